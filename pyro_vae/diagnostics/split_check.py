"""Predictive checks with p-values uniform under the right model: a part fits, a part checks."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from pyro_vae.data import Seed, as_seed
from pyro_vae.diagnostics.comparison import Refit, fit_again, num_data_of, refitted, some_of
from pyro_vae.diagnostics.predictive_check import Statistic, predictive_check
from pyro_vae.inference.programs import Program, program_scope, tensors_of, tool
from pyro_vae.results import Result, make_result, sha256_of

__all__ = ["split_check"]


@tool
def split_check(
    model: Program,
    guide: Program,
    x: Any,
    *,
    share: float = 0.5,
    refit: Refit | None = None,
    statistics: Mapping[str, Statistic] | None = None,
    num_draws: int = 200,
    seed: Seed = 0,
    max_memory: float = 0.5,
) -> Result:
    r"""Checks a model on data that its posterior has not seen, beside the classical check.

    The data are cut at random. The pair is fitted to one part, and the other compared with data
    replicated from there, as `predictive_check` does with `test`. The data are used once, so under
    the right model the p-values are uniform, where those of the classical check crowd about the
    middle and hardly ever are small.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior of all data.
        x: The data; a tuple for several arguments, a dict for keywords.
        share: Of the data that are fitted; more fits better, less checks more sharply.
        refit: From a part of the data to what `fit` returns, or to (model, guide). None for `fit`
            of copies of the programs.
        statistics: See `predictive_check`.
        num_draws: Replicates, at least 20.
        seed: Seeds the cut and the draws; the caller's random state is left alone.
        max_memory: Roughly the memory that the replicates drawn at once may take, in GiB.

    Returns:
        `observed`, `p_value`, `discrepancy` (dims `kind`, `statistic`) and `replicated` (and
        `draw`) of `predictive_check`, the kinds being `"split"` and the classical `"posterior"`.

    Raises:
        ProgramError: If the pair is refused, or x cannot be cut.
        ValueError: If an argument is out of its range.
        TypeError: If `refit` returns no pair.

    Note: uniform as far as the guide is the posterior of its part: a guide that is too narrow makes
        small p-values. What one cut finds another may miss.

    References:
        Li & Huggins (2024), Calibrated model criticism using split predictive checks; Moran,
        Cunningham & Blei (2023), The posterior predictive null (held-out data).
    """
    seed = as_seed(seed)
    if not 0 < share < 1:
        raise ValueError(f"share is between 0 and 1, not {share!r}")
    refit = fit_again(model, guide) if refit is None else refit
    with program_scope(seed):
        size = num_data_of(model, guide, x)
        order = torch.randperm(size)
        count = round(share * size)
        if not 0 < count < size:
            raise ValueError(f"share is {share!r}, which leaves no part of {size} data; change it")
        fitted, checked = (
            some_of(x, part.sort().values, size) for part in order.split([count, size - count])
        )
        pair = refitted(refit, fitted)
    settings: dict[str, Any] = {
        "statistics": statistics, "num_draws": num_draws, "seed": seed, "max_memory": max_memory
    }  # fmt: skip
    split = predictive_check(*pair, fitted, test=checked, **settings)
    classical = predictive_check(model, guide, x, **settings)
    return _side_by_side(split, classical, {"share": share, "num_draws": num_draws}, seed, x)


def _side_by_side(
    split: Result, classical: Result, config: dict[str, Any], seed: int, x: Any
) -> Result:
    variables: dict[str, Any] = {}
    for name in ("observed", "p_value", "discrepancy", "replicated"):
        values = [result[name].values for result in (split, classical)]
        stacked = np.stack(values) if name == "observed" else np.concatenate(values)
        dims = ("kind", "statistic", "draw")[: stacked.ndim]
        variables[name] = (dims, stacked, dict(split[name].attrs))
    both = (split.provenance, classical.provenance)
    tensors = tensors_of(x)
    return make_result(
        variables,
        function="split_check",
        config=config,
        seed=seed,
        data_sha256=sha256_of(*tensors) if tensors else None,
        coords={
            "kind": ["split", "posterior"],
            "statistic": split["statistic"].values,
            "draw": split["draw"].values,
        },
        notes=_once(both, "notes"),
        verdict=_once(both, "verdict"),
    )


def _once(parts: tuple[Mapping[str, Any], ...], what: str) -> list[str]:
    """The sentences of both checks, those in common once."""
    return list(dict.fromkeys(sentence for part in parts for sentence in part[what]))
