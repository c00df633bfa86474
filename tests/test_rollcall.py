"""The watch beside each process of a distributed run, without jax: the tests are the training processes."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isgd_jax.rollcall import Roll

SILENCE = 2.0


class Trainer:
    """What a training process does with its watch."""

    def __init__(self, roll: Roll) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "isgd_jax.rollcall", roll.to_json()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {}

    def say(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def beat(self) -> None:
        """Signs of life, until it dies."""
        while self.process.stdin is not None:
            self.say({"beat": True})
            time.sleep(0.1)

    def die(self) -> None:
        """The ends of its pipes close, as they do when a process is killed."""
        assert self.process.stdin is not None
        pipe, self.process.stdin = self.process.stdin, None
        pipe.close()

    def told(self) -> str:
        """All that the person was told, when the watch is over."""
        _, errors = self.process.communicate(timeout=60)
        return errors


@pytest.fixture
def start() -> Iterator[Callable[..., list[Trainer]]]:
    begun: list[Trainer] = []

    def start(
        *numbers: int, of: int = 2, patience: float = 60.0, timeout: float = 60.0, **changed: Any
    ) -> list[Trainer]:
        with socket.create_server(("", 0)) as free:
            port = changed.pop("port", free.getsockname()[1])
        identity = {"--seed": 0} | changed
        rolls = [Roll("127.0.0.1", port, number, of, identity, patience, timeout) for number in numbers]
        begun.extend(new := [Trainer(roll) for roll in rolls])
        return new

    yield start
    for trainer in begun:
        trainer.process.kill()
        trainer.process.communicate()


def test_all_hear_when_all_are_there_and_leave_in_any_order(start: Callable[..., list[Trainer]]) -> None:
    trainers = start(0, 1, 2, of=3)
    assert [trainer.hear() for trainer in trainers] == [{"complete": True}] * 3
    for trainer in trainers:
        trainer.say({"bye": None})
    assert [trainer.told() for trainer in trainers] == [""] * 3


@pytest.mark.slow
def test_missing_processes_are_named_on_every_host(start: Callable[..., list[Trainer]]) -> None:
    first, other = start(0, 2, of=4, patience=4.0)
    assert first.hear()["failed"].startswith(
        "processes 1, 3 of 4 did not come within 4 s: start the same command there"
    )
    assert "failed" in other.hear() or "lost" in other.hear()
    assert "waiting for processes 1, 3 of 4, at most 4 s (--initialization-timeout)" in first.told()


def test_without_process_0_the_others_say_where_they_looked(start: Callable[..., list[Trainer]]) -> None:
    (other,) = start(1, patience=1.0)
    assert other.hear()["failed"].startswith("process 0 at 127.0.0.1:")


def test_another_command_is_refused_by_name(start: Callable[..., list[Trainer]]) -> None:
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    (first,) = start(0, port=port)
    (other,) = start(1, port=port, **{"--seed": 1})
    heard = other.hear()
    assert "process 1 differs from process 0 in --seed: expected 0, got 1" in heard["failed"]
    assert heard["refused"]
    (right,) = start(1, port=port)
    assert first.hear() == right.hear() == {"complete": True}


@pytest.mark.parametrize("lost", [0, 1])
def test_when_one_dies_the_others_are_told(start: Callable[..., list[Trainer]], lost: int) -> None:
    trainers = start(0, 1, 2, of=3)
    assert all(trainer.hear() == {"complete": True} for trainer in trainers)
    trainers[lost].die()
    for number, trainer in enumerate(trainers):
        if number != lost:
            assert trainer.hear() == {"lost": f"process {lost} of 3 ended: its training process died"}
            trainer.die()
    assert all("this process ends too: resume from the last checkpoint" in trainer.told() for trainer in trainers)


@pytest.mark.parametrize("lost", [0, 1])
def test_when_a_whole_host_dies_the_others_are_told(start: Callable[..., list[Trainer]], lost: int) -> None:
    trainers = start(0, 1)
    assert all(trainer.hear() == {"complete": True} for trainer in trainers)
    trainers[lost].process.kill()
    assert trainers[1 - lost].hear() == {"lost": f"process {lost} of 2 ended without a word"}
    trainers[1 - lost].die()


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_silence_is_a_loss(start: Callable[..., list[Trainer]], lost: int) -> None:
    """One training process hangs: its watch is well, but passes on no signs of life."""
    trainers = start(0, 1, timeout=SILENCE)
    assert all(trainer.hear() == {"complete": True} for trainer in trainers)
    well = trainers[1 - lost]
    threading.Thread(target=well.beat, daemon=True).start()
    assert well.hear() == {"lost": f"process {lost} of 2 gave no sign of life for 2 s (--heartbeat-timeout)"}
    for trainer in trainers:
        trainer.die()


@pytest.mark.slow
def test_a_training_process_that_hangs_to_the_end_is_ended(tmp_path: Path) -> None:
    """It holds Python's lock in a collective, say, and does not hear that another is lost: its watch ends it."""
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    rolls = [Roll("127.0.0.1", port, number, 2, {}, 60.0, 60.0) for number in (0, 1)]
    hanging = (
        "import subprocess, sys, time\n"
        "watch = subprocess.Popen([sys.executable, '-m', 'isgd_jax.rollcall', sys.argv[1]], stdin=-1, stdout=-1)\n"
        "watch.stdout.readline()\nprint('there', flush=True)\ntime.sleep(100)"
    )
    first = subprocess.Popen([sys.executable, "-c", hanging, rolls[0].to_json()], stdout=subprocess.PIPE)
    other = Trainer(rolls[1])
    assert first.stdout is not None
    assert first.stdout.readline() == b"there\n"
    other.hear()
    other.die()
    first.communicate(timeout=60)
    assert first.returncode == -signal.SIGKILL
    other.told()


@pytest.mark.slow
def test_a_watch_that_hangs_is_a_loss(start: Callable[..., list[Trainer]]) -> None:
    trainers = start(0, 1, timeout=SILENCE)
    assert all(trainer.hear() == {"complete": True} for trainer in trainers)
    trainers[0].process.send_signal(signal.SIGSTOP)
    try:
        assert "process 0 of 2 gave no sign of life" in trainers[1].hear()["lost"]
        trainers[1].die()
    finally:
        trainers[0].process.send_signal(signal.SIGCONT)


def test_what_ended_one_is_told_to_all(start: Callable[..., list[Trainer]]) -> None:
    trainers = start(0, 1)
    assert all(trainer.hear() == {"complete": True} for trainer in trainers)
    trainers[1].say({"bye": "FloatingPointError: the training loss became nan"})
    assert trainers[0].hear() == {"lost": "process 1 of 2 ended: FloatingPointError: the training loss became nan"}
    trainers[0].die()


def test_a_taken_port_is_said(start: Callable[..., list[Trainer]]) -> None:
    with socket.create_server(("", 0)) as taken:
        (first,) = start(0, port=taken.getsockname()[1])
        assert "choose another --coordinator" in first.hear()["failed"]
