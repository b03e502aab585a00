"""What programs are and take: arguments, what a run of them shows, how they are refused."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

__all__ = [
    "Arguments",
    "Axes",
    "JointOnlyError",
    "NoParametersError",
    "PointMassError",
    "Program",
    "ProgramError",
    "ProgramStructure",
    "Site",
    "SitesError",
    "Split",
    "SubsampleError",
    "SupportError",
    "as_arguments",
    "batch_axes",
    "batch_length",
    "map_batch",
    "messenger_of",
    "take",
    "tensors_of",
]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Axes = tuple[int | None, ...]


def as_arguments(x: Any) -> Arguments:
    """Turns the `x` of every tool into a program's arguments.

    Args:
        x: A tensor (one argument), a tuple (several positional ones) or a dict (keywords).

    Returns:
        Positional and keyword arguments.
    """
    if isinstance(x, tuple):
        return x, {}
    if isinstance(x, Mapping):
        return (), dict(x)
    return (x,), {}


def tensors_of(x: Any) -> list[Tensor]:
    """The tensors among the arguments that `x` stands for, in their order."""
    args, kwargs = as_arguments(x)
    return [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]


def batch_axes(x: Any, size: int | None = None) -> list[Axes]:
    """The axes that so many data may lie along in the arguments of `x`, the likeliest first.

    Data often lie along the first axis, but sequences have time there as often as not. Which it is
    the programs say: their batch plate has the size of the part that they are given.

    Args:
        x: In one of the forms of `as_arguments`.
        size: Number of data, as the batch plate has it; None for the length of the first tensor,
            which says less.

    Returns:
        Ways to cut the data, each with an axis for every argument, or None where it is no tensor or
        is not cut. Empty if no tensor has so many entries along any axis.
    """
    args, kwargs = as_arguments(x)
    shapes = [a.shape if isinstance(a, Tensor) else torch.Size() for a in (*args, *kwargs.values())]
    if size is None:
        return [_axes(shapes, 0, next((shape[0] for shape in shapes if shape), 1))]
    first = next((shape for shape in shapes if size in shape), torch.Size())
    return [_axes(shapes, axis, size) for axis in range(len(first)) if first[axis] == size]


def _axes(shapes: list[torch.Size], axis: int, size: int) -> Axes:
    """Data along this axis of each argument, or along the first of those that lack it."""
    return tuple(
        next((i for i in (axis, 0) if i < len(shape) and shape[i] == size), None)
        for shape in shapes
    )


def batch_length(x: Any, axes: Axes) -> int:
    """Number of data in `x` along `axes` (1 if none is cut)."""
    args, kwargs = as_arguments(x)
    given = zip((*args, *kwargs.values()), axes, strict=True)
    return next((a.shape[axis] for a, axis in given if axis is not None), 1)


def map_batch(x: Any, change: Callable[[Tensor, int], Tensor], axes: Axes) -> Any:
    """Applies `change` to the tensors of `x` with their axis of the data; the others are passed on.

    `take` is such a change.
    """
    args, kwargs = as_arguments(x)
    changed = [
        a if axis is None else change(a, axis)
        for a, axis in zip((*args, *kwargs.values()), axes, strict=True)
    ]
    if isinstance(x, tuple):
        return tuple(changed)
    return dict(zip(kwargs, changed, strict=True)) if isinstance(x, Mapping) else changed[0]


def take(part: slice | Tensor) -> Callable[[Tensor, int], Tensor]:
    """Takes some of the data: a slice, or those at indices."""
    if isinstance(part, slice):
        return lambda a, axis: a[(*(slice(None),) * axis, part)]
    return lambda a, axis: a.index_select(axis, part.to(a.device))


Program = Callable[..., Any]


Site = dict[str, Any]


class ProgramError(ValueError):
    """A model or guide is not of the form that the tool needs; the message names the site."""


class SitesError(ProgramError):
    """Model and guide do not sample the same latents, so no objective of theirs is a bound."""


class SupportError(ProgramError):
    """Observed values lie outside the support of their distribution."""


class NoParametersError(ProgramError):
    """There is nothing to train."""


class PointMassError(ProgramError):
    """The guide is a point, so its objective is a MAP objective."""


class SubsampleError(ProgramError):
    """The programs draw a part of their data, and the tool needs all of them."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"{reason}; call the tool inside `with pyro_vae.all_data():`, where plates draw no "
            "subsample (where a plate is given its own, pass all data), and without poutine.scale"
        )


class JointOnlyError(ProgramError):
    """Data have no weights of their own; together they may have one.

    Attributes:
        reason: Why, without the advice to pass joint=True.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}, or pass joint=True for one weight per particle on all data")
        self.reason = reason


class Split(NamedTuple):
    """Where a pair with global latents has its data.

    Attributes:
        global_latents: Names of the latents outside the plate of the data, in the guide's order.
        local_sites: Names of the sites of model and guide inside it.
        dim: The plate's dim, counted from the right (negative).
        size: Number of data in it.
    """

    global_latents: tuple[str, ...]
    local_sites: frozenset[str]
    dim: int
    size: int

    def note(self) -> str:
        """What a result says that is joint because of it."""
        return (
            f"the latents {', '.join(self.global_latents)} are global: numbers are of all data "
            "together, with one weight per particle"
        )


@dataclass(frozen=True)
class ProgramStructure:
    """What one run of a model and its guide shows.

    Attributes:
        batch_dim: The batch plate's dim, counted from the right (negative); None for joint weights.
        batch_size: Number of data in the run that was inspected.
        max_plate_nesting: Dims that plates and batch shapes take; particles go to the left of them.
        scale: The factor N/B of a subsampled plate, applied outside every reduction.
        measure: The measure the observed data live on: binary, grey, real, counts or mixed.
        vectorizable: Whether particles in one tensor program give what they give one by one.
        replayable: Whether the guide's density can be evaluated at given latents (a flow without an
            inverse cannot): what a second pass needs.
        latents: Names of the latent sites, in the guide's order, without auxiliary ones.
        observed: Names of the observed sites of the model.
        enumerated: Names of the model's discrete latents that the guide leaves out and that are
            summed out exactly.
        scaled: Whether each site counts by its own scale, for objectives that are linear in a joint
            log weight: global latents count once, a mini-batch of data N/B times.
        split: Of joint weights, where the data are, if some of the latents are global.
    """

    batch_dim: int | None
    batch_size: int
    max_plate_nesting: int
    scale: float
    measure: str
    vectorizable: bool
    replayable: bool
    latents: tuple[str, ...]
    observed: tuple[str, ...]
    enumerated: tuple[str, ...] = ()
    scaled: bool = False
    split: Split | None = None

    @property
    def notes(self) -> list[str]:
        """What results of this pair say of it."""
        return [] if self.split is None else [self.split.note()]


def messenger_of(program: Any) -> Messenger | None:
    """The guide messenger under handlers and fitted values, which runs the model; or None."""
    inner = poutine.unwrap(program)
    while not isinstance(inner, Messenger) and "__wrapped__" in getattr(inner, "__dict__", {}):
        inner = poutine.unwrap(inner.__wrapped__)
    return inner if isinstance(inner, Messenger) else None
