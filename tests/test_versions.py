"""Pairs of versions that do not work together are told, in a sentence; all others are not."""

from importlib.metadata import PackageNotFoundError

import pytest

from isgd_jax.versions import check_versions, found_bad


def installed(**versions: str):
    def version_of(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    return version_of


@pytest.mark.parametrize(("flax", "jax"), [("0.12.8", "0.11.1"), ("0.12", "0.12.0.1"), ("0.12.8rc1", "0.13.0.dev3")])
def test_a_bad_pair_is_told_with_what_to_do(flax: str, jax: str) -> None:
    with pytest.warns(
        UserWarning, match=rf"flax {flax} .*jax {jax} .*install flax 0\.12\.\d+ or newer, or jax below"
    ) as told:
        check_versions(installed(flax=flax, jax=jax))
    assert len(told) == 1


@pytest.mark.parametrize(
    ("flax", "jax"), [("0.12.8", "0.10.2"), ("0.12.8", "0.11.0"), ("0.12.12", "0.12.0.1"), ("0.13", "0.20")]
)
def test_a_good_pair_is_not(flax: str, jax: str) -> None:
    assert found_bad(installed(flax=flax, jax=jax)) == []
    assert found_bad(installed(jax=jax)) == []


def test_what_is_installed_here_works_together() -> None:
    assert found_bad() == []
