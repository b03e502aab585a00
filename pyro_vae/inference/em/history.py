"""The history of EM: a row a half step, and a clock that stops while rows are measured."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyro_vae.inference.svi import TrainingError
from pyro_vae.results import Result, label, make_result

__all__ = ["HalfSteps"]


@dataclass
class HalfSteps:
    """Rows of the history, and the time and passes over the data behind them.

    Attributes:
        total_weight: What totals are divided by to be per datum.
        measures: Whether the KL is summed by itself, not taken as log p(x) - bound.
        every_half_step: Whether mini-batch methods record every half step.
        knows_evidence: Whether log p(x) is known, and so the gap; not where parameters are latent.
        of_point: Whether global latents are held at a point, theta: what is recorded is then of
            log p(x, theta), an objective that bounds no log p(x).
        rows: What was recorded.
        passes: Passes over the data so far.
        spent: Seconds until the clock was started last.
        started: When that was.
    """

    total_weight: float
    measures: bool = True
    every_half_step: bool = True
    knows_evidence: bool = True
    of_point: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    passes: float = 0.0
    spent: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """The time that the method itself took so far."""
        return self.spent + time.perf_counter() - self.started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock."""
        self.spent += time.perf_counter() - self.started
        try:
            yield
        finally:
            self.started = time.perf_counter()

    def stamp(self, phase: str, iteration: int) -> dict[str, Any]:
        """The half step, and when it ended."""
        return {
            "phase": phase,
            "iteration": iteration,
            "seconds": self.seconds,
            "data_passes": self.passes,
        }

    def add(
        self,
        stamp: Mapping[str, Any],
        log_likelihood: float,
        elbo: float,
        divergence: float,
        kl: float | None = None,
        residual: float = math.nan,
    ) -> None:
        """Adds a row.

        Args:
            stamp: From `stamp`, at the end of the half step.
            log_likelihood: log p(x), or the bound at the best q(z) where that is not known; this
                and the others are totals in nats.
            elbo: The bound.
            divergence: KL(q || p(z | x)).
            kl: KL(q(z) || p(z)), where it is known.
            residual: The bound less the sum of entropies that it ends at, where there is one.

        Raises:
            TrainingError: If log p(x) or the bound is not finite.
        """
        if not (math.isfinite(log_likelihood) and math.isfinite(elbo)):
            raise TrainingError(
                f"log p(x) is {log_likelihood} and the bound {elbo}: look for missing or huge "
                "values in the data, or pass reg_covar"
            )
        totals = {"log_evidence": log_likelihood, "bound": elbo, "gap": divergence}
        if not self.knows_evidence:
            totals = {"bound": elbo}
        if self.of_point:
            totals = {"log_joint": log_likelihood, "objective": elbo, "gap": divergence}
        row = {**stamp, "loss": -elbo / self.total_weight}
        for name, value in totals.items():
            row |= {name: value / self.total_weight, f"{name}_total": value}
        if kl is not None:
            row |= {"reconstruction": (elbo + kl) / self.total_weight, "kl": kl / self.total_weight}
        self.rows.append(row | {"entropy_residual": residual / self.total_weight})

    def result(self, config: Mapping[str, Any], measure: str) -> Result:
        """The rows as a labelled result with dimension `step`."""
        variables: dict[str, Any] = {}
        for name in self.rows[0] if self.rows else ():
            if name not in ("phase", "iteration"):
                values = [row[name] for row in self.rows]
                if name != "entropy_residual" or not np.isnan(values).all():
                    variables[name] = ("step", values, _label_of(name, measure))
        coords: dict[str, Any] = {"step": np.arange(len(self.rows))}
        for name in ("phase", "iteration"):
            coords[name] = ("step", np.array([row[name] for row in self.rows]))
        return make_result(
            variables,
            function="fit_em",
            config=config,
            seed=config["fit_em"]["seed"],
            data_sha256=config["fit_em"]["data_sha256"],
            coords=coords,
        )


def _label_of(name: str, measure: str) -> dict[str, Any]:
    plain = {
        "seconds": ("seconds", "time the method took so far, without measuring"),
        "data_passes": ("none", "passes over the data so far"),
    }
    if name in plain:
        unit, text = plain[name]
        return label(unit=unit, reduction="none", bound="none", description=text)
    if name == "entropy_residual":
        text = "bound less the sum of entropies that it equals where parameters are stationary"
        return label(bound="none", measure=measure, description=text)
    base = name.removesuffix("_total")
    bound, text = {
        "log_evidence": ("exact", "log p(x) under the parameters"),
        "bound": ("lower", "ELBO of q under the parameters"),
        "gap": ("exact", "KL(q || p(z | x)): log p(x) - bound, or log_joint - objective"),
        "log_joint": ("objective", "log p(x, theta) at the point where theta is held"),
        "objective": (
            "objective",
            "E log p(x, z, theta) and the entropy of q(z): no bound on log p(x)",
        ),
        "loss": ("objective", "minus what both half steps raise; lower is better"),
        "reconstruction": ("objective", "E log p(x | z), the first part of the ELBO"),
        "kl": ("objective", "E log q(z) - log p(z), subtracted in the ELBO"),
    }[base]
    reduction = "per datum" if base == name else "total"
    return label(reduction=reduction, bound=bound, measure=measure, description=text)
