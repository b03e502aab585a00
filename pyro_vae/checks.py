"""Checks of arguments that many tools have in common, each with its one wording."""

import dis
import inspect
import math
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

__all__ = [
    "check_count",
    "check_max_memory",
    "check_positive",
    "raised_in_words",
    "refuses_in_words",
]

_F = TypeVar("_F", bound=Callable[..., Any])
_HERE = __name__.partition(".")[0]
_LARGEST = 2**63  # what a size of a tensor stays below


def check_count(
    name: str, value: Any, least: int = 1, *, optional: bool = False, because: str = ""
) -> None:
    """Refuses what is no integer from `least` on.

    Args:
        name: Of the argument.
        value: As the caller gave it.
        least: The smallest that will do.
        optional: Whether None will do as well.
        because: What the sentence ends with.

    Raises:
        ValueError: If it will not do.
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < _LARGEST:
        allowed = f"an integer from {least}" + " or None" * optional
        raise ValueError(f"{name} must be {allowed}, not {value!r}{because}")


def check_positive(name: str, value: Any) -> None:
    """Refuses what is no positive and finite number."""
    if not (_is_number(value) and 0 < value < math.inf):
        raise ValueError(f"{name} must be positive, not {value!r}")


def check_max_memory(value: Any) -> None:
    """Refuses what is no size of memory."""
    if not (_is_number(value) and value > 0):
        raise ValueError(f"max_memory is in GiB and must be positive, not {value!r}")


# --- arguments of another kind than is said -------------------------------------------------------


def refuses_in_words(function: _F) -> _F:
    """Names the argument at fault where a call ends in an error that is not of this package.

    What a function takes stands in its annotations. They are looked at only where it failed, so
    that whatever works keeps working: the first argument that does not fit its annotation is named,
    with what it may be; where all fit, the error stays as it is.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            said = None if raised_in_words(error) else _misfit(signature, args, kwargs)
            if said is None:
                raise
            raise ValueError(said) from error

    return cast(_F, call)


def raised_in_words(error: Exception) -> bool:
    """Whether the package raised it in words: by a `raise` of its own, or as an operating error."""
    if type(error).__module__.startswith(_HERE) or isinstance(error, OSError):
        return True
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    place = str(last.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    doing = last.tb_frame.f_code.co_code[last.tb_lasti]
    return place == _HERE and dis.opname[doing] == "RAISE_VARARGS"


def _misfit(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str | None:
    """The sentence about the first argument that is not of the kind annotated."""
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:  # Python's own sentence says it
        return None
    for name, value in given.items():
        kind = signature.parameters[name].annotation
        program = name in ("model", "guide") and isinstance(value, type)
        if name != "self" and (program or not _fits(kind, value)):
            shown = repr(value)
            shown = shown if len(shown) <= 60 and "\n" not in shown else type(value).__name__
            return f"{name} must be {_said(kind)}, not {shown}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


_TESTS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    type(None): ("None", lambda value: value is None),
    bool: ("True or False", lambda value: isinstance(value, bool)),
    int: (
        "an integer",
        lambda value: (
            isinstance(value, Integral)
            and not isinstance(value, bool)
            and abs(int(value)) < _LARGEST
        ),
    ),
    float: ("a number", _is_number),
    str: ("text", lambda value: isinstance(value, str)),
    Path: ("a path", lambda value: isinstance(value, str | os.PathLike)),
    Callable: ("a function", callable),
    Mapping: ("a mapping", lambda value: isinstance(value, Mapping)),
    Sequence: (
        "a sequence",
        lambda value: isinstance(value, Sequence) and not isinstance(value, str | bytes),
    ),
    Iterable: (
        "several values",
        lambda value: isinstance(value, Iterable) and not isinstance(value, str | bytes),
    ),
}
"""What a simple annotation is called, and whether a value is such."""


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value is of an annotated kind; True where nobody can tell."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(each, value) for each in get_args(kind))
    if origin is Literal:
        return isinstance(value, str | int) and value in get_args(kind)
    of = get_args(kind)[:1] if origin in (Sequence, Iterable) else ()
    kind = kind if origin is None else origin
    test = _TESTS.get(type(None) if kind is None else kind)
    if test is not None:
        return test[1](value) and all(_fits(each, one) for each in of for one in value)
    if kind in (inspect.Parameter.empty, Any) or not isinstance(kind, type):
        return True
    # What is annotated as a tensor may come as an array or a list.
    array = kind.__name__ == "Tensor" or kind.__module__.startswith("jaxtyping")
    return array or isinstance(value, kind)


def _said(kind: Any) -> str:
    """An annotation in words."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        words = [_said(each) for each in get_args(kind) if each is not type(None)]
        words = list(dict.fromkeys(words)) + ["None"] * (type(None) in get_args(kind))
        return " or ".join([", ".join(words[:-1])] * (len(words) > 1) + words[-1:])
    if origin is Literal:
        return " or ".join(map(repr, get_args(kind)))
    simple = _TESTS.get(origin or (type(None) if kind is None else kind))
    if simple is None:
        name = getattr(kind, "__name__", str(kind))
        return "an integer" if name == "integer" else f"a {name}"
    of = get_args(kind)
    if origin in (Sequence, Iterable) and of and of[0] in (int, str, float):
        return {int: "integers", str: "names", float: "numbers"}[of[0]] + ", as (a, b)"
    return simple[0]
