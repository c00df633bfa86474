"""Several processes that train as one, by `jax.distributed` alone: how they meet, and what is said when they cannot.

Nothing of this package listens; JAX's coordinator does, in process 0. What JAX says when a process is lost, and which
ports need a trusted network, is in ``docs/tpu.md``.
"""

import atexit
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from isgd_jax.app.config import PER_HOST, Config, HostsConfig
from isgd_jax.app.resuming import files_of_numbers
from isgd_jax.errors import ArgumentError

__all__ = ["LOST", "joined"]

LOST = 75
"""Exit code where others did not come or were lost: what `sysexits.h` calls a temporary failure."""

_LOOPBACK = {"localhost", "127.0.0.1"}
_BEHIND = 60  # seconds by which JAX's own time-out, which aborts with a stack trace, stands behind ours
_GRACE = 2  # seconds that process 0 stays on after an error: without its coordinator JAX aborts the others mid-sentence
_LOSS = re.compile("Gloo|NCCL|heartbeat|coordination service|UNAVAILABLE|DEADLINE_EXCEEDED")


@contextmanager
def joined(config: Config, fingerprint: str) -> Iterator[None]:
    """Inside, this process is one of those of a run with ``distributed``; without, nothing happens.

    After an error the interpreter does not wait for the others when it exits: they may hang. The exit code is then 75
    where others did not come or were lost, so that a scheduler may try again, and else 1.

    Args:
        config: where the others are, and how long to wait for them; all else in it must be the same in each process,
            but for folders, and so must the files of numbers that it names.
        fingerprint: of the data set, held-out examples included, which must be the same too.

    Raises:
        TimeoutError: not all processes came in time.
        ValueError: the processes differ, or the place of this one among them is mistaken.
        ConnectionError: another process was lost. Where JAX notices first it aborts this one, with a stack trace.
    """
    if not config.hosts.distributed:
        yield
        return
    grace = 0
    if not jax.distributed.is_initialized():
        _check_port(config.hosts)
    try:
        if not jax.distributed.is_initialized():
            _initialize(config.hosts)
        devices = np.bincount([device.process_index for device in jax.devices()]).tolist()
        grace = 0 if jax.process_index() else _GRACE
        _check_same([{"the number of devices": count} for count in devices])
        _check_same(_of_all(_identity(config, fingerprint)))
        yield
    except BaseException as error:
        is_loss = isinstance(error, (ValueError, RuntimeError)) and _LOSS.search(str(error))
        code = LOST if is_loss or isinstance(error, TimeoutError) else 1
        atexit.register(_end, grace, code)  # runs before JAX's own, which waits for the others
        if not is_loss:
            raise
        reason = str(error).strip().splitlines()[0]
        advice = "see what it said last, and go on with resume=True on every host"
        raise ConnectionError(f"another process was lost ({reason}): {advice}") from error


def _check_port(hosts: HostsConfig) -> None:
    """JAX dies by a signal, without a word, when its port is taken; so it is tried before, without listening."""
    if hosts.process_id == 0 and hosts.coordinator is not None:
        host, _, port = hosts.coordinator.rpartition(":")
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("127.0.0.1" if host in _LOOPBACK else "", int(port)))
            except (OSError, OverflowError) as error:
                raise ArgumentError(f"process 0 cannot have port {port} ({error}): name another") from error


def _initialize(hosts: HostsConfig) -> None:
    """Meet the others, on a thread: JAX's call cannot be interrupted, and ends the process when its time is over."""
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM away, which saves and stops a run
    address, count, number = place = hosts.coordinator, hosts.num_processes, hosts.process_id
    is_local = address is not None and address.rpartition(":")[0] in _LOOPBACK
    limit, failed = hosts.initialization_timeout, list[Exception]()

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                *place,
                coordinator_bind_address=address if is_local else None,
                initialization_timeout=limit + _BEHIND,
                heartbeat_timeout_seconds=hosts.heartbeat_timeout,
                shutdown_timeout_seconds=limit,  # process 0 draws figures while the others wait
            )
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=initialize, daemon=True)
    thread.start()
    logging.getLogger(__name__).info("Waiting for all processes, at most %d s (initialization_timeout)", limit)
    thread.join(limit)
    if thread.is_alive():
        who = f"not all {count or 'of the'} processes came"
        if count == 2 and number is not None:
            who = f"process {1 - number} of 2 did not come"
        raise TimeoutError(
            f"{who} to {address or 'the coordinator'} within {limit} s: start the same command on every host (only "
            "process_id differs), see that the port is open between them, or raise initialization_timeout"
        )
    if failed and None in place:
        needs = "where no cluster is found distributed=True needs coordinator=, num_processes= and process_id="
        raise ArgumentError(f"{needs} ({failed[0]})") from failed[0]
    if failed:
        raise failed[0]


def _identity(config: Config, fingerprint: str) -> dict[str, Any]:
    """What must be the same everywhere."""
    flags = {f"{name}=": value for name, value in config.flat().items() if name not in PER_HOST}
    flags["num_processes="] = config.hosts.num_processes or jax.process_count()  # JAX goes by what process 0 was told
    flags |= {"the version of jax": jax.__version__, "the fingerprint of the data set": fingerprint}
    return flags | _files(config)


def _files(config: Config) -> dict[str, str]:
    """The checksums of the files of numbers that are named: each process reads its own."""
    try:
        return files_of_numbers(config)
    except OSError as error:  # where it is missing everywhere it is told when it is read
        return {"files of numbers": str(error)}


def _of_all(identity: dict[str, Any]) -> list[dict[str, Any]]:
    """The identities of all processes, in their order: JSON, gathered as rows of bytes."""
    text = np.frombuffer(json.dumps(identity).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    rows = multihost_utils.process_allgather(np.pad(text, (0, sizes.max() - text.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def _check_same(identities: list[dict[str, Any]]) -> None:
    """Name the first field that differs, and where: the same sentence in every process."""
    for name in sorted(set().union(*identities)):
        first, *others = (identity.get(name, "nothing") for identity in identities)
        got = [f"{other!r} in process {i}" for i, other in enumerate(others, start=1) if other != first]
        if got:
            what = f"the processes differ in {name}: {first!r} in process 0, but {', '.join(got)}"
            raise ArgumentError(f"{what}; start the same command on every host")


def _end(grace: float, code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(grace)
    os._exit(code)
