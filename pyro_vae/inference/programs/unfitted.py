"""Says when a program that was fitted is measured without its fitted values.

Modules are updated in place, but the values of bare `pyro.param` live in what `fit` returned:
nothing else could hold them, as two programs may use one name. Measuring the program itself would
then be, without a word, a measurement of its initial values.
"""

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.inference.programs.scope import FittedProgram

__all__ = ["LAST_FITS", "UnfittedWarning", "remember_fitted", "warn_of_unfitted"]


class UnfittedWarning(UserWarning):
    """A program that was fitted in this process is measured without the fitted values."""


@dataclass
class _Last:
    """The last fit of a program: values before and after, unconstrained, and who was told."""

    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    told: set[tuple[str, int]] = field(default_factory=set)


LAST_FITS: WeakKeyDictionary[Any, dict[str, _Last]] = WeakKeyDictionary()
"""By program, or by the object whose method it is: what its last fit did. Lives as they live."""

_PACKAGE = __name__.partition(".")[0]
_DECORATORS = ("contextlib", "jaxtyping", "torch")


def remember_fitted(
    program: Any, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> None:
    """Remembers that a program was fitted.

    Args:
        program: As the caller has it, without fitted values around it.
        before: Copies of its parameters as training began, unconstrained.
        after: The fitted ones; those of modules, which hold them themselves, are left out.
    """
    bare = {name: v.detach() for name, v in after.items() if not isinstance(v, nn.Parameter)}
    if not bare:
        return
    owner, name = _identity(program)
    try:
        LAST_FITS.setdefault(owner, {})[name] = _Last(before, bare)
    except TypeError:  # an object that takes no weak reference, or has no hash
        return


def warn_of_unfitted(*programs: Any) -> None:
    """Warns where a program was fitted and the parameter store at hand has not what was reached.

    Values that the caller has moved since the fit are meant, and nothing is said of them.

    Args:
        programs: As the caller gave them; fitted ones carry their values.
    """
    lasts = [(name, last) for name, last in map(_last_fit, programs) if last is not None]
    stale = [(name, last, found) for name, last in lasts if (found := _stale(last))]
    line = _callers_line()
    if all(line in last.told for _, last, _ in stale):
        return
    for _, last, _ in stale:
        last.told.add(line)
    told = " and ".join(f"'{name}'" for name, _, _ in stale)
    missing = dict.fromkeys(name for _, _, names in stale for name in names)
    parameters = ", ".join(f"'{name}'" for name in missing)
    warnings.warn_explicit(
        f"measuring the unfitted {told}: fitted in this process, but without the fitted values of "
        f"{parameters}. Values of bare parameters live in what fit returned; pass its fit.model "
        "and fit.guide instead",
        UnfittedWarning,
        *line,
    )


def _stale(last: _Last) -> list[str]:
    """The names that the store lacks, or holds as they were before the fit moved them."""
    store = dict(pyro.get_param_store().named_parameters())
    return [
        name
        for name, value in last.after.items()
        if name not in store
        or (_same(store[name], last.before[name]) and not _same(store[name], value))
    ]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and torch.equal(one, other)


def _last_fit(program: Any) -> tuple[str, _Last | None]:
    owner, name = _identity(program)
    try:
        return name, LAST_FITS.get(owner, {}).get(name)
    except TypeError:
        return name, None


def _identity(program: Any) -> tuple[Any, str]:
    """The object whose life counts, and a name: bound methods are new at every look."""
    while isinstance(program, partial):
        inner = poutine.unwrap(program)  # what a handler wraps
        program = inner if callable(inner) and inner is not program else program.func
    if isinstance(program, FittedProgram):  # shows the attributes of the program inside
        return program, "fitted"
    owner = getattr(program, "__self__", program)
    return owner, getattr(program, "__name__", type(owner).__name__)


def _callers_line() -> tuple[str, int]:
    """File and line that called into the package, past the decorators around its functions."""
    frame: FrameType | None = sys._getframe(1)
    caller, inside = sys._getframe(1), False
    while frame is not None:
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if inside and package not in _DECORATORS:
            caller = frame
        inside = package == _PACKAGE or (inside and package in _DECORATORS)
        frame = frame.f_back
    return caller.f_code.co_filename, caller.f_lineno
