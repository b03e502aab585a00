"""Drawing and timing gradients of a pair of programs, parameter group by parameter group."""

import fnmatch
import math
import time
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

from pyro_vae.diagnostics.gradients.candidates import Candidate
from pyro_vae.diagnostics.gradients.statistics import Gradients
from pyro_vae.inference.estimators import Estimator
from pyro_vae.inference.programs import (
    Arguments,
    PointMassError,
    Program,
    ProgramError,
    ProgramStructure,
    as_arguments,
    check_module_names,
    check_parameters,
    count_data,
    inspect_programs,
    keep_random_state,
    tensors_of,
    trace_programs,
    weighted_sites,
)

__all__ = ["Bench", "CannotMakeError", "Draws", "own_parameters"]

_MAX_ENTRIES = 50_000  # of a group, so that all repeats fit in memory


class CannotMakeError(ValueError):
    """An estimator refuses this number of particles."""


@dataclass
class Draws:
    """Repeated gradients of one estimator."""

    values: Float[Tensor, " repeats"]
    gradients: dict[str, Gradients]


@dataclass
class Bench:
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

    @classmethod
    def of(
        cls,
        model: Program,
        guide: Program,
        x: Any,
        parameters: Sequence[str] | Mapping[str, Sequence[str]] | None,
        joint: bool,
        seed: int,
        candidates: list[Candidate],
    ) -> "Bench":
        """Looks the programs over; the parameters must be the store's own by then.

        Raises:
            ProgramError: If the estimators' tool, or Pyro, could not train the pair.
            ValueError: If `parameters` matches nothing.
        """
        arguments = as_arguments(x)
        check_module_names(model, guide)
        structure = None
        ours = any(not candidate.name.startswith("Pyro ") for candidate in candidates)
        try:
            structure = inspect_programs(model, guide, arguments, joint=joint, num_particles=2)
        except ProgramError as error:
            if ours or isinstance(error, PointMassError):  # Pyro would call a MAP objective an ELBO
                raise
        enumerates = all(candidate.enumerates for candidate in candidates)
        check_parameters(model, guide, arguments, enumerates)
        leaves, users = _leaves_of(model, guide, arguments)
        groups = _group(users, parameters)
        with keep_random_state(), torch.no_grad():
            _, model_trace = trace_programs(model, guide, arguments)
        counts = count_data(model_trace)
        count = counts[0][0] if counts else 1
        per = structure.batch_size * structure.scale if structure is not None else float(count)
        notes: list[str] = []
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

    def gradient(self, group: str) -> Tensor:
        """The gradient of the bound, flat, from `.grad`."""
        leaves = [self.leaves[name] for name in self.groups[group]]
        parts = [
            (torch.zeros_like(leaf) if leaf.grad is None else -leaf.grad / self.per).reshape(-1)
            for leaf in leaves
        ]
        return self.select(group, torch.cat(parts))

    def select(self, group: str, flat: Tensor) -> Tensor:
        """The entries that stand for a group."""
        chosen = self.entries[group]
        return flat if chosen is None else flat[chosen]

    def share(self, group: str) -> float:
        """The share of a group's entries that stands for all."""
        chosen = self.entries[group]
        total = sum(self.leaves[name].numel() for name in self.groups[group])
        return 1.0 if chosen is None else len(chosen) / total

    def draw(self, elbo: ELBO, repeats: int, seed: int, advance: Callable[[], Any]) -> Draws:
        """Independent gradients, started from a seed; `advance` is called after each."""
        pyro.set_rng_seed(seed)
        values = torch.empty(repeats, dtype=torch.float64)
        rows: dict[str, list[Tensor]] = {group: [] for group in self.groups}
        for r in range(repeats):
            values[r] = self.step(elbo)
            for group in self.groups:
                rows[group].append(self.gradient(group).cpu())
            advance()
        gradients = {group: torch.stack(drawn).double() for group, drawn in rows.items()}
        return Draws(values, gradients)

    def time(self, elbos: Sequence[ELBO], rounds: int) -> np.ndarray:
        """Seconds of a gradient, [rounds, elbos]; in turns, so that a busy moment hits all."""
        on_gpu = any(leaf.is_cuda for leaf in self.leaves.values())
        clock = time.perf_counter if on_gpu else time.thread_time
        seconds = np.empty((rounds, len(elbos)))
        for r in range(rounds):
            for i, elbo in enumerate(elbos):
                started = clock()
                self.step(elbo)
                if on_gpu:
                    torch.cuda.synchronize()
                seconds[r, i] = clock() - started
        return seconds

    def make(self, candidate: Candidate, num_particles: int) -> ELBO:
        """The estimator for so many particles.

        Raises:
            CannotMakeError: If it does not take that number.
        """
        try:
            elbo = candidate.make(num_particles)
        except ValueError as error:  # too few particles, or groups that do not divide them
            raise CannotMakeError(str(error)) from error
        if (
            not isinstance(elbo, Estimator)
            and math.isinf(elbo.max_plate_nesting)
            and self.structure is not None
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


def own_parameters(start: dict[str, Any]) -> None:
    """Copies the store's parameters, so that gradients do not reach the caller's tensors."""
    store = pyro.get_param_store()
    state = store.get_state()
    own = {name: value.detach().clone().requires_grad_() for name, value in state["params"].items()}
    store.set_state({"params": own, "constraints": state["constraints"]})
    store.set_state(start)


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
