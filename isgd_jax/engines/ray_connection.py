"""Joins a Ray that runs, or starts one of this host alone, which listens on loopback and asks for a token."""

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray import _raylet
from ray._private import ray_constants, services, worker

__all__ = ["KNOCK", "QUIET", "connect"]

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Ray would print notices."""

KNOCK = 10.0
"""Seconds within which a Ray that is to be joined must answer."""


def connect(address: str | None, num_workers: int) -> bool:
    """Join the Ray at the address, or start one of this host; whether it was started, and so is to be stopped.

    A Ray that this process is connected to already is used as it is, whatever the address. One that is started listens
    on the loopback interface and asks for a token that is made for it, and gets as many CPUs as there are workers, at
    least.

    Args:
        address: of a running cluster, "auto", or None to start one.
        num_workers: for which there must be a place.

    Raises:
        ConnectionError: there is no Ray at the address.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    vars(worker)["print_to_stdstream"] = _log  # there is no switch for what it says of workers that died
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # from jax: what is forked is replaced at once
            return _connect(address, num_workers)
    except SystemExit:  # Ray's own handlers of SIGTERM, which are in force while it starts, leave with 1 or 15
        ray.shutdown()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminated)
            signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminated)  # Ray's own handler prints a stack trace


def _connect(address: str | None, num_workers: int) -> bool:
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if ray.is_initialized():
        return False
    try:
        if address is not None:
            _unlock()
            _knock(address)
            with _patched("NUM_REDIS_GET_RETRIES", 1):
                ray.init(address=address, **quiet)
            return False
    except (ConnectionError, ValueError) as error:
        raise ConnectionError(
            f"there is no Ray at address={address!r} ({_last_line(error)}): start one with `ray start --head` and join "
            "the other hosts with `ray start --address=HOST:6379`, or leave out address= to start one of this host"
        ) from error
    _lock()
    # Workers share the cores that training leaves: each has its place, however few there are.
    cores = max(num_workers, os.cpu_count() or 1)
    # It listens on 127.0.0.1 alone, as it does by itself on macOS and Windows. ``_node_ip_address="127.0.0.1"`` does
    # not do it: Ray replaces that by an address that others can reach.
    with _patched("ENABLE_RAY_CLUSTER", False):
        ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
    return True


def _knock(address: str) -> None:
    """Raise ConnectionError unless something answers there: Ray itself would try for a quarter of an hour."""
    told = os.environ.get(ray_constants.RAY_ADDRESS_ENVIRONMENT_VARIABLE) if address == "auto" else None
    if "://" in (told or address):  # for Ray's client, which has its own limit
        return
    there = services.canonicalize_bootstrap_address(address)
    if there is None:  # of "local", which Ray takes for one that is to be started, open to everybody
        raise ConnectionError("that is the address of none that runs")
    host, _, port = there.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK).close()
    except OSError as error:
        raise ConnectionError(f"nothing answers at {host}:{port}: {error.strerror or error}") from error


@contextlib.contextmanager
def _patched(name: str, value: object) -> Iterator[None]:
    """A constant of Ray's, another one meanwhile: those that it reads from the environment, it has read on import."""
    before = getattr(ray_constants, name)
    vars(ray_constants)[name] = value
    try:
        yield
    finally:
        vars(ray_constants)[name] = before


_own_token: list[str] = []


def _lock() -> None:
    """Make the Ray that is started next ask for a token: without one, whoever reaches a port of it can run code here.

    The token is made anew for each process and goes to Ray's processes in their environment alone: it is on no command
    line, in no file and no log. A ``RAY_AUTH_MODE`` or token that the user has set is left as it is.
    """
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        _own_token.append(secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN"] = _own_token[-1]
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    _read_authentication_anew()


def _unlock() -> None:
    """Forget a token of our own: a cluster that is joined has another one, or none."""
    if _own_token and os.environ.get("RAY_AUTH_TOKEN") == _own_token[-1]:
        del os.environ["RAY_AUTH_TOKEN"]
        os.environ.pop("RAY_AUTH_MODE", None)
        _own_token.clear()
        _read_authentication_anew()


def _read_authentication_anew() -> None:
    """Ray reads the environment once, when it is imported."""
    raylet: Any = _raylet  # compiled: it has no types
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def _log(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    """What Ray would print between our lines; our notices say the same in a sentence."""
    logging.getLogger(__name__).debug("\n".join(data["lines"]))


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
