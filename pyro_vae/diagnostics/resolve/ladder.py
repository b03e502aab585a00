"""The rungs of the ladder: ways to draw from a posterior, each started from what the last one left.

A rung works on all data that are still without usable draws, in unconstrained space. `RUNGS` is the
registry: a row is a name, its paper, and a function from a `LadderState` to an `Attempt`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pyro_vae.diagnostics.posterior import Thresholds, assess
from pyro_vae.inference.log_weights import (
    effective_sample_size,
    importance_bound,
    khat_threshold,
    weighted_columns,
)
from pyro_vae.inference.mcmc import bulk_ess, hmc_step, jittered, split_rhat
from pyro_vae.inference.programs import UnconstrainedModel
from pyro_vae.inference.refit import (
    Normal,
    WeightedDraws,
    batch_and_match,
    match_moments,
    weighted_normal,
)
from pyro_vae.inference.tempered import Point, Tempered, in_double

__all__ = ["RUNGS", "Attempt", "LadderState", "Rung"]

_MOST_TEMPERATURES = 60
_ISLANDS = 4  # populations that are tempered apart, so that their agreement can be judged
_NUM_SCOUTS = 64
_NUM_CHAINS = 8
_CHAIN_LENGTH = 250  # of shorter chains R-hat is above 1.01 by chance
_NUM_LEAPFROG = 6


@dataclass
class LadderState:
    """What the rungs know of the data that are still on the ladder.

    Attributes:
        latent_model: Log joint of these data.
        num_draws: Draws that each rung makes.
        thresholds: What counts as good enough.
        draws: Of the last rung that has weights.
        normal: The last fitted normal distribution, or None.
        start: Draws that a Markov chain may start from, `[count, batch, dim]`, or None.
        scouts: Draws that were tempered from the prior, `[count, batch, dim]`: they owe nothing to
            the guide, so draws that leave them out have missed something.
    """

    latent_model: UnconstrainedModel
    num_draws: int
    thresholds: Thresholds
    draws: WeightedDraws
    normal: Normal | None = None
    start: Tensor | None = None
    scouts: Tensor | None = None

    def of(self, data: Tensor, latent_model: UnconstrainedModel) -> "LadderState":
        """The same for some of the data, whose latent_model it is."""
        normal = self.normal and Normal(self.normal.loc[data], self.normal.chol[data])
        start, scouts = (None if u is None else u[:, data] for u in (self.start, self.scouts))
        draws = WeightedDraws(*(part[:, data] for part in self.draws))
        return LadderState(
            latent_model, self.num_draws, self.thresholds, draws, normal, start, scouts
        )

    def log_joint(self, u: Float[Tensor, "count batch dim"]) -> Float[Tensor, "count batch"]:
        """Log p(x, u) in nats, -inf where it is undefined."""
        with torch.no_grad():
            found = self.latent_model.log_density(u.to(self.latent_model.like)).double()
        return torch.nan_to_num(found, nan=-math.inf)

    def send_scouts(self) -> None:
        """Tempers a few draws of the prior."""
        target = in_double(Tempered(self.latent_model))
        self.scouts, _ = _sequential(target, self.latent_model, _NUM_SCOUTS, islands=1)

    def misses(self, u: Float[Tensor, "count batch dim"]) -> Bool[Tensor, " batch"]:
        """Whether scouts stand where none of the draws does."""
        if self.scouts is None:
            return torch.zeros(u.shape[1], dtype=torch.bool)
        around = weighted_normal(u, torch.zeros_like(u[..., 0]))
        reach = around.to_noise(u).square().sum(-1).amax(0)
        outside = around.to_noise(self.scouts).square().sum(-1) > 1.5 * reach
        return outside.double().mean(0) > 0.03


@dataclass(frozen=True)
class Attempt:
    """What a rung gives for the data that it was asked for.

    Attributes:
        u: Draws in unconstrained space, `[count, batch, dim]`.
        passed: Which may be used, `[batch]`.
        log_evidence: log p(x) in nats with its standard error, `[batch]` each.
        khat: Of the weights behind the draws; nan where there are none.
        ess: Effective draws.
        rhat: Of the chains behind the draws; nan where there are none.
    """

    u: Float[Tensor, "count batch dim"]
    passed: Bool[Tensor, " batch"]
    log_evidence: Float[Tensor, " batch"]
    log_evidence_se: Float[Tensor, " batch"]
    khat: Float[Tensor, " batch"]
    ess: Float[Tensor, " batch"]
    rhat: Float[Tensor, " batch"]


@dataclass(frozen=True)
class Rung:
    """One row of the ladder.

    Attributes:
        name: As the result calls it.
        description: What it does, for the reader.
        reference: Where it comes from.
        run: Makes the attempt, and leaves in the `LadderState` what the next rung starts from.
    """

    name: str
    description: str
    reference: str
    run: Callable[[LadderState], Attempt]


def _as_they_are(state: LadderState) -> Attempt:
    columns, verdict = _assess(state, state.draws)
    passed = verdict.trust_guide & ~state.misses(state.draws.u)
    return _attempt(state.draws, state.draws.u, passed, columns)


def _weighted(state: LadderState) -> Attempt:
    return _resample(state, state.draws)


def _moments_matched(state: LadderState) -> Attempt:
    enough = khat_threshold(state.num_draws) - 0.1  # room for k-hat's own error
    state.draws = match_moments(state.log_joint, state.draws, enough=enough)
    return _resample(state, state.draws)


def _matched_normal(state: LadderState) -> Attempt:
    begin = weighted_normal(state.draws.u, state.draws.log_weights)
    plain = weighted_normal(state.draws.u, torch.zeros_like(state.draws.log_weights))
    begin = _where_finite(begin, plain)
    target = in_double(Tempered(state.latent_model))
    state.normal = batch_and_match(target, begin)
    u = state.normal.draw(state.num_draws)
    state.draws = WeightedDraws(u, state.log_joint(u).double(), state.normal.log_prob(u))
    return _resample(state, state.draws)


def _tempered(state: LadderState, times: int = 1) -> Attempt:
    """Sequential Monte Carlo from the prior, in islands; its draws start the chains."""
    target = in_double(Tempered(state.latent_model))
    count = times * (state.num_draws // _ISLANDS) * _ISLANDS
    u, log_z = _sequential(target, state.latent_model, count, islands=_ISLANDS)
    log_evidence = log_z.logsumexp(0) - math.log(_ISLANDS)
    se = (log_z - log_evidence).exp().std(0) / math.sqrt(_ISLANDS)
    rhat, ess = _mixing(u.unflatten(0, (_ISLANDS, -1)), state.latent_model.active)
    state.start = u
    nan = torch.full_like(log_evidence, math.nan)
    passed = (rhat <= state.thresholds.rhat) & (ess >= state.thresholds.reference_ess)
    return Attempt(_spread(u, state.num_draws), passed, log_evidence, se, nan, ess, rhat)


def _tempered_again(state: LadderState) -> Attempt:
    return _tempered(state, times=4)


def _spread(u: Float[Tensor, "count batch dim"], num_draws: int) -> Tensor:
    """So many of the draws, evenly apart."""
    return u[torch.linspace(0, len(u) - 1, num_draws).round().long()]


def _chains(state: LadderState) -> Attempt:
    """HMC in the coordinates of the normal distribution of the tempered draws."""
    assert state.start is not None
    u, length = state.start[torch.randperm(len(state.start))], _CHAIN_LENGTH
    starts = u[:_NUM_CHAINS]
    for _ in range(3):  # chains that have not mixed go on, with a covariance of their own
        around = weighted_normal(u, torch.zeros_like(u[..., 0]))
        target = _Whitened(in_double(Tempered(state.latent_model)), around)
        kept = _run_chains(target, around.to_noise(starts), num_warmup=150, num_samples=length)
        rhat, ess = _mixing(kept, state.latent_model.active)
        passed = (rhat <= state.thresholds.rhat) & (ess >= state.thresholds.reference_ess)
        u = around.from_noise(kept.transpose(0, 1).flatten(0, 1))
        starts, length = u[-_NUM_CHAINS:], 2 * length
        if bool(passed.all()):
            break
    nan = torch.full_like(rhat, math.nan)
    return Attempt(_spread(u, state.num_draws), passed, nan, nan, nan, ess, rhat)


RUNGS = (
    Rung("guide", "the guide's draws as they are", "Li et al. (2026)", _as_they_are),
    Rung(
        "importance resampling",
        "the guide's draws, resampled by their weights",
        "Vehtari et al. (2024)",
        _weighted,
    ),
    Rung(
        "moment matching",
        "the guide's draws, moved to the moments of the weighted ones and weighted",
        "Paananen et al. (2021)",
        _moments_matched,
    ),
    Rung(
        "batch and match",
        "a normal distribution of full covariance fitted to the datum, weighted",
        "Cai et al. (2024)",
        _matched_normal,
    ),
    Rung(
        "tempered",
        "sequential Monte Carlo from the prior, in four populations that must agree",
        "Del Moral, Doucet & Jasra (2006)",
        _tempered,
    ),
    Rung(
        "tempered, four times the draws",
        "the same with more, for modes whose shares must be found",
        "Del Moral, Doucet & Jasra (2006)",
        _tempered_again,
    ),
    Rung("hmc", "chains started from the tempered draws", "Neal (2011)", _chains),
)
"""From the cheapest to the dearest."""


# --- weights --------------------------------------------------------------------------------------


def _assess(state: LadderState, draws: WeightedDraws):  # noqa: ANN202
    columns = weighted_columns(draws.u, draws.log_weights)
    names = [f"u[{i}]" for i in range(draws.u.shape[-1])]
    return columns, assess(columns, names, len(draws.u), state.thresholds)


def _resample(state: LadderState, draws: WeightedDraws) -> Attempt:
    columns, verdict = _assess(state, draws)
    share = (draws.log_weights.double() - draws.log_weights.logsumexp(0)).exp()
    share = torch.nan_to_num(share, nan=0.0).clamp_min(1e-300)
    marks = (torch.arange(len(share)) + torch.rand(share.shape[1], 1)) / len(share)
    heights = share.T.cumsum(1)
    index = torch.searchsorted(heights / heights[:, -1:], marks.to(heights)).T
    index = index.clamp_max(len(share) - 1)
    u = draws.u.gather(0, index[..., None].expand_as(draws.u))
    passed = verdict.trust_weights & ~state.misses(u)
    return _attempt(draws, u[torch.randperm(len(u))], passed, columns)


def _attempt(
    draws: WeightedDraws, u: Tensor, passed: Tensor, columns: dict[str, Tensor]
) -> Attempt:
    log_weights = draws.log_weights.double()
    evidence = importance_bound(log_weights)
    se = (log_weights - evidence).exp().std(0) / math.sqrt(len(u))
    nan = torch.full_like(evidence, math.nan)
    ess = effective_sample_size(log_weights)
    return Attempt(u, passed, evidence, se, columns["khat"], ess, nan)


def _where_finite(first: Normal, second: Normal) -> Normal:
    good = first.loc.isfinite().all(-1) & first.chol.isfinite().all(-1).all(-1)
    return Normal(
        torch.where(good[:, None], first.loc, second.loc),
        torch.where(good[:, None, None], first.chol, second.chol),
    )


# --- chains ---------------------------------------------------------------------------------------


class _Whitened:
    """A target in the coordinates in which a normal distribution is standard."""

    def __init__(self, target: Callable[[Tensor], Point], normal: Normal) -> None:
        self.target, self.normal = target, normal

    def __call__(self, v: Float[Tensor, "chains batch dim"]) -> Point:
        at = self.target(self.normal.from_noise(v))
        gradient = torch.einsum("nij,cni->cnj", self.normal.chol, at.gradient)
        return Point(v, at.log_density, gradient, at.joint, at.start)


def _sequential(
    target: Callable[..., Point], latent_model: UnconstrainedModel, count: int, *, islands: int
) -> tuple[Float[Tensor, "count batch dim"], Float[Tensor, "islands batch"]]:
    """Tempers draws of the prior, every datum by itself; draws and log evidence of each island."""
    u = latent_model.draw(count, "prior").double()
    beta = torch.zeros(u.shape[1], dtype=torch.float64)
    log_z = torch.zeros(islands, u.shape[1], dtype=torch.float64)
    step = torch.full_like(beta, 0.5 * u.shape[-1] ** -0.25)
    point = target(u, beta)
    for _ in range(_MOST_TEMPERATURES):
        ratio = torch.nan_to_num(point.joint - point.start, nan=-math.inf)
        new = _next_temperature(ratio, beta)
        log_w = ((new - beta) * ratio).unflatten(0, (islands, -1))
        log_z = log_z + log_w.logsumexp(1) - math.log(log_w.shape[1])
        parts = zip(u.chunk(islands), log_w, strict=True)
        u, beta = torch.cat([_resampled(part, weights) for part, weights in parts]), new
        mass = u.var(0).clamp_min(1e-12)
        point = target(u, beta)
        # The last distribution gets more moves, so that copies part.
        for _ in range(3 + 7 * bool((beta >= 1).all())):
            moved = hmc_step(
                lambda at: target(at, beta),  # noqa: B023
                point,
                jittered(step, point),
                num_leapfrog=_random_length(),
                scale=mass.sqrt(),
                active=latent_model.active,
            )
            point = moved.point
            step = (step * torch.exp(0.7 * (moved.acceptance.mean(0) - 0.75))).clamp(1e-4, 2.0)
        u = point.u
        if bool((beta >= 1).all()):
            break
    return u, log_z


def _random_length() -> int:
    return int(torch.randint(1, 2 * _NUM_LEAPFROG, ()))


def _next_temperature(
    ratio: Float[Tensor, "count batch"], beta: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """The largest temperature at which half of the draws are effective, by bisection."""
    low, high = beta, torch.ones_like(beta)
    good = effective_sample_size((high - beta) * ratio) >= 0.5 * len(ratio)
    for _ in range(30):
        middle = (low + high) / 2
        enough = effective_sample_size((middle - beta) * ratio) >= 0.5 * len(ratio)
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(good | (beta >= 1), torch.ones_like(beta), low.clamp_min(1e-12))


def _resampled(v: Float[Tensor, "count batch dim"], log_w: Float[Tensor, "count batch"]) -> Tensor:
    share = torch.nan_to_num((log_w - log_w.logsumexp(0)).exp(), nan=1 / len(v))
    heights = share.T.cumsum(1)
    marks = (torch.arange(len(v)) + torch.rand(len(heights), 1)) / len(v)
    index = torch.searchsorted(heights / heights[:, -1:], marks.to(heights)).clamp_max(len(v) - 1)
    return v.gather(0, index.T[..., None].expand_as(v))


def _run_chains(
    target: Callable[[Tensor], Point], v: Tensor, *, num_warmup: int, num_samples: int
) -> Float[Tensor, "chains draws batch dim"]:
    point, kept = target(v), []
    step = torch.full((v.shape[1],), v.shape[-1] ** -0.25, dtype=v.dtype)
    for count in range(num_warmup + num_samples):
        moved = hmc_step(
            target,
            point,
            jittered(step, point),
            num_leapfrog=int(torch.randint(1, 2 * _NUM_LEAPFROG, ())),
        )
        point = moved.point
        if count < num_warmup:  # steps of Robbins and Monro towards an acceptance of 0.8
            gain = 1 / math.sqrt(count / 4 + 1)
            step = (step * torch.exp(gain * (moved.acceptance.mean(0) - 0.8))).clamp(1e-5, 2.5)
        else:
            kept.append(point.u)
    return torch.stack(kept, 1)


def _mixing(kept: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    rhat, ess = split_rhat(kept), bulk_ess(kept)
    on = active.any(-1, keepdim=True) & active
    return (
        torch.where(on, rhat, 1.0).amax(-1),
        torch.where(on, ess, math.inf).amin(-1),
    )
