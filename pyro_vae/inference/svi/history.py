"""What a training reached: its rows, which of them bounds anything, the labelled result, `Fit`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from pyro_vae.inference.estimators import loss_text
from pyro_vae.inference.programs import FittedProgram
from pyro_vae.inference.svi.step import Interruptible
from pyro_vae.results import Result, label, make_result, summary_html

__all__ = ["Convergence", "Fit", "Phase", "best_row", "history_result", "is_bound"]

_COLUMNS: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {  # unit, kind and description
        "loss": ("nats", "objective", "what was minimised, mean over the epoch; lower is better"),
        "bound": ("nats", "lower", "ELBO of the training data"),
        "reconstruction": ("nats", "objective", "E log p(x | z), the first part of the ELBO"),
        "kl": ("nats", "objective", "E log q(z | x) - log p(z), subtracted in the ELBO"),
        "entropy_residual": (
            *("nats", "none"),
            "bound less the sum of entropies that it equals where parameters are stationary",
        ),
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
        A variable for each column that is known, dimension `epoch`; nats are per datum:

        ================  ===============  ====================================================
        name              unit, bound      meaning
        ================  ===============  ====================================================
        `loss`            nats, objective  what was minimised, mean over the epoch
        `bound`           nats, lower      ELBO of the training data; objective where it is the
                                           negative loss
        `reconstruction`  nats, objective  E log p(x | z), the first part of the ELBO
        `kl`              nats, objective  E log q(z | x) - log p(z), subtracted in the ELBO
        `seconds`         seconds, none    training time so far
        `data_passes`     none, none       passes over the data
        ================  ===============  ====================================================

        Standard errors are `*_se`, held-out data `validation_*`. Without variables if there is no
        row.

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


@dataclass(frozen=True)
class Phase:
    """Training at one rate.

    Attributes:
        kind: "Adam", or "Newton" where gradients are multiplied by an inverse Hessian; the name of
            the optimizer otherwise.
        rate: The learning rate.
        steps: Steps at it.
        rhat: The largest split R-hat of the parameters over the averaged steps.
        error_nats: What the Monte-Carlo error of the averaged parameters costs.
        gain_nats: How much higher the bound is than at the end of the phase before.
        gain_se: The standard error of that.
    """

    kind: str
    rate: float
    steps: int
    rhat: float
    error_nats: float
    gain_nats: float
    gain_se: float


@dataclass(frozen=True)
class Convergence:
    """What a training that ends by itself did.

    Attributes:
        converged: Whether what more training would buy is below the threshold. If not, the limit of
            steps was reached, or Ctrl-C came.
        steps: Made in all.
        gain_nats: What more training would buy, as predicted from the last phases; in nats of the
            bound of all data, or per datum for mini-batches. NaN if nothing is known yet.
        threshold_nats: Below which training ends.
        phases: What was done at each rate.
    """

    converged: bool
    steps: int
    gain_nats: float
    threshold_nats: float
    phases: tuple[Phase, ...]

    def summary(self) -> str:
        """One sentence: whether it converged, and what more training would buy."""
        told = "converged" if self.converged else "not converged"
        gain = "unknown" if math.isnan(self.gain_nats) else f"{self.gain_nats:.2g} nats"
        return (
            f"{told} after {self.steps:,} steps in {len(self.phases)} phases; more training would "
            f"buy {gain} (threshold {self.threshold_nats:.2g})"
        )

    def __str__(self) -> str:
        rows = [
            f"  {p.kind:<8}{p.rate:>10.3g}{p.steps:>8,}{p.rhat:>8.3f}{p.error_nats:>11.2g}"
            f"{p.gain_nats:>11.3g} +- {p.gain_se:.1g}"
            for p in self.phases
        ]
        head = (
            f"  {'phase':<8}{'rate':>10}{'steps':>8}{'R-hat':>8}{'error':>11}{'gain':>11}  (nats)"
        )
        return "\n".join([self.summary(), head, *rows])


@dataclass(frozen=True, repr=False)
class Fit(Interruptible):
    """What `fit` reached.

    Attributes:
        model: The model with the fitted parameters in place, ready for every tool.
        guide: The guide, likewise.
        history: A row an epoch, dimension `epoch`; see `fit`.
        config: How it was trained, as JSON can hold it.
        parameters: Fitted values by name, in the space users see (constrained), detached.
        status: "finished", "stopped early" or "interrupted".
        convergence: Of a training that ends by itself (``epochs="converged"``): whether it
            converged, its phases, and what more training would buy; None where epochs were named.
        restarts: Of several runs: what each reached, how far they agree, the mixture of their
            guides; None of a single one.
        posterior: What a method other than SVI says of the latents; see `fit`. None of SVI.
    """

    model: FittedProgram
    guide: FittedProgram
    history: Result
    config: dict[str, Any]
    parameters: dict[str, Tensor]
    status: Literal["finished", "stopped early", "interrupted"]
    convergence: Convergence | None = None
    restarts: Any = None
    posterior: Result | None = None

    def summary(self) -> str:
        """One sentence: how long it trained and which bound it reached."""
        count = sum(value.numel() for value in self.parameters.values())
        if not self.history.sizes["epoch"]:
            return f"fit {self.status} before its first epoch ended; {count:,} parameters"
        last = self.history.isel(epoch=-1)
        text = f"fit {self.status} after {int(last.epoch)} epochs, {float(last.seconds):.1f} s"
        row = self.history.isel(epoch=self._reached())
        for name in ("bound", "validation_bound"):
            if name in row:
                spread = f" +- {float(row[name + '_se']):.2f}" if name + "_se" in row else ""
                said = name.replace("_", " ")
                if row[name].attrs["bound"] == "objective":
                    said = said.replace("bound", "objective")
                text += f"; {said} {float(row[name]):.2f}{spread} nats per datum"
        if int(row.epoch) != int(last.epoch):
            text += f" (back to epoch {int(row.epoch)})"
        if self.convergence is not None:
            text += f"; {self.convergence.summary()}"
        if self.restarts is not None:
            text += f"; the best of {self.restarts.table.sizes['run']} runs"
        return f"{text}; {count:,} parameters"

    def _reached(self) -> int:
        """The row of the history that speaks of the parameters."""
        if self.config["fit"]["patience"] is None or self.status == "interrupted":
            return -1
        return best_row(self.history.validation_bound.values.tolist())

    def __repr__(self) -> str:
        return f"<{self.summary()}>"

    def _repr_html_(self) -> str:
        return summary_html(self.summary(), self.history)
