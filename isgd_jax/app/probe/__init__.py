"""Does importance sampling pay for this model, on this data, on this machine? Measured, then said in plain words."""

from isgd_jax.app.probe.findings import Probe, check_probeable, probe, probed_of
from isgd_jax.app.probe.measure import Costs, Probed, Spread, ageing, costs, spread
from isgd_jax.app.probe.plots import figures_of
from isgd_jax.app.probe.verdict import Period, Trial, is_unlearnt, periods, verdict

__all__ = [
    "Costs",
    "Period",
    "Probe",
    "Probed",
    "Spread",
    "Trial",
    "ageing",
    "check_probeable",
    "costs",
    "figures_of",
    "is_unlearnt",
    "periods",
    "probe",
    "probed_of",
    "spread",
    "verdict",
]
