"""How near the densities of `isgd_jax.domain_sampler` come to the best that there could be.

A training with uniform points is stopped at five moments. Each density is fitted to scores of 25 steps before, three
refreshes in a row as in a run. Told is the second moment of the gradient of a weighted draw, over that of a uniform
one, by the norms at 32,768 new points. ``ideal`` is a draw in exact proportion to fresh norms; ``norms`` and
``residual`` are exact, fresh proportions too, a quarter spread uniformly; then come so many boxes, by residuals
(``resi``) and by norms (``norm``).

Command    python experiments/benchmarks/densities.py [--problems poisson burgers siren/china] [--boxes 128 512 2048]
Time       a quarter of an hour on a core in use

Result     Where a shock or a source is sharp, exact norms save a factor of 50 to 110 in the second moment, most of the
           way. Boxes by norms come to 26 to 34, with 512 of them; by residuals, which are cheaper, to 2 to 18, and it
           matters less how many there are. On a photograph, rough everywhere, even ideal draws save 2.5, and boxes 1.1
           to 1.4:

           poisson         error    ideal    norms residual  resi/128  resi/512 resi/2048  norm/128  norm/512 norm/2048
               10 %        0.190    0.012    0.015    0.060     0.070     0.096     0.096     0.042     0.038     0.034
               30 %        0.334    0.009    0.011    0.030     0.056     0.055     0.052     0.060     0.029     0.037
              100 %        0.006    0.014    0.017    0.084     0.137     0.114     0.104     0.041     0.036     0.031
           burgers         error    ideal    norms residual  resi/128  resi/512 resi/2048  norm/128  norm/512 norm/2048
               10 %        0.333    0.235    0.267    0.370     0.438     0.487     0.493     0.341     0.355     0.341
               30 %        0.282    0.007    0.009    0.043     0.242     0.192     0.210     0.046     0.031     0.024
              100 %        0.015    0.017    0.020    0.103     0.506     0.193     0.136     0.215     0.031     0.026
           siren/china     error    ideal    norms residual  resi/128  resi/512 resi/2048  norm/128  norm/512 norm/2048
                2 %        0.099    0.428    0.454    0.494     0.886     0.782     0.756     0.823     0.807     0.751
              100 %        0.051    0.399    0.428    0.465     0.794     0.746     0.699     0.828     0.758     0.697
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1]))

from domains import arms, problems, race

import isgd_jax as isgd
from isgd_jax.sampling.boxes import densities
from isgd_jax.sampling.places import quasi_random

LENGTHS = {"poisson": (3e-3, 28_000), "burgers": (1e-3, 40_000), "siren/china": (1e-3, 2_700)}
"""Rates, and steps of a run."""
MOMENTS = (0.02, 0.1, 0.3, 0.6, 1.0)
MEASURED, AT_ONCE = 1 << 15, 1 << 10
REFRESHES = 3

Array = jax.Array


def table(problem: str, boxes: list[int]) -> None:
    """Print a row for each moment of a run."""
    domain, (rate, total) = problems.domain(problem), LENGTHS[problem]
    term = next(iter(domain.terms.values()))
    made, key, at = race.programs(problem, "uniform", 1), jax.random.key(5), 0
    score = {name: jax.jit(functools.partial(scores, domain, term, name)) for name in ("residual", "norms")}
    fits = {(name, count): fitter(term, count, score[name]) for name in score for count in boxes}
    carry, unit = made.begin(key), quasi_random(jax.random.key(9), MEASURED, term.dims)
    points = term.spread(unit)
    heads = ["error", "ideal", "norms", "residual", *(f"{name[:4]}/{count}" for name, count in fits)]
    print(f"{problem}\n     " + "".join(f"{head:>10}" for head in heads), flush=True)
    for share in MOMENTS:
        stop = round(share * total)
        before = max(at, stop - arms.REFRESH)
        carry = made.advance(carry, key, rate, float(total), at, before - at)
        fitted = {which: fit(carry[0], before) for which, fit in fits.items()}
        carry = made.advance(carry, key, rate, float(total), before, stop - before)
        at = stop
        norms, residuals = (score[name](carry[0], points) for name in ("norms", "residual"))
        tried = [norms / jnp.mean(norms), _mixed(norms), _mixed(residuals)]
        tried += [densities(state.boxes, unit) for state in fitted.values()]
        found = [float(domain.error(carry[0])), *(_moment(norms, density) for density in tried)]
        print(f"{share:5.0%}" + "".join(f"{x:10.3f}" for x in found), flush=True)


def scores(domain: problems.Domain, term: problems.Term, name: str, params: Any, points: Array) -> Array:
    """Of points [k], a multiple of some."""
    arm = arms.arm("ours" if name == "residual" else "ours_norms", domain)
    assert isinstance(arm, arms.Ours)
    parts = points.reshape(-1, min(AT_ONCE, len(points)), points.shape[-1])
    return jax.lax.map(lambda part: arm.scores(params, term, part), parts).ravel()


def fitter(term: problems.Term, count: int, score: Any) -> Any:
    """``(params, number) -> state``, after some refreshes with these parameters."""
    sampler = isgd.domain_sampler(
        term.spread, dims=term.dims, batch_size=1, num_boxes=count, uniform_fraction=arms.UNIFORM
    )

    @jax.jit
    def fit(params: Any, number: int) -> isgd.DomainState:
        key = jax.random.fold_in(jax.random.key(7), number)
        refreshed = functools.partial(sampler.refresh, key, score=functools.partial(score, params))
        return jax.lax.fori_loop(0, REFRESHES, lambda _, state: refreshed(state), sampler.init())

    return fit


def _moment(norms: Array, density: Array) -> float:
    """The second moment of a draw from a density, over that of a uniform draw."""
    return float(jnp.mean(jnp.square(norms) / density) / jnp.mean(jnp.square(norms)))


def _mixed(sizes: Array) -> Array:
    """The density in proportion to sizes at uniform points, a part of it spread uniformly."""
    return (1 - arms.UNIFORM) * sizes / jnp.mean(sizes) + arms.UNIFORM


def main() -> None:
    """A table for each problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--boxes", nargs="+", type=int, default=[128, 512, 2_048])
    options = parser.parse_args()
    for problem in options.problems:
        table(problem, options.boxes)


if __name__ == "__main__":
    main()
