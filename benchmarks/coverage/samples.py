"""Samples, codes and curves: whatever the extras measure."""

from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import stats
from torch import Tensor, nn

from benchmarks.coverage.kinds import Checked, Row, Study, interval, p_value, watched
from benchmarks.coverage.planted import tensor
from pyro_vae.extras.f_divergence import fit_divergence
from pyro_vae.extras.latents import (
    attribute_effect,
    code_activity,
    compression,
    feature_quality,
    shortest_path,
    unit_effects,
)
from pyro_vae.extras.samples import (
    make_features,
    nearest_training_distance,
    precision_recall,
    sample_quality,
)

__all__ = ["STUDIES"]

Found = dict[str, Checked]
Numbers = dict[str, list[tuple[float, float, float]]]


def _found(numbers: Numbers) -> Found:
    return {name: interval(*np.array(rows).T) for name, rows in numbers.items()}


# --- samples --------------------------------------------------------------------------------------


def _frechet(size: int, apart: float, count: int, seed: int) -> Found:
    """Normals in three dimensions, one moved and stretched by 1.2."""
    numbers: Numbers = {}
    flagged = []
    truth = 3 * (apart**2 + (0.2 * (apart > 0)) ** 2)
    for i in range(count):
        random = np.random.default_rng([seed, i])
        train, test = (tensor(random.normal(size=(size, 3))) for _ in range(2))
        stretched = 1.2 if apart else 1.0
        samples = tensor(apart + stretched * random.normal(size=(size, 3)))
        space = make_features("pixels", train, seed=0)
        found = watched(
            sample_quality(samples, train, test, features=space, num_groups=min(20, size // 2))
        )
        flagged.append(any("do not trust" in note for note in found.provenance["notes"]))
        scale = _unit_of(space, train)
        for name in ("frechet_distance_infinity", "frechet_distance"):
            value, error = float(found[name]) / scale, float(found[f"{name}_se"]) / scale
            numbers.setdefault(f"{name}_se", []).append((value, error, truth))
    return {
        name: Checked(checked.missed, np.array(flagged))
        for name, checked in _found(numbers).items()
    }


def _unit_of(space: Any, train: Tensor) -> float:
    """Squared units of the feature space in one squared unit of the data."""
    moved = space(train + 1.0) - space(train)
    return float(moved.square().sum(1).mean() / train.shape[1])


def _shares(count: int, seed: int) -> Found:
    """Precision and recall beside their means over sets, which a search by hand measures."""
    size, k = 60, 3
    random = np.random.default_rng(10**6 + seed)
    expected = np.mean(
        [
            _covered(random.normal(0.5, 1.0, (size, 2)), random.normal(size=(size, 2)), k)
            for _ in range(600)
        ],
        axis=0,
    )
    numbers: Numbers = {}
    for i in range(count):
        own = np.random.default_rng([seed, i])
        samples, data = own.normal(0.5, 1.0, (size, 2)), own.normal(size=(size, 2))
        found = precision_recall(tensor(samples), tensor(data), k)
        for name, truth in zip(("precision", "recall"), expected, strict=True):
            value, error = getattr(found, name), getattr(found, f"{name}_se")
            numbers.setdefault(f"{name}_se", []).append((value, error, float(truth)))
    return _found(numbers)


def _covered(samples: np.ndarray, data: np.ndarray, k: int) -> tuple[float, float]:
    """Precision and recall, from all distances."""

    def share(points: np.ndarray, centres: np.ndarray) -> float:
        between = np.linalg.norm(centres[:, None] - centres, axis=-1)
        radius = np.sort(between, 1)[:, k]
        away = np.linalg.norm(points[:, None] - centres, axis=-1)
        return float((away <= radius).any(1).mean())

    return share(samples, data), share(data, samples)


def _nearest(count: int, seed: int) -> Found:
    """Samples that are fresh draws of the data: the ratio is 1."""
    numbers: Numbers = {}
    p = []
    for i in range(count):
        random = np.random.default_rng([seed, i])
        train, samples, test = (tensor(random.normal(size=(n, 2))) for n in (50, 80, 80))
        found = nearest_training_distance(samples, train, test)
        p.append(found.p_value)
        numbers.setdefault("ratio_se", []).append((found.ratio, found.ratio_se, 1.0))
    return {**_found(numbers), "p_value": p_value(p)}


def _images(count: int, seed: int) -> Found:
    """White noise of 4 x 4 pixels: every frequency has the same power."""
    high = np.hypot(*np.meshgrid(np.fft.fftfreq(4), np.fft.fftfreq(4))) > 0.25
    numbers: Numbers = {}
    for i in range(count):
        random = np.random.default_rng([seed, i])
        train, test = (tensor(random.normal(size=(60, 16))) for _ in range(2))
        samples = tensor(1.5 * random.normal(size=(60, 16)))
        space = make_features("pixels", train, seed=0)
        found = watched(
            sample_quality(samples, train, test, features=space, image_shape=(4, 4), num_groups=4)
        )
        for name, truth in (
            ("high_frequency_ratio", 1.5**2),
            ("high_frequency_fraction", high.sum() / 15),
            ("high_frequency_ratio_held_out", 1.0),
            ("copied_fraction", 1 / 61),
        ):
            row = (float(found[name]), float(found[f"{name}_se"]), truth)
            numbers.setdefault(f"{name}_se", []).append(row)
    return _found(numbers)


def _critic(count: int, seed: int) -> Found:
    """A critic that stands still, between two normals; its bound by quadrature."""
    x = np.linspace(-12, 12, 20_001)
    v = 0.7 * x + 0.2
    on_data = np.log(2) - np.logaddexp(0, -v)
    on_samples = np.logaddexp(0, v) - np.log(2)
    truth = np.trapezoid(stats.norm.pdf(x, 0.5, 1.0) * on_data, x)
    truth -= np.trapezoid(stats.norm.pdf(x, 0.0, 1.25) * on_samples, x)
    numbers: Numbers = {}
    for i in range(count):
        random = np.random.default_rng([seed, i])
        data, held_out = (tensor(random.normal(0.5, 1.0, (80, 1))) for _ in range(2))
        critic = nn.Linear(1, 1).double()
        with torch.no_grad():
            critic.weight.fill_(0.7), critic.bias.fill_(0.2)
        with pyro.get_param_store().scope():
            found = fit_divergence(
                _generator,
                data,
                critic=critic,
                validation=held_out,
                epochs=1,
                learning_rate=1e-12,
                critic_learning_rate=1e-12,
                seed=seed + i,
                progress=False,
            ).require_finished()
        last = watched(found.history).isel(epoch=-1)
        for name in ("bound", "validation_bound"):
            row = (float(last[name]), float(last[f"{name}_se"]), float(truth))
            numbers.setdefault(f"{name}_se", []).append(row)
    return _found(numbers)


def _generator(x: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros((), dtype=torch.float64))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0).expand([len(x)]))
        pyro.sample("x", dist.Normal(z[:, None], 0.75).to_event(1), obs=x)


# --- codes ----------------------------------------------------------------------------------------


def _probes(count: int, seed: int) -> Found:
    """Two classes on a line: a threshold errs by two normal tails.

    A second kind of codes is noise, which no classifier tells apart.
    """
    numbers: Numbers = {}
    for i in range(count):
        random = np.random.default_rng([seed, i])
        labels = {part: np.arange(n) % 2 for part, n in (("train", 120), ("test", 100))}
        signal = {part: (random.normal(2.0 * y, 1.0))[:, None] for part, y in labels.items()}
        noise = {part: random.normal(size=(len(y), 1)) for part, y in labels.items()}
        sets = {"noise": [(noise["train"], noise["test"])]}
        sets["signal"] = [(signal["train"], signal["test"])]
        found = watched(
            feature_quality(sets, labels["train"], labels["test"], num_bootstrap=60, seed=seed)
        )
        best = float(stats.norm.cdf(1.0))
        for name, truth in (("probe_accuracy", best), ("probe_gain", best - 0.5)):
            own = found.sel(features="signal")
            row = (float(own[name]), float(own[f"{name}_se"]), truth)
            numbers.setdefault(f"{name}_se", []).append(row)
        for name, truth in (("cluster_accuracy", best), ("adjusted_rand", (2 * best - 1) ** 2)):
            row = (float(own[name]), float(own[f"{name}_se"]), truth)
            numbers.setdefault(f"{name}_se", []).append(row)
        row = (float(own["cluster_gain"]), float(own["cluster_gain_se"]), best - 0.5)
        numbers.setdefault("cluster_gain_se", []).append(row)
    return _found(numbers)


def _effects(count: int, seed: int) -> Found:
    """A linear decoder and judge; a product of units; a code that cuts off beyond one sd."""
    numbers: Numbers = {}
    beyond = float(2 * (stats.norm.pdf(1.0) + stats.norm.sf(1.0)))
    for i in range(count):
        codes = tensor(np.random.default_rng([seed, i]).normal(size=(60, 2)))
        vector = torch.tensor([1.0, 0.0], dtype=torch.float64)
        moved = watched(
            attribute_effect(
                lambda z: 2 * z, codes, vector, lambda x: x[:, 0], strengths=(1.0,), seed=seed + i
            )
        )
        units = watched(unit_effects(lambda z: z[..., :1] * z[..., 1:], codes, num_values=4))
        kept = watched(
            compression(
                {"cut": lambda x: torch.where(x.abs() < 1, x, 0.0)}, {"normal": codes[:, :1]}
            )
        )
        centre = 2 * float(codes[:, 0].mean())
        for name, result, place, truth in (
            ("probability", moved, {"strength": 0}, 2.0),
            ("control", moved, {"strength": 0}, centre),
            ("effect", units, {"unit": 0}, 1.0),
            ("relative_error", kept, {"code": 0, "distribution": 0}, beyond),
        ):
            own = result.isel(place)
            row = (float(own[name]), float(own[f"{name}_se"]), truth)
            numbers.setdefault(f"{name}_se", []).append(row)
    return _found(numbers)


def _activity(count: int, seed: int) -> Found:
    """Laplace codes of rate 1, a unit a replication: sizes are exponential."""
    codes = tensor(np.random.default_rng(seed).laplace(size=(150, max(count, 2))))
    found = watched(code_activity(codes, threshold=1.0))
    truths = {"mean_activation": 1.0, "active_share": np.exp(-1.0)}
    return {
        f"{name}_se": interval(found[name], found[f"{name}_se"], truth)
        for name, truth in truths.items()
    }


def _circle(z: Tensor) -> Tensor:
    """A line bent into a spiral of unit speed along the first code."""
    return torch.stack([z[..., 0].cos(), z[..., 0].sin(), 0.5 * z[..., 1]], -1)


def _lengths(count: int, seed: int) -> Found:
    """On a cylinder the straight line of the code is shortest, and its length known."""
    random = np.random.default_rng(seed)
    start, end = (tensor(random.normal(size=(count, 2))) for _ in range(2))
    found = watched(shortest_path(_circle, start, end, num_points=5, max_steps=20))
    away = (end - start).numpy() * np.array([1.0, 0.5])
    truth = np.linalg.norm(away, axis=1)
    columns = {}
    for name in ("length", "straight_length"):
        off = np.abs(found[name].values - truth)
        missed = (off > found[f"{name}_error"].values + 1e-9).astype(float)
        columns[f"{name}_error"] = Checked(missed, np.zeros(count, dtype=bool))
    return columns


STUDIES = [
    Study(
        "Frechet distance, 100 rows",
        "sample_quality",
        partial(_frechet, 100, 0.5),
        (
            Row("frechet_distance_infinity_se", most=0.09, breaks="few rows", guard="a note"),
            Row("frechet_distance_se", most=None, breaks="always: biased", guard="bound `upper`"),
        ),
        quick=5,
        longest=500,
    ),
    Study(
        "Frechet distance, 5 rows",
        "sample_quality",
        partial(_frechet, 5, 0.5),
        (
            Row(
                "frechet_distance_infinity_se",
                most=None,
                breaks="fewer rows than twice the features",
                guard="a note",
                speaks=1.0,
            ),
        ),
        quick=10,
        longest=1000,
    ),
    Study(
        "precision and recall",
        "precision_recall",
        _shares,
        (
            Row("precision_se", breaks="errs on the large side", guard="docstring"),
            Row("recall_se", breaks="errs on the large side", guard="docstring"),
        ),
        quick=30,
    ),
    Study(
        "nearest training data",
        "nearest_training_distance",
        _nearest,
        (
            Row("ratio_se", breaks="smoother samples", guard="docstring"),
            Row("p_value", most=0.055, breaks="smoother samples", guard="docstring"),
        ),
        quick=100,
    ),
    Study(
        "images of white noise",
        "sample_quality",
        _images,
        (
            Row("high_frequency_ratio_se", breaks="few images", guard="none"),
            Row("high_frequency_fraction_se", breaks="few images", guard="none"),
            Row("high_frequency_ratio_held_out_se", breaks="few images", guard="none"),
            Row("copied_fraction_se", breaks="few held-out data", guard="the note"),
        ),
        quick=8,
        longest=500,
    ),
    Study(
        "a critic that stands still",
        "fit_divergence",
        _critic,
        (
            Row("bound_se", most=0.08, breaks="a critic that has seen the data", guard="objective"),
            Row("validation_bound_se", most=0.08, breaks="few data", guard="none"),
        ),
        quick=5,
        longest=1000,
    ),
    Study(
        "probes of codes",
        "feature_quality",
        _probes,
        (
            Row("probe_accuracy_se", most=0.09, breaks="few test data", guard="none"),
            Row("probe_gain_se", most=0.09, breaks="few test data", guard="none"),
            Row("cluster_accuracy_se", most=0.09, breaks="few test data", guard="none"),
            Row("cluster_gain_se", most=0.09, breaks="chance matches gain", guard="none"),
            Row("adjusted_rand_se", most=0.09, breaks="few test data", guard="none"),
        ),
        quick=3,
        longest=100,
    ),
    Study(
        "effects on the decoder",
        "attribute_effect, unit_effects, compression",
        _effects,
        (
            Row("probability_se", most=0.08, breaks="few codes", guard="none"),
            Row("control_se", most=0.09, breaks="few directions", guard="none"),
            Row("effect_se", most=0.11, breaks="few codes", guard="none"),
            Row("relative_error_se", most=0.1, breaks="few data", guard="none"),
        ),
        quick=30,
        longest=1000,
    ),
    Study(
        "Laplace codes",
        "code_activity",
        _activity,
        (
            Row("mean_activation_se", most=0.08, breaks="few data", guard="none"),
            Row("active_share_se", most=0.08, breaks="no datum active: 0 +- 0", guard="none"),
        ),
    ),
    Study(
        "lengths on a cylinder",
        "shortest_path",
        _lengths,
        (
            Row("length_error", 1.0, 1e-3, "more than 610 chords a side", "a larger error"),
            Row("straight_length_error", 1.0, 1e-3, "the same", "a larger error"),
        ),
        quick=3,
        longest=40,
    ),
]
