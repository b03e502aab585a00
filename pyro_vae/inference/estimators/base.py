r"""How a row of the table of estimators becomes a loss that Pyro can train with."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.checks import check_count
from pyro_vae.inference.programs import (
    Arguments,
    JointOnlyError,
    Program,
    ProgramError,
    ProgramStructure,
    SupportError,
    UnfittedWarning,
    common_scale,
    draw_traces,
    inspect_programs,
    is_delta,
    rerun_traces,
    sum_traces,
    weighted_sites,
)

__all__ = [
    "Coefficients",
    "Estimator",
    "Objective",
    "Terms",
    "Traces",
    "WeightedTerms",
    "Weights",
    "can_share",
    "is_number",
    "log_p_of",
    "log_q_of",
    "scale_of",
    "sites_without_path",
]

Weights = Float[Tensor, "particles batch"]
Traces = list[tuple[Trace, Trace, int]]


class Coefficients(NamedTuple):
    """A row of the table, without gradients.

    Attributes:
        value: The bound per datum, in nats.
        theta: Weight of grad log p at fixed latents.
        path: Weight of the gradient through the latents; None if no latent is to be
            reparameterised.
        score: Weight of grad log q at fixed latents.
        reinforce: Added to `score` at sites that cannot be reparameterised; None if the estimator
            cannot have such sites.
    """

    value: Float[Tensor, " batch"]
    theta: Weights
    path: Weights | None
    score: Weights
    reinforce: Weights | None


class Terms:
    """Log p and log q of the same draws: attached, and at latents held fixed.

    Every term is `[particles, batch]`, in nats and without the factor N/B: `log_p` and `log_q`
    with the gradient through the latents, `fixed_log_p` and `fixed_log_q` without it (the programs
    are run again when one of these is first asked for), and, for score functions, `drawn_log_q`,
    as `fixed_log_q`, and `unpathed_log_q`, the part of `log_q` that sites without a
    reparameterised draw have. Where sites count by scales of their own (`structure.scaled`), these
    two do not: they are of the density that was drawn from.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior.
        arguments: From `as_arguments`.
        structure: From `inspect_programs`.
        traces: From `draw_traces`.
        attached: Whether a gradient passes through the latents of `traces`.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        arguments: Arguments,
        structure: ProgramStructure,
        traces: Traces,
        attached: bool = True,
    ) -> None:
        self._programs = model, guide, arguments
        self.structure, self.traces, self.attached = structure, traces, attached
        log_p, log_q = log_p_of(traces, structure), log_q_of(traces, structure)
        self.log_weights = (log_p - log_q).detach()
        self._known: dict[str, Tensor] = {"log_p": _of_possible(log_p), "log_q": log_q}

    @cached_property
    def fixed(self) -> Traces:
        """The traces at latents through which no gradient passes."""
        return (
            rerun_traces(*self._programs, self.structure, self.traces)
            if self.attached
            else self.traces
        )

    def __getitem__(self, name: str) -> Weights:
        if name not in self._known:
            self._known[name] = self._sum(name)
        return self._known[name].expand_as(self.log_weights)

    def define(
        self, name: str, make: Callable[[Trace, Trace, int, ProgramStructure], Weights]
    ) -> Weights:
        """A further term, made from each pair of traces when it is first asked for."""
        if name not in self._known:
            parts = [make(*trace, self.structure) for trace in self.traces]
            self._known[name] = torch.cat(parts)
        return self[name]

    def _sum(self, name: str) -> Tensor:
        if name == "fixed_log_p":
            return _of_possible(log_p_of(self.fixed, self.structure))
        if name == "fixed_log_q":
            return log_q_of(self.fixed, self.structure)
        drawn = replace(self.structure, scaled=False)
        if name == "drawn_log_q":
            return log_q_of(self.fixed, drawn)
        return log_q_of(self.traces, drawn, only=sites_without_path(self.traces))


def can_share(elbo: ELBO) -> bool:
    """Whether an estimator is no more than weights of `Terms`, which others can use as well."""
    return isinstance(elbo, WeightedTerms) and all(
        getattr(type(elbo), name) is getattr(WeightedTerms, name)
        for name in ("loss_and_grads", "differentiable_loss", "_surrogate")
    )


class Objective(ELBO):
    """A value and a sum whose gradient estimates that of it; takes the place of any Pyro ELBO.

    Works with `pyro.infer.SVI`, with `fit` and as `estimator(model, guide)`. Losses are sums over
    the batch in nats, with the factor N/B of a subsampled plate outside; lower is better. After
    the first call the pair of programs is known, and a call costs one or two passes.

    Args:
        num_particles: Draws from the guide for each datum.
        joint: True for models with global latents: one weight per particle on the full data. None
            infers it: one weight per datum where there is such a thing, else joint ones.

    Raises:
        ProgramError: From every method, if the pair has no log weights (see `inspect_programs`),
            or a guide's site cannot be reparameterised and the estimator needs that; the sentence
            names the site and the estimators that would do.

    Attributes:
        value_name: Which bound the value is.
        bound_kind: What it bounds log p(x) from, in the words of `results.BOUNDS`.
        unbiased: Whether the gradient is, in expectation, that of the value.
        min_particles: The fewest particles it can work with.
        linear: Whether the value is a mean of log weights, which mini-batches estimate without
            bias even where data share latents.
    """

    value_name: ClassVar[str]
    bound_kind: ClassVar[str] = "lower"
    unbiased: ClassVar[bool] = True
    min_particles: ClassVar[int] = 1
    linear: ClassVar[bool] = False

    def __init__(self, num_particles: int = 1, *, joint: bool | None = None) -> None:
        check_count("num_particles", num_particles)
        if num_particles < self.min_particles:
            raise ValueError(
                f"{type(self).__name__} needs num_particles >= {self.min_particles}, not "
                f"{num_particles}"
            )
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self.joint = joint
        self._inspected: tuple[Program, Program, ProgramStructure] | None = None

    # -- what Pyro asks for, written once

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The negative bound, a sum over the batch in nats."""
        with torch.no_grad():
            value, scale = self._value(model, guide, (args, kwargs))
        return float(-scale * value.sum())

    def bound(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Float[Tensor, " batch"]:
        """The bound of each datum in nats, higher is better, without the factor N/B."""
        with torch.no_grad():
            return self._value(model, guide, (args, kwargs))[0]

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Float[Tensor, ""]:
        """The negative bound, whose gradient is minus the estimator's."""
        value, surrogate, scale = self._surrogate(model, guide, (args, kwargs))
        return -scale * (value.sum().detach() + surrogate - surrogate.detach())

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The negative bound; adds its gradient to the `.grad` of every parameter."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return float(loss.detach())

    def _get_trace(
        self, model: Program, guide: Program, args: Any, kwargs: Any
    ) -> tuple[Trace, Trace]:
        structure = self.structure_of(model, guide, (args, kwargs))
        return draw_traces(model, guide, (args, kwargs), structure, 1)[0][1::-1]

    # -- the one evaluation behind them

    def assume(self, model: Program, guide: Program, structure: ProgramStructure) -> None:
        """Takes a pair as inspected, which saves the runs of `inspect_programs`."""
        self._inspected = (model, guide, structure)

    def structure_of(
        self, model: Program, guide: Program, arguments: Arguments
    ) -> ProgramStructure:
        """Inspects a pair the first time it comes."""
        if self._inspected is None or self._inspected[:2] != (model, guide):
            with poutine.block(), warnings.catch_warnings():
                # A loss moves parameters; tools that measure with it inspect the pair themselves.
                warnings.simplefilter("ignore", UnfittedWarning)
                found = self._inspect(model, guide, arguments)
            self._inspected = (model, guide, found)
        return self._inspected[2]

    def _inspect(self, model: Program, guide: Program, arguments: Arguments) -> ProgramStructure:
        pair = (model, guide, arguments)
        options: dict[str, Any] = {"num_particles": self.num_particles, "linear": self.linear}
        if self.joint is not None:
            return inspect_programs(*pair, joint=self.joint, **options)
        try:
            return inspect_programs(*pair, **options)
        except SupportError:
            raise
        except ProgramError as refusal:
            try:
                return inspect_programs(*pair, joint=True, **options)
            except ProgramError as error:
                raise (error if isinstance(refusal, JointOnlyError) else refusal) from None

    def _value(
        self, model: Program, guide: Program, arguments: Arguments
    ) -> tuple[Float[Tensor, " batch"], float]:
        value, _, scale = self._surrogate(model, guide, arguments)
        return value, scale

    @abstractmethod
    def _surrogate(
        self, model: Program, guide: Program, arguments: Arguments
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, ""], float]:
        """The value, a sum whose gradient is the estimator's, and the factor N/B."""

    def check_replayable(self, structure: ProgramStructure) -> None:
        """Refuses guides whose density cannot be had at given latents."""
        if not structure.replayable:
            raise ProgramError(
                f"{type(self).__name__} needs log q at given latents, which this guide cannot "
                "give (a flow without an inverse, or a guide messenger); use PathwiseELBO, "
                "ImportanceWeighted or Renyi, or a flow with an inverse"
            )


class WeightedTerms(Objective):
    """An estimator whose gradient is a weighted sum of `Terms`, which others can share."""

    @property
    def _reparameterizes(self) -> bool:
        return True

    @abstractmethod
    def weigh(self, terms: Terms) -> tuple[Float[Tensor, " batch"], dict[str, Weights]]:
        """The value, and the weights with which the terms sum to the estimator's gradient.

        Of more particles than the estimator's own it takes the first.

        Raises:
            ProgramError: If the estimator cannot take the guide of these draws.
        """

    def _surrogate(
        self, model: Program, guide: Program, arguments: Arguments
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, ""], float]:
        structure = self.structure_of(model, guide, arguments)
        if not self._reparameterizes:
            self.check_replayable(structure)
        with nullcontext() if self._reparameterizes else _WithoutPath():
            traces = draw_traces(model, guide, arguments, structure, self.num_particles)
        terms = Terms(model, guide, arguments, structure, traces, self._reparameterizes)
        value, weights = self.weigh(terms)
        surrogate = torch.stack([(w * terms[name]).sum() for name, w in weights.items()]).sum()
        return value, surrogate, scale_of(traces, structure)


class Estimator(WeightedTerms):
    """A bound and its gradient by coefficients of the log weights: a row of the table."""

    @abstractmethod
    def coefficients(self, log_weights: Weights) -> Coefficients:
        """The estimator's row of the table, from detached log weights."""

    def _value(
        self, model: Program, guide: Program, arguments: Arguments
    ) -> tuple[Float[Tensor, " batch"], float]:
        structure = self.structure_of(model, guide, arguments)
        traces = draw_traces(model, guide, arguments, structure, self.num_particles)
        log_p, log_q = log_p_of(traces, structure), log_q_of(traces, structure)
        return self.coefficients((log_p - log_q).detach()).value, scale_of(traces, structure)

    def weigh(self, terms: Terms) -> tuple[Float[Tensor, " batch"], dict[str, Weights]]:
        """The weights of log p and log q, along the path and at fixed latents."""
        row = self.coefficients(terms.log_weights[: self.num_particles])
        if row.path is None:  # every latent is held fixed
            self.check_replayable(terms.structure)
            self._check_densities(terms.fixed)
            score = row.score if row.reinforce is None else row.score + row.reinforce
            drawn = "drawn_log_q" if terms.structure.scaled else "fixed_log_q"
            return row.value, {"fixed_log_p": row.theta, drawn: score}
        unpathed = sites_without_path(terms.traces)
        self._check_path(unpathed, terms.traces)
        if torch.equal(row.path, row.theta) and torch.equal(row.score, -row.theta):
            weights = {"log_p": row.theta, "log_q": -row.theta}  # one pass is enough
        else:
            self.check_replayable(terms.structure)
            self._check_densities(terms.fixed)
            weights = {
                "log_p": row.path,
                "log_q": -row.path,
                "fixed_log_p": row.theta - row.path,
                "fixed_log_q": row.score + row.path,
            }
        if unpathed and row.reinforce is not None:
            # Attached: their distribution also moves with reparameterised latents above them.
            weights["unpathed_log_q"] = row.reinforce
        return row.value, weights

    @cached_property
    def _reparameterizes(self) -> bool:
        return self.coefficients(torch.zeros(self.num_particles, 1)).path is not None

    def _check_path(self, fixed: list[str], traces: list[tuple[Trace, Trace, int]]) -> None:
        if not fixed:
            return
        latents = [n for n, s in weighted_sites(traces[0][0]).items() if not s["is_observed"]]
        row = self.coefficients(torch.zeros(self.num_particles, 1))
        mixed = not set(fixed) >= set(latents)
        advice = (
            f"LeaveOneOut{', PathwiseELBO' if mixed else ''} or ScoreFunction (ELBO), "
            f"VIMCO{', ImportanceWeighted' if mixed else ''} or ReweightedWakeSleep (importance "
            "bound)"
        )
        if row.reinforce is None or not mixed:
            raise ProgramError(
                f"{type(self).__name__} needs reparameterised latents, but the guide's site "
                f"'{fixed[0]}' is not; use {advice}, or StraightThrough for a relaxed gradient"
            )
        if self.num_particles < 2:
            raise ProgramError(
                f"the guide's site '{fixed[0]}' cannot be reparameterised, and its baseline needs "
                "other particles; use num_particles >= 2, or ScoreFunction"
            )

    def _check_densities(self, traces: Traces) -> None:
        """Refuses a `Delta` that its parameters move: log q at its fixed value is another one."""
        for name, site in weighted_sites(traces[0][0]).items():
            if is_delta(site["fn"]) and _point_of(site["fn"]).requires_grad:
                raise ProgramError(
                    f"{type(self).__name__} needs log q at given latents, but the guide moves its "
                    f"Delta site '{name}' by parameters, so its density is known at auxiliary "
                    "draws alone; use PathwiseELBO, ImportanceWeighted or Renyi, or draw the site "
                    "from a distribution (AutoNormal, AutoMultivariateNormal)"
                )


def log_p_of(traces: Traces, structure: ProgramStructure) -> Tensor:
    """Log p(x, z) of each particle and datum in nats, without the factor N/B."""
    return sum_traces([(model, count) for _, model, count in traces], structure)


def log_q_of(
    traces: Traces, structure: ProgramStructure, only: Collection[str] | None = None
) -> Tensor:
    """Log q(z | x) of each particle and datum in nats, of some sites or all."""
    keep = None if only is None else lambda name, _: name in only
    return sum_traces([(guide, count) for guide, _, count in traces], structure, keep)


def _of_possible(log_p: Tensor) -> Tensor:
    """Log p without its infinities: a particle of no weight moves nothing, and 0 * inf is nan."""
    return log_p.masked_fill(log_p == -torch.inf, 0.0)


def scale_of(traces: Traces, structure: ProgramStructure) -> float:
    """The factor N/B of the run at hand; 1 where every site has counted by its own."""
    if structure.scaled:
        return 1.0
    guide, model, _ = traces[0]
    joint = structure.batch_dim is None
    return common_scale(weighted_sites(guide), weighted_sites(model), joint)


def sites_without_path(traces: Traces) -> list[str]:
    """The guide's latents whose distribution has no reparameterised draw."""
    found = [
        name
        for guide, _, _ in traces
        for name, site in weighted_sites(guide).items()
        if not site["is_observed"] and not site["fn"].has_rsample
    ]
    return list(dict.fromkeys(found))


def is_number(value: Any) -> bool:
    """Whether an option is a real number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _point_of(fn: Any) -> Tensor:
    """Where a point mass lies."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn.v


class _WithoutPath(Messenger):
    """Draws latents without a gradient through them."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or type(msg["fn"]).__name__ == "_Subsample":
            return
        with torch.no_grad():
            # A clone, so that a transform computes its inverse instead of remembering it.
            msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"]).clone()
        msg["done"] = True
