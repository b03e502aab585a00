"""Several estimates of the same evidence side by side, and what contradicts what."""

import itertools
import math
from typing import Any

import numpy as np

from pyro_vae.results import Result, make_result

__all__ = ["evidence_table"]

_STANDARD_ERRORS = 4.5  # two-sided failure rate 7e-6 a comparison
_ROUNDING = 1e-6  # relative: what counts as equal where there is no Monte-Carlo error


def evidence_table(*results: Result, **named: Result) -> Result:
    """Puts the log evidence of several methods side by side and flags contradictions.

    Contradictory are a lower bound above an upper one or above an exact number, an upper bound
    below an exact one, and two exact or consistent numbers apart, each by more than 4.5 standard
    errors of the mean over the data. Where all bounds hold in expectation, one such case points to
    a mistake in a program or to chains that have not mixed.

    Args:
        *results: From `log_evidence`; their methods name them.
        **named: The same under names of one's own.

    Returns:
        One variable for each result, named by its method or the name given, with its dims, unit
        (nats) and bound, and its standard error `*_se`. `summary()` says what contradicts what, as
        do `provenance["notes"]`; a note that several results share is there once, with their names.

    Raises:
        IncomparableError: If the results are of different data, measures or reductions.
        ValueError: If there are none, or one holds no log evidence.
    """
    columns = _named(results, named)
    variables: dict[str, Any] = {}
    for name, result in columns.items():
        if "log_evidence" not in result.data_vars:
            raise ValueError(f"result {name!r} holds no variable log_evidence: nothing to compare")
        value = result["log_evidence"]
        attrs = {"seed": result.provenance.get("seed"), **value.attrs}
        variables[name] = (value.dims, value.values, attrs)
        if "log_evidence_se" in result.data_vars:
            error = result["log_evidence_se"]
            variables[f"{name}_se"] = (error.dims, error.values, error.attrs)
    notes = []
    for first, second in itertools.combinations(columns, 2):
        notes += _contradictions(first, columns[first], second, columns[second])
    said: dict[str, list[str]] = {}
    for name, result in columns.items():
        for note in result.provenance.get("notes", []):
            said.setdefault(note, []).append(name)
    notes += [f"{', '.join(names)}: {note}" for note, names in said.items()]
    some = next(iter(columns.values()))
    return make_result(
        variables,
        function="evidence_table",
        config={name: result.provenance["config"] for name, result in columns.items()},
        seed=None,
        data_sha256=some.provenance["data_sha256"],
        notes=notes,
    )


def _named(results: tuple[Result, ...], named: dict[str, Result]) -> dict[str, Result]:
    columns: dict[str, Result] = {}
    for result in results:
        method = str(result.provenance["config"].get("method", "log_evidence"))
        name, count = method, 1
        while name in columns or name in named:
            count += 1
            name = f"{method}_{count}"
        columns[name] = result
    columns |= named
    if not columns:
        raise ValueError("evidence_table needs at least one result of log_evidence")
    return columns


def _contradictions(first: str, a: Result, second: str, b: Result) -> list[str]:
    """Sentences on what cannot be true of both results together."""
    one, two = a.quantity("log_evidence"), b.quantity("log_evidence")
    one._check_comparable(two)
    if not (math.isfinite(one.value) and math.isfinite(two.value)):
        return []
    error = math.hypot(one.standard_error or 0.0, two.standard_error or 0.0)
    known = all(q.standard_error is not None or q.bound == "exact" for q in (one, two))
    room = _STANDARD_ERRORS * error + _ROUNDING * (1 + abs(one.value))
    excess = one.value - two.value
    if not known or abs(excess) <= room:
        return []
    low, high = (first, one.bound), (second, two.bound)
    if excess > 0:
        low, high = high, low
    # `high` is above `low` by more than error: wrong, unless `low` may be below or `high` above.
    if low[1] == "lower" or high[1] == "upper":
        return []
    which = np.abs(excess) / error if error else math.inf
    return [
        f"contradiction: {high[0]} ({_kind(high[1])}) is {abs(excess):.3g} nats above {low[0]} "
        f"({_kind(low[1])}), {which:.1f} standard errors: one of them is wrong."
    ]


def _kind(bound: str) -> str:
    return {"lower": "a lower bound", "upper": "an upper bound", "exact": "exact"}.get(
        bound, "a consistent estimate"
    )
