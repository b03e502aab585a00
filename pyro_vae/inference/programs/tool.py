"""What every public tool takes: a pair as one object, data in any form, fitted values, no NaN."""

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial, wraps
from types import FrameType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast, overload, runtime_checkable
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.checks import refuses_in_words
from pyro_vae.data import as_data
from pyro_vae.inference.programs.arguments import (
    Program,
    ProgramError,
    as_arguments,
    batch_axes,
    batch_length,
    map_batch,
    take,
)
from pyro_vae.inference.programs.scope import (
    FittedProgram,
    evaluation_mode,
    modules_of,
    program_scope,
)
from pyro_vae.inference.programs.traces import site_log_prob, trace_programs, weighted_sites

__all__ = [
    "LAST_FITS",
    "UnfittedWarning",
    "ready_data",
    "remember_fitted",
    "tool",
    "tool_of_model",
    "warn_of_unfitted",
]

_P = ParamSpec("_P")
_F = TypeVar("_F", bound=Callable[..., Any])
_R = TypeVar("_R")
_R_co = TypeVar("_R_co", covariant=True)

_DATA = ("x", "validation", "training", "test")  # parameters of tools that hold data
_PROBED = 1000  # rows with a value that is not finite, looked at


@runtime_checkable
class _Pair(Protocol):
    """A VAE, an autoencoder, a mixture, a `Fit`: anything that has both programs."""

    @property
    def model(self) -> Any: ...
    @property
    def guide(self) -> Any: ...


@runtime_checkable  # where annotations are checked while running
class _Tool(Protocol[_P, _R_co]):
    """A function of `model, guide, ...` that takes a pair in their place."""

    @overload
    def __call__(
        self, model: Program, guide: Program | None, *args: _P.args, **kwargs: _P.kwargs
    ) -> _R_co: ...
    @overload
    def __call__(self, pair: _Pair, /, *args: _P.args, **kwargs: _P.kwargs) -> _R_co: ...


def tool(function: Callable[Concatenate[Program, Program, _P], _R]) -> _Tool[_P, _R]:
    """Lets a function of `model, guide, x` take what people have.

    One object with both programs may stand for `model, guide`: a module with methods of these
    names, or what `fit` returned. The data may come in any form that `data.as_data` reads and are
    converted to the dtype of the programs' parameters. Values that are not finite are refused in a
    sentence, unless the model masks them.
    """
    return cast(_Tool[_P, _R], _prepared(function, ready_data))


def tool_of_model(*, observes: bool = True) -> Callable[[_F], _F]:
    """The same for a function of `model, x` that may be given a guide by keyword, or knows none.

    Args:
        observes: Whether the values of x are looked at; not where the model draws them anew.
    """
    ready = ready_data if observes else converted_data

    def decorate(function: _F) -> _F:
        return cast(_F, _prepared(function, ready))

    return decorate


def _prepared(function: Callable[..., Any], ready: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(function)

    function = refuses_in_words(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _apart(args, kwargs, function.__name__, signature.parameters)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # for Python's own sentence
        given = bound.arguments
        for name in _DATA:
            if given.get(name) is not None:
                given[name] = ready(given["model"], given.get("guide"), given[name])
        return function(*bound.args, **bound.kwargs)

    return call


def ready_data(model: Any, guide: Program | None, x: Any) -> Any:
    """The data as tensors of the programs' type, refused where they are not finite.

    Raises:
        ValueError: If the data cannot be converted without loss, or their values cannot be used.
        TypeError: If they hold no numbers.
    """
    ready = converted_data(model, guide, x)
    _check_finite(model, guide, ready)
    return ready


def converted_data(model: Any, guide: Program | None, x: Any) -> Any:
    """The data as tensors of the programs' type, whatever their values."""
    ready = as_data(x, _dtype_of(model, guide))
    _check_arity(model, x, ready)
    return ready


def _apart(
    args: tuple[Any, ...], kwargs: dict[str, Any], name: str, parameters: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with a pair at their head taken apart; others are returned as they are."""
    positional = list(parameters)[1] == "guide"
    rest = args[1:]
    has_guide = "guide" in kwargs or (rest and (rest[0] is None or callable(rest[0])))
    if not args or (positional and has_guide):
        return args, kwargs
    pair = args[0]
    if isinstance(pair, _Pair) and callable(pair.model):
        if positional:
            return (pair.model, pair.guide, *rest), kwargs
        guide = {"guide": pair.guide} if "guide" in parameters else {}
        return (pair.model, *rest), {**guide, **kwargs}
    if positional and rest:
        raise TypeError(
            f"{name} takes model, guide and x, or one object that has `model` and `guide`, and x; "
            f"{type(pair).__name__} {'has no guide' if hasattr(pair, 'model') else 'has neither'}, "
            f"and a {type(rest[0]).__name__} is no guide"
        )
    return args, kwargs


def _dtype_of(*programs: Program | None) -> torch.dtype | None:
    """The one floating-point type of the modules' parameters; None without modules."""
    types = {
        parameter.dtype
        for program in programs
        if program is not None
        for module in modules_of(program)
        for parameter in module.parameters()
        if parameter.is_floating_point()
    }
    return types.pop() if len(types) == 1 else None


def _check_arity(model: Program, given: Any, ready: Any) -> None:
    """A data set of images and labels is not silently cut to its images."""
    if isinstance(ready, dict):
        try:
            inspect.signature(model).bind(**ready)
        except TypeError as error:
            raise ProgramError(
                f"x is a dict of {', '.join(map(repr, ready)) or 'nothing'}, whose names are "
                f"arguments of the programs, but the model does not take them so ({error}): name "
                "its arguments, or pass the data alone"
            ) from error
        return
    if not isinstance(ready, tuple) or isinstance(given, tuple):
        return
    try:
        inspect.signature(model).bind(*ready)
    except TypeError as error:
        raise ProgramError(
            f"an item of {type(given).__name__} has {len(ready)} parts, but the model takes other "
            f"arguments ({error}): pass the part it takes, for example "
            "x=torch.stack([item[0] for item in dataset])"
        ) from error


# --- values that are not finite -------------------------------------------------------------------


def _check_finite(model: Program, guide: Program | None, x: Any) -> None:
    """Refuses data with NaN or infinite values that reach a log-probability.

    What a mask takes out of the model may be anything: the programs are run, and the observed
    sites' log-probabilities looked at.

    Raises:
        ProgramError: Names the site, how many values there are, and where the first is.
    """
    args, kwargs = as_arguments(x)
    given = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
    suspects = [t for t in given if t.is_floating_point() and not _all_finite(t)]
    if not suspects:
        return
    axes = batch_axes(x)[0]
    rows = _rows_with(suspects, batch_length(x, axes))
    part = x if rows is None else map_batch(x, take(rows), axes)
    for data, kept in ((part, rows), (x, None)):
        try:
            reason = _reason(model, guide, data, kept)
        except Exception:  # programs that want all data, or whose own sentence is the better one
            continue
        if reason:
            raise ProgramError(f"{reason}: remove or impute such data, or mask them in the model")
        return


def _all_finite(x: Tensor) -> bool:
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())  # the sum is much the faster


def _rows_with(tensors: list[Tensor], length: int) -> Tensor | None:
    """The data that hold such values; None where tensors are not as long as the data."""
    if any(t.dim() == 0 or len(t) != length for t in tensors):
        return None
    wrong = torch.stack([~t.reshape(length, -1).isfinite().all(1).cpu() for t in tensors])
    return wrong.any(0).nonzero().flatten()[:_PROBED]


@torch.no_grad()
def _reason(model: Program, guide: Program | None, x: Any, rows: Tensor | None) -> str:
    args, kwargs = arguments = as_arguments(x)
    programs = [model] if guide is None else [model, guide]
    with program_scope(0), pyro.validation_enabled(False), evaluation_mode(*programs):
        if guide is None:
            traces = [poutine.trace(model).get_trace(*args, **kwargs)]
        else:
            traces = list(trace_programs(model, guide, arguments))[::-1]
        for name, site in weighted_sites(traces[0]).items():
            if site["is_observed"] and (said := _where(name, site, rows)):
                return said
        for trace in traces:
            for name, site in weighted_sites(trace).items():
                if not site["is_observed"] and not site["value"].isfinite().all():
                    return (
                        f"the data hold values that are not finite, which a mask of the model "
                        f"cannot undo, since latent '{name}' is not finite because of them"
                    )
    return ""


def _where(name: str, site: dict[str, Any], rows: Tensor | None) -> str:
    """Which observed values make the log-probability of a site NaN or infinite, in words."""
    value = site["value"]
    if not value.is_floating_point():
        return ""
    log_prob = site_log_prob(site)
    event = (...,) + (None,) * site["fn"].event_dim
    wrong = ~value.isfinite() & ~log_prob.isfinite()[event]
    if not bool(wrong.any()):
        return ""
    place = wrong.nonzero()[0].tolist()
    if rows is not None and len(rows) in wrong.shape:
        dim = wrong.shape.index(len(rows))
        place[dim] = int(rows[place[dim]])
    count, missing = int(wrong.sum()), int((wrong & value.isnan()).sum())
    more = "at least " if rows is not None and len(rows) == _PROBED else ""
    return (
        f"site '{name}' observes {more}{count} values that are not finite ({missing} NaN, "
        f"{count - missing} infinite), the first at {place}"
    )


# --- programs that are measured without what was fitted -------------------------------------------
#
# Modules are updated in place, but the values of bare `pyro.param` live in what `fit` returned:
# nothing else could hold them, as two programs may use one name. Measuring the program itself would
# then be, without a word, a measurement of its initial values.


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
