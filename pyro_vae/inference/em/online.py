"""Online EM on a stream: one step of averaged statistics for each batch that arrives."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["OnlineState", "check_steps", "online_step", "step_size"]


def check_steps(exponent: float, delay: float) -> None:
    """Raises ValueError unless `step_size` has steps with which averages settle."""
    if not 0.5 < exponent <= 1:
        raise ValueError(
            f"step_exponent must lie above 0.5 and be at most 1, or the averages do not "
            f"settle; not {exponent!r}"
        )
    if not 0 <= delay < math.inf:
        raise ValueError(f"step_delay must be 0 or positive, not {delay!r}")


def step_size(number: int, exponent: float, delay: float) -> float:
    """The share of the newest statistics in their average, (n + delay)^-a."""
    return float((number + delay) ** -exponent)


@dataclass(frozen=True)
class OnlineState:
    """What online EM keeps of the batches that it saw, besides the parameters.

    Attributes:
        statistics: Expected sufficient statistics per unit of weight, averaged over batches.
        coordinates: Centre and scale of the features in them.
        num_batches: Seen so far.
    """

    statistics: Any
    coordinates: Any
    num_batches: int


def online_step(
    mixture: Any,
    x: Tensor,
    state: OnlineState | None = None,
    *,
    sample_weights: Tensor | None = None,
    step_exponent: float = 0.6,
    step_delay: float = 0.0,
) -> tuple[OnlineState, float]:
    r"""Moves a mixture by one batch: :math:`s \leftarrow s + (n + d)^{-a} (\hat s - s)`, then M.

    Args:
        mixture: A mixture of this package; its parameters are moved in place.
        x: The batch, shape (batch, features); at least a datum a component where `state` is None.
        state: After the batches before; None for the first, which is taken whole.
        sample_weights: How often each datum of the batch counts, shape (batch,). Batches count
            alike, whatever their weights sum to.
        step_exponent: The a of the formula, above 0.5 and at most 1.
        step_delay: The d, 0 or positive.

    Returns:
        The state after the batch, and the mean log p(x) of the batch before the step, in nats per
        datum.

    Raises:
        ValueError: If data or steps cannot be used; `SingularComponentError` if a component loses
            its data. The mixture is then as it was.

    References:
        Cappe & Moulines (2009), On-line expectation-maximization algorithm for latent data models,
        JRSS B 71, 593-613.
    """
    check_steps(step_exponent, step_delay)
    problem = mixture.prepare(x, sample_weights, coordinates=state and state.coordinates)
    parameters = problem.read()
    about = state.statistics.about if state else problem.origin(parameters)
    expected = problem.e_step(parameters, about=about)
    statistics = expected.statistics * (1 / problem.total_weight)
    number = state.num_batches + 1 if state else 1
    if state is not None:
        step = step_size(number, step_exponent, step_delay)
        statistics = state.statistics * (1 - step) + statistics * step
    problem.write(problem.m_step(statistics, parameters))
    return (
        OnlineState(statistics, problem.coordinates, number),
        expected.log_likelihood / problem.total_weight,
    )
