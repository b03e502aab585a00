r"""log p(x_n | theta) of each datum at draws of the global latents, its own latents integrated out.

.. math:: \hat p(x_n \mid \theta) = \frac1K \sum_k
          \frac{p(x_n, z_{nk} \mid \theta)}{q(z_{nk} \mid x_n, \theta)}

which is exact where discrete latents are summed out, or a datum has none of its own. It is
unbiased, so weights made of products of it are right whatever K is, as those of pseudo-marginal
methods: only their spread grows.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyro
import torch
from jaxtyping import Float
from pyro.poutine import Trace
from torch import Tensor

from pyro_vae.inference.log_weights import importance_bound
from pyro_vae.inference.programs import (
    JointOnlyError,
    Pair,
    Program,
    ProgramError,
    ProgramStructure,
    Site,
    Split,
    SubsampleError,
    UnconstrainedModel,
    as_arguments,
    inspected_guide,
    particles_at_once,
    redraw_local,
    split_count,
    sum_traces,
    weighted_sites,
)

__all__ = ["GlobalDraws", "GlobalModel", "inspect_globals"]

_PILOT = 8  # draws that choose where latents of new data are drawn from

_COMPUTED = ("name", "masked_log_prob", "log_prob", "log_prob_sum", "unscaled_log_prob")

Traces = list[tuple[Trace, Trace, int]]


class GlobalDraws(NamedTuple):
    """Draws of the global latents with what their weights are made of.

    Attributes:
        traces: Runs of the guide that hold them, by the number of draws in each.
        u: They in unconstrained space, `[draws, 1, dim]`; None where they have none.
        log_ratio: log p(theta) - log q(theta) in nats, `[draws]`.
        log_likelihood: log p(x | theta) of all data, `[draws]`.
        pointwise: log p(x_n | theta) of the data asked for, `[draws, datum]`.
        surrogate: What WAIC makes of each of all data, `[all]`; None where no part was asked for.
        fit: Log of the mean density of each of all data, `[all]`; None likewise.
    """

    traces: Traces
    u: Float[Tensor, "draws 1 dim"] | None
    log_ratio: Float[Tensor, " draws"]
    log_likelihood: Float[Tensor, " draws"]
    pointwise: Float[Tensor, "draws datum"]
    surrogate: Float[Tensor, " all"] | None = None
    fit: Float[Tensor, " all"] | None = None

    @property
    def log_weights(self) -> Float[Tensor, " draws"]:
        """Log of p(theta, x) / q(theta), in nats."""
        return self.log_ratio + self.log_likelihood


def inspect_globals(model: Program, guide: Program, x: Any) -> Pair:
    """Inspects a pair that has global latents.

    Raises:
        ProgramError: If it has none, or is refused by `log_weights`.
    """
    try:
        pair = Pair.inspect(model, guide, x, joint=None)
    except JointOnlyError as error:
        raise ProgramError(error.reason) from error
    if pair.structure.scale != 1.0:
        raise SubsampleError("the programs subsample or rescale their data")
    if pair.structure.split is not None:
        pair.split_log_weights(1)  # refuses guides that draw all latents as one vector
    return pair


@dataclass
class GlobalModel:
    """log p(theta) and log p(x_n | theta) of a pair with global latents.

    Attributes:
        pair: Inspected, with global latents.
        num_inner: Draws of each datum's latents beside one draw of the global ones.
        max_memory: Of the draws made at once, in GiB, roughly.
    """

    pair: Pair
    num_inner: int
    max_memory: float

    def __post_init__(self) -> None:
        """Finds out whether data have latents to draw, and a way to move the global ones."""
        structure = self.pair.structure
        assert structure.split is not None
        if not set(structure.latents) & structure.split.local_sites:
            self.num_inner = 1
        bare = replace(self.pair, structure=replace(structure, latents=self.split.global_latents))
        self._free: UnconstrainedModel | None = None
        try:
            self._free = UnconstrainedModel(bare)
        except ProgramError:  # discrete, or without a transform: weights alone must do
            return

    @property
    def split(self) -> Split:
        """Where the data are."""
        split = self.pair.structure.split
        assert split is not None
        return split

    @property
    def most(self) -> int:
        """Draws that memory has room for at once."""
        return particles_at_once(
            2**31, self.max_memory, self.pair.bytes_of_particle * self.num_inner
        )

    # --- draws ------------------------------------------------------------------------------------

    def draw(self, num_draws: int, rows: Tensor | None = None) -> GlobalDraws:
        """Draws from the guide, with the pointwise densities of these rows alone, or of all."""
        parts, sums = [], _Sums()
        for count in split_count(num_draws, min(self.most, num_draws)):
            with torch.no_grad(), pyro.validation_enabled(False):
                draws = self.pair.draws(count)
                log_ratio = self._log_ratio(draws)
                each = self._pointwise(draws, self.pair, self.pair.guide)
                free = self._free
                u = free and torch.cat([free.flatten(model, n) for _, model, n in draws])
            total = each.sum(1)
            if rows is not None:
                sums.add(log_ratio + total, each)
                each = each[:, rows]
            parts.append((self._globals_of(draws), u, log_ratio, total, each))
        traces, us, *numbers = zip(*parts, strict=True)
        found = [torch.cat(column) for column in numbers]
        whole = [trace for part in traces for trace in part]
        moving = None if self._free is None else torch.cat([u.double() for u in us])
        log_ratio, total, each = found
        surrogate, fit = sums.columns()
        return GlobalDraws(whole, moving, log_ratio, total, each, surrogate, fit)

    def at(self, u: Float[Tensor, "draws 1 dim"], rows: Tensor | None = None) -> GlobalDraws:
        """The densities at given global latents; `log_ratio` is then log p(u), with Jacobian."""
        assert self._free is not None
        parts = []
        for part in u.split(self.most):
            with torch.no_grad(), pyro.validation_enabled(False):
                runs = self._free.runs(part.to(self._free.like))
                kept = self._globals_of([(trace, trace, count) for trace, count, _ in runs])
                draws = [(b, t, n) for (b, _, n), (t, *_) in zip(kept, runs, strict=True)]
                jacobian = torch.cat([jacobian for *_, jacobian in runs])[:, 0]
                prior = sum_traces([(t, n) for _, t, n in draws], self.structure, self._is_global)
                each = self._pointwise(draws, self.pair, self.pair.guide)
            total = each.sum(1)
            log_prior = (prior[:, 0] + jacobian).double()
            chosen = each if rows is None else each[:, rows]
            parts.append((kept, log_prior, total, chosen))
        traces, *numbers = zip(*parts, strict=True)
        whole = [trace for part in traces for trace in part]
        return GlobalDraws(whole, u, *(torch.cat(column) for column in numbers))

    def of_new_data(self, draws: GlobalDraws, x: Any) -> Float[Tensor, "draws new"]:
        """Log p(x_n | theta) of other data at draws of the global latents.

        Latents of the new data come from the guide, or from their prior, whichever bounds their
        density the more tightly at a few of the draws (a guide with parameters for each of the
        training data knows nothing of them).
        """
        other = replace(self.pair, x=x, traces=None)
        prior = inspected_guide(self.pair.model, None)
        with torch.no_grad(), pyro.validation_enabled(False):
            chosen = prior if self.num_inner == 1 else self._proposal(draws, other, prior)
            return torch.cat(
                [self._pointwise([trace], other, chosen, redraw=True) for trace in draws.traces]
            )

    def _proposal(self, draws: GlobalDraws, other: Pair, prior: Program) -> Program:
        guide_trace, model_trace, count = draws.traces[0]
        some = [(guide_trace, model_trace, count)]
        if count == 1:
            some = draws.traces[:_PILOT]
        by_prior = self._pointwise(some, other, prior, redraw=True)
        try:
            by_guide = self._pointwise(some, other, self.pair.guide, redraw=True)
        except (IndexError, RuntimeError, ValueError):  # parameters for other data than these
            return prior
        tighter = by_guide.shape == by_prior.shape and by_guide.sum() > by_prior.sum()
        return self.pair.guide if tighter else prior

    # --- densities --------------------------------------------------------------------------------

    @property
    def structure(self) -> ProgramStructure:
        """Of the pair."""
        return self.pair.structure

    def _is_local(self, name: str, _site: Site) -> bool:
        return name in self.split.local_sites

    def _is_global(self, name: str, _site: Site) -> bool:
        return name not in self.split.local_sites

    def _log_ratio(self, draws: Traces) -> Float[Tensor, " draws"]:
        p = sum_traces([(model, n) for _, model, n in draws], self.structure, self._is_global)
        q = sum_traces([(guide, n) for guide, _, n in draws], self.structure, self._is_global)
        return (p - q)[:, 0].double()

    def _globals_of(self, draws: Traces) -> Traces:
        """The draws of the global latents alone: those of all data are too many to keep."""
        kept = []
        for guide_trace, _, count in draws:
            bare = Trace()
            for name, site in weighted_sites(guide_trace).items():
                if name not in self.split.local_sites and not site["is_observed"]:
                    fields = {k: v for k, v in site.items() if k not in _COMPUTED}
                    bare.add_node(name, **fields)
            kept.append((bare, bare, count))
        return kept

    def _pointwise(
        self, draws: Traces, pair: Pair, proposal: Program, *, redraw: bool = False
    ) -> Float[Tensor, "draws datum"]:
        count, arguments = sum(n for *_, n in draws), as_arguments(pair.x)
        if redraw or self.num_inner > 1:
            programs = (pair.model, proposal, arguments, self.structure)
            draws = redraw_local(*programs, draws, self.num_inner)
        inside = replace(
            self.structure, batch_dim=self.split.dim, batch_size=self.split.size, split=None
        )
        log_p = sum_traces([(model, n) for _, model, n in draws], inside, self._is_local)
        log_q = sum_traces([(guide, n) for guide, _, n in draws], inside, self._is_local)
        each = (log_p - log_q).double().unflatten(0, (count, self.num_inner))
        return importance_bound(each.movedim(1, 0).flatten(1)).reshape(count, -1)


class _Sums:
    """Weighted moments of log p(x_n | theta) over draws that come in parts."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, log_weights: Tensor, each: Tensor) -> None:
        """Adds some draws: their log weights, and the densities of all data."""
        top = log_weights.logsumexp(0)
        share = (log_weights - top).exp()
        density = (log_weights[:, None] + each).logsumexp(0)
        self._parts.append((top, density, share @ each, share @ each.square()))

    def columns(self) -> tuple[Tensor | None, Tensor | None]:
        """WAIC's estimate of each datum, and the log of its mean density."""
        if not self._parts:
            return None, None
        tops, densities, first, second = (torch.stack(c) for c in zip(*self._parts, strict=True))
        share = tops.softmax(0)
        fit = densities.logsumexp(0) - tops.logsumexp(0)
        mean = share @ first
        return fit - (share @ second - mean.square()).clamp_min(0), fit
