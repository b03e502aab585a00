"""What to maximise, chosen by name: the estimators of bounds, and the objectives beside them."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from pyro.infer import ELBO, RenyiELBO

from pyro_vae.inference.estimators.base import Objective
from pyro_vae.inference.estimators.bounds import estimator_names, make_estimator
from pyro_vae.inference.estimators.not_bounds import BetaELBO, FreeBits, InfoVAE

__all__ = ["bounds_nothing", "loss_options", "loss_text", "make_objective", "objective_names"]

_BESIDE = {kind.__name__: kind for kind in (BetaELBO, FreeBits, InfoVAE)}
_NOT_ALONE = ("SleepPhi", "StraightThrough")  # moves the guide alone; is for discrete latents
_SEVERAL = 8  # particles, where one would make another objective of it


def objective_names() -> tuple[str, ...]:
    """Names that `make_objective` takes, those that bound nothing last."""
    return (*(name for name in estimator_names() if name not in _NOT_ALONE), *_BESIDE)


def make_objective(objective: str | Mapping[str, Any], num_particles: int | None = None) -> ELBO:
    """Makes a loss for `fit` from its class name.

    Args:
        objective: One of `objective_names()`, whatever its case, or a mapping of such a `"name"`
            and the options of its class.
        num_particles: Draws from the guide for each datum; None for 1, or for 8 where one particle
            is too few or would make the ELBO of another bound.

    Raises:
        ValueError: If there is no such objective or option, or an option is out of its range.

    Example:
        >>> make_objective({"name": "BetaELBO", "beta": 2.0}).beta
        2.0
    """
    options = {"name": objective} if isinstance(objective, str) else dict(objective)
    asked = str(options.pop("name", None))
    known = {name.lower(): name for name in objective_names()}
    name = known.get(asked.lower().replace("_", ""))
    if name is None:
        nearest = difflib.get_close_matches(asked.lower(), known, n=1)
        hint = f" Did you mean {known[nearest[0]]!r}?" if nearest else ""
        raise ValueError(f"no objective {asked!r}; there are {', '.join(known.values())}.{hint}")
    kind: Any = _BESIDE.get(name) or type(make_estimator(name, _SEVERAL))
    takes = _defaults(kind)
    unknown = sorted(set(options) - set(takes))
    if unknown:
        has = f"it has {', '.join(takes)}" if takes else "it has none"
        raise ValueError(f"the objective {name} has no argument {unknown[0]!r}: {has}")
    if num_particles is None:
        alone = kind.value_name == "ELBO" or name in _BESIDE
        num_particles = 1 if alone and kind.min_particles == 1 else _SEVERAL
    return kind(num_particles, **options)


def bounds_nothing(name: str) -> bool:
    """Whether a loss of that name is an objective whose value bounds nothing."""
    return name in _BESIDE or name == "SleepPhi"


def loss_options(loss: ELBO) -> dict[str, Any]:
    """What a loss was made with besides particles: for ours their options, for Renyi's alpha."""
    if isinstance(loss, RenyiELBO):
        return {"alpha": loss.alpha}
    if not isinstance(loss, Objective):
        return {}
    return {name: getattr(loss, name) for name in _defaults(type(loss)) if hasattr(loss, name)}


def loss_text(described: Mapping[str, Any]) -> str:
    """A loss in one word, as `BetaELBO(beta=4.0)`.

    Args:
        described: With `loss` and `loss_options`, as a run's config has them.
    """
    options = ", ".join(f"{k}={v!r}" for k, v in (described.get("loss_options") or {}).items())
    return f"{described.get('loss', 'unknown')}{f'({options})' if options else ''}"


def _defaults(kind: type) -> dict[str, Any]:
    """Keyword options of a class besides `joint`, with their defaults."""
    return {
        name: p.default
        for name, p in inspect.signature(kind).parameters.items()
        if p.kind is p.KEYWORD_ONLY and name != "joint"
    }
