"""What training with each estimator reaches in equal processor time."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from pyro_vae.data import Seed, as_seed
from pyro_vae.diagnostics.evidence import log_evidence
from pyro_vae.inference.estimators import make_estimator
from pyro_vae.inference.svi import fit
from pyro_vae.results import Result, label, make_result, sha256_of

__all__ = ["train_at_equal_time", "training_rows"]

_TIMED_EPOCHS = 5
_LEAST_SECONDS = 1e-3  # of an epoch, should the clock not resolve it


def train_at_equal_time(
    make: Callable[[int], Any],
    x: Float[Tensor, "batch features"],
    test: Float[Tensor, "tests features"],
    estimators: Sequence[tuple[str, int]],
    *,
    seconds: float,
    num_seeds: int = 2,
    timing_rounds: int = 3,
    evidence_particles: int = 1000,
    learning_rate: float = 3e-3,
    transform: Callable[..., Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    seed: Seed = 0,
    say: Callable[[str], None] | None = None,
    progress: bool = True,
) -> Result:
    """Trains the same module under each estimator for equal time, and measures its evidence.

    An epoch of each estimator is timed first: the least of rounds, so that a busy moment does not
    count. The time then says how many epochs each gets, at least one.

    Args:
        make: Makes the module, which has `model(x)` and `guide(x)`, at the start of a seed.
        x: Training data.
        test: Data for the evidence.
        estimators: Names (see `estimator_names`) with their numbers of particles.
        seconds: Processor time of a training, of the calling thread.
        num_seeds: Trainings of each estimator, with seeds 0, 1, ...
        timing_rounds: How often the epochs are timed.
        evidence_particles: Particles of the test evidence.
        learning_rate: Of Adam.
        transform: Of each batch, see `fit`.
        config: Further settings to write into the result.
        seed: Of the evidence.
        say: Is told a line about each estimator once it has been trained.
        progress: Shows bars on stderr where that is a terminal.

    Returns:
        Over `estimator` and `training_seed`: `log_evidence` (a lower bound by importance weights)
        and `elbo`, means over the test data in nats per datum, with the standard errors of their
        draws in `*_se`; `epochs`, and the `seconds` that they took.

    Note: Standard errors are of the draws; the spread over training seeds is larger.
    """
    seed = as_seed(seed)
    trainer = _Trainer(make, x, learning_rate, transform)
    times = _time_epochs(trainer, estimators, timing_rounds)
    names = [f"{name} K={k}" for name, k in estimators]
    columns = {
        name: np.full((len(names), num_seeds), np.nan)
        for name in ("log_evidence", "log_evidence_se", "elbo", "elbo_se", "epochs", "seconds")
    }
    measure = None
    for i, pair in enumerate(estimators):
        epochs = max(1, round(seconds / times[pair]))
        for start in range(num_seeds):
            module, took = trainer.train(pair, epochs, start, progress)
            found = log_evidence(
                module.model,
                module.guide,
                test,
                num_particles=evidence_particles,
                seed=seed,
                progress=progress,
            )
            for column in ("log_evidence", "elbo"):
                quantity = found.quantity(column)
                measure = quantity.measure
                columns[column][i, start] = quantity.value
                columns[f"{column}_se"][i, start] = quantity.standard_error
            columns["epochs"][i, start], columns["seconds"][i, start] = epochs, took
        if say is not None:
            say(f"{names[i]}: {columns['log_evidence'][i].mean():.2f} after {epochs} epochs")
    attrs = _labels(measure, evidence_particles)
    return make_result(
        {
            name: (("estimator", "training_seed"), column, attrs.get(name, {}))
            for name, column in columns.items()
        },
        function="train_at_equal_time",
        config={
            "train_seconds": seconds,
            "evidence_particles": evidence_particles,
            "num_data": len(test),
            **(config or {}),
        },
        seed=seed,
        data_sha256=sha256_of(test),
        coords={"estimator": names, "training_seed": np.arange(num_seeds)},
        notes=[
            "Standard errors are those of the Monte-Carlo draws; the spread over training seeds is "
            "larger."
        ],
    )


@dataclass(frozen=True)
class _Trainer:
    """What all trainings have in common."""

    make: Callable[[int], Any]
    x: Tensor
    learning_rate: float
    transform: Callable[..., Tensor] | None

    def train(
        self, pair: tuple[str, int], epochs: int, seed: int, progress: bool
    ) -> tuple[Any, float]:
        """A trained module, and the processor seconds that its training took."""
        module = self.make(seed)
        started = time.thread_time()
        fit(
            module.model,
            module.guide,
            self.x,
            loss=make_estimator(*pair),
            learning_rate=self.learning_rate,
            epochs=epochs,
            evaluate_every=epochs,
            transform=self.transform,
            seed=seed,
            progress=progress,
        ).require_finished()
        return module, time.thread_time() - started


def _time_epochs(
    trainer: _Trainer, estimators: Sequence[tuple[str, int]], rounds: int
) -> dict[tuple[str, int], float]:
    """Processor seconds of an epoch, without those that a training takes before its first."""
    times = dict.fromkeys(estimators, float("inf"))
    for _ in range(rounds):  # in turns, so that a busy moment hits all
        for pair in estimators:
            few, many = (trainer.train(pair, n, 0, False)[1] for n in (1, 1 + _TIMED_EPOCHS))
            times[pair] = min(times[pair], max((many - few) / _TIMED_EPOCHS, _LEAST_SECONDS))
    return times


def _labels(measure: str | None, num_particles: int) -> dict[str, dict[str, Any]]:
    return {
        "log_evidence": label(
            bound="lower",
            measure=measure,
            num_particles=num_particles,
            description="mean over test data, importance-weighted",
        ),
        "elbo": label(bound="lower", measure=measure, description="mean over test data"),
        "epochs": label(unit="none", reduction="none", bound="none"),
        "seconds": label(unit="seconds", reduction="none", bound="none"),
    }


def training_rows(trained: Result) -> list[dict[str, str]]:
    """Test evidence by estimator, best first, with the spread over training seeds.

    Args:
        trained: From `train_at_equal_time`.

    Returns:
        Rows with the same keys, in the order in which a table shows them.
    """
    seeds = trained.sizes["training_seed"]
    mean = trained["log_evidence"].mean("training_seed").values
    error = _evidence_error(trained)
    elbo = trained["elbo"].mean("training_seed").values
    rows = []
    for i in np.argsort(-mean):
        rows.append(
            {
                "trained with": str(trained["estimator"].values[i]),
                "test log evidence": f"{mean[i]:.2f} ± {error:.2f}",
                "behind the best": f"{mean.max() - mean[i]:.2f} ± {error * 2**0.5:.2f}",
                "test ELBO": f"{elbo[i]:.2f}",
                "epochs": f"{trained['epochs'].values[i, 0]:.0f}",
                "processor s": f"{trained['seconds'].values[i].mean():.1f}",
                "seeds": str(seeds),
            }
        )
    return rows


def _evidence_error(trained: Result) -> float:
    """Standard error of a mean over training seeds, their spread pooled over estimators."""
    values, errors = trained["log_evidence"].values, trained["log_evidence_se"].values
    seeds = values.shape[1]
    variance = values.var(1, ddof=1).mean() if seeds > 1 else (errors**2).mean()
    return float((variance / seeds) ** 0.5)
