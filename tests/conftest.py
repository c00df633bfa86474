"""Strictness for every test: shapes and types checked on public functions, no silent promotion, eight CPU devices."""

import functools
import gc
import importlib
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from processes import forced

gc.disable()  # until all is imported: see pytest_collection_finish

# Bytecode is kept, here and in the processes that tests start: without it each worker takes 3 s to compile the package
# with its checks of types, and as long again for the tests.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Before jax is imported. NPROC: more threads than devices, or collectives can starve each other on a small machine.
os.environ.setdefault("XLA_FLAGS", forced(8))
os.environ.setdefault("NPROC", "16")

import beartype
import jaxtyping

CHECKED_CLOSURES = 3
with_tower = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
"""An int will do for a float, as in Python's own rules of types."""
types_alone = beartype.beartype(
    conf=beartype.BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError)
)
"""The same, with the error of the checks of shapes."""
whole_check, closures_made = jaxtyping.jaxtyped, Counter()


def names_shapes(function: Any) -> bool:
    """Whether an annotation speaks of the shape of an array. Where none does, `beartype` alone has the same to check,
    for a tenth of the time."""
    for annotation in function.__annotations__.values():
        try:
            meant = eval(annotation, function.__globals__) if isinstance(annotation, str) else annotation
        except NameError:  # of a module that is imported for types alone, or defined further down
            return True
        words = re.sub(r"Literal\[[^]]*\]", "", repr(meant))
        if "jaxtyping" in words or "'" in words:  # or a name within quotes, likewise
            return True
    return False


def when_called(function: Any, check: Callable[[Any], Any]) -> Any:
    """``check(function)``, made at the first call: of what a worker imports it calls a part, and to make the checks of
    all of it takes seconds."""
    checked: list[Any] = []

    @functools.wraps(function)
    def either(*args: Any, **options: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **options)
        if not checked:
            checked.append(check(function))
        return checked[0](*args, **options)

    return either


def checks(function: Any) -> Any:
    return types_alone(function) if not names_shapes(function) else whole_check(function, typechecker=with_tower)


def jaxtyped(function: Any = None, *, typechecker: Any) -> Any:
    """A closure is checked the first times it is made: to make a checked one takes 2 ms, and tracing makes many."""
    if function is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    code = getattr(function, "__code__", None)
    if code is not None and "<locals>" not in function.__qualname__:
        return when_called(function, checks)
    if code is not None:
        closures_made[code] += 1
        if closures_made[code] > CHECKED_CLOSURES:
            return function
    return whole_check(function, typechecker=with_tower)


jaxtyping.jaxtyped = jaxtyped  # what the hook decorates with

importlib.import_module("isgd_jax.app.config")  # before the hook: it checks its own types, and its messages are tested
jaxtyping.install_import_hook("isgd_jax", "beartype.beartype")

import tempfile
from types import SimpleNamespace

import jax
import programs
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Many tests compile the same programs, in several workers and in processes of their own: once a session is enough. To
# compile an addition takes 10 ms, to find it there one.
if "PYTEST_XDIST_WORKER" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="isgd-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
for name, value in {
    "jax_traceback_in_locations_limit": 0,  # which line of Python asked for an operation: kept with each of them
    "jax_compilation_cache_dir": os.environ["JAX_COMPILATION_CACHE_DIR"],
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)


def pytest_collection_finish() -> None:
    """A seventh of the time went into looking for garbage among what was imported: it is looked at no more."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """On an accelerator (JAX_PLATFORMS=cuda,cpu) there may be one device where a test is of several."""
    asked = item.get_closest_marker("devices")
    if asked and len(jax.devices()) < asked.args[0]:
        pytest.skip(f"needs {asked.args[0]} devices, there are {len(jax.devices())}")


MAPPED_REGIONS = 45_000


@pytest.fixture(autouse=True, scope="module")
def room_for_programs() -> Iterator[None]:
    """Forget compiled programs before they are too many.

    Linux gives a process 65,530 mapped regions, XLA takes some twenty for each program on the CPU, and beyond them it
    ends by a segmentation fault: a worker of the whole suite came there.
    """
    yield
    programs.lowering.context = None
    mapped = Path("/proc/self/maps")
    if mapped.exists() and len(mapped.read_bytes().splitlines()) > MAPPED_REGIONS:
        jax.clear_caches()
        programs.loaded.clear()
        gc.collect()


@pytest.fixture(autouse=True)
def own_logger() -> Iterator[None]:
    """The command, called in a test, sets up the package's logger: not for the tests after it."""
    logger = logging.getLogger("isgd_jax")
    before = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


@pytest.fixture(autouse=True)
def without_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fit` ends with figures that take a second: drawn by commands, and by tests marked `figures`."""
    if "figures" not in request.keywords:
        monkeypatch.setattr("isgd_jax.app.recorder.plots", SimpleNamespace(draw=lambda run: None))


@pytest.fixture
def failed_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Orbax leaves coroutines of reads that failed behind: what they say when they go belongs to the test that damaged
    a checkpoint, and to no other."""
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    yield
    gc.collect()


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)
