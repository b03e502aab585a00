"""What training with each estimator reaches: in equal steps or runs, and along the way."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from jaxtyping import Float
from pyro.infer import ELBO
from torch import Tensor

from pyro_vae.data import Seed, as_seed
from pyro_vae.diagnostics.evidence import log_evidence
from pyro_vae.diagnostics.gradients.sampler import count_passes
from pyro_vae.inference.estimators import make_estimator
from pyro_vae.inference.programs import as_arguments, program_scope
from pyro_vae.inference.svi import fit
from pyro_vae.results import Result, label, make_result, processor_name, sha256_of

__all__ = ["learning_curves", "train_at_equal_cost", "training_rows"]

_LEVEL = 0.05  # of all differences that are called real together
_COLUMNS = ("log_evidence", "log_evidence_se", "elbo", "elbo_se", "epochs", "seconds")


def train_at_equal_cost(
    make: Callable[[int], Any],
    x: Float[Tensor, "batch features"],
    test: Float[Tensor, "tests features"],
    estimators: Sequence[tuple[str, int]],
    *,
    epochs: int,
    num_seeds: int = 8,
    evidence_particles: int = 1000,
    learning_rate: float = 3e-3,
    transform: Callable[..., Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    seed: Seed = 0,
    say: Callable[[str], None] | None = None,
    progress: bool = True,
) -> Result:
    """Trains the same module under each estimator, and measures its evidence.

    Budgets are counted, not timed, so that they are the same on every machine: "steps" gives every
    estimator the same epochs; "passes" the same runs of the programs, of which some estimators
    need two a step and so get half the epochs. More particles cost more than is counted here, as
    they run together: compare estimators of the same number of particles.

    Args:
        make: Makes the module, which has `model(x)` and `guide(x)`, at the start of a seed.
        x: Training data.
        test: Data for the evidence.
        estimators: Names (see `estimator_names`) with their numbers of particles.
        epochs: Of each training at equal steps, and of those with one run a step at equal passes.
        num_seeds: Trainings of each estimator, with seeds 0, 1, ...
        evidence_particles: Particles of the test evidence.
        learning_rate: Of Adam.
        transform: Of each batch, see `fit`.
        config: Further settings to write into the result.
        seed: Of the evidence, whose draws differ from one training seed to the next.
        say: Is told a line about each estimator once it has been trained.
        progress: Shows bars on stderr where that is a terminal.

    Returns:
        B stands for the dimension `budget` ("steps", "passes"), E for `estimator`, S for
        `training_seed`; nats are per datum.

        ==============  =======  =============  ==============================================
        name            dims     unit, bound    meaning
        ==============  =======  =============  ==============================================
        `log_evidence`  B, E, S  nats, lower    mean over the test data, by importance weights
        `elbo`          B, E, S  nats, lower    mean of the ELBO over the test data
        `epochs`        B, E, S  none, none     epochs of the training
        `seconds`       B, E, S  seconds, none  the time that they took
        `passes`        E        none, none     runs with one particle for a gradient
        ==============  =======  =============  ==============================================

        The first two have the standard errors of their draws in `*_se`.

    Note: `*_se` leave out the spread over trainings; `training_rows` has it.
    """
    seed = as_seed(seed)
    trainer = _Trainer(make, x, learning_rate, transform)
    names = [f"{name} K={k}" for name, k in estimators]
    passes = np.array([trainer.passes(pair, test[:2]) for pair in estimators])
    runs = passes / np.array([k for _, k in estimators])
    budgets = {
        "steps": np.full(len(names), epochs),
        "passes": np.maximum(1, np.rint(epochs / runs)).astype(int),
    }
    columns = {name: np.full((2, len(names), num_seeds), np.nan) for name in _COLUMNS}
    measure = None
    for i, pair in enumerate(estimators):
        for start in range(num_seeds):
            for length in sorted({int(given[i]) for given in budgets.values()}):
                module, took = trainer.train(pair, length, start, progress)
                found = log_evidence(
                    module.model,
                    module.guide,
                    test,
                    num_particles=evidence_particles,
                    seed=seed + start,
                    progress=progress,
                )
                measure = found.quantity("elbo").measure
                chosen = np.array([given[i] == length for given in budgets.values()])
                for column, number in _numbers(found, length, took).items():
                    columns[column][chosen, i, start] = number
        if say is not None:
            mean = columns["log_evidence"][0, i].mean()
            say(f"{names[i]}: {mean:.2f} after {epochs} epochs, {num_seeds} trainings")
    attrs = _labels(measure, evidence_particles)
    return make_result(
        {
            "passes": ("estimator", passes.astype(float), attrs["passes"]),
            **{
                name: (("budget", "estimator", "training_seed"), column, attrs.get(name, {}))
                for name, column in columns.items()
            },
        },
        function="train_at_equal_cost",
        config={
            "epochs": epochs,
            "evidence_particles": evidence_particles,
            "num_data": len(test),
            **(config or {}),
        },
        seed=seed,
        data_sha256=sha256_of(test),
        coords={
            "budget": list(budgets),
            "estimator": names,
            "training_seed": np.arange(num_seeds),
        },
        notes=[
            "Standard errors `*_se` are those of the Monte-Carlo draws of one training; the spread "
            "over trainings is larger, and in the errors of the table.",
            f"Seconds are those of one thread of {processor_name()}.",
        ],
    )


def learning_curves(
    make: Mapping[str, Callable[[int], Any]],
    x: Float[Tensor, "batch features"],
    test: Float[Tensor, "tests features"],
    algorithms: Mapping[str, ELBO],
    *,
    epochs: Sequence[int],
    evidence: Mapping[str, Any] | None = None,
    batch_size: int | None = 100,
    learning_rate: float = 1e-3,
    max_train: int = 1000,
    seed: Seed = 0,
    progress: bool = True,
) -> Result:
    """Measures bound and evidence of training and test data along the training of each algorithm.

    Args:
        make: By the model's name (such as its number of latents), what makes it at a seed; a model
            has `model(x)` and `guide(x)`.
        x: Training data.
        test: Held-out data.
        algorithms: By name what is trained with, such as `PathwiseELBO()` (AEVB), `WakeSleep()`,
            `MonteCarloEM()`; each training gets a copy.
        epochs: When to measure, rising.
        evidence: `method` and settings for `log_evidence`; None for importance sampling with 100
            particles. With another method no guide is used, so that algorithms with and without
            one compare.
        batch_size: As for `fit`.
        learning_rate: Of Adam.
        max_train: Training data that are measured: the first so many.
        seed: Of starts, orders and draws.
        progress: Shows bars on stderr where that is a terminal.

    Returns:
        M stands for the dimension `model`, A for `algorithm`, D for `split` ("train", "test"), S
        for `samples` (training data gone through); nats are per datum.

        ==============  ==========  ===========  ===============================================
        name            dims        unit, bound  meaning
        ==============  ==========  ===========  ===============================================
        `log_evidence`  M, A, D, S  nats, lower  mean over the data, by `evidence`'s method
        `elbo`          M, A, D, S  nats, lower  mean of the ELBO over the data, with importance
                                                 sampling
        ==============  ==========  ===========  ===============================================

        The standard errors of their draws are in `*_se`.

    Raises:
        ValueError: If `epochs` are not rising whole numbers from 1.

    References:
        Kingma & Welling (2014), Auto-encoding variational Bayes, arXiv:1312.6114, figures 2 and 3.
    """
    seed = as_seed(seed)
    if not epochs or list(epochs) != sorted(set(epochs)) or min(epochs) < 1:
        raise ValueError(f"epochs must be rising whole numbers from 1, not {list(epochs)!r}")
    settings = dict(evidence or {"method": "importance", "num_particles": 100})
    parts = {"train": x[:max_train], "test": test}
    names = ("log_evidence", "elbo")
    shape = (len(make), len(algorithms), len(parts), len(epochs))
    columns = {f"{name}{se}": np.full(shape, math.nan) for name in names for se in ("", "_se")}
    measure = None
    for i, create in enumerate(make.values()):
        for j, loss in enumerate(algorithms.values()):
            module, trained = create(seed), copy.deepcopy(loss)
            options = {"loss": trained, "batch_size": batch_size, "learning_rate": learning_rate}
            reached = _stops(module, x, epochs, seed=seed, progress=progress, **options)
            for k, _ in enumerate(reached):
                for s, data in enumerate(parts.values()):
                    guide = module.guide if settings.get("method") == "importance" else None
                    found = log_evidence(
                        module.model, guide, data, seed=seed, progress=progress, **settings
                    )
                    measure = found.quantity("log_evidence").measure
                    for name in names:
                        if name in found:
                            quantity = found.quantity(name)
                            columns[name][i, j, s, k] = quantity.value
                            columns[f"{name}_se"][i, j, s, k] = quantity.standard_error or math.nan
    attrs = label(bound="lower", measure=measure, description="mean over data")
    return make_result(
        {
            name: (("model", "algorithm", "split", "samples"), column, attrs)
            for name, column in columns.items()
            if np.isfinite(columns[name.removesuffix("_se")]).any()
        },
        function="learning_curves",
        config={
            "epochs": list(epochs),
            "evidence": settings,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "num_train": len(x),
        },
        seed=seed,
        data_sha256=sha256_of(x, test),
        coords={
            "model": list(make),
            "algorithm": list(algorithms),
            "split": list(parts),
            "samples": np.array(epochs) * len(x),
        },
    )


def _stops(module: Any, x: Tensor, epochs: Sequence[int], **options: Any) -> Iterator[int]:
    """Trains, and stops after so many epochs each: one training, resumed in between."""
    with TemporaryDirectory() as folder:
        for n in epochs:
            fit(
                module.model,
                module.guide,
                x,
                epochs=n,
                evaluate_every=epochs[-1],
                checkpoint=Path(folder) / "run",
                resume=n > epochs[0],
                **options,
            ).require_finished()
            yield n


@dataclass(frozen=True)
class _Trainer:
    """What all trainings have in common."""

    make: Callable[[int], Any]
    x: Tensor
    learning_rate: float
    transform: Callable[..., Tensor] | None

    def passes(self, pair: tuple[str, int], x: Tensor) -> int:
        """Runs of the programs with one particle that a gradient takes, on any data."""
        module = self.make(0)
        with program_scope():
            return count_passes(make_estimator(*pair), module.model, module.guide, as_arguments(x))

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


def _numbers(found: Result, epochs: int, seconds: float) -> dict[str, float]:
    """What is kept of one training."""
    means: dict[str, float] = {}
    for name in ("log_evidence", "elbo"):
        quantity = found.quantity(name)
        error = quantity.standard_error
        means |= {name: quantity.value, f"{name}_se": math.nan if error is None else error}
    return {**means, "epochs": float(epochs), "seconds": seconds}


def _labels(measure: str | None, num_particles: int) -> dict[str, dict[str, Any]]:
    counted: dict[str, Any] = {"unit": "none", "reduction": "none", "bound": "none"}
    return {
        "log_evidence": label(
            bound="lower",
            measure=measure,
            num_particles=num_particles,
            description="mean over test data, importance-weighted",
        ),
        "elbo": label(bound="lower", measure=measure, description="mean over test data"),
        "epochs": label(**counted),
        "passes": label(**counted, description="runs with one particle for a gradient"),
        "seconds": label(unit="seconds", reduction="none", bound="none"),
    }


def training_rows(trained: Result, budget: str = "passes") -> list[dict[str, str]]:
    """Test evidence by estimator, best first, and which differences from the best are real.

    Errors are over training seeds. Differences are taken seed by seed, for estimators share starts
    and orders of the data, and called real where a paired t-test says so at a level of 0.05 for
    all pairs of estimators together (Bonferroni).

    Args:
        trained: From `train_at_equal_cost`.
        budget: At equal "steps" or "passes".

    Returns:
        Rows with the same keys, in the order in which a table shows them.
    """
    chosen = trained.sel(budget=budget)
    evidence, elbo = chosen["log_evidence"].values, chosen["elbo"].values
    size, seeds = evidence.shape
    order = np.argsort(-evidence.mean(1))
    rows = []
    for i in order:
        behind, error = _mean_and_error(evidence[order[0]] - evidence[i])
        real = behind > _bar(seeds, size * (size - 1) // 2) * error
        epochs = float(chosen["epochs"].values[i, 0])
        rows.append(
            {
                "trained with": str(chosen["estimator"].values[i]),
                "test log evidence": _with_error(*_mean_and_error(evidence[i])),
                "behind the best": "-" if i == order[0] else _with_error(behind, error),
                "difference": "-" if i == order[0] else "real" if real else "may be chance",
                "test ELBO": _with_error(*_mean_and_error(elbo[i])),
                "epochs": f"{epochs:.0f}",
                "passes a datum": f"{epochs * float(chosen['passes'].values[i]):.0f}",
                "seeds": str(seeds),
            }
        )
    return rows


def _mean_and_error(values: Float[np.ndarray, " seeds"]) -> tuple[float, float]:
    """Mean over trainings and its standard error; unknown from a single one."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return float(values.mean()), float(error)


def _with_error(mean: float, error: float) -> str:
    return f"{mean:.2f} ± {error:.2f}" if math.isfinite(error) else f"{mean:.2f} (one training)"


def _bar(seeds: int, pairs: int) -> float:
    """How many standard errors a difference must have."""
    from scipy.stats import t

    return float(t.isf(_LEVEL / (2 * max(pairs, 1)), seeds - 1)) if seeds > 1 else math.inf
