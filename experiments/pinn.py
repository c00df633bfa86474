"""Do physics-informed networks get there sooner from points drawn by the norms of their gradients?

Question: seconds to a relative L2 error of 0.1, 0.01 and 0.001 on three equations (`domains/problems.py`), against
eight other ways to choose collocation points (`domains/arms.py`), each at its own best rate, batch and length
(`domains/race.py`).

Claims     Burgers: seconds to 0.01 at most 0.40 of uniform points', 0.80 of the best rival's; Allen-Cahn and Poisson
           at most 0.70, and not behind the best rival.

Commands   python experiments/pinn.py                                      all, hours on one core (it says how many)
           python experiments/pinn.py --problems burgers --arms uniform r3 ours --seeds 5
           python experiments/pinn.py --quick                              minutes
           python experiments/pinn.py --picture experiments/figures/pinn.png
It goes on where it was stopped. What a step costs: `benchmarks/pinn_step.py`.

Result     Not run whole yet. The quick form on Burgers' equation (three arms, three seeds, six seconds a run by price,
           one core of a busy machine, prices 2.7 times those of a quiet one): no run came to 0.1. Errors at the
           end, median (least to largest): uniform 0.184 (0.106 to 0.294) after 5,070 steps, residual 0.323 (0.119 to
           0.352) after 4,223, ours 0.200 (0.185 to 0.230) after 3,038: a tie. The claim is not met at this length.
"""

from pathlib import Path

import jax
import matplotlib
import numpy as np
from domains import problems, race

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PROBLEMS = ("burgers", "allen_cahn", "poisson")
ARMS = ("uniform", "sobol", "rad", "rar_d", "r3", "residual", "lbfgs", "ours")
FULL = race.Grid((1e-3, 3e-3, 1e-2), (1, 4), (15.0, 45.0))
QUICK = race.Grid((1e-3, 3e-3, 1e-2), (1,), (6.0,))


def picture(file: Path, problem: str) -> None:
    """The solution with the points that were drawn, at four moments of a run."""
    domain, moments = problems.domain(problem), (0.02, 0.1, 0.4, 1.0)
    rows = race.captured(problem, 0, race.Trial(3e-3, 1, 15.0), moments)
    figure, panels = plt.subplots(1, len(rows), figsize=(10.4, 3.1), sharey=True, constrained_layout=True)
    first, second = domain.grid[..., 0], domain.grid[..., 1]
    value = jax.jit(jax.vmap(domain.value, (None, 0)))
    for panel, share, (params, points) in zip(panels, moments, rows, strict=True):
        found = np.asarray(value(params, domain.grid.reshape(-1, 2).astype(np.float32))).reshape(first.shape)
        mesh = panel.pcolormesh(first, second, found, cmap="RdBu_r", vmin=-1, vmax=1, shading="auto", rasterized=True)
        panel.scatter(points[:, 0], points[:, 1], s=1.2, c="black", alpha=0.5, linewidths=0)
        panel.set(xlabel="t" if problem != "poisson" else "x", xlim=(first.min(), first.max()), ylim=(-1, 1))
        error = float(domain.error(params))
        panel.set_title(f"{share:.0%} of the run, error {error:.3f}", fontsize=10)
    panels[0].set_ylabel("x" if problem != "poisson" else "y")
    figure.colorbar(mesh, ax=panels, label="the network's u", pad=0.01, aspect=30)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    print(f"wrote {file}")


if __name__ == "__main__":
    race.main(__doc__, "runs/pinn", PROBLEMS, ARMS, seeds=10, full=FULL, quick=QUICK, picture=picture)
