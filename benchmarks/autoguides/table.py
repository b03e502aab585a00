"""Each tool on each case: right by the known answer, or refused in words."""

import argparse
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import autoguide
from torch import Tensor

from benchmarks.autoguides.cases import Case, Truth, X, cases, make_exact
from pyro_vae import (
    elbo_gap,
    fit,
    log_evidence,
    log_weights,
    loo,
    posterior_quality,
    predictive_check,
    resolve,
    to_arviz,
)
from pyro_vae.inference.draws import draw_posterior
from pyro_vae.inference.log_weights import SplitLogWeights
from pyro_vae.inference.programs import ProgramError

NUM_DRAWS = 1000
EXACT = 1e-6  # nats: of a guide that was set to the posterior
TRAINED = 0.02  # nats in all: of one that `fit` trained until more would buy nothing that counts
ERRORS = 4.5  # standard errors that a random quantity may be off by


# --- tools ----------------------------------------------------------------------------------------


def _near(found: Any, expected: Any, error: Any = 0.0, tolerance: float = EXACT) -> bool:
    difference = np.abs(np.asarray(found) - np.asarray(expected))
    return bool((difference < tolerance + ERRORS * np.asarray(error)).all())


def _are_posterior(truth: Truth, values: Any) -> bool:
    """Means and standard deviations of independent draws, `[draws, ...]`, in standard errors."""
    draws = np.asarray(values, dtype=float).reshape(len(values), -1)
    mean, scale = truth.mean.reshape(-1).numpy(), truth.scale.reshape(-1).numpy()
    error = scale / math.sqrt(len(draws))
    fourth = ((draws - mean) ** 4).mean(0)  # of the squared deviations, which need not be normal
    variance_error = np.sqrt(np.maximum(fourth - scale**4, 0) / len(draws))
    variance = ((draws - mean) ** 2).mean(0)
    return _near(draws.mean(0), mean, error) and _near(variance, scale**2, variance_error)


def _fit(case: Case, guide: Any) -> bool:
    """On a guide that knows nothing yet; the bound is measured anew, with an error."""
    del guide
    guide = case.guide(case.model)
    fitted = fit(
        case.model,
        guide,
        X,
        loss=case.loss,
        epochs=400,
        evaluate_every=400,
        learning_rate=lambda epoch: 0.1 * 0.985**epoch,
        progress=False,
    ).require_finished()
    if isinstance(guide, autoguide.AutoDelta | autoguide.AutoLaplaceApproximation):
        found = fitted.guide(X)["z"].detach()
        return _near(found, case.truth.mean, tolerance=0.1 * float(case.truth.scale))
    weights = _joint(log_weights(fitted.model, fitted.guide, X, 200, joint=True, seed=0))
    bound = weights.sum(1)
    error = float(bound.std()) / math.sqrt(len(bound))
    return _near(bound.mean(), case.truth.log_evidence.sum(), error, TRAINED)


def _joint(found: Tensor | SplitLogWeights) -> Tensor:
    return (found if isinstance(found, Tensor) else found.joint).detach()


def _log_weights(case: Case, guide: Any) -> bool:
    """Each weight of an exact guide is the evidence."""
    found = _joint(log_weights(case.model, guide, X, 5, joint=case.joint, seed=0))
    return _near(found, case.truth.log_evidence.expand(found.shape))


def _evidence(case: Case, guide: Any) -> bool:
    found = log_evidence(
        case.model, guide, X, joint=case.joint, num_particles=100, seed=0, progress=False
    )
    return _near(found.log_evidence, case.truth.log_evidence)


def _gap(case: Case, guide: Any) -> bool:
    found = elbo_gap(case.model, guide, X, richer=(), max_steps=50, seed=0, progress=False)
    right = _near(found.log_evidence, case.truth.log_evidence, found.log_evidence_se)
    return right and _near(found.gap, 0.0, found.gap_se)


def _quality(case: Case, guide: Any) -> bool:
    found = posterior_quality(
        case.model,
        guide,
        X,
        checks=(),
        joint=case.joint,
        seed=0,
        num_particles=NUM_DRAWS,
        progress=False,
    )
    return _near(found.ess, NUM_DRAWS, tolerance=1e-6 * NUM_DRAWS)


def _draws(case: Case, guide: Any) -> bool:
    found = draw_posterior(case.model, guide, X, num_draws=NUM_DRAWS, joint=case.joint, seed=0)
    return _are_posterior(case.truth, found.latents[case.latent].detach())


def _resolve(case: Case, guide: Any) -> bool:
    found = resolve(case.model, guide, X, joint=case.joint, seed=0, progress=False)
    return _are_posterior(case.truth, found.latents[case.latent].detach())


def _predict(case: Case, guide: Any) -> bool:
    """The tail area of the mean of replicated data."""
    found = predictive_check(case.model, guide, X, num_draws=NUM_DRAWS, joint=case.joint, seed=0)
    first = found.p_value.isel(statistic=0)
    if not str(first.statistic.item()).endswith("mean"):
        raise AssertionError(f"the first statistic is {first.statistic.item()}")
    return _near(first, case.truth.tail, 1 / math.sqrt(NUM_DRAWS))


def _arviz(case: Case, guide: Any) -> bool:
    draws = draw_posterior(case.model, guide, X, num_draws=NUM_DRAWS, joint=case.joint, seed=0)
    group = to_arviz(draws)["posterior"]
    return _are_posterior(case.truth, np.asarray(group[case.latent])[0])


def _loo(case: Case, guide: Any) -> bool:
    found = loo(case.model, guide, X, num_draws=NUM_DRAWS, seed=0, progress=False)
    return _near(found.log_predictive, case.truth.left_out, found.log_predictive_se)


_WORDS = {True: "right", False: "wrong"}
TOOLS: Mapping[str, Callable[[Case, Any], bool]] = {
    "fit": _fit,
    "log_weights": _log_weights,
    "log_evidence": _evidence,
    "elbo_gap": _gap,
    "posterior_quality": _quality,
    "draw_posterior": _draws,
    "resolve": _resolve,
    "predictive_check": _predict,
    "to_arviz": _arviz,
    "loo": _loo,
}


# --- the table ------------------------------------------------------------------------------------


def measure(
    rows: Sequence[str] | None = None, tools: Sequence[str] = tuple(TOOLS)
) -> dict[str, dict[str, str]]:
    """What each tool says of each row: `right`, `wrong`, or the refusal's sentence.

    Args:
        rows: Of `cases()`; all if None.
        tools: Of `TOOLS`.
    """
    outside = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        known = cases()
        return {name: _row(known[name], tools) for name in rows or known}
    finally:
        torch.set_default_dtype(outside)
        pyro.clear_param_store()


def _row(case: Case, tools: Sequence[str]) -> dict[str, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of guides that were not fitted: they are set
        return {tool: _cell(TOOLS[tool], case) for tool in tools}


def _cell(tool: Callable[[Case, Any], bool], case: Case) -> str:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = case.guide(case.model)
    if case.exact:
        make_exact(guide, case.truth)
    try:
        return _WORDS[tool(case, guide)]
    except ProgramError as refusal:
        return str(refusal)


def page(table: Mapping[str, Mapping[str, str]]) -> str:
    """The document: the table, and each refusal in full below it."""
    said: dict[str, int] = {}
    lines = []
    for name, row in table.items():
        cells = [
            cell if cell in _WORDS.values() else f"[{said.setdefault(cell, len(said) + 1)}]"
            for cell in row.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    head = f"| | {' | '.join(f'`{tool}`' for tool in TOOLS)} |"
    notes = [f"{number}. {sentence}" for sentence, number in said.items()]
    return "\n".join(
        [INTRODUCTION, head, "|---" * (1 + len(TOOLS)) + "|", *lines, "", REFUSED, *notes, ""]
    )


INTRODUCTION = """\
# Pyro's autoguides and handlers in every tool

Written by `python -m benchmarks.autoguides --out docs/autoguides.md`; a test measures some rows
anew and compares. The model is a normal location with a normal prior, one for all data or, where
the row says so, one for each datum, beside what the row names (masked data, a second observed site,
discrete latents that are summed out). Posterior, evidence and predictions are known in closed form,
or by counting every state. `right`: the tool's number is the known one. `wrong`: it is not; a test
refuses a table with such a cell. A number in brackets: refused, with the sentence below the table.

In the column `fit` a new guide is trained for 400 steps, and its bound, from 200 draws, is the
evidence within 0.02 nats in all and 4.5 standard errors; of points, the mode within a tenth of a
standard deviation. In all others the guide is set to the posterior, so that each log weight must be
the evidence within 1e-6 nats (`log_weights`, `log_evidence`), the gap zero within 4.5 of its
standard errors (`elbo_gap(richer=())`), and the effective draws all draws (`posterior_quality`).
Means and variances of draws (`draw_posterior`, `resolve`, `to_arviz`), the tail area of the mean of
replicated data (`predictive_check`) and log densities of data left out (`loo`) are within 4.5
standard errors. That guides which are not exact are weighed right is not asked here.
"""
REFUSED = "Refusals, as they are raised:\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measures every cell and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/autoguides.md"))
    options = parser.parse_args(argv)
    options.out.write_text(page(measure()), encoding="utf-8")
    return 0
