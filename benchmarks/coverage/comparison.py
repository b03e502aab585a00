"""Predictive densities of data left out, beside those of conjugate models in closed form."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks.coverage.kinds import Checked, Row, Study, interval, joined, p_value, watched
from benchmarks.coverage.planted import Array, Hierarchy, tensor
from pyro_vae.diagnostics.comparison import held_out, kfold, loo
from pyro_vae.diagnostics.split_check import split_check
from pyro_vae.results import Result

__all__ = ["STUDIES"]

_DATA = 30
_FOLDS = np.arange(_DATA) % 3


def _density(pair: Hierarchy, x: Array, new: Array) -> Array:
    mean, sd = pair.posterior(tensor(x))
    return stats.norm.logpdf(new, mean, np.sqrt(2 + sd**2))


def _left_out(pair: Hierarchy, seed: int) -> tuple[Result, Array]:
    x = pair.data(_DATA, seed)
    found = loo(
        pair.model, pair.guide, x, num_draws=400, num_inner=8, pit=True, seed=seed, progress=False
    )  # fmt: skip
    each = x.numpy()
    truth = [_density(pair, np.delete(each, n), each[n]) for n in range(_DATA)]
    return found, np.array(truth)


def _in_folds(pair: Hierarchy, seed: int) -> tuple[Result, Array]:
    x, truth = pair.data(_DATA, seed), np.empty(_DATA)
    found = kfold(
        pair.model, pair.guide, x, folds=_FOLDS.tolist(), num_draws=400, num_inner=8, seed=seed,
        refit=lambda _: (pair.model, pair.guide), progress=False,
    )  # fmt: skip
    for fold in range(3):
        inside = fold == _FOLDS
        truth[inside] = _density(pair, x.numpy()[~inside], x.numpy()[inside])
    return found, truth


def _new_data(pair: Hierarchy, seed: int) -> tuple[Result, Array]:
    x = pair.data(2 * _DATA, seed)
    parts = x[:_DATA], x[_DATA:]
    found = held_out(pair.model, pair.guide, *parts, num_draws=400, num_inner=8, seed=seed)
    return found, _density(pair, parts[0].numpy(), parts[1].numpy())


def _study(
    make: Callable[[Hierarchy, int], tuple[Result, Array]], size: int, count: int, seed: int
) -> dict[str, Checked]:
    """One datum of each replication: data share their draws.

    Further data are of the same theta, and their expected density a closed form.
    """
    pair, parts = Hierarchy(scale=1.2, shift=0.3), []
    for i in range(count):
        found, truth = make(pair, seed + i)
        watched(found)
        x = pair.data(size, seed + i).numpy()[:_DATA]
        theta = np.random.default_rng(seed + i).normal(size=2 * size + 1)[0]
        mean, sd = pair.posterior(tensor(x))
        variance = 2 + sd**2
        each = -0.5 * np.log(2 * np.pi * variance) - ((theta - mean) ** 2 + 2) / (2 * variance)
        flagged = not bool(found.reliable.all())
        row: dict[str, Any] = {
            "elpd_se": interval(found.elpd, found.elpd_se, truth.sum(), flagged),
            "log_predictive_se": interval(
                found.log_predictive[0], found.log_predictive_se[0], truth[0], flagged
            ),
            "data_standard_error": interval(
                found.elpd, found.data_standard_error, _DATA * each, flagged
            ),
        }
        if "pit_p_value" in found:
            row["pit_p_value"] = p_value(found.pit_p_value)
        parts.append(row)
    return joined(parts)


def _split_check(count: int, seed: int) -> dict[str, Checked]:
    """p-values of the part that was not fitted, under the right model."""
    pair, found = Hierarchy(scale=1.0, shift=0.0), []
    for i in range(count):
        x = pair.data(24, seed + i)
        result = split_check(
            pair.model, pair.guide, x, refit=lambda _: (pair.model, pair.guide), num_draws=59,
            statistics={"mean": torch.mean, "sd": torch.std}, seed=seed + i,
        )  # fmt: skip
        found.append(watched(result).p_value.sel(kind="split").values)
    return {"p_value": p_value(np.concatenate(found))}


STUDIES = [
    Study(
        "data checked by a fit of others",
        "split_check",
        _split_check,
        (Row("p_value", most=0.07, breaks="a guide too narrow", guard="a note on every result"),),
        quick=12,
        longest=400,
    ),
    *(
        Study(
            f"data {name}",
            function,
            partial(_study, make, size),
            (
                Row("elpd_se", most=0.08, breaks="k-hat", guard="`khat`, `reliable`"),
                Row("log_predictive_se", most=0.08, breaks="k-hat", guard="`khat`, `reliable`"),
                Row(
                    "data_standard_error", most=0.12, breaks="few data, or a model that fits badly"
                ),
                *((Row("pit_p_value", most=0.055),) if function == "loo" else ()),
            ),
            quick=12 if function == "kfold" else 25,  # three fits each
            longest=300,
        )
        for name, function, make, size in (
            ("left out, each", "loo", _left_out, _DATA),
            ("left out in folds", "kfold", _in_folds, _DATA),
            ("held out", "held_out", _new_data, 2 * _DATA),
        )
    ),
]
