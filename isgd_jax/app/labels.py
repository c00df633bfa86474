"""What the fields of a run's records are called where a person reads them: on the page and in its figures."""

from collections.abc import Mapping

__all__ = ["LABELS", "label"]

LABELS: Mapping[str, str] = {
    "step": "update",
    "steps_per_second": "updates a second",
    "train_seconds": "seconds of training",
    "loss": "train loss, of draws",
    "train_loss": "train loss",
    "test_loss": "held-out loss",
    "train_error": "train error",
    "test_error": "held-out error",
    "sd_uniform": "√Tr Cov, uniform",
    "sd_stale": "√Tr Cov, in use",
    "sd_ideal": "√Tr Cov, ideal",
    "sd_drawn": "√(M Tr Cov), drawn",
    "variance_ratio": "in use over uniform, variance",
    "max_weight": "largest weight",
    "age_mean": "mean age of scores, updates",
    "age_p95": "95th percentile of ages, updates",
    "share_scoring": "time spent on scoring",
    "share_updating": "time spent on updates",
    "share_measuring": "time spent on measuring",
    "scores_per_second": "scores a second",
    "scores_per_second_by_worker": "scores a second, by worker",
    "bytes_moved": "bytes to and from workers",
    "chunks_again": "chunks scored again",
    "results_refused": "results refused",
    "trusted_share": "share of scores trusted",
    "gate_is_open": "gate is open",
}


def label(field: str) -> str:
    """The name of a field as words: its label, or else its own name with spaces.

    >>> label("max_weight"), label("chunk_size")
    ('largest weight', 'chunk size')

    Args:
        field: as it is written in metrics.jsonl.
    """
    return LABELS.get(field, field.replace("_", " "))
