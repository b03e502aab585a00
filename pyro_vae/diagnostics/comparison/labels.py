"""What predictive densities are labelled with, and what is said of them in words."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae.inference.log_weights import khat_threshold
from pyro_vae.inference.programs import tensors_of
from pyro_vae.intervals import mean_factor
from pyro_vae.results import Result, label, make_result, sha256_of

__all__ = ["density_result", "error_over_data"]

_SHOWN = 5  # data that a note names


def error_over_data(log_predictive: Tensor) -> float:
    r"""Error of a sum over N data as an estimate for N others, :math:`\sqrt N` sd.

    Raised for few and skewed ones; see `intervals.mean_factor`. nan of a single datum.
    """
    values = log_predictive.numpy()
    if len(values) < 2:
        return math.nan
    return float(values.std(ddof=1)) * math.sqrt(len(values)) * mean_factor(values)


def density_result(
    function: str,
    log_predictive: Tensor,
    se: Tensor,
    total_se: Tensor,
    khat: Tensor,
    num_draws: int,
    *,
    measure: str,
    config: Mapping[str, Any],
    seed: int,
    data: tuple[Any, ...],
    more: Mapping[str, tuple[Any, Any, Any]] | None = None,
    reliable: Tensor | None = None,
    total: Tensor | None = None,
    spread: float | None = None,
    rows: Tensor | None = None,
    notes: Sequence[str] = (),
) -> Result:
    """The columns with their labels; see `loo`, `held_out`.

    Args:
        function: That made them.
        log_predictive: Of each datum, in nats.
        se: Monte-Carlo errors.
        total_se: That of the sum.
        khat: Of the weights of each.
        num_draws: Behind each.
        measure: Of the data.
        config: What was chosen.
        seed: Of the draws.
        data: Arguments that hold data.
        more: Further columns.
        reliable: Whether errors hold; None for what k-hat says.
        total: The sum over all data; None for that over these.
        spread: Its error over data; None for that of these.
        rows: Which data these are; None for all.
        notes: Sentences to begin with.
    """
    limit = khat_threshold(num_draws)
    fine = khat <= limit if reliable is None else reliable

    def nats(text: str, reduction: str, reliable_by: str | None = None) -> dict[str, Any]:
        return label(
            reduction=reduction, bound="none", measure=measure, num_particles=num_draws,
            description=text, reliable_by=reliable_by,
        )  # fmt: skip

    said = "log predictive density of all data, each by a posterior that has not seen it"
    about_khat = label(
        unit="none", reduction="none", bound="none", num_particles=num_draws,
        description="Pareto k-hat of the weights of the global latents",
    )  # fmt: skip
    over_data = error_over_data(log_predictive) if spread is None else spread
    about_error = nats("error of elpd as an estimate for further data", "total")
    variables: dict[str, tuple[Any, Any, Any]] = {
        "elpd": ((), log_predictive.sum() if total is None else total, nats(said, "total")),
        "elpd_se": ((), total_se, {}),
        "data_standard_error": ((), over_data, about_error),
        "log_predictive": (
            "datum",
            log_predictive,
            nats("log p of a datum given data without it", "per datum", "reliable"),
        ),
        "log_predictive_se": ("datum", se, {}),
        "khat": ("datum", khat, about_khat),
        "reliable": ("datum", fine, {}),
        **(more or {}),
    }
    tensors = [tensor for part in data for tensor in tensors_of(part)]
    return make_result(
        variables,
        function=function,
        config=dict(config),
        seed=seed,
        data_sha256=sha256_of(*tensors) if tensors else None,
        coords={} if rows is None else {"datum": rows.numpy()},
        notes=[*notes, *_caveats(khat, fine, limit, rows)],
    )


def _caveats(khat: Tensor, fine: Tensor, limit: float, rows: Tensor | None) -> list[str]:
    bad = (~fine).nonzero()[:, 0]
    if not len(bad):
        return []
    worst = bad[torch.argsort(khat[bad].nan_to_num(nan=math.inf), descending=True)][:_SHOWN]
    names = worst if rows is None else rows[worst]
    listed = ", ".join(
        f"{int(n)} (k-hat {float(khat[i]):.2f})" for n, i in zip(names, worst, strict=True)
    )
    more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    return [
        f"k-hat is above {limit:.2f} for {len(bad)} of {len(fine)} data, whose densities and "
        f"errors are not to be relied upon: {listed}{more}."
    ]
