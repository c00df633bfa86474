"""Programs that JAX compiles, made and found sooner: for the tests, and for processes that they start to run code."""

import functools
import os
import threading
import zlib
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

from jax._src import compilation_cache
from jax._src.interpreters import mlir
from jax._src.lru_cache import LRUCache


def put_whole(cache: LRUCache, key: str, value: bytes) -> None:
    """JAX writes an entry where others may read the half of it: here it appears when it is whole."""
    whole = cache.path / f"{key}-{os.getpid()}"
    whole.write_bytes(value)
    whole.replace(cache.path / f"{key}-cache")


KEPT = 100
loaded: OrderedDict[str, tuple[Any, Any]] = OrderedDict()
load = compilation_cache.get_executable_and_time


def load_once(cache_key: str, options: Any, backend: Any, devices: Any, *callbacks: Any) -> tuple[Any, Any]:
    """A program that this process has loaded is not linked a second time, which takes tens of milliseconds: the key
    tells programs, options and devices, but not which functions of Python a program calls (JAX 0.11.2 and newer)."""
    given = (options, backend, devices, *callbacks)
    if any(callbacks):
        return load(cache_key, *given)
    found = loaded.pop(cache_key, None) or load(cache_key, *given)
    if found[0] is not None:
        loaded[cache_key] = found
        if len(loaded) > KEPT:
            loaded.popitem(last=False)
    return found


class Lowering(threading.local):
    """What JAX makes anew for each program that it lowers, 4 ms each: here one for all programs of a file of tests."""

    context: Any = None


make_context, lowering = mlir.make_ir_context, Lowering()


def same_context() -> Any:
    """One of this thread's own: a context is filled as it is used."""
    lowering.context = lowering.context or make_context()
    return lowering.context


LRUCache.put = put_whole
compilation_cache.get_executable_and_time = load_once
compilation_cache.zlib = SimpleNamespace(compress=functools.partial(zlib.compress, level=1), decompress=zlib.decompress)
mlir.make_ir_context = same_context
