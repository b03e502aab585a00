"""Mini-batches: data shuffled and cut, and given to programs whose data share latents.

What lies in the plate of the data counts N/B times in a mini-batch of B, and a global latent once
(Hoffman et al. 2013, Stochastic variational inference). Which plate that is, and whether programs
take the rows of a mini-batch or look them up themselves, is found by running them: a way is taken
only where each site weighs the rows of a mini-batch as it weighed them among all data.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.inference.estimators import Objective
from pyro_vae.inference.programs import (
    Axes,
    Program,
    ProgramError,
    agree,
    as_arguments,
    batch_axes,
    batch_length,
    first_run,
    fixed_draws,
    ieee_precision,
    is_delta,
    keep_random_state,
    map_batch,
    messenger_of,
    plate_rows,
    site_log_prob,
    take,
    tensors_of,
    weighted_sites,
)
from pyro_vae.inference.svi.settings import scales_sites
from pyro_vae.results import sha256_of

__all__ = [
    "MiniBatches",
    "TrainingData",
    "check_loss",
    "data_plates",
    "find_mini_batches",
    "move_data",
    "takes_parts",
]

Traces = tuple[Trace, Trace]


@dataclass(frozen=True)
class MiniBatches:
    """How the programs of a training are given a part of their data.

    Attributes:
        num_data: Number of data, N.
        axes: The axes that the data lie along.
        plates: Names of the plates that are given the rows; none where programs scale themselves.
        whole: Whether the programs are given all data, and take the rows of the plate out of them.
        cut: Parameters with a value for each datum that the programs use as they are.
        row_axes: By name, the axis of each parameter with a value for each datum, from the left.
    """

    num_data: int
    axes: Axes
    plates: frozenset[str] = frozenset()
    whole: bool = False
    cut: Mapping[str, int] = field(default_factory=dict)
    row_axes: Mapping[str, int] = field(default_factory=dict)

    def arguments(self, x: Any, rows: Tensor) -> Any:
        """What the programs are given of the data."""
        return x if self.whole else map_batch(x, take(rows), self.axes)

    @contextmanager
    def on(self, rows: Tensor, num_data: int | None = None) -> Iterator[None]:
        """Inside, the plates of the data hold these rows, out of so many data."""
        with ExitStack() as stack:
            if self.plates:
                stack.enter_context(plate_rows(self.plates, rows, num_data or self.num_data))
            if self.cut:
                stack.enter_context(_CutParameters(self.cut, rows))
            yield


class _CutParameters(Messenger):
    """Gives programs the rows of parameters that have a value for each datum."""

    def __init__(self, axes: Mapping[str, int], rows: Tensor) -> None:
        super().__init__()
        self.axes, self.rows = axes, rows

    def _pyro_post_param(self, msg: Any) -> None:
        if msg["name"] in self.axes:
            value = msg["value"]
            some = value.index_select(self.axes[msg["name"]], self.rows.to(value.device))
            some.unconstrained = value.unconstrained  # what an optimizer is to move
            msg["value"] = some


def check_loss(loss: ELBO, global_latents: Collection[str]) -> None:
    """Refuses an objective that mini-batches of such programs do not estimate.

    Raises:
        ProgramError: If it is a bound by weights on all data, or takes the factor N/B for a part of
            its weights.
    """
    name = type(loss).__name__
    instead = "use an ELBO (Trace_ELBO(), or PathwiseELBO), or pass batch_size=None"
    if isinstance(loss, Objective):
        if global_latents and not loss.linear:
            raise ProgramError(
                f"{name} bounds log p(x) by one weight on all data, as the latents "
                f"{sorted(global_latents)} are global, and a mini-batch does not estimate a weight "
                f"without bias in a bound that is not linear in it; {instead}"
            )
    elif not scales_sites(loss):
        raise ProgramError(
            f"{name} does not keep the factor N/B of a mini-batch outside its weights (Renyi and "
            "importance bounds), or keeps the rows of its first step (a compiled loss), so it is "
            f"no bound there; {instead}"
        )


def data_plates(traces: Traces) -> list[Any]:
    """The vectorised plates around everything that the model observes."""
    observed = [
        {f.name: f for f in site["cond_indep_stack"] if f.vectorized}
        for site in weighted_sites(traces[1]).values()
        if site["is_observed"]
    ]
    names = set(observed[0]).intersection(*observed) if observed else set()
    return [frame for name, frame in observed[0].items() if name in names] if observed else []


def find_mini_batches(
    model: Program,
    guide: Program,
    x: Any,
    traces: Traces | None,
    num_data: int,
    batch_size: int,
) -> tuple[MiniBatches | None, str]:
    """The way in which the programs take a part of their data, tried on the last of them.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior.
        x: All data.
        traces: Of guide and model, from a run on all data; None where that failed.
        num_data: Number of data.
        batch_size: Data in a mini-batch, fewer than all.

    Returns:
        The way; None where there is none, and the reason.
    """
    names = _sets_of_plates(traces, num_data) if traces is not None else []
    if not names:
        return None, "no vectorised plate with the number of data holds all that is observed"
    rows = torch.arange(num_data - 1, num_data - 1 - batch_size, -1)
    reason = ""
    with keep_random_state(), ieee_precision(), _moved_parameters():
        for plates, way in _ways(x, names, num_data):
            try:
                whole = _run(model, guide, x, way, torch.arange(num_data))
                reason = _difference(model, guide, x, whole, plates, way, rows) or ""
                if not reason:
                    axes = _row_axes(model, guide, x, way, rows)
                    return MiniBatches(**{**vars(way), "row_axes": axes}), ""
            except Exception as error:  # whatever a program does with data that it cannot take
                reason = str(error).strip().split("\n")[0] or type(error).__name__
    return None, reason


def takes_parts(
    model: Program, guide: Program, x: Any, axes: Axes, num_data: int, count: int
) -> bool:
    """Whether the last data weigh, given alone, what they weigh among all, whatever their scale."""
    store = pyro.get_param_store()
    way, rows = MiniBatches(num_data, axes), torch.arange(num_data - count, num_data)
    with store.scope(store.get_state()), keep_random_state(), ieee_precision():
        try:
            plates = {f.name for f in data_plates(_run(model, guide, x, way, rows))}
            with _moved_parameters():
                whole = _run(model, guide, x, way, torch.arange(num_data))
                return not _difference(model, guide, x, whole, plates, way, rows, scaled=False)
        except Exception:  # what is wrong shows again where it can be said
            return True


def _sets_of_plates(traces: Traces, num_data: int) -> list[frozenset[str]]:
    """Plates that may hold the data: one around all that is observed, or all like it."""
    frames = [
        frame
        for trace in traces
        for site in weighted_sites(trace).values()
        for frame in site["cond_indep_stack"]
        if frame.vectorized
    ]
    found = []
    for plate in data_plates(traces):
        if (plate.full_size or plate.size) in (num_data, -1) or plate.size == num_data:
            alike = [f.name for f in frames if f.dim == plate.dim and f.size in (plate.size, -1)]
            found += [frozenset({plate.name}), frozenset(alike)]
    return list(dict.fromkeys(found))


def _ways(
    x: Any, names: list[frozenset[str]], num_data: int
) -> Iterator[tuple[frozenset[str], MiniBatches]]:
    """The ways to try, those first in which the programs see to everything themselves."""
    along = batch_axes(x, num_data)
    for plates, axes in product(names, along):
        yield plates, MiniBatches(num_data, axes)
    uncut: Axes = (None,) * len(as_arguments(x)[0] + tuple(as_arguments(x)[1]))
    cut = {
        name: value.shape.index(num_data)
        for name, value in pyro.get_param_store().items()
        if num_data in value.shape
    }
    for plates in names:
        yield plates, MiniBatches(num_data, along[0] if along else uncut, plates, whole=True)
        for axes in along:
            yield plates, MiniBatches(num_data, axes, plates)
        for axes in along if cut else ():
            yield plates, MiniBatches(num_data, axes, plates, cut=cut)


def _run(model: Program, guide: Program, x: Any, way: MiniBatches, rows: Tensor) -> Traces:
    """Traces of guide and model on some of the data."""
    with way.on(rows), torch.no_grad():
        return first_run(model, guide, as_arguments(way.arguments(x, rows))).traces


def _difference(
    model: Program,
    guide: Program,
    x: Any,
    traces: Traces,
    plates: Collection[str],
    way: MiniBatches,
    rows: Tensor,
    *,
    scaled: bool = True,
) -> str:
    """Why a mini-batch of these rows does not weigh what they weigh among all; "" if it does.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior.
        x: All data.
        traces: Of guide and model, from a run on all data.
        plates: Names of the plates of the data.
        way: How the programs are given a part of the data.
        rows: Which they are.
        scaled: Whether the sites in the plates must count N/B times.
    """
    args, kwargs = as_arguments(way.arguments(x, rows))
    given = _draws_of(traces, plates, way.num_data, rows)
    free = messenger_of(guide) is not None  # it runs the model itself
    with way.on(rows), torch.no_grad():
        if free:
            guide_again, model_again = first_run(model, guide, (args, kwargs)).traces
        else:
            try:
                again = poutine.replay(guide, trace=_without_deltas(given))
                guide_again = poutine.trace(again).get_trace(*args, **kwargs)
            except (KeyError, NotImplementedError):  # a flow without an inverse: shapes must do
                free, guide_again = True, poutine.trace(guide).get_trace(*args, **kwargs)
            replayed = poutine.replay(model, trace=given)
            model_again = poutine.trace(replayed).get_trace(*args, **kwargs)
    factor = way.num_data / len(rows) if scaled else None
    for role, before, after in zip(
        ("guide", "model"), traces, (guide_again, model_again), strict=True
    ):
        sites, others = weighted_sites(before), weighted_sites(after)
        for name in dict.fromkeys((*sites, *others)):
            expected = _expected(sites.get(name), plates, way.num_data, rows, factor)
            found = _weight(others.get(name), factor)
            same = expected.shape == found.shape if free else agree(expected, found)
            if not same or not _same_point(sites[name], others[name], plates, way.num_data, rows):
                return (
                    f"the {role}'s site '{name}' weighs some of the data otherwise when they are "
                    "given alone"
                )
    return ""


def _weight(site: Any, factor: float | None) -> Tensor:
    """A site's log-probability with its scale, if scales count; a site that is not there: none."""
    if site is None:
        return torch.empty(0)
    return site_log_prob(site) * (1.0 if factor is None else site["scale"])


def _expected(
    site: Any, plates: Collection[str], num_data: int, rows: Tensor, factor: float | None
) -> Tensor:
    if site is None:
        return torch.full((1,), torch.nan)
    weight = _select(_weight(site, factor), site, 0, plates, num_data, rows)
    inside = any(frame.name in plates for frame in site["cond_indep_stack"])
    return weight * factor if inside and factor is not None else weight


def _same_point(
    before: Any, after: Any, plates: Collection[str], num_data: int, rows: Tensor
) -> bool:
    """Whether a `Delta`, whose density does not tell, lies where it lay."""
    if not is_delta(before["fn"]):
        return True
    event = len(before["fn"].event_shape)
    return agree(
        _select(before["value"], before, event, plates, num_data, rows), after["value"].detach()
    )


def _select(
    value: Tensor, site: Any, event: int, plates: Collection[str], num_data: int, rows: Tensor
) -> Tensor:
    """The rows of a site's values along the plates of the data."""
    for frame in site["cond_indep_stack"]:
        dim = value.dim() - event + (frame.dim or 0)
        if frame.name in plates and dim >= 0 and value.shape[dim] == num_data:
            value = value.index_select(dim, rows.to(value.device))
    return value


def _draws_of(traces: Traces, plates: Collection[str], num_data: int, rows: Tensor) -> Trace:
    """The draws of these rows, those of latents that the guide leaves to be summed out as well."""
    given = fixed_draws(*traces)
    for name in plates:
        given.nodes.pop(name, None)
    latents = {n: s for n, s in weighted_sites(traces[1]).items() if not s["is_observed"]}
    for name, site in {**latents, **weighted_sites(given)}.items():
        value = _select(site["value"], site, len(site["fn"].event_shape), plates, num_data, rows)
        given.nodes[name] = {**site, "value": value.detach()}
    return given


def _without_deltas(given: Trace) -> Trace:
    drawn = given.copy()
    for name, site in weighted_sites(given).items():
        if is_delta(site["fn"]):
            del drawn.nodes[name]
    return drawn


def _row_axes(
    model: Program, guide: Program, x: Any, way: MiniBatches, rows: Tensor
) -> dict[str, int]:
    """The parameters that a mini-batch moves in its own rows alone, with the axis of the rows."""
    with way.on(rows), torch.enable_grad():
        run = first_run(model, guide, as_arguments(way.arguments(x, rows)))
        sites = [site for trace in run.traces for site in weighted_sites(trace).values()]
        total = torch.stack([site_log_prob(site).sum() for site in sites]).sum()
    named = {n: p for n, p in run.parameters.items() if way.num_data in p.shape and p.requires_grad}
    if not named or not total.requires_grad:
        return {}
    gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    axes = {
        name: [axis for axis in range(g.dim()) if _moves(g, axis, rows, way.num_data)]
        for name, g in zip(named, gradients, strict=True)
        if g is not None
    }
    return {name: found[0] for name, found in axes.items() if found}


def _moves(gradient: Tensor, axis: int, rows: Tensor, num_data: int) -> bool:
    """Whether a gradient is that of these rows along an axis, and of no others."""
    if gradient.shape[axis] != num_data:
        return False
    moved = gradient.movedim(axis, 0).reshape(num_data, -1).ne(0).any(1)
    return bool(moved.any()) and not moved.index_fill(0, rows.to(moved.device), False).any()


@contextmanager
def _moved_parameters() -> Iterator[None]:
    """Moves every parameter a little for a while: rows with equal values tell nothing."""
    parameters = [p for _, p in pyro.get_param_store().named_parameters() if p.is_floating_point()]
    before = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p in parameters:
                p.add_(0.1 * torch.randn_like(p))
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)


class TrainingData:
    """Data held in memory, shuffled by a generator of its own.

    Args:
        x: The data, in one of the forms of `as_arguments`.
        transform: As for `fit`.
        seed: Seeds shuffling, the draws of `transform` and the streams of `generator`.

    Attributes:
        axes: The axes that data lie along, as `batch_axes` has them: the first one until the
            programs have said otherwise; None throughout where no part can be taken.
        length: Number of data.
        whole: Whether the programs are given all data at every step, and take the rows of their
            plate out of them.

    Raises:
        ValueError: If there are no data.
    """

    def __init__(
        self, x: Any, transform: Callable[[Tensor, torch.Generator], Tensor] | None, seed: int
    ) -> None:
        self.x, self.transform = x, transform
        self.axes: Axes = next(iter(batch_axes(x)), ())
        self.length = batch_length(x, self.axes)
        self.whole = False
        if self.length == 0:
            raise ValueError("there are no data to fit: the first tensor of x has length 0")
        self.seed = seed
        self.shuffler = torch.Generator().manual_seed(_stream_seed(seed, 0))
        self.noise = self.generator(1)

    def sha256(self) -> str:
        """The hash of the data; that of an empty tensor where programs bring their own."""
        return sha256_of(*tensors_of(self.x) or [torch.empty(0)])

    def generator(self, stream: int) -> torch.Generator:
        """A source of randomness where the data lie, independent of the others of this run."""
        tensors = tensors_of(self.x)
        device = tensors[0].device if tensors else "cpu"
        return torch.Generator(device=device).manual_seed(_stream_seed(self.seed, stream))

    def random_states(self) -> dict[str, Tensor]:
        """The states of shuffler and noise, and of the device where the data lie, by name."""
        states = {"shuffler": self.shuffler.get_state(), "noise": self.noise.get_state()}
        if self.noise.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.noise.device)
        return states

    def set_random_states(self, states: Mapping[str, Tensor]) -> None:
        """Puts back what `random_states` gave, as far as it is of the same kind of device."""
        self.shuffler.set_state(states["shuffler"])
        on_cuda = self.noise.device.type == "cuda"
        if on_cuda and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.noise.device)
        if on_cuda == ("cuda" in states):
            self.noise.set_state(states["noise"])

    def first(self, rows: int, stream: int) -> Any:
        """The first rows, with draws of their own that are the same each time."""
        index = torch.arange(rows) if rows < self.length else None
        return self.batch(index, self.generator(stream))

    def batch(self, index: Tensor | None, noise: torch.Generator | None = None) -> Any:
        """The data at `index` (all if None), in the form of `x`, transformed; see `whole`."""
        x = self.x if index is None or self.whole else map_batch(self.x, take(index), self.axes)
        if self.transform is None:
            return x
        todo = [self.transform]  # for the first tensor alone
        return map_batch(
            x, lambda a, _: todo.pop()(a, noise or self.noise) if todo else a, self.axes
        )


def _stream_seed(seed: int, stream: int) -> int:
    return int(np.random.SeedSequence((seed, stream)).generate_state(1)[0])


def move_data(x: Any, device: str | torch.device) -> Any:
    """The data with all their tensors on a device; what is no tensor is passed on."""
    if isinstance(x, tuple):
        return tuple(move_data(a, device) for a in x)
    if isinstance(x, Mapping):
        return {name: move_data(a, device) for name, a in x.items()}
    return x.to(device) if isinstance(x, Tensor) else x
