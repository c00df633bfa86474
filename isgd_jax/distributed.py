"""Several processes that train as one: how they find each other, and how each learns that another is lost.

Every host runs the same command. A watch beside each process (`isgd_jax.rollcall`) calls the roll first; only when all
are there is `jax.distributed` set up, whose own time-outs end in a stack trace.
"""

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import jax

from isgd_jax.config import PER_HOST, Config
from isgd_jax.rollcall import Message, Roll

PORTS_APART = 1
"""The roll is called on the port after that of `jax.distributed`."""

LOST = 75
"""Exit code of a process that ends because another was lost: what `sysexits.h` calls a temporary failure."""


@contextmanager
def joined(config: Config, fingerprint: str) -> Iterator[None]:
    """Inside, this process is one of those of a `--distributed` run; without that flag, nothing happens.

    Raises:
        TimeoutError: not all processes came in time; the message names the missing ones.
        ValueError: a process is started with other settings or packages, or its place cannot be found out.
    """
    if not config.distributed:
        yield
        return
    watch = _Watched(_roll(config, fingerprint))
    try:
        _set_up(config, watch.roll)
        yield
    except BaseException as error:
        watch.leave(f"{type(error).__name__}: {error}")
        atexit.register(_end_at_once)  # runs before jax's own, which would wait for the others
        raise
    watch.leave(None)


class _Watched:
    """This side of the pipes to the watch."""

    def __init__(self, roll: Roll) -> None:
        self.roll = roll
        self._left = threading.Event()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "isgd_jax.rollcall", roll.to_json()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, env=_path(),
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to: IO[str] = self._process.stdin
        self._hear(self._process.stdout)
        threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def leave(self, error: str | None) -> None:
        """Say goodbye, and why."""
        self._left.set()
        self._say({"bye": error})
        try:
            self._process.wait(timeout=self.roll.timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _hear(self, pipe: IO[str]) -> None:
        """Wait until all are there."""
        line = pipe.readline()
        message: Message = (
            json.loads(line) if line else {"failed": "the watch beside this process could not be started"}
        )
        if "complete" in message:
            return
        self._left.set()
        raise (ValueError if "refused" in message else TimeoutError)(message.get("failed") or message["lost"])

    def _listen(self, pipe: IO[str]) -> None:
        """The watch has told the person already; nothing can be saved, as collectives would wait for the lost one."""
        for line in pipe:
            if "lost" in json.loads(line) and not self._left.is_set():
                os._exit(LOST)

    def _beat(self) -> None:
        while not self._left.wait(self.roll.interval):
            self._say({"beat": True})

    def _say(self, message: Message) -> None:
        try:
            self._to.write(json.dumps(message) + "\n")
            self._to.flush()
        except OSError:
            pass  # the watch is gone: it has said why


def _roll(config: Config, fingerprint: str) -> Roll:
    address, num_processes, process_id = _place(config)
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--coordinator must be host:port of process 0; got {address!r}")
    identity = {
        f"--{name.replace('_', '-')}": value for name, value in config.to_dict().items() if name not in PER_HOST
    }
    identity |= {"the version of jax": jax.__version__, "the fingerprint of the data set": fingerprint}
    waiting, silence = config.initialization_timeout, config.heartbeat_timeout
    return Roll(host, int(port) + PORTS_APART, process_id, num_processes, identity, waiting, silence)


def _place(config: Config) -> tuple[str, int, int]:
    """Coordinator, number of processes and the id of this one: from the flags, else from the cluster."""
    given: Any = (config.coordinator, config.num_processes, config.process_id)
    if None in given:
        address, count, number = given
        given = _detected(address, count, number, config.initialization_timeout)
    flags = ("--coordinator", "--num-processes", "--process-id")
    unknown = [flag for flag, value in zip(flags, given, strict=True) if value is None]
    if unknown:
        raise ValueError(
            f"--distributed needs {', '.join(unknown)}: nothing here (no Cloud TPU, Slurm, Open MPI or Kubernetes) "
            "tells the place of this process among the others"
        )
    address, count, number = given
    if not 0 <= number < count:
        raise ValueError(f"--process-id must be between 0 and {count - 1}, as --num-processes is {count}; got {number}")
    return address, count, number


def _detected(address: Any, count: Any, number: Any, patience: int) -> Any:
    """What jax knows of the clusters it may be run on; the one private name of jax here."""
    from jax._src.clusters import ClusterEnv

    found = ClusterEnv.auto_detect_unset_distributed_params(address, count, number, [], None, patience)
    return found[:3]


def _set_up(config: Config, roll: Roll) -> None:
    """All are there: this is quick. Its own time-outs stand behind ours."""
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM away, which saves and stops a run
    jax.distributed.initialize(
        coordinator_address=f"{roll.host}:{roll.port - PORTS_APART}",
        num_processes=roll.num_processes,
        process_id=roll.process_id,
        initialization_timeout=config.initialization_timeout,
        heartbeat_timeout_seconds=3 * config.heartbeat_timeout,
        shutdown_timeout_seconds=config.heartbeat_timeout,
    )


def _path() -> dict[str, str]:
    """The environment of the watch: it finds this package wherever this process found it."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _end_at_once() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
