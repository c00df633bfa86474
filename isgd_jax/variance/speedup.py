"""How many steps less variance saves: what draws are worth against what they cost."""

__all__ = ["expected_speedup"]


def expected_speedup(*, uniform: float, drawn: float, mean_grad_norm_sq: float, batch_size: int) -> float:
    """Steps with uniform draws over steps with the draws in question, where each takes the step size that suits it.

    The second moment of the gradient of a uniform batch over that of a batch as drawn, (‖μ‖² + UNIFORM/m) over
    (‖μ‖² + DRAWN/m): the ratio of variances where noise is all there is, and 1 where batches are so large already that
    there is none. A bound on hope: it knows nothing of curvature, nor of a rate that stays the same.

    >>> expected_speedup(uniform=40.0, drawn=10.0, mean_grad_norm_sq=0.0, batch_size=8)
    4.0
    >>> expected_speedup(uniform=40.0, drawn=10.0, mean_grad_norm_sq=5.0, batch_size=8)
    1.6

    Args:
        uniform: Tr Cov of the gradient of one uniform draw.
        drawn: the same of one draw as they are made.
        mean_grad_norm_sq: ‖μ‖², the squared norm of the mean gradient, in the same unit.
        batch_size: draws in a step, m.

    Returns:
        The ratio; 1 where there is neither noise nor gradient. Below 1 the draws do harm.

    Source: McCandlish et al. (2018), section 2.2, whose number of steps goes as 1 + B/m with the noise scale
    B = UNIFORM/‖μ‖²; put to draws of another variance it is ours.
    """
    above = mean_grad_norm_sq + uniform / batch_size
    below = mean_grad_norm_sq + drawn / batch_size
    return above / below if below > 0.0 else 1.0
