"""Programs whose latents are summed out, or held at a point: what generalised EM alternates on."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta
from pyro.ops import packed
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.inference.programs.arguments import Program, ProgramError, as_arguments
from pyro_vae.inference.programs.refusals import (
    check_module_names,
    check_parameters,
    is_enumerable,
)
from pyro_vae.inference.programs.scope import keep_random_state
from pyro_vae.inference.programs.sites import agree, count_data
from pyro_vae.inference.programs.traces import trace_programs, weighted_sites

__all__ = ["EnumeratedProgram", "check_states", "gradient_m_step", "measure_of", "no_guide"]

_HALVINGS = 30
_DRAWN_DATA = 24  # that are compared with their states, at least


def no_guide(*_args: Any, **_kwargs: Any) -> None:
    """The guide of a program all of whose latents are summed out."""


class _Factors(TraceEnum_ELBO):
    """Sums out the latents of a model, and gives the posterior marginals of all its factors.

    The derivative of log p(x) with respect to the log of a factor is the posterior probability of
    its arguments, jointly; so E log p(x, z) needs nothing but these derivatives, whatever the
    model's structure (plates, chains).
    """

    trace: Any = None
    leaves: dict[str, Tensor] | None = None

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found vars in model but not guide")  # at a point
            model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        if self.leaves is not None:
            for name, site in _factor_sites(model_trace):
                own, given = site["packed"], site["packed"]["unscaled_log_prob"]
                leaf = given.detach().clone().requires_grad_()
                leaf._pyro_dims = given._pyro_dims
                own["unscaled_log_prob"] = self.leaves[name] = leaf
                own["log_prob"] = packed.scale_and_mask(leaf, site["scale"], own["mask"])
        self.trace = model_trace
        return model_trace, guide_trace


def _factor_sites(trace: Any) -> list[tuple[str, dict[str, Any]]]:
    return [
        (name, site)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    ]


class _AtPoint(Messenger):
    """Puts global latents at a point; their log prior counts."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True
            msg["infer"]["enumerate"] = "parallel"  # no guide is to draw it


def _at_point(model: Program, point: AutoDelta) -> Program:
    """The model with the latents of a point guide at its point."""

    def held(*args: Any, **kwargs: Any) -> Any:
        with poutine.block(hide_types=["sample"]):
            values = point(*args, **kwargs)
        with _AtPoint(values):
            return model(*args, **kwargs)

    held.__wrapped__ = model  # type: ignore[attr-defined]
    return held


class EnumeratedProgram:
    """A program whose latents are summed out, or held at a point, with its parameters.

    It registers its parameters in the parameter store at hand, where they have to stay. Latents
    that cannot be enumerated are held at a point of `AutoDelta` where they are global, that is in
    no plate with data: log p(x) is then log p(x, theta) everywhere below.

    Args:
        model: The program; sites need no mark for enumeration.
        x: Its arguments, as `fit` takes them.

    Attributes:
        points: Names of the latents that are held at a point.
        guide: The point, or a guide without sites.
        length: Number of data.
        parameters: The unconstrained tensors that an optimizer moves.
        foreign: Names in the parameter store that are not this program's.
        elbo: The loss that sums the latents out; `elbo.trace` is the last trace.

    Raises:
        ProgramError: If a latent of the data cannot be enumerated, there is none to sum out, the
            data are subsampled, a parameter was never registered, or a factor's density at some
            latents is not that of a run with these latents alone.
    """

    def __init__(self, model: Program, x: Any) -> None:
        self.program, self.arguments = model, as_arguments(x)
        self.model = config_enumerate(model, "parallel")
        self.guide: Program = no_guide
        store = pyro.get_param_store()
        foreign = set(store.keys())
        with torch.no_grad(), keep_random_state():
            _, trace = trace_programs(self.model, no_guide, self.arguments)
            self.points = _global_points(trace)
            self._check(trace)
            if self.points:
                self.guide = AutoDelta(poutine.block(model, expose=self.points))
                self.guide(*self.arguments[0], **self.arguments[1])
                self.model = config_enumerate(_at_point(model, self.guide), "parallel")
                _, trace = trace_programs(self.model, no_guide, self.arguments)
        counts = count_data(trace)
        self.length = counts[0][0] if counts else 1
        check_module_names(model, no_guide)
        used = check_parameters(self.model, no_guide, self.arguments, enumerates=True)
        self.foreign = foreign - set(used)
        depths = [-f.dim for s in trace.nodes.values() for f in _plates(s)]
        self.elbo = _Factors(max_plate_nesting=max(depths, default=0))
        named = store.named_parameters()
        self.parameters = [p for name, p in named if name not in self.foreign and p.requires_grad]
        self._check_states()

    def _check(self, trace: Any) -> None:
        latents = {
            name: site
            for name, site in weighted_sites(trace).items()
            if not site["is_observed"] and name not in self.points
        }
        if self.points and not latents:
            raise ProgramError(
                f"the latents {', '.join(self.points)} are global and nothing is left to take an "
                "expectation over; for their most probable values call fit(model, "
                "AutoDelta(model), x)"
            )
        if not latents:
            raise ProgramError(
                "the program has no latent site, so there is nothing to take an expectation over; "
                "check that latents are sampled with pyro.sample and without obs="
            )
        for name, site in latents.items():
            if not is_enumerable(site["fn"]):
                raise ProgramError(
                    f"the latent site '{name}' cannot be enumerated "
                    f"({type(site['fn']).__name__}), so its posterior is not a sum; make it a "
                    "parameter, or use fit with a guide"
                )
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and site_is_subsample(site):
                plate = site["fn"]
                if plate.subsample_size not in (None, plate.size):
                    raise ProgramError(
                        f"the plate '{name}' is subsampled, so each pass would see other data; "
                        "take subsample_size out"
                    )

    def _check_states(self) -> None:
        """Refuses a program that weighs the latents drawn otherwise when it gets all states."""
        args, kwargs = self.arguments
        with torch.no_grad(), keep_random_state():
            try:
                next(iter(self.elbo._get_traces(self.model, no_guide, args, kwargs)))
            except Exception as error:
                raise ProgramError(
                    f"the program cannot run with its latents enumerated ({type(error).__name__}: "
                    f"{error}); let latents have further dims on the left, which are their states"
                ) from error
            check_states(
                self.elbo.trace,
                lambda: trace_programs(self.model, no_guide, self.arguments)[1],
                self.length,
            )

    def e_step(self) -> tuple[float, dict[str, Tensor]]:
        """The log of p(x), and the posterior marginals of each factor's arguments."""
        args, kwargs = self.arguments
        leaves: dict[str, Tensor] = {}
        self.elbo.leaves = leaves
        with torch.enable_grad():
            total = -self.elbo.differentiable_loss(self.model, no_guide, *args, **kwargs)
            found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        marginals = {
            name: leaf.new_zeros(leaf.shape) if part is None else part
            for (name, leaf), part in zip(leaves.items(), found, strict=True)
        }
        return float(total.detach()), marginals

    def expected_log_joint(self, marginals: Mapping[str, Tensor]) -> Tensor:
        """E_q log p(x, z) under the present parameters, a total in nats, differentiable."""
        args, kwargs = self.arguments
        self.elbo.leaves = None
        next(iter(self.elbo._get_traces(self.model, no_guide, args, kwargs)))
        total = torch.zeros(())
        for name, site in _factor_sites(self.elbo.trace):
            weight = marginals[name]
            log_prob = site["packed"]["unscaled_log_prob"].masked_fill(weight == 0, 0.0)
            total = total + (weight * log_prob).sum()  # 0 log 0 = 0
        return total


def _global_points(trace: Trace) -> list[str]:
    """The latents that cannot be enumerated and are in no plate with data."""
    sites = weighted_sites(trace)
    with_data = {f.name for s in sites.values() if s["is_observed"] for f in s["cond_indep_stack"]}
    return [
        name
        for name, site in sites.items()
        if not site["is_observed"]
        and not is_enumerable(site["fn"])
        and not with_data & {f.name for f in site["cond_indep_stack"]}
    ]


def check_states(enumerated: Trace, draw: Callable[[], Trace], num_data: int) -> None:
    """Refuses a program whose factors at latents drawn are not those where all states are laid out.

    Args:
        enumerated: A run with the states of latents along dims of their own, which have symbols.
        draw: Runs the program at one draw of them.
        num_data: Of few data one draw may happen to be what a wrong program reads.
    """
    for _ in range(1 + _DRAWN_DATA // max(num_data, 1)):
        _compare_states(enumerated, draw())


def _compare_states(enumerated: Trace, drawn: Trace) -> None:
    states = {
        symbol: _state_of(drawn.nodes[name], site)
        for name, site in _factor_sites(enumerated)
        if (symbol := site["infer"].get("_enumerate_symbol")) is not None
    }
    drawn.compute_log_prob()
    for name, site in _factor_sites(enumerated):
        found, alone = site["log_prob"], drawn.nodes[name]["log_prob"]
        dims = [dim for dim in site["infer"].get("_dim_to_id", ()) if dim >= -found.dim()]
        if all(found.shape[dim] == 1 for dim in dims):  # it reads no states
            same = agree(*torch.broadcast_tensors(found, alone))
        else:
            found = packed.pack(found, site["infer"]["_dim_to_symbol"])
            for symbol in set(found._pyro_dims) & set(states):
                found = packed.gather(found, states[symbol], symbol)
            alone = packed.pack(alone, site["infer"]["_dim_to_symbol"])
            same = agree(*packed.broadcast_all(found, alone))
        if not same:
            raise ProgramError(
                f"site '{name}' has another density where latents are enumerated than at the same "
                "latents alone; index latents from the right, let them broadcast (their states lie "
                "to the left of all plates), read none of another row, and make noise a "
                "pyro.sample site"
            )


def _state_of(drawn: Mapping[str, Any], site: Mapping[str, Any]) -> Tensor:
    """Which of its states each draw of a latent is, packed along its plates."""
    support = site["fn"].enumerate_support(expand=False)
    value, events = drawn["value"], len(site["fn"].event_shape)
    shape = (len(support), *(1,) * (value.dim() - events), *site["fn"].event_shape)
    same = support.reshape(shape) == value
    index = same.flatten(same.dim() - events).all(-1) if events else same
    return packed.pack(index.to(torch.uint8).argmax(0), site["infer"]["_dim_to_symbol"])


def _plates(site: Mapping[str, Any]) -> list[Any]:
    return [f for f in site.get("cond_indep_stack", ()) if f.vectorized]


def measure_of(trace: Any) -> str:
    """What the data are, from the supports of the observed sites."""
    supports = {_measure_of_support(s["fn"]) for _, s in _factor_sites(trace) if s["is_observed"]}
    return supports.pop() if len(supports) == 1 else "mixed"


def _measure_of_support(fn: Any) -> str:
    support = fn.support
    while isinstance(support, torch.distributions.constraints.independent):
        support = support.base_constraint
    if support is torch.distributions.constraints.boolean:
        return "binary"
    return "counts" if support.is_discrete else "real"


def gradient_m_step(
    program: EnumeratedProgram,
    marginals: Mapping[str, Tensor],
    before: float,
    optimizer: torch.optim.Optimizer | None,
    num_steps: int,
) -> tuple[float, int]:
    """Gradient steps on E log p(x, z); halves the way back until nothing was lost.

    Args:
        program: Whose parameters move.
        marginals: Of the posterior that the expectation is under.
        before: E log p(x, z) at the start, a total in nats.
        optimizer: Of the program's parameters; L-BFGS with a line search if None.
        num_steps: How many steps.

    Returns:
        E log p(x, z) where it ended, not below `before`, and the passes over the data it took.
    """
    parameters = program.parameters
    passes = 0
    start = [p.detach().clone() for p in parameters]

    def loss() -> Tensor:
        nonlocal passes
        for parameter in parameters:
            parameter.grad = None
        value = -_finite_or_infinite(program, marginals) / program.length
        passes += 1
        if value.requires_grad:  # where there is no gradient, an optimizer stays where it is
            value.backward()
        return value

    if optimizer is None:
        torch.optim.LBFGS(
            parameters,
            max_iter=num_steps,
            max_eval=4 * num_steps,
            tolerance_grad=1e-12,
            tolerance_change=1e-15,
            line_search_fn="strong_wolfe",
        ).step(loss)
    else:
        for _ in range(num_steps):
            optimizer.step(loss)  # type: ignore[arg-type]
    for parameter in parameters:
        parameter.grad = None
    with torch.no_grad():
        reached = [p.detach().clone() for p in parameters]
        for halving in range(_HALVINGS):
            joint = float(_finite_or_infinite(program, marginals))
            passes += 1
            if joint >= before:
                return joint, passes
            share = 0.5 ** (halving + 1)
            for parameter, old, new in zip(parameters, start, reached, strict=True):
                parameter.copy_(torch.where(new.isfinite(), old + share * (new - old), old))
        for parameter, old in zip(parameters, start, strict=True):
            parameter.copy_(old)
    return before, passes


def _finite_or_infinite(program: EnumeratedProgram, marginals: Mapping[str, Tensor]) -> Tensor:
    """E log p(x, z); minus infinity where an optimizer went too far for it to exist."""
    worst = torch.tensor(-math.inf)
    if not all(bool(p.isfinite().all()) for p in program.parameters):
        return worst
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered (NaN|inf|\\+inf|-inf)")
        try:
            value = program.expected_log_joint(marginals)
        except ValueError:  # Pyro's checks, of parameters that have overflown
            return worst
    return value if bool(value.isfinite()) else worst
