"""The `x` of every tool as the arguments of a program."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Arguments",
    "Axes",
    "as_arguments",
    "batch_axes",
    "batch_length",
    "map_batch",
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
