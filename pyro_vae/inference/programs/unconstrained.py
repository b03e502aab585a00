r"""The log joint of any Pyro model as a function of one unconstrained vector per chain and datum.

.. math:: u \mapsto \log p(x_n, z = T(u)) + \log \lvert \det T'(u) \rvert

with T the transform of each latent site onto its support (`torch.distributions.biject_to`). The
transforms are taken anew in every run, so a support may depend on other latents. What samplers and
annealing need is here; they know nothing of Pyro.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from pyro import poutine
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.inference.programs.arguments import (
    Program,
    ProgramError,
    ProgramStructure,
    Site,
)
from pyro_vae.inference.programs.inspection import Pair
from pyro_vae.inference.programs.refusals import is_delta
from pyro_vae.inference.programs.simulate import inspected_guide, layers, prior_guide
from pyro_vae.inference.programs.traces import (
    draw_traces,
    enumerating,
    in_particle_plate,
    site_log_prob,
    site_values,
    subsamples,
    sum_dims,
    sum_sites,
    weighted_sites,
)
from pyro_vae.inference.supports import family_of, support_of, transform_of

__all__ = [
    "LogDensities",
    "UnconstrainedModel",
    "unconstrained_model",
]

_STRAIGHT_THROUGH = (
    dist.RelaxedBernoulliStraightThrough,
    dist.RelaxedOneHotCategoricalStraightThrough,
)


class LogDensities(NamedTuple):
    """Log-densities of the unconstrained latents in nats, Jacobians included.

    Attributes:
        joint: log p(x, z), `[chains, batch]`.
        start: log p(z) of the prior, or log q(z | x) where the guide was asked for.
    """

    joint: Float[Tensor, "chains batch"]
    start: Float[Tensor, "chains batch"]


@dataclass(frozen=True)
class _Layout:
    """Where one latent site lies in the flat vector of a datum."""

    name: str
    plates: tuple[int, ...]  # the site's batch shape
    free_event: tuple[int, ...]  # event shape in unconstrained space
    start: int
    stop: int


class UnconstrainedModel:
    r"""A model's log joint over unconstrained latents `[chains, batch, dim]`.

    Its methods run the user's programs: call them inside `programs.program_scope`.

    Attributes:
        structure: What `inspect_programs` found.
        num_data: Data in the batch (1 if joint).
        dim: Unconstrained latents of a datum.
        active: False for latents that a mask switches off, `[batch, dim]`: they have no density.
        like: A zero of the latents' device, in the wider type of latents and data: beside float64
            data their density is one of float64, whatever type a prior of Python numbers has.
    """

    def __init__(self, pair: Pair, *, has_guide: bool = True) -> None:
        """Of a pair; `has_guide` is False where its guide stands in for a missing one.

        Raises:
            ProgramError: If a latent is discrete or has no transform onto its support, or there is
                none.
        """
        model, guide, arguments, structure = pair.model, pair.guide, pair.arguments, pair.structure
        if not structure.latents:
            raise ProgramError("the model has no latent site to sample; its log joint is a number")
        self._guide, self._arguments = guide, arguments
        self._model = enumerating(model, structure)
        self.structure, self.has_guide = structure, has_guide
        guide_trace, model_trace = pair.first_run()
        self._fixed = subsamples(guide_trace, model_trace)
        self._plain_model = poutine.replay(model, trace=self._fixed)
        sites = weighted_sites(model_trace)
        self.num_data = structure.batch_size if structure.batch_dim is not None else 1
        self._layouts = _lay_out(sites, structure, self.num_data)
        self._forms = {
            name: (site["fn"], site["mask"])
            for name, site in sites.items()
            if name in structure.latents
        }
        self.dim = self._layouts[-1].stop
        self.like = _wide_zero(site["value"] for site in sites.values())
        self.active = self._active()
        self._auxiliary = self._known_auxiliary(guide_trace, model_trace)
        self._cannot_evaluate_guide = (
            None if self._auxiliary else _why_no_density(guide_trace, structure)
        )

    @property
    def data(self) -> list[Tensor]:
        """The tensors among the programs' arguments."""
        args, kwargs = self._arguments
        return [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]

    # --- values -----------------------------------------------------------------------------------

    def log_densities(
        self, u: Float[Tensor, "chains batch dim"], start: str = "prior"
    ) -> LogDensities:
        """Log joint and log prior (or log guide) at given latents; gradients flow to `u`.

        Raises:
            ProgramError: If `start` is `"guide"` and its density cannot be evaluated.
        """
        if start == "guide":
            self.check_guide_density()
        parts = [self._run(part, start) for part in self._parts(u)]
        joint, first = (torch.cat(columns) for columns in zip(*parts, strict=True))
        return LogDensities(joint, first)

    def log_density(self, u: Float[Tensor, "chains batch dim"]) -> Float[Tensor, "chains batch"]:
        """Log p(x, z) with the Jacobian of the transforms, in nats."""
        return self.log_densities(u).joint

    @property
    def knows_guide_density(self) -> bool:
        """Whether there is a guide whose density can be had at latents that it did not draw."""
        return self.has_guide and self._cannot_evaluate_guide is None

    def check_guide_density(self, instead: str | None = None) -> None:
        """Refuses a guide whose density cannot be evaluated at latents that it did not draw.

        Args:
            instead: What the caller's caller can do without that density, if there is a way.
        """
        ways = [] if instead is None else [instead]
        if not self.has_guide:
            reason = "this needs the density of a guide"
            raise ProgramError(f"{reason}; {', or '.join(['pass one', *ways])}")
        if self._cannot_evaluate_guide:
            reason, remedy = self._cannot_evaluate_guide
            raise ProgramError(f"{reason}; {', or '.join([*ways, remedy])}")

    def constrain(self, u: Float[Tensor, "chains batch dim"]) -> dict[str, Tensor]:
        """The latents by site, `[chains, batch, inner plates, event]`; without batch if joint.

        Gradients flow to `u`.
        """
        runs = [trace for trace, _ in self.traces(u)]
        return {
            name: torch.cat([site_values(run, name, self.structure) for run in runs])
            for name in self.structure.latents
        }

    def traces(self, u: Float[Tensor, "chains batch dim"]) -> list[tuple[Trace, int]]:
        """Runs of the model at given latents, each with the number of chains in it."""
        return [(trace, count) for trace, count, _ in self.runs(u)]

    def runs(self, u: Float[Tensor, "chains batch dim"]) -> list[tuple[Trace, int, Tensor]]:
        """The same, each with the log Jacobian of the transforms, `[chains, batch]`."""
        found = [(*self._trace(part), len(part)) for part in self._parts(u)]
        return [(t, n, jacobian.expand(n, self.num_data)) for t, jacobian, n in found]

    # --- draws ------------------------------------------------------------------------------------

    def draw(self, num_chains: int, start: str = "prior") -> Float[Tensor, "chains batch dim"]:
        """Independent draws of the prior or of the guide, from the global random stream."""
        guide = self._guide if start == "guide" else prior_guide(self._plain_model)
        guide = poutine.replay(guide, trace=self._fixed) if start != "guide" else guide
        with torch.no_grad(), pyro.validation_enabled(False):
            traces = draw_traces(
                self._plain_model, guide, self._arguments, self.structure, num_chains
            )
            drawn = torch.cat([self.flatten(trace, count) for _, trace, count in traces])
            return drawn.to(self.like)

    # --- running ----------------------------------------------------------------------------------

    def _parts(self, u: Tensor) -> list[Tensor]:
        return [u] if self.structure.vectorizable else list(u.split(1))

    def _run(self, u: Tensor, start: str) -> tuple[Tensor, Tensor]:
        trace, log_jacobian = self._trace(u)
        chains, structure = len(u), self.structure
        joint = sum_sites(trace, structure, chains)
        if start == "guide":
            first = sum_sites(self._guide_trace(trace, u), structure, chains)
        else:
            first = sum_sites(trace, structure, chains, _is_latent)
        return tuple(
            (log_p + log_jacobian).expand(chains, self.num_data) for log_p in (joint, first)
        )  # type: ignore[return-value]

    def _trace(self, u: Tensor) -> tuple[Trace, Tensor]:
        """Runs the model at given latents; returns its trace and the log Jacobian."""
        args, kwargs = self._arguments
        chains = len(u)
        at = _AtUnconstrained(self.by_site(u))
        program = self._in_plate(self._model, chains)
        with pyro.validation_enabled(False):
            trace = poutine.trace(poutine.replay(at(program), trace=self._fixed)).get_trace(
                *args, **kwargs
            )
        total = u.new_zeros(())
        for name, log_jacobian in at.log_jacobians.items():
            masked = scale_and_mask(log_jacobian, 1.0, trace.nodes[name]["mask"])
            summed = sum_dims(masked, self.structure, chains)
            if summed.dim() > 2:
                raise ProgramError(
                    f"the support of the model's latent site '{name}' depends on an enumerated "
                    "site; give it one support, or sample the enumerated site in the guide"
                )
            total = total + summed
        return trace, total

    def _guide_trace(self, model_trace: Trace, u: Tensor) -> Trace:
        args, kwargs = self._arguments
        given = self._fixed.copy()
        for name, value in self._auxiliary_values(u, self._auxiliary).items():
            infer = {"is_auxiliary": True}
            given.add_node(name, type="sample", value=value, infer=infer, is_observed=False)
        for name in () if self._auxiliary else self.structure.latents:
            site = model_trace.nodes[name]
            given.add_node(name, **{k: v for k, v in site.items() if k != "name"})
        program = poutine.replay(self._in_plate(self._guide, len(u)), trace=given)
        with pyro.validation_enabled(False):
            return poutine.trace(program).get_trace(*args, **kwargs)

    def _in_plate(self, program: Program, chains: int) -> Program:
        return in_particle_plate(program, chains, -1 - self.structure.max_plate_nesting)

    # --- autoguides -------------------------------------------------------------------------------

    def _auxiliary_values(self, u: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """What Pyro's autoguides draw for the latents: each by itself, or all in one vector."""
        by_site = self.by_site(u)
        plain = {name: name.removesuffix("_unconstrained") for name in names}
        if set(plain.values()) <= set(by_site):
            return {name: by_site[site] for name, site in plain.items()}
        padding = (len(u), *(1,) * self.structure.max_plate_nesting) if len(u) > 1 else ()
        whole = len(names) == 1 and self.structure.batch_dim is None
        return {names[0]: u.reshape(*padding, self.dim)} if whole else {}

    def _known_auxiliary(self, guide_trace: Trace, model_trace: Trace) -> tuple[str, ...]:
        """The auxiliary sites of the guide, if its latents are these, transformed; else none."""
        sites = weighted_sites(guide_trace)
        drawn = {name: s["value"] for name, s in sites.items() if s["infer"].get("is_auxiliary")}
        if not drawn or not self.has_guide:
            return ()
        found = self._auxiliary_values(self.flatten(model_trace, 1), tuple(drawn))
        same = len(found) == len(drawn) and all(
            found[name].shape == value.shape
            and torch.allclose(found[name], value, rtol=1e-4, atol=1e-4)
            for name, value in drawn.items()
        )
        return tuple(drawn) if same else ()

    # --- shapes -----------------------------------------------------------------------------------

    def by_site(self, u: Float[Tensor, "chains batch dim"]) -> dict[str, Tensor]:
        """Unconstrained values by site, as a run of the model has them."""
        return {
            layout.name: self._inner(u[..., layout.start : layout.stop], layout)
            for layout in self._layouts
        }

    def _inner(self, flat: Tensor, layout: _Layout) -> Tensor:
        chains, event = len(flat), layout.free_event
        if self.structure.batch_dim is None:
            shaped = flat.reshape(chains, *layout.plates, *event)
        else:
            position = len(layout.plates) + self.structure.batch_dim
            others = (*layout.plates[:position], *layout.plates[position + 1 :])
            shaped = flat.reshape(chains, self.num_data, *others, *event)
            shaped = shaped.movedim(1, 1 + position)
        if chains == 1:
            return shaped[0]
        padding = (1,) * (self.structure.max_plate_nesting - len(layout.plates))
        return shaped.reshape(chains, *padding, *shaped.shape[1:])

    def unconstrain(self, latents: dict[str, Tensor]) -> Float[Tensor, "1 batch dim"]:
        """One draw of the latents, by site as a run of the model has them, as a flat vector."""
        args, kwargs = self._arguments
        given = self._fixed.copy()
        for name in self.structure.latents:
            given.add_node(name, type="sample", value=latents[name], infer={}, is_observed=False)
        with torch.no_grad(), pyro.validation_enabled(False):
            program = poutine.replay(self._plain_model, trace=given)
            return self.flatten(poutine.trace(program).get_trace(*args, **kwargs), 1)

    def flatten(self, trace: Trace, chains: int) -> Tensor:
        """Unconstrained latents of a run, `[chains, batch, dim]`."""
        columns = []
        for layout in self._layouts:
            site = trace.nodes[layout.name]
            free = _finite(transform_of(site["fn"]).inv(site["value"]))
            shape = (*layout.plates, *layout.free_event)
            if chains > 1:
                padding = (1,) * (self.structure.max_plate_nesting - len(layout.plates))
                shape = (chains, *padding, *shape)
            free = free.expand(shape).reshape(chains, *layout.plates, *layout.free_event)
            if self.structure.batch_dim is not None:
                free = free.movedim(1 + len(layout.plates) + self.structure.batch_dim, 1)
            columns.append(free.reshape(chains, self.num_data, -1))
        return torch.cat(columns, -1)

    def _active(self) -> Bool[Tensor, "batch dim"]:
        found = []
        for layout in self._layouts:
            mask = self._forms[layout.name][1]
            whole = torch.ones(
                (1, *layout.plates, *layout.free_event), dtype=torch.bool, device=self.like.device
            )
            if mask is not None:
                mask = torch.as_tensor(mask, device=self.like.device)
                whole = whole & mask.expand(layout.plates)[(..., *(None,) * len(layout.free_event))]
            if self.structure.batch_dim is not None:
                whole = whole.movedim(1 + len(layout.plates) + self.structure.batch_dim, 1)
            found.append(whole.reshape(self.num_data, -1))
        return torch.cat(found, -1)


def unconstrained_model(
    model: Program, guide: Program | None, x: Any, *, joint: bool | None = False
) -> UnconstrainedModel:
    """Makes the log joint of a model a function of unconstrained latents.

    Args:
        model: The generative program; its discrete latents must be marked for enumeration.
        guide: The program of the approximate posterior, or None: the prior then takes its place.
        x: The data; a tuple for several arguments, a dict for keywords.
        joint: All latents as those of one datum; None for that where latents are global.

    Raises:
        ProgramError: If a latent is discrete, a point mass, or has no transform onto its support
            (names it), or the pair has no log weights (see `inspect_programs`).

    Note: run it, and its result's methods, inside `programs.program_scope`.
    """
    pair = Pair.inspect(model, inspected_guide(model, guide), x, joint=joint)
    return UnconstrainedModel(pair, has_guide=guide is not None)


class _AtUnconstrained(Messenger):
    """Puts latents at given points of unconstrained space, and notes the Jacobians."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.log_jacobians: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.values:
            return
        free = self.values[msg["name"]]
        transform = transform_of(msg["fn"])
        value = transform(free)
        log_jacobian = transform.log_abs_det_jacobian(free, value)
        extra = log_jacobian.dim() - value.dim() + len(msg["fn"].event_shape)
        self.log_jacobians[msg["name"]] = sum_rightmost(log_jacobian, extra)
        msg["value"], msg["done"] = value, True


def _is_latent(_name: str, site: Site) -> bool:
    return not site["is_observed"]


def _lay_out(
    sites: dict[str, Site], structure: ProgramStructure, num_data: int
) -> tuple[_Layout, ...]:
    """A place for every latent in the flat vector; refuses those without a transform."""
    layouts, start = [], 0
    for name in structure.latents:
        fn = sites[name]["fn"]
        transform = _transform_of(name, fn)
        plates = site_log_prob(sites[name]).shape
        shape = transform.inverse_shape((*plates, *fn.event_shape))
        free_event = tuple(shape[len(plates) :])
        size = math.prod((*plates, *free_event)) // num_data
        layouts.append(_Layout(name, tuple(plates), free_event, start, start + size))
        start += size
    return tuple(layouts)


def _transform_of(name: str, fn: Any) -> Any:
    if is_delta(fn):
        raise ProgramError(
            f"the model's latent site '{name}' is a Delta, which has no density to follow; write "
            "pyro.deterministic, or condition the model on it"
        )
    if any(isinstance(layer, _STRAIGHT_THROUGH) for layer in layers(fn)):
        raise ProgramError(
            f"the model's latent site '{name}' ({family_of(fn)}) hands on a rounded draw, so its "
            "log joint has no gradient; use the relaxed distribution without rounding, or "
            "importance weights, which need none"
        )
    try:
        if support_of(fn).is_discrete:
            raise ProgramError(
                f"the model's latent site '{name}' is discrete ({family_of(fn)}), so its log "
                "joint has no gradient; mark it infer={'enumerate': 'parallel'} and leave it out "
                "of the guide, or use importance weights (log_evidence's method='importance', "
                "draw_posterior), which need none"
            )
        return transform_of(fn)
    except (AttributeError, NotImplementedError) as error:
        raise ProgramError(
            f"the model's latent site '{name}' ({family_of(fn)}) has no transform onto its "
            "support; register one with torch.distributions.biject_to.register, or use importance "
            "weights, which need none"
        ) from error


def _wide_zero(values: Iterable[Any]) -> Tensor:
    """A zero of the widest floating-point type among these."""
    floats = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    if not floats:
        return torch.zeros(())
    types = (v.dtype for v in floats)
    return floats[0].new_zeros((), dtype=reduce(torch.promote_types, types))


def _why_no_density(guide_trace: Trace, structure: ProgramStructure) -> tuple[str, str] | None:
    """Why the guide's density cannot be had at latents that another program drew, and a remedy."""
    for name, site in weighted_sites(guide_trace).items():
        if site["infer"].get("is_auxiliary") or is_delta(site["fn"]):
            return (
                f"the guide draws its latents through the auxiliary site '{name}', so its density "
                "at given latents is unknown",
                "write the guide's distributions at the model's own sites",
            )
    if not structure.replayable:
        return (
            "the guide's density cannot be evaluated at latents that it did not draw (a flow "
            "without an inverse, or a guide messenger)",
            "use an invertible flow, or a guide with a site for each latent (AutoNormal)",
        )
    return None


def _finite(free: Tensor) -> Tensor:
    """Values rounded onto the edge of a support are infinite in unconstrained space."""
    edge = -math.log(torch.finfo(free.dtype).tiny)
    return torch.nan_to_num(free, nan=0.0, posinf=edge, neginf=-edge)
