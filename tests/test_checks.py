"""Arguments that many tools check in common: what passes, and the sentence for what does not."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from pyro_vae.checks import check_count, check_max_memory, check_positive, refuses_in_words


def test_what_is_in_its_range_passes():
    check_count("n", 1)
    check_count("n", 0, 0)
    check_count("n", None, optional=True)
    check_positive("rate", 0.1)
    check_max_memory(math.inf)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1", None, np.int64(1)])
def test_a_count_that_is_none_is_said(value):
    with pytest.raises(ValueError, match=r"^n must be an integer from 1, not "):
        check_count("n", value)


def test_the_sentence_names_the_least_the_option_and_the_reason():
    with pytest.raises(ValueError, match="n must be an integer from 8 or None, not 7: too few"):
        check_count("n", 7, 8, optional=True, because=": too few")


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_what_is_not_positive_and_finite_is_said(value):
    with pytest.raises(ValueError, match="rate must be positive, not"):
        check_positive("rate", value)
    if value != math.inf:
        with pytest.raises(ValueError, match="max_memory is in GiB and must be positive"):
            check_max_memory(value)


# --- arguments of another kind than annotated -----------------------------------------------------


@refuses_in_words
def takes(
    model: Callable[..., Any],
    x: Any = None,
    count: int = 1,
    rate: float | None = None,
    names: Sequence[str] = (),
    kind: Literal["a", "b"] = "a",
    where: str | Path | None = None,
    more: Mapping[str, int] | None = None,
    fails: Exception | None = None,
) -> str:
    if fails is not None:
        raise fails
    model(range(count))
    return f"{1 / (rate or 1.0)} {Path(where or '.')} {dict(more or {})} {kind}{''.join(names)}"


def raised_by(fault: dict[str, Any]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 -- of any type
        takes(**{"model": len, **fault})
    return caught.value


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"model": None}, "model must be a function, not None"),
        ({"model": dict, "x": 1, "count": 3}, "model must be a function, not <class 'dict'>"),
        ({"count": "3"}, "count must be an integer, not '3'"),
        ({"count": 2**70}, f"count must be an integer, not {2**70}"),
        ({"rate": "fast"}, "rate must be a number or None, not 'fast'"),
        ({"names": 5}, r"names must be names, as (a, b), not 5"),
        ({"names": ["a", 3]}, r"names must be names, as (a, b), not ['a', 3]"),
        ({"where": 1.5}, "where must be text, a path or None, not 1.5"),
        ({"more": [1, 2]}, "more must be a mapping or None, not [1, 2]"),
    ],
)
def test_an_argument_of_another_kind_is_named(fault, says):
    error = raised_by(fault)
    assert isinstance(error, ValueError)
    assert str(error) == says
    assert error.__cause__ is not None  # whoever debugs sees what failed


def test_what_works_keeps_working():
    assert takes(len, count=True, kind="c") == "1.0 . {} c"  # nothing failed, nothing is said


@pytest.mark.parametrize(
    "fails", [KeyError("of the user's program"), ZeroDivisionError("in torch"), OSError("disk")]
)
def test_an_error_that_no_argument_explains_stays(fails):
    assert raised_by({"fails": fails}) is fails


def test_a_sentence_of_the_package_stays():
    guarded = refuses_in_words(check_count)
    with pytest.raises(ValueError, match="n must be an integer from 1, not 'a'"):
        guarded("n", "a", 1)


@pytest.mark.parametrize("value", ["a", None, [1], math.nan])
def test_sizes_that_are_no_numbers_are_said(value):
    for check in (lambda: check_positive("rate", value), lambda: check_max_memory(value)):
        with pytest.raises(ValueError, match="must be positive, not"):
            check()
