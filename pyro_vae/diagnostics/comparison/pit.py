r"""LOO-PIT: where each datum lies among draws of its predictive distribution given the others."""

from typing import Any

import numpy as np
import pyro
import torch
from jaxtyping import Float64
from pyro import poutine
from torch import Tensor

from pyro_vae.diagnostics.calibration import ecdf, ecdf_band, ecdf_p_value
from pyro_vae.diagnostics.comparison.pointwise import GlobalDraws, GlobalModel
from pyro_vae.inference.programs import (
    ProgramError,
    in_particle_plate,
    is_factor,
    site_values,
    without_data,
)
from pyro_vae.results import label

__all__ = ["check_one_number", "pit_columns", "pit_of"]

_RANKS = 99  # points at which the ECDF is looked at


def check_one_number(model: GlobalModel) -> Float64[Tensor, " all"]:
    """The observed numbers, one for each datum.

    Raises:
        ProgramError: If data are not single numbers of one site, which a rank is of.
    """
    structure, trace = model.structure, model.pair.first_run()[1]
    names = [name for name in structure.observed if not is_factor(trace.nodes[name])]
    values = site_values(trace, names[0], structure)[0] if len(names) == 1 else torch.zeros(())
    if values.numel() != model.split.size or len(structure.observed) > 1:
        raise ProgramError(
            f"a datum of this model is no single number (sites {', '.join(structure.observed)}), "
            "so it has no rank among draws; leave out pit=True, or check a statistic (split_check)"
        )
    return values.double().reshape(-1)


def pit_of(
    model: GlobalModel, draws: GlobalDraws, log_weights: Tensor, observed: Tensor, rows: Tensor
) -> Float64[Tensor, " datum"]:
    r"""The weighted share of draws below each datum; ties are broken at random.

    Args:
        model: Of the global latents.
        draws: Of these.
        log_weights: Smoothed, of each datum, exponentials sum to 1, `[draws, datum]`.
        observed: From `check_one_number`.
        rows: Which data these are.

    References:
        Gelfand, Dey & Chang (1992), Model determination using predictive distributions; Czado,
        Gneiting & Held (2009), Predictive model assessment for count data (the randomisation).
    """
    args, kwargs = model.pair.arguments
    (name,), nesting = model.structure.observed, model.structure.max_plate_nesting
    below, start = torch.zeros(2, len(rows), dtype=torch.float64), 0
    x = observed[rows]
    for guide_trace, _, count in draws.traces:
        given = guide_trace.copy()
        for other in [n for n in given.nodes if n not in model.split.global_latents]:
            given.remove_node(other)
        program = in_particle_plate(without_data(model.pair.model), count, -1 - nesting)
        with pyro.validation_enabled(False):
            drawn = poutine.trace(poutine.replay(program, trace=given)).get_trace(*args, **kwargs)
        new = site_values(drawn, name, model.structure).double().reshape(count, -1)[:, rows]
        weights = log_weights[start : start + count].exp()
        below += torch.stack([(weights * (new < x)).sum(0), (weights * (new <= x)).sum(0)])
        start += count
    return below[0] + torch.rand_like(below[0]) * (below[1] - below[0])


def pit_columns(pit: Tensor) -> dict[str, tuple[Any, Any, Any]]:
    """The PIT of each datum, its ECDF, the simultaneous 95 % band and the test of uniformity."""

    def about(text: str) -> dict[str, Any]:
        return label(unit="none", reduction="none", bound="none", description=text)

    known = pit[~pit.isnan()].numpy()
    ranks = np.minimum((known * (_RANKS + 1)).astype(np.int64), _RANKS)[:, None]
    band = ecdf_band(len(known), _RANKS)
    p = ecdf_p_value(ranks, _RANKS)[0]
    return {
        "pit": ("datum", pit, about("share of the predictive distribution below the datum")),
        "pit_ecdf": ("rank", ecdf(ranks, _RANKS)[0], about("ECDF of pit in hundredths")),
        "ecdf_lower": ("rank", band.lower, about("simultaneous 95 % band of uniform ones")),
        "ecdf_upper": ("rank", band.upper, about("simultaneous 95 % band of uniform ones")),
        "pit_p_value": ((), p, about("test of uniformity, by the statistic of the band")),
    }
