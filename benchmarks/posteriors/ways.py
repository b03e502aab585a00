"""Every way to a posterior that the benchmark measures, a row each: draws and a verdict."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.infer.autoguide import (
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import Tensor

from benchmarks.posteriors.models import RealPosterior
from pyro_vae.diagnostics.posterior import posterior_quality
from pyro_vae.diagnostics.resolve import resolve
from pyro_vae.inference.draws import draw_posterior
from pyro_vae.inference.mcmc import sample_posterior
from pyro_vae.inference.supports import init_to_middle
from pyro_vae.inference.svi import Fit, fit

__all__ = ["WAYS", "Found", "Way"]

_DRAWS = 4000
_FLOW_STEPS = 2000


class Found(NamedTuple):
    """What a way gave.

    Attributes:
        mean: Of the parameters, as `RealPosterior.report` orders them.
        sd: Of the same.
        trusted: Our verdict on these, or None where there is none.
        khat: Of importance weights, or nan.
        said: What speaks against them, in words.
    """

    mean: Tensor
    sd: Tensor
    trusted: bool | None
    khat: float = np.nan
    said: str = ""


@dataclass(frozen=True)
class Way:
    """A row: what is measured, and whether it is cheap enough for the short form."""

    name: str
    find: Callable[[RealPosterior, int], dict[str, Found]]
    cheap: bool = False


def _judged(fitted: Any, posterior: RealPosterior, seed: int) -> dict[str, Found]:
    """Draws of a guide as they are, and weighted, each with its verdict."""
    pair, x = (fitted.model, fitted.guide), posterior.data
    quality = posterior_quality(*pair, x, joint=True, checks=[], seed=seed, progress=False)
    drawn = draw_posterior(*pair, x, num_draws=_DRAWS, joint=True, seed=seed + 1)
    khat, reason = float(quality.khat), str(quality.reason.values)
    found = {"": _found(posterior, drawn.latents, bool(quality.trust_guide), khat, reason)}
    weighted = drawn.resampled(seed=seed)
    trusted = bool(quality.trust_weights)
    found[", weighted"] = _found(posterior, weighted.latents, trusted, khat, reason)
    return found


def _found(posterior: RealPosterior, latents: dict[str, Tensor], *verdict: Any) -> Found:
    reported = posterior.report(latents).double()
    return Found(reported.mean(0), reported.std(0), *verdict)


def _guide(make: Callable[..., Any], **options: Any) -> Callable[..., dict[str, Found]]:
    def find(posterior: RealPosterior, seed: int) -> dict[str, Found]:
        guide = make(posterior.model, init_loc_fn=init_to_middle)
        reached = _fit(posterior, guide, seed, **options)
        return _judged(reached, posterior, seed)

    return find


def _fit(posterior: RealPosterior, guide: Any, seed: int, **options: Any) -> Fit:
    return fit(
        posterior.model, guide, posterior.data, seed=seed, progress=False, **options
    ).require_finished()


def _laplace(posterior: RealPosterior, seed: int) -> dict[str, Found]:
    reached = _fit(
        posterior, AutoLaplaceApproximation(posterior.model, init_loc_fn=init_to_middle), seed
    )
    around = reached.guide.laplace_approximation(**posterior.data)
    return _judged(_Both(posterior.model, around), posterior, seed)


class _Both(NamedTuple):
    model: Any
    guide: Any


def _deterministic(posterior: RealPosterior, seed: int) -> dict[str, Found]:
    guide = AutoNormal(posterior.model, init_loc_fn=init_to_middle)
    reached = _fit(posterior, guide, seed, method="deterministic")
    found = _judged(reached, posterior, seed)
    assert reached.posterior is not None
    latents = draw_posterior(reached, posterior.data, num_draws=2, joint=True).latents
    ends = [
        _by_site(
            reached.posterior["mean"] + sign * reached.posterior["linear_response_sd"], latents
        )
        for sign in (-1, 1)
    ]
    both = posterior.report({name: torch.stack([low[name] for low in ends]) for name in latents})
    middle, half = both.double().mean(0), (both[1] - both[0]).double().abs() / 2
    if _is_a_list(posterior, latents):
        found[", linear response"] = Found(middle, half, None)
    return found


def _by_site(values: Any, latents: dict[str, Tensor]) -> dict[str, Tensor]:
    """Numbers of all latents, one after the other, by site."""
    sizes = [value[0].numel() for value in latents.values()]
    parts = torch.as_tensor(np.asarray(values)).split(sizes)
    return {
        name: part.reshape(value.shape[1:])
        for (name, value), part in zip(latents.items(), parts, strict=True)
    }


def _is_a_list(posterior: RealPosterior, latents: dict[str, Tensor]) -> bool:
    """Whether the reported parameters are the latents themselves, in some order."""
    total = sum(value[0].numel() for value in latents.values())
    numbers = _by_site(torch.arange(1.0, total + 1), latents)
    reported = posterior.report({name: value[None] for name, value in numbers.items()})
    return sorted(reported[0].tolist()) == list(range(1, total + 1))


def _pathfinder(posterior: RealPosterior, seed: int) -> dict[str, Found]:
    reached = _fit(posterior, None, seed, method="pathfinder")
    assert reached.posterior is not None
    found = _judged(reached, posterior, seed)
    latents = draw_posterior(reached, posterior.data, num_draws=2, joint=True).latents
    rows = [_by_site(row, latents) for row in reached.posterior["draws"].values]
    draws = {name: torch.stack([row[name] for row in rows]) for name in latents}
    found[", its draws"] = _found(posterior, draws, None, float(reached.posterior.khat))
    return found


def _batch_and_match(posterior: RealPosterior, seed: int) -> dict[str, Found]:
    reached = _fit(posterior, None, seed, method="batch_and_match")
    return _judged(reached, posterior, seed)


def _resolve(posterior: RealPosterior, seed: int) -> dict[str, Found]:
    reached = _fit(posterior, None, seed, method="pathfinder")
    found = resolve(reached, posterior.data, joint=True, seed=seed, progress=False)
    usable = not found.unresolved
    khat, rung = float(found.result.khat), str(found.result.rung.values)
    return {"": _found(posterior, found.latents, usable, khat, rung)}


def _hmc(posterior: RealPosterior, seed: int) -> dict[str, Found]:
    found = sample_posterior(
        posterior.model, posterior.data, joint=True, num_samples=1000, seed=seed, progress=False
    )
    converged = float(found.rhat.max()) <= 1.01 and float(found.ess.min()) >= 400
    latents = {name: value.flatten(0, 1) for name, value in found.draws.items()}
    return {"": _found(posterior, latents, converged, np.nan, " ".join(found.notes()))}


_ROWS = (
    Way("mean-field", _guide(AutoNormal)),
    Way("full", _guide(AutoMultivariateNormal)),
    Way("low-rank", _guide(AutoLowRankMultivariateNormal)),
    Way("IAF", _guide(AutoIAFNormal, epochs=_FLOW_STEPS, learning_rate=5e-3)),
    Way("Laplace", _laplace),
    Way("deterministic", _deterministic, cheap=True),
    Way("Pathfinder", _pathfinder, cheap=True),
    Way(
        "batch and match",
        lambda p, seed: _judged(_fit(p, None, seed, method="batch_and_match"), p, seed),
        cheap=True,
    ),
    Way("resolve", _resolve),
    Way("HMC", _hmc),
)
WAYS = {way.name: way for way in _ROWS}
"""By name, in the order in which they are run."""
