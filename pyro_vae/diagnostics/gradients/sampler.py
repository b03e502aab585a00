"""Drawing and timing gradients of a pair of programs, parameter group by parameter group."""

import copy
import fnmatch
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from jaxtyping import Float
from pyro.infer import ELBO
from torch import Tensor

from pyro_vae.diagnostics.gradients.specs import EstimatorSpec
from pyro_vae.diagnostics.gradients.statistics import Gradients
from pyro_vae.inference.estimators import Objective, Terms, can_share, scale_of
from pyro_vae.inference.programs import (
    Arguments,
    PointMassError,
    Program,
    ProgramError,
    ProgramStructure,
    as_arguments,
    bytes_of_run,
    check_module_names,
    check_parameters,
    count_data,
    draw_traces,
    inspect_programs,
    keep_random_state,
    tensors_of,
    trace_programs,
    weighted_sites,
)

__all__ = ["CannotMakeError", "Draws", "GradientSampler", "count_passes"]

_MAX_ENTRIES = 50_000  # of a group, so that all repeats fit in memory
_ROOM_FOR_REPEATS = 2**29  # bytes of the gradients of estimators that share their draws
_ROOM_AT_ONCE = 2**26  # bytes of a run: above it, gradients are taken one after the other
_LEAST_ROUNDS, _SECONDS_TO_TIME = 3, 8.0


class CannotMakeError(ValueError):
    """An estimator refuses this number of particles."""


@dataclass
class Draws:
    """Repeated gradients of one estimator."""

    values: Float[Tensor, " repeats"]
    gradients: dict[str, Gradients]


@dataclass
class GradientSampler:
    """A pair of programs, its parameters and how to draw gradients from it."""

    model: Program
    guide: Program
    x: Any
    arguments: Arguments
    structure: ProgramStructure | None
    leaves: dict[str, Tensor]
    groups: dict[str, tuple[str, ...]]
    num_data: int
    per: float
    joint: bool
    seed: int
    entries: dict[str, Tensor | None]
    notes: list[str]
    bytes_of_particle: int
    at_once: bool = True

    @classmethod
    def of(
        cls,
        model: Program,
        guide: Program,
        x: Any,
        parameters: Sequence[str] | Mapping[str, Sequence[str]] | None,
        joint: bool,
        seed: int,
        specs: list[EstimatorSpec],
    ) -> "GradientSampler":
        """Looks the programs over; the parameters must be the store's own by then.

        Raises:
            ProgramError: If the estimators' tool, or Pyro, could not train the pair.
            ValueError: If `parameters` matches nothing.
        """
        arguments = as_arguments(x)
        check_module_names(model, guide)
        structure = None
        ours = any(not spec.name.startswith("Pyro ") for spec in specs)
        try:
            structure = inspect_programs(model, guide, arguments, joint=joint, num_particles=2)
        except ProgramError as error:
            if ours or isinstance(error, PointMassError):  # Pyro would call a MAP objective an ELBO
                raise
        enumerates = all(spec.enumerates for spec in specs)
        check_parameters(model, guide, arguments, enumerates)
        leaves, users = _leaves_of(model, guide, arguments)
        groups = _group(users, parameters)
        with keep_random_state(), torch.no_grad():
            _, model_trace = trace_programs(model, guide, arguments)
        counts = count_data(model_trace)
        count = counts[0][0] if counts else 1
        per = structure.batch_size * structure.scale if structure is not None else float(count)
        notes = structure.notes if structure is not None else []
        return cls(
            model=model,
            guide=guide,
            x=x,
            arguments=arguments,
            structure=structure,
            leaves=leaves,
            groups=groups,
            num_data=count,
            per=1.0 if joint else per,
            joint=joint,
            seed=seed,
            entries={name: _entries(name, g, leaves, seed, notes) for name, g in groups.items()},
            notes=notes,
            bytes_of_particle=bytes_of_run(model, guide, arguments),
        )

    @contextmanager
    def keep_gradients(self) -> Iterator[None]:
        """Takes the `.grad` of every leaf that a backward pass could reach, and puts it back."""
        given = [tensor for tensor in tensors_of(self.x) if tensor.requires_grad]
        tensors = [*self.leaves.values(), *given]
        kept = [tensor.grad for tensor in tensors]
        for tensor in tensors:
            tensor.grad = None
        try:
            yield
        finally:
            for tensor, grad in zip(tensors, kept, strict=True):
                tensor.grad = grad

    def step(self, elbo: ELBO) -> float:
        """One gradient into `.grad`; returns the bound."""
        for leaf in self.leaves.values():
            leaf.grad = None
        args, kwargs = self.arguments
        loss = elbo.loss_and_grads(self.model, self.guide, *args, **kwargs)
        return -float(loss[0] if isinstance(loss, tuple) else loss) / self.per

    def gradients(self) -> list[Tensor | None]:
        """The gradient of the bound, leaf by leaf, from `.grad`."""
        leaves = self.leaves.values()
        return [None if leaf.grad is None else -leaf.grad / self.per for leaf in leaves]

    def flat(self, group: str, gradients: Sequence[Tensor | None]) -> Tensor:
        """The entries that stand for a group, out of a gradient leaf by leaf."""
        found = {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(self.leaves.items(), gradients, strict=True)
        }
        flat = torch.cat([found[name].reshape(-1) for name in self.groups[group]])
        return self.select(group, flat)

    def select(self, group: str, flat: Tensor) -> Tensor:
        """The entries that stand for a group."""
        chosen = self.entries[group]
        return flat if chosen is None else flat[chosen]

    def share(self, group: str) -> float:
        """The share of a group's entries that stands for all."""
        chosen = self.entries[group]
        return 1.0 if chosen is None else len(chosen) / self._size(group)

    def draw(
        self, elbos: Sequence[ELBO], repeats: int, seed: int, advance: Callable[[int], Any]
    ) -> Iterator[tuple[int, Draws]]:
        """Independent gradients of each, with its place; all start from the same seed.

        Estimators that can share their draws do: then the programs run once for all of them.

        Args:
            elbos: From `make`.
            repeats: Gradients of each.
            seed: Where the draws start.
            advance: Called with how many gradients were made.
        """
        for places in self._sharing(elbos, repeats):
            pyro.set_rng_seed(seed)
            values = torch.empty(len(places), repeats, dtype=torch.float64)
            rows: list[dict[str, list[Tensor]]] = [{g: [] for g in self.groups} for _ in places]
            for r in range(repeats):
                for i, (value, found) in enumerate(self._step_all([elbos[p] for p in places])):
                    values[i, r] = value
                    for group, drawn in rows[i].items():
                        drawn.append(self.flat(group, found).cpu())
                advance(len(places))
            for i, place in enumerate(places):
                gradients = {g: torch.stack(drawn).double() for g, drawn in rows[i].items()}
                rows[i] = {}
                yield place, Draws(values[i], gradients)

    def _sharing(self, elbos: Sequence[ELBO], repeats: int) -> list[list[int]]:
        """Which estimators share their draws, as far as the gradients fit in memory."""
        groups: dict[Any, list[int]] = {}
        one_by_one = self.structure is not None and not self.structure.vectorizable
        for place, elbo in enumerate(elbos):
            shares = self.structure is not None and can_share(elbo)
            alone = ("alone", place)
            key = ("all" if one_by_one else elbo.num_particles) if shares else alone
            groups.setdefault(key, []).append(place)
        entries = sum(min(self._size(group), _MAX_ENTRIES) for group in self.groups)
        most = max(1, int(_ROOM_FOR_REPEATS / (8 * repeats * entries)))
        return [
            places[i : i + most] for places in groups.values() for i in range(0, len(places), most)
        ]

    def _step_all(self, elbos: Sequence[ELBO]) -> list[tuple[float, Sequence[Tensor | None]]]:
        """Value and gradient of each estimator, all of the same draws."""
        if self.structure is None or not can_share(elbos[0]):
            return [(self.step(elbo), self.gradients()) for elbo in elbos]
        most = max(elbo.num_particles for elbo in elbos)
        traces = draw_traces(self.model, self.guide, self.arguments, self.structure, most)
        terms = Terms(self.model, self.guide, self.arguments, self.structure, traces)
        weighed = [elbo.weigh(terms) for elbo in elbos]
        factor = scale_of(traces, self.structure) / self.per
        found = self._gradients_of(terms, [weights for _, weights in weighed])
        return [
            (float(value.sum()) * factor, [None if g is None else g * factor for g in gradients])
            for (value, _), gradients in zip(weighed, found, strict=True)
        ]

    def _gradients_of(
        self, terms: Terms, weights: list[dict[str, Tensor]]
    ) -> list[Sequence[Tensor | None]]:
        """The gradient that each set of weights gives the terms.

        One backward pass, vectorised over the sets, makes all of them; where it takes too much
        memory, or an operation of the programs cannot be vectorised, each has a pass of its own.
        """
        leaves = list(self.leaves.values())
        room = len(weights) * self.bytes_of_particle * len(terms.log_weights)
        if self.at_once and room <= _ROOM_AT_ONCE:
            try:
                found = _at_once(terms, weights, leaves)
            except RuntimeError:
                self.at_once = False
            else:  # an infinity of one set would reach the others, as 0 * inf
                if all(g is None or bool(g.isfinite().all()) for one in found for g in one):
                    return found
        return [_in_turn(terms, one, leaves) for one in weights]

    def _size(self, group: str) -> int:
        return sum(self.leaves[name].numel() for name in self.groups[group])

    def time(self, elbos: Sequence[ELBO], rounds: int) -> np.ndarray:
        """Seconds of a gradient, [rounds, elbos]; in turns, so that a busy moment hits all.

        Where a round takes long there are fewer, but no less than three.
        """
        on_gpu = any(leaf.is_cuda for leaf in self.leaves.values())
        clock = time.perf_counter if on_gpu else time.thread_time
        seconds: list[list[float]] = []
        while len(seconds) < rounds:
            seconds.append([])
            for elbo in elbos:
                started = clock()
                self.step(elbo)
                if on_gpu:
                    torch.cuda.synchronize()
                seconds[-1].append(clock() - started)
            if len(seconds) >= _LEAST_ROUNDS and sum(map(sum, seconds)) > _SECONDS_TO_TIME:
                break
        return np.array(seconds)

    def make(self, spec: EstimatorSpec, num_particles: int) -> ELBO:
        """The estimator for so many particles.

        Raises:
            CannotMakeError: If it does not take that number.
        """
        try:
            elbo = spec.make(num_particles)
        except ValueError as error:  # too few particles, or groups that do not divide them
            raise CannotMakeError(str(error)) from error
        if isinstance(elbo, Objective):
            if self.structure is not None:
                elbo.assume(self.model, self.guide, self.structure)
        elif (
            math.isinf(elbo.max_plate_nesting) and self.structure is not None
        ):  # Pyro's own guess would draw random numbers
            own = int(elbo.vectorize_particles and num_particles > 1)
            elbo.max_plate_nesting = self.structure.max_plate_nesting + own
        return elbo

    def has_unreparameterised(self) -> bool:
        """Whether the guide draws a latent without reparameterisation."""
        with keep_random_state(), torch.no_grad():
            guide_trace, _ = trace_programs(self.model, self.guide, self.arguments)
        sites = weighted_sites(guide_trace).values()
        return any(not site["is_observed"] and not site["fn"].has_rsample for site in sites)


def _in_turn(
    terms: Terms, weights: Mapping[str, Tensor], leaves: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradient of the weighted terms; None where a leaf has none."""
    used = [(terms[n][: len(w)], w) for n, w in weights.items() if terms[n].requires_grad]
    if not used:
        return (None,) * len(leaves)
    outputs, given = zip(*used, strict=True)
    return torch.autograd.grad(outputs, leaves, given, retain_graph=True, allow_unused=True)


def _at_once(
    terms: Terms, weights: list[dict[str, Tensor]], leaves: list[Tensor]
) -> list[Sequence[Tensor | None]]:
    """The same for several sets of weights, in one pass."""
    names = dict.fromkeys(n for one in weights for n in one if terms[n].requires_grad)
    if not names:
        return [(None,) * len(leaves)] * len(weights)
    given = []
    for name in names:
        rows = torch.zeros(len(weights), *terms[name].shape).to(terms[name])
        for row, one in zip(rows, weights, strict=True):
            if name in one:
                row[: len(one[name])] = one[name]
        given.append(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that are vectorised by a loop
        found = torch.autograd.grad(
            [terms[name] for name in names],
            leaves,
            given,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )
    return [[None if g is None else g[i] for g in found] for i in range(len(weights))]


def count_passes(elbo: ELBO, model: Program, guide: Program, arguments: Arguments) -> int:
    """Runs of the programs with one particle that a gradient takes, the same on every machine.

    The parameters' `.grad` are added to.
    """
    runs = dict.fromkeys(("model", "guide"), 0)

    def counted(which: str, program: Program) -> Program:
        def run(*args: Any, **kwargs: Any) -> Any:
            runs[which] += 1
            return program(*args, **kwargs)

        return run

    one = copy.copy(elbo)  # the caller's knows its own programs, and need not look at these
    model, guide = counted("model", model), counted("guide", guide)
    args, kwargs = arguments
    together = one.vectorize_particles
    with keep_random_state():
        one.loss_and_grads(model, guide, *args, **kwargs)  # looks the programs over
        if isinstance(one, Objective):
            together = one.structure_of(model, guide, arguments).vectorizable
        runs.update(model=0, guide=0)
        one.loss_and_grads(model, guide, *args, **kwargs)
    return max(runs.values()) * (one.num_particles if together else 1)


def _leaves_of(
    model: Program, guide: Program, arguments: Arguments
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors an optimizer would move, by name, and who uses each: model, guide or both."""
    with keep_random_state():
        guide_trace, model_trace = trace_programs(model, guide, arguments)
    leaves: dict[str, Tensor] = {}
    users: dict[int, set[str]] = {}
    names: dict[int, str] = {}
    for user, trace in (("guide", guide_trace), ("model", model_trace)):
        for name, site in trace.nodes.items():
            if site["type"] != "param":
                continue
            leaf = site["value"].unconstrained()
            if not leaf.requires_grad:
                continue
            shown = names.setdefault(id(leaf), name.replace("$$$", "."))
            leaves[shown] = leaf
            users.setdefault(id(leaf), set()).add(user)
    if not leaves:
        raise ProgramError("neither model nor guide has a parameter that requires a gradient")
    return leaves, {
        name: "both" if len(users[id(leaf)]) > 1 else next(iter(users[id(leaf)]))
        for name, leaf in leaves.items()
    }


def _group(
    users: Mapping[str, str], parameters: Sequence[str] | Mapping[str, Sequence[str]] | None
) -> dict[str, tuple[str, ...]]:
    if parameters is None:
        kinds = [kind for kind in ("guide", "model", "both") if kind in users.values()]
        return {k: tuple(name for name, user in users.items() if user == k) for k in kinds}
    if isinstance(parameters, str):
        parameters = [parameters]
    if not isinstance(parameters, Mapping):
        parameters = {pattern: [pattern] for pattern in parameters}
    groups = {}
    for group, patterns in parameters.items():
        patterns = [patterns] if isinstance(patterns, str) else patterns
        chosen = tuple(n for n in users if any(fnmatch.fnmatchcase(n, p) for p in patterns))
        if not chosen:
            raise ValueError(f"no parameter matches {group!r}; there are {', '.join(users)}")
        groups[group] = chosen
    if not groups:
        raise ValueError("parameters is empty; name some, or pass None for model and guide")
    return groups


def _entries(
    group: str, names: tuple[str, ...], leaves: Mapping[str, Tensor], seed: int, notes: list[str]
) -> Tensor | None:
    total = sum(leaves[name].numel() for name in names)
    if total <= _MAX_ENTRIES:
        return None
    notes.append(
        f"{_MAX_ENTRIES:,} of the {total:,} entries of '{group}', drawn at random, stand for all."
    )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(total, generator=generator)[:_MAX_ENTRIES].sort().values
    return chosen.to(leaves[names[0]].device)
