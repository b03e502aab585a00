"""Own fits on a part of the data, for cross-validation and split checks."""

from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from pyro_vae.inference.programs import (
    FittedProgram,
    Program,
    ProgramError,
    batch_axes,
    keep_random_state,
    map_batch,
    modules_of,
    take,
)
from pyro_vae.inference.svi import fit

__all__ = ["Refit", "fit_again", "refitted", "some_of"]

Refit = Callable[[Any], Any]
"""From a part of the data to a fitted pair: a `Fit`, or anything with `model` and `guide`."""


@runtime_checkable
class _Pair(Protocol):
    @property
    def model(self) -> Any: ...
    @property
    def guide(self) -> Any: ...


def some_of(x: Any, rows: Tensor, num_data: int) -> Any:
    """These data of x, along the axis that has so many.

    Raises:
        ProgramError: If no tensor has.
    """
    axes = batch_axes(x, num_data)
    if not axes:
        raise ProgramError(
            f"no tensor of x has the {num_data} entries of the plate of the data along any axis, "
            "so x cannot be cut into parts; pass the data as arguments of the programs"
        )
    return map_batch(x, take(rows), axes[0])


def fit_again(model: Program, guide: Program) -> Refit:
    """Copies of the programs, fitted by `fit` from where they are; the originals stay as they are.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior.

    Raises:
        ProgramError: If they reach modules that a copy of them would share.
    """
    memo: dict[int, Any] = {}
    programs = [_copied(program, memo) for program in (model, guide)]
    originals = {id(m) for program in (model, guide) for m in modules_of(program)}
    if originals & {id(m) for program in programs for m in modules_of(program)}:
        raise ProgramError(
            "a program is a function that reaches a module, which a new fit would train in place; "
            "pass refit=, a function from data to a fit of programs of its own"
        )

    def refit(x: Any) -> Any:
        # Fitted anew each time: a part of the data is to know nothing of another.
        again: dict[int, Any] = {}
        own_model, own_guide = (_copied(program, again) for program in programs)
        try:
            return fit(own_model, own_guide, x, progress=False).require_finished()
        except ProgramError:
            raise
        except (IndexError, RuntimeError, ValueError) as error:
            raise ProgramError(
                f"the programs cannot be fitted to a part of the data ({error}), as those with "
                "parameters for each datum; pass refit=, a function from data to a fit of programs "
                "of its own, such as lambda part: fit(model, AutoNormal(model), part)"
            ) from error

    return refit


def _copied(program: Any, memo: dict[int, Any]) -> Any:
    if isinstance(program, FittedProgram):
        return FittedProgram(_copied(program.__wrapped__, memo), program.state)
    if hasattr(program, "__code__") and not hasattr(program, "__self__"):

        @wraps(program)
        def call(*args: Any, **kwargs: Any) -> Any:  # a name of its own: see `warn_of_unfitted`
            return program(*args, **kwargs)

        return call
    try:
        return deepcopy(program, memo)
    except (RuntimeError, TypeError) as error:
        raise ProgramError(
            f"{type(program).__name__} cannot be copied ({error}); pass refit=, a function from "
            "data to a fit of programs of its own"
        ) from error


def refitted(refit: Refit, x: Any) -> tuple[Program, Program]:
    """The pair that a refit gives.

    Raises:
        TypeError: If it gives none.
    """
    with keep_random_state():
        found = refit(x)
    if isinstance(found, tuple) and len(found) == 2:
        return found
    if not isinstance(found, _Pair):
        raise TypeError(
            f"refit returned a {type(found).__name__}; return what fit returns, or (model, guide)"
        )
    return found.model, found.guide
