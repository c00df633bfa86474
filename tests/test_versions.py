"""Pairs of versions that do not work together are told, in a sentence; all others are not. Nor do tests ask XLA for
what a version of it does not know."""

import importlib
import os
import re
from importlib.metadata import PackageNotFoundError

import processes
import pytest
from processes import forced, quick_to_compile

from isgd_jax.versions import check_versions, found_bad


def installed(**versions: str):
    def version_of(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    return version_of


@pytest.mark.parametrize(
    ("flax", "jax", "needed"),
    [
        ("0.12.8", "0.11.1", "0.12.10"),
        ("0.12", "0.12.0.1", "0.12.10"),
        ("0.12.8rc1", "0.13.0.dev3", "0.12.10"),
        ("0.12.0", "0.10.2", "0.12.1"),
    ],
)
def test_a_bad_pair_is_told_with_what_to_do(flax: str, jax: str, needed: str) -> None:
    expected = rf"flax {flax} .*jax {jax} .*install flax {re.escape(needed)} or newer, or jax below"
    with pytest.warns(UserWarning, match=expected) as told:
        check_versions(installed(flax=flax, jax=jax))
    assert len(told) == 1


@pytest.mark.parametrize(
    ("flax", "jax"),
    [("0.12.1", "0.10.0"), ("0.12.8", "0.10.2"), ("0.12.8", "0.11.0"), ("0.12.12", "0.12.0.1"), ("0.13", "0.20")],
)
def test_a_good_pair_is_not(flax: str, jax: str) -> None:
    assert found_bad(installed(flax=flax, jax=jax)) == []
    assert found_bad(installed(jax=jax)) == []


def test_what_is_installed_here_works_together() -> None:
    assert found_bad() == []


@pytest.mark.parametrize(
    ("jaxlib", "count"),
    [("0.10.0", 2), ("0.11.0", 2), ("0.11.1.dev20260801", 1), ("0.11.1", 1), ("0.12.0.1", 1), ("1.0", 1)],
)
def test_xla_is_asked_for_what_it_knows(jaxlib: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.11.1 gave up the older emitters of fusions, and a process with a flag that XLA does not know ends at once."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    flags = quick_to_compile(jaxlib)
    assert len(flags) == count
    assert ("--xla_cpu_use_fusion_emitters=false" in flags) == (count == 2)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    assert quick_to_compile(jaxlib) == []
    assert forced(3) == "--xla_force_host_platform_device_count=3"


def test_tests_run_on_the_cpu_of_any_machine_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_PLATFORMS")
    importlib.reload(processes)
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    importlib.reload(processes)
    assert os.environ["JAX_PLATFORMS"] == "cuda"
