"""TensorBoard events, read back record by record as the format has them."""

import importlib.util
import os
import struct
from pathlib import Path

import pytest

from isgd_jax.app import tensorboard


def events(folder: Path) -> list[tuple[int, str, float]]:
    """Step, tag and value of each scalar: length, its checksum, the message, its checksum."""
    from tensorboardX.proto import event_pb2

    found = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            message = event_pb2.Event.FromString(content[12 : 12 + length])
            found += [(message.step, value.tag, value.simple_value) for value in message.summary.value]
            if message.session_log.status:
                found.append((message.step, "session", float(message.session_log.status)))
            content = content[16 + length :]
    return found


def test_every_number_of_a_line_of_progress_is_written(tmp_path: Path) -> None:
    seen: list[str] = []
    observe = tensorboard.with_events(tmp_path, lambda record: seen.append(record["event"]))
    observe({"event": "plan", "run_dir": "x"})
    observe({"event": "progress", "step": 10, "loss": 0.5, "test_loss": None, "note": "text"})
    observe({"event": "progress", "step": 20, "loss": 0.25})
    observe({"event": "finished", "step": 20})
    assert seen == ["plan", "progress", "progress", "finished"]
    assert events(tmp_path) == [(10, "progress/loss", 0.5), (20, "progress/loss", 0.25)]


def test_a_resumed_run_takes_the_place_of_what_it_does_again(tmp_path: Path) -> None:
    again = tensorboard.Events(tmp_path)
    again({"event": "resumed", "step": 20})
    again({"event": "progress", "step": 30, "loss": 0.75})
    again({"event": "finished", "step": 30})
    started, written = events(tmp_path)
    assert started == (21, "session", 1.0)  # SessionLog.START: TensorBoard forgets what came from step 21 on
    assert written == (30, "progress/loss", 0.75)


def test_a_full_disk_is_one_sentence_at_once(tmp_path: Path) -> None:
    observe = tensorboard.Events(tmp_path)
    observe({"event": "progress", "step": 10, "loss": 0.5})
    (written,) = tmp_path.iterdir()
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), observe._writer._py_recordio_writer._writer.fileno())
    with pytest.raises(
        OSError, match=r"cannot write .*events.out.tfevents \(No space left on device\): make room there"
    ):
        observe({"event": "progress", "step": 20} | {f"field-{i}": 0.5 for i in range(100)})  # no queue holds so many
    os.truncate(written, 0)
    with open(written, "wb") as room:
        os.dup2(room.fileno(), observe._writer._py_recordio_writer._writer.fileno())
    observe({"event": "finished", "step": 20})


def test_without_tensorboardx_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'isgd_jax\[tensorboard\]'"):
        tensorboard.require_tensorboard()


def test_numbers_go_to_any_tracker() -> None:
    seen: list[tuple[dict[str, float], int]] = []
    observe = tensorboard.log_to(lambda values, *, step: seen.append((values, step)))
    observe({"event": "progress", "step": 7, "loss": 0.5, "test_loss": None, "scores_per_second_by_worker": {}})
    observe({"event": "warning", "step": 8, "text": "x"})
    assert seen == [({"loss": 0.5}, 7)]
