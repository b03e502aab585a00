"""What can be compared: estimators by name, class or instance, and Pyro's own ELBOs."""

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO

from pyro_vae.inference import estimators as table
from pyro_vae.inference.estimators import Objective, estimator_names

__all__ = ["TRUSTED", "EstimatorSpec", "option_text", "specs_of"]

_DEFAULT = (
    "PathwiseELBO",
    "AnalyticELBO",
    "StickingTheLanding",
    "ScoreFunction",
    "LeaveOneOut",
    "ImportanceWeighted",
    "DReG",
    "VIMCO",
    "ReweightedWakeSleep",
    "WakeDReG",
    "StraightThrough",
)

TRUSTED: dict[str, tuple[type[Objective], ...]] = {
    "ELBO": (table.PathwiseELBO, table.LeaveOneOut, table.ScoreFunction),
    "IWAE": (table.ImportanceWeighted, table.VIMCO),
    "Renyi": (table.Renyi,),
    "MIWAE": (table.MIWAE,),
    "CIWAE": (table.CIWAE,),
}
"""Unbiased estimators of each bound; a pooled reference is drawn with the first that fits."""


@dataclass(frozen=True)
class EstimatorSpec:
    """A row of the comparison: how to make it for K particles, and what its value is."""

    name: str
    make: Callable[[int], ELBO]
    family: str  # of its bound: ELBO, IWAE, Renyi, ...
    bound_kind: str
    claims_unbiased: bool = True  # that its gradient is, in expectation, that of its value
    options: Mapping[str, Any] = field(default_factory=dict)
    asked_for: bool = True
    enumerates: bool = False

    @property
    def bound(self) -> str:
        """The bound with its options, as `Renyi(alpha=0.5)`."""
        return self.family + (option_text(self.options) if self.options else "")

    def bound_at(self, num_particles: int) -> tuple[str, Mapping[str, Any]]:
        """Family and options of the bound; with one particle the importance bound is the ELBO."""
        if num_particles == 1 and self.family == "IWAE":
            return "ELBO", {}
        return self.family, self.options


def specs_of(given: Sequence[Any] | Mapping[str, Any] | None, joint: bool) -> list[EstimatorSpec]:
    """The rows that `compare_estimators` was asked for; None is a common set.

    Raises:
        ValueError: If there are none, or one is unknown, stands there twice or disagrees with
            `joint`.
    """
    if isinstance(given, str):
        given = [given]
    if given is None:
        named: list[tuple[str | None, Any]] = [(None, name) for name in _DEFAULT]
    elif isinstance(given, Mapping):
        named = list(given.items())
    else:
        named = [(None, one) for one in given]
    if not named:
        raise ValueError("there is no estimator to compare; name some, or pass None for a set")
    found = [_spec(name, one, joint, given is not None) for name, one in named]
    names = [spec.name for spec in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(
            f"two estimators are called '{twice[0]}'; pass a mapping with names of your choice"
        )
    return found


def _spec(name: str | None, one: Any, joint: bool, asked_for: bool) -> EstimatorSpec:
    if isinstance(one, str):
        if one not in estimator_names():
            raise ValueError(
                f"there is no estimator {one!r}; there are {', '.join(estimator_names())}"
            )
        one = getattr(table, one)
    if isinstance(one, type) and issubclass(one, ELBO) and not issubclass(one, Objective):
        one = one()
    if isinstance(one, ELBO) and not isinstance(one, Objective):
        return _pyro_spec(name, one)
    kind = one if isinstance(one, type) else type(one)
    if not issubclass(kind, Objective):
        raise ValueError(
            f"{one!r} is not an estimator; pass names, Estimator classes or instances, or Pyro's "
            "ELBOs"
        )
    if not isinstance(one, type) and one.joint not in (None, joint):
        raise ValueError(
            f"{kind.__name__} was made with joint={one.joint}, the comparison with joint={joint}; "
            "make them agree"
        )
    options = _options(kind, one)
    changed = {k: v for k, v in options.items() if v != _defaults(kind)[k]}
    of_bound = {} if kind.value_name in ("ELBO", "IWAE", "sleep") else options
    return EstimatorSpec(
        name=name or kind.__name__ + (option_text(changed) if changed else ""),
        make=partial(kind, joint=joint, **options),
        family=kind.value_name,
        bound_kind=kind.bound_kind,
        claims_unbiased=kind.unbiased,
        options=of_bound,
        asked_for=asked_for,
        enumerates=True,
    )


def _defaults(kind: type) -> dict[str, Any]:
    """Keyword options of a class besides `joint`, with their defaults."""
    return {
        name: p.default
        for name, p in inspect.signature(kind).parameters.items()
        if p.kind is p.KEYWORD_ONLY and name != "joint"
    }


def _options(kind: type, one: Any) -> dict[str, Any]:
    """The options an instance was made with: they are attributes of the same names."""
    return {
        name: default if isinstance(one, type) else getattr(one, name, default)
        for name, default in _defaults(kind).items()
    }


def option_text(options: Mapping[str, Any]) -> str:
    """Options as they stand in a name: `(alpha=0.5)`."""
    return "(" + ", ".join(f"{name}={value!r}" for name, value in options.items()) + ")"


def _pyro_spec(name: str | None, one: ELBO) -> EstimatorSpec:
    family = type(one).__name__
    options: dict[str, Any] = {}
    if isinstance(one, RenyiELBO):
        family, options = ("Renyi", {"alpha": one.alpha}) if one.alpha else ("IWAE", {})
    elif isinstance(one, Trace_ELBO | TraceGraph_ELBO | TraceEnum_ELBO):
        family = "ELBO"
    known = family in TRUSTED
    shown = f"(alpha={one.alpha:g})" if isinstance(one, RenyiELBO) else ""
    return EstimatorSpec(
        name=name or f"Pyro {type(one).__name__}{shown}",
        make=partial(_with_particles, one),
        family=family,
        bound_kind="lower" if known else "none",
        options=options,
        enumerates=isinstance(one, TraceEnum_ELBO),
    )


def _with_particles(one: ELBO, num_particles: int) -> ELBO:
    changed = copy.copy(one)
    if not math.isinf(one.max_plate_nesting):  # the particles' plate is counted in it
        own = int(one.vectorize_particles and one.num_particles > 1)
        now = int(one.vectorize_particles and num_particles > 1)
        changed.max_plate_nesting = one.max_plate_nesting - own + now
    changed.num_particles = num_particles
    return changed
