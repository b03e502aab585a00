"""Pyro's autoguides and handlers in every tool: right by a known answer, or refused in words.

A normal location with a normal prior, whose posterior, evidence and predictions are known in closed
form. Each guide is trained, and each tool's number compared with the known one. A cell is `right`,
`wrong`, or the first words of the refusal; anything else that is raised ends the run.

    python -m benchmarks.autoguides --out docs/autoguides.md
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import autoguide
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from pyro.nn import PyroModule, PyroSample
from torch import Tensor
from torch import distributions as torch_dist

from pyro_vae import (
    elbo_gap,
    fit,
    log_evidence,
    log_weights,
    posterior_quality,
    predictive_check,
    resolve,
    to_arviz,
)
from pyro_vae.inference.draws import draw_posterior
from pyro_vae.inference.programs import Program, ProgramError

X = torch.tensor([-1.0, 0.3, 1.2, 0.5], dtype=torch.float64)
KEPT = torch.tensor([True, True, False, True])
NOISE = 2.0
NUM_DRAWS = 1000
TOLERANCE = 0.05  # nats, and posterior standard deviations: what a trained guide is off by


class Case(NamedTuple):
    """A row: programs, and what is known of them.

    Attributes:
        model: The generative program.
        guide: Makes the guide of a model.
        seen: The data that count, all of them about one location.
        local: Whether each datum has a location of its own.
        joint: What `joint` is given as.
        latent: The site of the location; None where the draws are not compared.
        trained: Whether `fit` trains it first.
    """

    model: Program
    guide: Callable[[Program], Any]
    seen: Tensor = X
    local: bool = False
    joint: bool | None = None
    latent: str | None = "z"
    trained: bool = True

    @property
    def precision(self) -> float:
        """Of the posterior of a location."""
        return 1 + (1 if self.local else len(self.seen)) / NOISE**2

    @property
    def mean(self) -> Tensor:
        """Of the posterior of a location."""
        total = self.seen if self.local else self.seen.sum()
        return total / NOISE**2 / self.precision

    @property
    def scale_of_replicated_mean(self) -> float:
        """Standard deviation of the mean of data drawn anew from the posterior."""
        variance = 1 / self.precision
        return math.sqrt((variance / len(X) if self.local else variance) + NOISE**2 / len(X))

    @property
    def log_evidence(self) -> Tensor:
        """Log p(x), of each datum or of all."""
        if self.local:
            return torch_dist.Normal(0.0, math.sqrt(1 + NOISE**2)).log_prob(self.seen)
        n = len(self.seen)
        covariance = NOISE**2 * torch.eye(n) + torch.ones(n, n)
        return torch_dist.MultivariateNormal(torch.zeros(n), covariance).log_prob(self.seen)


# --- programs -------------------------------------------------------------------------------------


def of_all(x: Tensor) -> None:
    """One location for all data."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def of_each(x: Tensor) -> None:
    """A location for each datum."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


class Module(PyroModule):
    """The first as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.z = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, x: Tensor) -> None:
        """Draws the location and observes the data."""
        z = self.z
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def under_mask(x: Tensor) -> None:
    """The third datum is masked by a handler."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)), poutine.mask(mask=KEPT):
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def with_mask(x: Tensor) -> None:
    """The third datum is masked in its distribution."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, NOISE).mask(KEPT), obs=x)


def twice(x: Tensor) -> None:
    """Two observed sites."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)
        pyro.sample("y", dist.Normal(z, NOISE), obs=x + 1)


def one_after_another(x: Tensor) -> None:
    """The data in a loop that forgets what is further back."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    for n in pyro.markov(range(len(x))):
        pyro.sample(f"x_{n}", dist.Normal(z, NOISE), obs=x[n])


def of_exponential(x: Tensor) -> None:
    """The location is the logarithm of a latent."""
    z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z.log(), NOISE), obs=x)


# --- guides ---------------------------------------------------------------------------------------


def laplace(model: Program) -> Any:
    """The normal at the mode, which the trained point gives."""
    guide = autoguide.AutoLaplaceApproximation(model)
    fit(model, guide, X, epochs=200, learning_rate=0.05, progress=False)
    return guide.laplace_approximation(X)


def listed(model: Program) -> Any:
    """A list of one autoguide."""
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoNormal(poutine.block(model, expose=["z"])))
    return guide


class Easy(EasyGuide):
    """One group of one site."""

    def guide(self, *_: Any) -> None:
        """Draws the group's vector."""
        group = self.group(match="z")
        loc = pyro.param("loc", torch.zeros(group.event_shape))
        positive = dist.constraints.positive
        scale = pyro.param("scale", torch.ones(group.event_shape), constraint=positive)
        group.sample("group", dist.Normal(loc, scale).to_event(1))


AUTOGUIDES: Mapping[str, Callable[[Program], Any]] = {
    "AutoDelta": autoguide.AutoDelta,
    "AutoNormal": autoguide.AutoNormal,
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": partial(autoguide.AutoLowRankMultivariateNormal, rank=1),
    "AutoIAFNormal": partial(autoguide.AutoIAFNormal, hidden_dim=[4]),
    "AutoLaplaceApproximation": autoguide.AutoLaplaceApproximation,
    "AutoLaplaceApproximation, its .laplace_approximation(x)": laplace,
    "AutoGuideList": listed,
    "AutoStructured": partial(
        autoguide.AutoStructured, conditionals="normal", dependencies="linear"
    ),
    "AutoGaussian": partial(autoguide.AutoGaussian, backend="dense"),
    "AutoNormalMessenger": autoguide.AutoNormalMessenger,
    "AutoHierarchicalNormalMessenger": autoguide.AutoHierarchicalNormalMessenger,
    "AutoRegressiveMessenger": autoguide.AutoRegressiveMessenger,
    "EasyGuide": Easy,
}
_UNTRAINED = ("AutoLaplaceApproximation, its .laplace_approximation(x)",)


def cases() -> dict[str, Case]:
    """The rows."""
    rows = {
        f"{name}": Case(of_all, make, trained=name not in _UNTRAINED)
        for name, make in AUTOGUIDES.items()
    }
    for name in ("AutoNormal", "AutoNormalMessenger"):
        rows[f"{name}, a latent of each datum"] = Case(of_each, AUTOGUIDES[name], local=True)
    name = "AutoMultivariateNormal"
    rows[f"{name}, a latent of each datum"] = Case(of_each, AUTOGUIDES[name], local=True)
    normal = AUTOGUIDES["AutoNormal"]
    both = torch.cat([X, X + 1])
    programs: dict[str, dict[str, Any]] = {
        "PyroModule, PyroSample": {"model": Module()},
        "poutine.mask": {"model": under_mask, "seen": X[KEPT]},
        "Distribution.mask": {"model": with_mask, "seen": X[KEPT]},
        "two observed sites": {"model": twice, "seen": both},
        "pyro.markov, joint=True": {"model": one_after_another, "joint": True},
        "LocScaleReparam": {
            "model": poutine.reparam(of_all, config={"z": LocScaleReparam(0.0)}),
            "latent": "z_decentered",
        },
        "TransformReparam": {
            "model": poutine.reparam(of_exponential, config={"z": TransformReparam()}),
            "latent": "z_base",
        },
    }
    return rows | {
        f"AutoNormal, {name}": Case(guide=normal, **row) for name, row in programs.items()
    }


# --- tools ----------------------------------------------------------------------------------------


def _near(found: Any, expected: Any, error: Any = 0.0) -> bool:
    difference = np.abs(np.asarray(found) - np.asarray(expected))
    return bool((difference < TOLERANCE + 4 * np.asarray(error)).all())


def _are_posterior(case: Case, values: Any) -> bool:
    """Means and standard deviations of independent draws, `[draws, ...]`, in standard errors."""
    draws = np.asarray(values, dtype=float).reshape(len(values), -1)
    scale = 1 / math.sqrt(case.precision)
    error = scale / math.sqrt(len(draws))
    mean = np.asarray(case.mean).reshape(-1)
    return _near(draws.mean(0), mean, error) and _near(draws.std(0), scale, error)


def _fit(case: Case, guide: Any) -> bool:
    fitted = fit(case.model, guide, X, epochs=20, learning_rate=1e-4, progress=False)
    if isinstance(guide, autoguide.AutoDelta | autoguide.AutoLaplaceApproximation):
        return _near(guide(X)["z"].detach(), case.mean)
    bound = float(fitted.history["bound"][-20:].mean())
    return _near(bound, case.log_evidence.sum() / len(X))


def _log_weights(case: Case, guide: Any) -> bool:
    found = log_weights(case.model, guide, X, NUM_DRAWS, joint=case.joint, seed=0)
    found = found if isinstance(found, Tensor) else found.joint
    bound = found.detach().logsumexp(0) - math.log(NUM_DRAWS)
    return _near(bound.sum(), case.log_evidence.sum())


def _evidence(case: Case, guide: Any, **options: Any) -> bool:
    found = log_evidence(case.model, guide, X, joint=case.joint, seed=0, progress=False, **options)
    return _near(found.log_evidence, case.log_evidence, found.log_evidence_se)


def _gap(case: Case, guide: Any) -> bool:
    found = elbo_gap(case.model, guide, X, richer=(), max_steps=100, seed=0, progress=False)
    right = _near(found.log_evidence, case.log_evidence, found.log_evidence_se)
    return right and _near(found.gap, 0.0, found.gap_se)


def _quality(case: Case, guide: Any) -> bool:
    found = posterior_quality(
        case.model, guide, X, checks=(), joint=case.joint, seed=0, progress=False
    )
    return bool((np.asarray(found.ess) > 0.9 * NUM_DRAWS).all())


def _draws(case: Case, guide: Any) -> bool:
    found = draw_posterior(case.model, guide, X, num_draws=NUM_DRAWS, joint=case.joint, seed=0)
    return case.latent is None or _are_posterior(case, found.latents[case.latent].detach())


def _resolve(case: Case, guide: Any) -> bool:
    found = resolve(case.model, guide, X, joint=case.joint, seed=0, progress=False)
    return case.latent is None or _are_posterior(case, found.latents[case.latent].detach())


def _predict(case: Case, guide: Any) -> bool | None:
    """The tail area of the mean of replicated data, which is normal; None where no one knows it."""
    found = predictive_check(case.model, guide, X, num_draws=NUM_DRAWS, joint=case.joint, seed=0)
    if not torch.equal(case.seen, X) or case.joint:
        return None
    below = torch_dist.Normal(case.mean.mean(), case.scale_of_replicated_mean).cdf(X.mean())
    expected = 2 * min(float(below), 1 - float(below))
    return _near(found.p_value.sel(statistic="mean"), expected, 1 / math.sqrt(NUM_DRAWS))


def _arviz(case: Case, guide: Any) -> bool:
    draws = draw_posterior(case.model, guide, X, num_draws=NUM_DRAWS, joint=case.joint, seed=0)
    group = to_arviz(draws)["posterior"]
    values = np.asarray(group[case.latent])[0]
    return _are_posterior(case, values)


_WORDS = {True: "right", False: "wrong", None: "runs"}
TOOLS: Mapping[str, Callable[[Case, Any], bool | None]] = {
    "fit": _fit,
    "log_weights": _log_weights,
    "log_evidence": _evidence,
    "annealed": partial(_evidence, method="annealed", num_temperatures=20, num_chains=100),
    "elbo_gap": _gap,
    "posterior_quality": _quality,
    "draw_posterior": _draws,
    "resolve": _resolve,
    "predictive_check": _predict,
    "to_arviz": _arviz,
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
    known = cases()
    try:
        return {name: _row(known[name], tools) for name in rows or known}
    finally:
        torch.set_default_dtype(outside)
        pyro.clear_param_store()


def _row(case: Case, tools: Sequence[str]) -> dict[str, str]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of guides that were not fitted, in cells that refuse them
        guide = case.guide(case.model)
        if case.trained:
            try:
                for rate in (0.05, 0.005):
                    fit(case.model, guide, X, epochs=300, learning_rate=rate, progress=False)
            except ProgramError:  # said in its own cell
                pass
        return {tool: _cell(TOOLS[tool], case, guide) for tool in tools}


def _cell(tool: Callable[[Case, Any], bool | None], case: Case, guide: Any) -> str:
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

Written by `python -m benchmarks.autoguides --out docs/autoguides.md`. The model is a normal
location with a normal prior, one for all data or, where the row says so, one for each datum; its
posterior and evidence are known in closed form. `right`: the guide was trained by `fit`, and the
tool's number is the known one, within 0.05 nats (or standard deviations) and four standard errors.
`runs`: it gave a number that nobody checked. A number in brackets: refused, with the sentence
below the table.

Compared are the bound after `fit` (of points, the mode), the evidence by `log_weights`, by
importance and by `method="annealed"`, evidence and gap of `elbo_gap(richer=())`, the effective size
of the weights, means and standard deviations of draws, and the tail area of the replicated mean.
"""
REFUSED = "Refusals, as they are raised:\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measures every cell and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/autoguides.md"))
    options = parser.parse_args(argv)
    options.out.write_text(page(measure()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
