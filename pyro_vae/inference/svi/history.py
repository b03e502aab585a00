"""What the rows of a training say: which bounds anything, which is best, the labelled result."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pyro_vae.inference.estimators import loss_text
from pyro_vae.results import Result, label, make_result

__all__ = ["best_row", "history_result", "is_bound"]

_COLUMNS: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {  # unit, kind and description
        "loss": ("nats", "objective", "what was minimised, mean over the epoch; lower is better"),
        "bound": ("nats", "lower", "ELBO of the training data"),
        "reconstruction": ("nats", "objective", "E log p(x | z), the first part of the ELBO"),
        "kl": ("nats", "objective", "E log q(z | x) - log p(z), subtracted in the ELBO"),
        "seconds": ("seconds", "none", "training time so far"),
        "data_passes": ("none", "none", "passes over the data"),
    }
)


def is_bound(row: Mapping[str, Any]) -> bool:
    """Whether a row's `bound` is a lower bound, and not the negative loss of a point guide.

    Bounds come with parts, or, where latents are summed out of the model, with a standard error.
    """
    return not {"kl", "bound_se"}.isdisjoint(row)


def best_row(bounds: Sequence[float]) -> int:
    """The place of the highest; the first of equals, as `patience` counts them."""
    return max(range(len(bounds)), key=lambda i: -math.inf if math.isnan(bounds[i]) else bounds[i])


def history_result(
    rows: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    seed: int | None,
    data_sha256: str | None,
) -> Result:
    """The rows of a training as a labelled result.

    Args:
        rows: One an evaluation, each with `epoch`, as `fit` collects them and history.jsonl keeps
            them; what a row lacks (JSON holds no NaN) becomes NaN.
        config: How it was trained, as in config.json.
        seed: That of the training.
        data_sha256: That of the training data.

    Returns:
        A variable for each column that is known, dimension `epoch`; in nats per datum but for
        `seconds` and `data_passes`. Without variables if there is no row.

    Raises:
        ValueError: If a row holds something else than numbers, or a measure that does not exist.

    Example:
        >>> rows = [{"epoch": 1, "bound": -2.5, "bound_se": 0.5, "measure": "real"}]
        >>> history_result(rows, {}, seed=0, data_sha256=None).bound.attrs["bound"]
        'lower'
    """
    measure = rows[-1].get("measure") if rows else None
    bounded = any(is_bound(row) for row in rows)
    variables: dict[str, Any] = {}
    for name in dict.fromkeys(str(key) for row in rows for key in row):
        base = name.removeprefix("validation_").removesuffix("_se")
        if base not in _COLUMNS:
            continue
        unit, kind, description = _COLUMNS[base]
        if base == "bound" and not bounded:
            kind, description = "objective", "the negative loss, which bounds nothing"
        if name.startswith("validation_"):
            description += " (held-out data)"
        nats = unit == "nats"
        attrs = label(
            unit=unit,
            reduction="per datum" if nats else "none",
            bound=kind,
            objective=_objective(base, config) if kind == "objective" else None,
            measure=measure if nats else None,
            num_particles=1 if nats else None,
            seed=seed if nats else None,
            description=description,
        )
        variables[name] = ("epoch", [float(row.get(name, math.nan)) for row in rows], attrs)
    return make_result(
        variables,
        function="fit",
        config=config,
        seed=seed,
        data_sha256=data_sha256,
        coords={"epoch": [int(row["epoch"]) for row in rows]},
    )


def _objective(name: str, config: Mapping[str, Any]) -> str:
    """Which objective a column is: losses of two trainings are seldom the same number."""
    trained = config.get("fit", {})
    loss = loss_text(trained)
    if (particles := trained.get("num_particles") or 1) > 1:
        loss += f" with {particles} particles"
    # A MAP objective has the terms of its prior and likelihood, and compares with no other ones.
    model = config.get("model", {}).get("arguments", {})
    terms = "; ".join(f"{part} {model[part]}" for part in ("kind", "likelihood") if part in model)
    return {"loss": loss, "bound": f"minus {loss} ({terms})"}.get(name, name)
