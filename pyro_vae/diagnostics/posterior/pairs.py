"""Sums over all pairs of draws, batched over data, in blocks that fit in memory."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

__all__ = [
    "PairSums",
    "centred",
    "check_two_samples",
    "finite_data",
    "median_distance",
    "pair_sums",
    "squares",
]

_ENTRIES = 2**17  # numbers in a block of pairs: 1 MiB, which stays in the cache
_MEDIAN_DRAWS = 1000  # draws whose distances give the median

Block = Callable[[slice, slice], Float64[Tensor, "data rows draws"]]
"""The values of all pairs (row, draw) for a slice of the data and a slice of the rows."""


class PairSums(NamedTuple):
    """Sums over the pairs of different draws; w are the columns of weights, k the value."""

    total: Float64[Tensor, " batch"]
    """The sum of k."""
    linear: Float64[Tensor, "batch columns"]
    """The sum of w_i k_ij."""
    quadratic: Float64[Tensor, "batch columns"]
    """The sum of w_i k_ij w_j."""


def centred(
    draws: Float[Tensor, "draws batch dim"],
) -> tuple[Float64[Tensor, "batch dim"], Float64[Tensor, "draws batch dim"]]:
    """Mean and draws less their mean, exactly zero where all draws are equal."""
    draws = draws.detach().double()
    rest = draws - draws[0]
    offset = rest.mean(0)
    return draws[0] + offset, rest - offset


def check_two_samples(sample: Tensor, reference: Tensor, least: int) -> None:
    """Refuses draws (draws, batch, dim) of unlike things, or fewer than `least` of them."""
    if sample.shape[1:] != reference.shape[1:]:
        raise ValueError(
            f"sample has shape {tuple(sample.shape)} and reference {tuple(reference.shape)}; give "
            "both as (draws, data, latents), with the same data and latents"
        )
    for name, draws in (("sample", sample), ("reference", reference)):
        if len(draws) < least:
            raise ValueError(
                f"{name} has {len(draws)} draws of each datum, but at least {least} are needed; "
                "draw more"
            )
    if sample.shape[2] == 0:
        raise ValueError("the draws have no dimension; give at least one latent")


def finite_data(*draws: Float[Tensor, "_ batch dim"]) -> Bool[Tensor, " batch"]:
    """Which data have finite draws alone."""
    found = [part.isfinite().all(2).all(0) for part in draws]
    return torch.stack(found).all(0)


def squares(
    rows: Float64[Tensor, "batch rows dim"], draws: Float64[Tensor, "batch draws dim"]
) -> Float64[Tensor, "batch rows draws"]:
    """Squared Euclidean distances, exactly zero between equal draws."""
    return torch.cdist(rows, draws, compute_mode="donot_use_mm_for_euclid_dist").square_()


def pair_sums(block: Block, num_data: int, weights: Float64[Tensor, "draws columns"]) -> PairSums:
    """Sums a symmetric function of pairs, without the pairs of a draw with itself.

    Args:
        block: The function; must be symmetric in the draws of a pair.
        num_data: How many data there are.
        weights: Columns of weights of the draws, the same for every datum.
    """
    num_draws = len(weights)
    data_step = max(1, _ENTRIES // num_draws**2)
    row_step = max(1, min(num_draws, _ENTRIES // num_draws))
    parts = []
    for first in range(0, num_data, data_step):
        data = slice(first, min(first + data_step, num_data))
        found = []
        for start in range(0, num_draws, row_step):
            rows = slice(start, min(start + row_step, num_draws))
            values = block(data, rows)
            values.diagonal(offset=start, dim1=1, dim2=2).zero_()
            sums = values.sum(2)
            own = weights[rows]
            quadratic = ((values @ weights) * own).sum(1)
            found.append((sums.sum(1), sums @ own, quadratic))
        parts.append([torch.stack(terms).sum(0) for terms in zip(*found, strict=True)])
    return PairSums(*(torch.cat(terms) for terms in zip(*parts, strict=True)))


def median_distance(draws: Float64[Tensor, "batch draws dim"]) -> Float64[Tensor, " batch"]:
    """The median distance between different draws of each datum; 1 where all draws are equal.

    It is that of at most 1000 draws, picked at random but always the same ones.
    """
    count = draws.shape[1]
    if count > _MEDIAN_DRAWS:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        draws = draws[:, order[:_MEDIAN_DRAWS].to(draws.device)]
        count = _MEDIAN_DRAWS
    i, j = torch.triu_indices(count, count, offset=1, device=draws.device)
    medians = []
    for part in draws.split(max(1, _ENTRIES // count**2)):
        distances = squares(part, part)[:, i, j].sqrt()
        medians.append(distances.where(distances > 0, torch.nan).nanmedian(1).values)
    return torch.cat(medians).nan_to_num(nan=1.0)
