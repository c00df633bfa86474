"""Several processes that train as one, over loopback."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from problems import blobs, small_config
from processes import QUICK_TO_RUN, forced
from test_cli import isgd

from isgd_jax.app import checkpoints
from isgd_jax.app.config import Config, configure
from isgd_jax.app.multihost import LOST, _check_same, _identity, _of_all
from isgd_jax.app.run import _devices, _fingerprint, fit
from isgd_jax.app.run_dir import RunDir

SETTINGS: dict[str, Any] = {
    "hidden": (16,), "batch_size": 32, "refresh_every": 20, "chunk_size": 128, "log_every": 20, "checkpoint_every": 20,
    "learning_rate": 0.01,
}  # fmt: skip


MEMBER = """
import json, sys
import numpy as np
from jax.experimental import multihost_utils
from isgd_jax.app.config import Config, configure
from isgd_jax.app.multihost import joined
flags = json.loads(sys.argv[1])
fingerprint = flags.pop("fingerprint", "a")
try:
    with joined(configure(distributed=True, **flags), fingerprint):
        print("joined", flush=True)
        for line in iter(input, "done"):
            print(multihost_utils.process_allgather(np.int32(line)).tolist(), flush=True)
except (OSError, ValueError) as error:
    sys.exit(str(error))
"""
"""In place of a training process: makes a collective for each number it is given."""

ENDED = (LOST, -signal.SIGABRT)
"""How a process ends when another is lost: by our sentence, or by JAX, whichever of its threads notices first."""


class Member:
    """The test's hold on one such process."""

    def __init__(self, flags: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", MEMBER, json.dumps(flags)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": forced(1)},
        )  # fmt: skip

    def says(self) -> str:
        """The next line, but for what Gloo prints. The test's own time-out stands behind it."""
        assert self.process.stdout is not None
        return next((line.strip() for line in self.process.stdout if not line.startswith("[Gloo]")), "")

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def end(self) -> tuple[int, str]:
        """Its exit code and what it told the person, in time."""
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture
def start() -> Iterator[Callable[..., list[Member]]]:
    begun: list[Member] = []

    def start(*numbers: int, of: int = 2, **changed: Any) -> list[Member]:
        port = changed.pop("port", None) or free_port()
        flags = {"coordinator": f"127.0.0.1:{port}", "num_processes": of, "heartbeat_timeout": 5, **changed}
        begun.extend(new := [Member(flags | {"process_id": number}) for number in numbers])
        return new

    yield start
    for member in begun:
        member.process.kill()
        member.process.communicate(timeout=60)


def processes(
    cwd: Path, *arguments: str, count: int = 2, devices: int = 4, settings: dict[str, Any] = SETTINGS
) -> list[subprocess.Popen[str]]:
    """The same command on each of the hosts, but for its place."""
    address = f"127.0.0.1:{free_port()}"
    flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", _word(value))]
    places = ["--distributed", "--coordinator", address, "--num-processes", str(count)]
    environment = {
        "XLA_FLAGS": forced(devices), "NPROC": "16", "JAX_PLATFORMS": "cpu",
    }  # fmt: skip
    return [
        isgd(
            "train", *arguments, *flags, *places, "--process-id", str(i), cwd=cwd, first=QUICK_TO_RUN, **environment
        )
        for i in range(count)
    ]  # fmt: skip


def _word(value: Any) -> str:
    return str(value[0]) if isinstance(value, tuple) else str(value)


def progress(run: Path) -> list[dict[str, Any]]:
    return list(RunDir(run).records("progress")) if run.is_dir() else []


def wait_for(run: Path, step: int, running: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 240
    while not any(record["step"] >= step for record in progress(run)):
        assert all(process.poll() is None for process in running), [process.communicate() for process in running]
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_make_the_run_of_one_and_the_loss_of_one_ends_both(tmp_path: Path) -> None:
    """2 x 2 devices give the losses of one; one process is killed, the other ends in time; the checkpoint is whole."""
    settings = SETTINGS | dict.fromkeys(("refresh_every", "log_every", "checkpoint_every"), 10)
    fit(configure(**settings, data_dir=str(tmp_path / "data"), run_dir=str(tmp_path / "one"), steps=20))
    endless = ["--run-dir", "two", "--data-dir", "data", "--steps", "100000"]
    running = processes(tmp_path, *endless, devices=2, settings=settings)
    wait_for(tmp_path / "two", 20, running)
    began = time.monotonic()
    running[1].kill()
    outs = [process.communicate(timeout=200) for process in running]
    assert time.monotonic() - began < 60  # seconds of silence, after which a process counts as lost
    assert running[0].returncode in ENDED
    assert "another process was lost" in outs[0][1] or "another task died" in outs[0][1]
    saved = checkpoints.read(tmp_path / "two/checkpoints")
    assert saved is not None
    assert saved.step >= 10
    assert "The plan" in outs[0][0]
    assert "The plan" not in outs[1][0]
    expected, got = (progress(tmp_path / name) for name in ("one", "two"))
    assert [record["step"] for record in expected] == [0, 10, 20]
    for name in ("loss", "test_loss", "sd_stale"):
        pairs = [(theirs[name], ours[name]) for theirs, ours in zip(got, expected, strict=False) if ours[name]]
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-5)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_signal_at_one_stops_all_at_one_step_and_the_run_goes_on(tmp_path: Path) -> None:
    """SIGTERM, resume, and the death of process 0, with which jax's own coordinator dies."""
    running = processes(tmp_path, "--run-dir", "two", "--data-dir", "data", "--steps", "100000")
    wait_for(tmp_path / "two", 40, running)
    running[1].send_signal(signal.SIGTERM)
    outs = [process.communicate(timeout=200) for process in running]
    assert [process.returncode for process in running] == [128 + signal.SIGTERM] * 2, outs
    stopped = [record["step"] for record in RunDir(tmp_path / "two").records()][-1]
    first, second = running = processes(tmp_path, "--resume", "two", "--steps", "100000")
    wait_for(tmp_path / "two", stopped + 20, running)
    steps = [record["step"] for record in RunDir(tmp_path / "two").records()]
    assert steps == sorted(steps)
    first.kill()
    _, err = second.communicate(timeout=200)
    first.communicate()
    assert second.returncode in ENDED
    assert "another process was lost" in err or "another task died" in err
    saved = checkpoints.read(tmp_path / "two/checkpoints")
    assert saved is not None
    assert saved.step >= stopped


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 8 devices that train"):
        _devices(configure(distributed=True, batch_size=12))


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["uniform", "exact", "relaxed"])
def test_parts_of_one_process_make_the_same_run(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the network: a batch cut over 8 devices gives the losses of a batch on one, in every mode."""
    changes: dict[str, Any] = {"mode": mode, "batch_size": 16, "steps": 10, "log_every": 10}
    fit(small_config(tmp_path / "whole", **changes), dataset=blobs())
    monkeypatch.setattr("isgd_jax.app.run._devices", lambda config: jax.devices())
    fit(small_config(tmp_path / "parts", **changes), dataset=blobs())
    expected, got = progress(tmp_path / "whole")[-1], progress(tmp_path / "parts")[-1]
    for name in ("loss", "test_loss", "sd_stale", "max_weight"):
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5)


@pytest.mark.slow
def test_parameters_in_parts_are_measured_scored_saved_and_taken_up_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one process with 8 devices: the numbers of one device, and no parameter that can be cut is whole on any."""
    changes: dict[str, Any] = {"batch_size": 16, "steps": 10, "log_every": 10, "mode": "exact", "hidden": (16,)}
    fit(small_config(tmp_path / "whole", **changes), dataset=blobs())
    monkeypatch.setattr("isgd_jax.app.run.multihost.joined", lambda config, fingerprint: nullcontext())
    changes |= {"distributed": True, "shard_params": True}

    def measure(state: Any) -> dict[str, float]:
        kernel = max(jax.tree.leaves((state.params, state.opt_state)), key=lambda x: x.size)
        return {"largest": max(part.data.size for part in kernel.addressable_shards) / kernel.size}

    first = small_config(tmp_path / "parts", **changes | {"steps": 5})
    fit(first, dataset=blobs(), measure=measure)
    resumed = fit(first.replace(steps=10), dataset=blobs(), measure=measure, resume=True)
    assert resumed.step == 10
    assert not any(x.is_fully_replicated for x in jax.tree.leaves(resumed.params) if x.shape[0] % 8 == 0)
    expected, got = progress(tmp_path / "whole")[-1], progress(tmp_path / "parts")[-1]
    assert got["largest"] == 1 / 8
    for name in ("test_loss", "sd_stale", "test_error"):
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_model_in_parts_on_two_processes_makes_the_run_of_one(tmp_path: Path) -> None:
    """2 x 2 devices, each with a quarter of every parameter; the checkpoint is taken up by one process, unsplit."""
    fit(configure(**SETTINGS, data_dir=str(tmp_path / "data"), run_dir=str(tmp_path / "one"), steps=60))
    running = processes(
        tmp_path, "--run-dir", "two", "--data-dir", "data", "--steps", "40", "--shard-params", devices=2
    )
    outs = [process.communicate(timeout=400) for process in running]
    assert [process.returncode for process in running] == [0, 0], outs
    resumed = RunDir(tmp_path / "two").read_config()
    fit(resumed.replace(steps=60, run_dir=str(tmp_path / "two"), data_dir=str(tmp_path / "data")), resume=True)
    expected, got = (progress(tmp_path / name) for name in ("one", "two"))
    assert [record["step"] for record in got] == [0, 20, 40, 60]
    for name in ("loss", "test_loss", "sd_stale"):
        pairs = [(theirs[name], ours[name]) for theirs, ours in zip(got, expected, strict=True) if ours[name]]
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("there", [0, 1])
def test_a_process_that_never_comes_is_named(start: Callable[..., list[Member]], there: int) -> None:
    (member,) = start(there, initialization_timeout=2)
    code, told = member.end()
    assert code == LOST
    assert f"process {1 - there} of 2 did not come to 127.0.0.1:" in told
    assert "within 2 s: start the same command on every host" in told
    assert len(told.strip().splitlines()) == 1


@pytest.mark.slow
def test_another_command_is_refused_by_name_on_every_host(start: Callable[..., list[Member]]) -> None:
    port = free_port()
    members = start(0, 1, of=3, port=port) + start(2, of=3, port=port, seed=1)
    expected = "the processes differ in seed=: 0 in process 0, but 1 in process 2; start the same command on every host"
    assert [member.says() for member in members] == [""] * 3  # none joins
    for member in members:
        code, told = member.end()
        assert code == 1
        assert told.splitlines()[-1] == expected


@pytest.mark.slow
def test_other_data_and_another_number_of_processes_are_refused(start: Callable[..., list[Member]]) -> None:
    port, other = free_port(), free_port()
    data = start(0, port=port) + start(1, port=port, fingerprint="b")
    assert all("the fingerprint of the data set: 'a' in process 0, but 'b' in process 1" in x.end()[1] for x in data)
    numbers = start(0, of=2, port=other) + start(1, of=3, port=other)
    assert all("differ in num_processes=: 2 in process 0, but 3 in process 1" in x.end()[1] for x in numbers)


@pytest.mark.slow
def test_other_numbers_in_a_file_of_the_same_name_are_refused(
    start: Callable[..., list[Member]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process would draw by its own weights of examples, and all would learn from a mixture."""
    port, members = free_port(), list[Member]()
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        np.save("weights.npy", np.full(4, 1.0 + number))
        members += start(number, port=port, example_weights="weights.npy")
    for member in members:
        code, told = member.end()
        assert code == 1
        assert "the processes differ in file of example_weights: " in told


def test_held_out_examples_and_files_of_numbers_are_part_of_what_must_be_the_same(tmp_path: Path) -> None:
    dataset, alone, many = blobs(), configure(), configure(distributed=True)
    other = dataclasses.replace(dataset, test={name: array[1:] for name, array in dataset.test.items()})
    assert _fingerprint(alone, dataset) == _fingerprint(alone, other) == dataset.fingerprint
    assert _fingerprint(many, dataset) != _fingerprint(many, other)
    weighted = configure(distributed=True, example_weights=str(tmp_path / "weights.npy"))
    missing = _identity(weighted, "a")
    np.save(tmp_path / "weights.npy", np.ones(4))
    one = _identity(weighted, "a")
    np.save(tmp_path / "weights.npy", np.zeros(4))
    for others in (missing, _identity(weighted, "a")):
        with pytest.raises(ValueError, match="the processes differ in file of example_weights: "):
            _check_same([one, others])


def test_what_differs_is_named_with_its_processes() -> None:
    same = {"--seed": 0, "the version of jax": "1"}
    _check_same([same] * 3)
    with pytest.raises(
        ValueError, match="the version of jax: '1' in process 0, but '2' in process 1, '2' in process 3;"
    ):
        _check_same([same, same | {"the version of jax": "2"}, same, same | {"the version of jax": "2"}])
    with pytest.raises(ValueError, match="--power: 'nothing' in process 0, but 1 in process 1"):
        _check_same([same, same | {"--power": 1}])
    assert _of_all(same) == [same]


SAVER = """
import sys
from pathlib import Path
import jax.numpy as jnp
import numpy as np
from isgd_jax.app import shared_checkpoints
from isgd_jax.app.config import configure
from isgd_jax.app.multihost import joined
place = {"coordinator": f"127.0.0.1:{sys.argv[1]}", "num_processes": 2, "process_id": int(sys.argv[2])}
with joined(configure(distributed=True, **place), "a"):
    numbers = np.array([-0.0, 1e-40, np.nan, -1.5], np.float32)
    tree = [numbers, jnp.array([-0.0, 1.0], "bfloat16"), np.array([True, False]), np.uint32(2**32 - 1)]
    saved = shared_checkpoints.of_run(Path(sys.argv[3]), identity={})
    saved.save(1, tree, {})
    saved.wait()
    found, _, _ = saved.restore(tree)
    saved.close()
    print([np.asarray(x).tobytes().hex() for x in found] == [np.asarray(x).tobytes().hex() for x in tree])
"""
"""Saves numbers that a sum would change, and takes them up again."""


@pytest.mark.slow
def test_what_is_taken_up_by_several_processes_has_the_bits_that_were_saved(tmp_path: Path) -> None:
    """The sign of zeros, and numbers below 1e-38, among them."""
    port, environment = str(free_port()), os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": forced(1)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SAVER, port, str(i), str(tmp_path / "checkpoints")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for i in range(2)
    ]  # fmt: skip
    outs = [process.communicate(timeout=120) for process in running]
    assert [out.splitlines()[-1:] for out, _ in outs] == [["True"]] * 2, outs


@pytest.mark.slow
def test_strangers_at_the_port_change_nothing(start: Callable[..., list[Member]]) -> None:
    """A request, random bytes, a connection closed at once, one that stays open: before the others come, and after."""
    port = free_port()
    with ExitStack() as strangers:
        members = start(0, port=port)
        visit(port, strangers)
        members += start(1, port=port)
        assert [member.says() for member in members] == ["joined"] * 2
        for i in range(3):
            for member in members:
                member.tell(str(i))
            assert [member.says() for member in members] == [str([i, i])] * 2
            visit(port, strangers)
        for member in members:
            member.tell("done")
        assert [member.end() for member in members] == [(0, "")] * 2


def visit(port: int, left_open: ExitStack) -> None:
    """What a health check, a port scan or a browser in the same network does."""
    deadline = time.monotonic() + 60
    while True:
        try:
            opened = [
                left_open.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5)) for _ in range(5)
            ]
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    opened[0].sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
    opened[1].sendall(np.random.default_rng(0).bytes(4096))
    opened[2].sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(range(200)))
    opened[3].close()


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_when_one_is_killed_the_other_ends_in_time(start: Callable[..., list[Member]], lost: int) -> None:
    members = start(0, 1)
    assert [member.says() for member in members] == ["joined"] * 2
    members[lost].process.kill()
    began = time.monotonic()
    well = members[1 - lost]
    if well.process.poll() is None:
        with suppress(BrokenPipeError):
            well.tell("0")
    code, told = well.end()
    assert time.monotonic() - began < 30
    assert code in ENDED
    assert "another process was lost" in told or "another task died" in told


@pytest.mark.soak
def test_silence_is_a_loss(start: Callable[..., list[Member]]) -> None:
    """A stopped process closes no connection: JAX counts its heartbeats."""
    members = start(0, 1, heartbeat_timeout=10)
    assert [member.says() for member in members] == ["joined"] * 2
    members[1].process.send_signal(signal.SIGSTOP)
    try:
        members[0].tell("0")
        code, told = members[0].end()
    finally:
        members[1].process.send_signal(signal.SIGCONT)
    assert code in ENDED
    assert "stopped sending heartbeats" in told


@pytest.mark.slow
def test_where_no_cluster_is_found_the_flags_are_asked_for(start: Callable[..., list[Member]]) -> None:
    (member,) = start(0, num_processes=None)
    code, told = member.end()
    assert code == 1
    assert "distributed=True needs coordinator=, num_processes= and process_id=" in told


def test_a_mistaken_place_is_found_before_anything_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="process_id must be below num_processes=2; got 2"):
        configure(distributed=True, coordinator="127.0.0.1:1", num_processes=2, process_id=2)
    with pytest.raises(ValueError, match="coordinator must be host:port of process 0; got 'here'"):
        configure(distributed=True, coordinator="here", num_processes=2, process_id=0)


@pytest.mark.parametrize("host", ["127.0.0.1", "10.0.0.2"])
def test_a_taken_port_is_said(tmp_path: Path, host: str) -> None:
    """JAX would die of it by a signal. At 10.0.0.2 all interfaces are listened at, so any of them counts."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place: dict[str, Any] = {"coordinator": f"{host}:{taken.getsockname()[1]}", "num_processes": 2, "process_id": 0}
        with pytest.raises(ValueError, match=r"process 0 cannot have port .*: name another"):
            fit(small_config(tmp_path / "run", distributed=True, **place), dataset=blobs())
    assert not (tmp_path / "run").exists()


def test_flags_of_a_place_need_the_flag_that_asks_for_it() -> None:
    with pytest.raises(ValueError, match="process_id must be left out unless distributed=True"):
        configure(process_id=1)
    with pytest.raises(ValueError, match="heartbeat_timeout must be at least 1; got 0"):
        configure(heartbeat_timeout=0)


def test_what_is_saved_names_no_place() -> None:
    config = configure(distributed=True, coordinator="host:1", num_processes=2, process_id=1)
    assert config.as_saved() == Config()
    assert json.dumps(config.as_saved().to_dict())
