"""The geometry of a latent space: its manifold, paths in it, attributes, and its units."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from analyses.latent_space.work import Work, codes_of, compared, labelled, percent, probe
from analyses.pages import mean_and_error
from pyro_vae import VAE, Autoencoder
from pyro_vae.diagnostics.gap import elbo_surgery
from pyro_vae.extras.latents import (
    attribute_effect,
    attribute_vector,
    relative_error,
    shortest_path,
    traverse,
    unit_effects,
)
from pyro_vae.extras.samples import nearest_training_distance
from pyro_vae.plots import (
    plot_attribute_effects,
    plot_latent,
    plot_manifold,
    plot_paths,
    plot_picture_rows,
    plot_units,
)
from pyro_vae.results import Result

# Name -> (classes without, classes with); None is every class that is not with.
ATTRIBUTES: dict[str, dict[str, tuple[tuple[int, ...] | None, tuple[int, ...]]]] = {
    "digits": {
        "4 becomes 9": ((4,), (9,)),
        "3 becomes 8": ((3,), (8,)),
        "closed loop (0, 6, 8, 9)": (None, (0, 6, 8, 9)),
    },
    "fashion_mnist": {
        "T-shirt becomes pullover": ((0,), (2,)),
        "sneaker becomes ankle boot": ((7,), (9,)),
        "footwear": (None, (5, 7, 9)),
    },
}
ATTRIBUTES["mnist"] = ATTRIBUTES["digits"]


# --- the manifold ---------------------------------------------------------------------------------


def tell_manifold(work: Work) -> dict[str, Any]:
    """What two numbers hold."""
    rows, held, named = [], {}, {}
    for vae in (work.manifold, work.vae):
        with torch.no_grad():
            value, error = relative_error(work.test, vae.reconstruct(work.test))
        held[vae.latent_dim] = (1 - value, error)
        row = {"latents": str(vae.latent_dim), "variance of pixels kept": percent(1 - value, error)}
        if work.data.test_labels is not None:
            share, error = probe(work, partial(codes_of, vae))
            named[vae.latent_dim] = (share, error)
            row["test data named by a linear classifier"] = percent(share, error)
        rows.append(row)
    figure = Figure(figsize=(11.5, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_manifold(work.manifold, work.shape, left, data=work.data.name, pixels=work.data.pixels)
    plot_latent(
        work.manifold,
        work.test[:2000],
        None if work.data.test_labels is None else work.data.test_labels[:2000],
        right,
        data=work.data.name,
    )
    verdict = f"Two numbers keep {percent(*held[2])} of the variance of the pixels of test data"
    if named:
        verdict += f", and are enough to name {percent(*named[2])} of them rightly"
    return {"manifold": figure, "manifold_verdict": verdict, "manifold_rows": rows}


# --- paths ----------------------------------------------------------------------------------------


def pairs_of(work: Work) -> tuple[Tensor, Tensor]:
    """Indices of test data that paths join, of different classes where classes are known."""
    generator = torch.Generator().manual_seed(work.settings.seed)
    order = torch.randperm(len(work.test), generator=generator)
    labels = work.data.test_labels
    starts, ends = order[: len(order) // 2], order[len(order) // 2 :][: len(order) // 2]
    if labels is not None:
        differ = labels[starts] != labels[ends]
        starts, ends = starts[differ], ends[differ]
    return starts[: work.settings.num_pairs], ends[: work.settings.num_pairs]


@dataclass(frozen=True)
class Measured:
    """Paths through one latent space.

    Attributes:
        result: From `shortest_path`.
        pictures: What lies on the way, by "straight" and "shortest".
        saving: By what share the shortest path is shorter, of each pair.
        away: Mean distance of a path's inner pictures from training data, of each pair, by
            "straight" and "shortest"; 1 is that of test data.
    """

    result: Result
    pictures: dict[str, Tensor]
    saving: np.ndarray
    away: dict[str, np.ndarray]

    @property
    def widest(self) -> list[int]:
        """The pairs that are drawn: those where the shortest path saves most."""
        return [int(i) for i in np.argsort(-self.saving)[:3]]


def measure_paths(work: Work, module: VAE | Autoencoder) -> Measured:
    """Straight and shortest paths between pairs of test data, in double precision."""
    starts, ends = pairs_of(work)
    exact = copy.deepcopy(module).double()
    codes = codes_of(exact, work.test.double())
    graph = codes_of(exact, work.x[:: max(1, len(work.x) // 1500)].double())
    found = shortest_path(
        exact.decode, codes[starts], codes[ends], work.settings.num_points, through=graph
    )
    pictures, away = {}, {}
    for text, column in (("straight", "straight_points"), ("shortest", "points")):
        with torch.no_grad():
            pictures[text] = exact.decode(torch.as_tensor(found[column].values))
        inner = pictures[text][:, 1:-1].flatten(0, 1)
        near = nearest_training_distance(inner, work.x.double(), work.test.double())
        by_pair = near.samples.reshape(len(starts), -1).mean(1) / near.held_out.mean()
        away[text] = by_pair.numpy()
    saving = 1 - found["length"].values / found["straight_length"].values
    return Measured(found, pictures, saving, away)


def path_row(name: str, measured: Measured) -> dict[str, str]:
    """The table's row of one latent space; errors are those over pairs."""
    steps = measured.pictures["straight"].diff(dim=1).norm(dim=2)
    longest = float((steps.amax(1) / steps.mean(1)).mean())
    away = {text: mean_and_error(values) for text, values in measured.away.items()}
    return {
        "decoder": name,
        "shortest is shorter by": percent(*mean_and_error(measured.saving)),
        **{f"distance from data, {t}": f"{v:.2f} ± {e:.2f}" for t, (v, e) in away.items()},
        "longest / mean step, straight": f"{longest:.1f}",
        "converged": f"{int(measured.result['converged'].sum())} of {len(measured.saving)}",
    }


def tell_paths(work: Work) -> dict[str, Any]:
    """How much shorter the shortest paths are, and what is seen on the way."""
    size = work.settings.latent_dim
    modules = {
        "VAE, 2 latents": work.manifold,
        f"VAE, {size} latents": work.vae,
        f"autoencoder, {size} codes": work.models["undercomplete"][0],
    }
    measured = {name: measure_paths(work, module) for name, module in modules.items()}
    for name, found in measured.items():
        work.results[f"paths_{name.replace(', ', '_').replace(' ', '_')}"] = found.result
    small, large = list(measured.values())[:2]
    nearer, error = mean_and_error(large.away["straight"] - large.away["shortest"])
    verdict = (
        "Under the metric that the decoder pulls back, the shortest paths found are "
        f"{percent(*mean_and_error(small.saving))} shorter than straight ones in the VAE with 2 "
        f"latents, and {percent(*mean_and_error(large.saving))} with {size}; there, the pictures "
        "on the shorter way are "
        + compared(nearer, error, "nearer to", "farther from", "neither nearer to nor farther from")
        + f" the data (by {abs(nearer):.2f} ± {error:.2f})"
    )
    return {
        "paths": paths_figure(work, measured),
        "paths_verdict": verdict,
        "paths_rows": [path_row(name, found) for name, found in measured.items()],
        "paths_notes": small.result.provenance["notes"],
        "num_pairs": len(large.saving),
    }


def paths_figure(work: Work, measured: Mapping[str, Measured]) -> Figure:
    """Paths over the plane of two latents, and pictures along the way for both VAEs."""
    figure = Figure(figsize=(13.5, 6.4), layout="constrained")
    left, right = np.asarray(figure.subfigures(1, 2, width_ratios=(1, 1.15))).tolist()
    exact = copy.deepcopy(work.manifold).double()
    vaes = dict(list(measured.items())[:2])
    small = next(iter(vaes.values()))
    labels = work.data.test_labels
    plot_paths(
        exact.decode,
        codes_of(exact, work.test[:2000].double()),
        small.result.isel(pair=small.widest),
        None if labels is None else labels[:2000],
        left.subplots(),
        title=f"2 latents: codes of test {work.data.name}"
        + ("" if labels is None else ", coloured by class"),
    )
    num_points = work.settings.num_points
    chosen = torch.linspace(0, num_points - 1, min(num_points, 10)).round().long()
    for ax, (name, found) in zip(right.subplots(2, 1), vaes.items(), strict=True):
        strips = {
            f"{place + 1} {text}": pictures[i, chosen]
            for place, i in enumerate(found.widest)
            for text, pictures in found.pictures.items()
        }
        rows = torch.stack(list(strips.values()))
        plot_picture_rows(rows, work.shape, list(strips), ax, title=name, pixels=work.data.pixels)
    return figure


# --- attributes -----------------------------------------------------------------------------------


STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def tell_attributes(work: Work) -> dict[str, Any]:
    """What adding the vector of an attribute does; nothing where there are no classes."""
    known, test_labels = ATTRIBUTES.get(work.data.name), work.data.test_labels
    train_labels = work.data.train_labels
    if known is None or test_labels is None or train_labels is None:
        return {}
    x, labels = labelled(work)
    judge = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    judge.fit(x.numpy(), labels.numpy())
    train_codes, test_codes = codes_of(work.vae, work.x), codes_of(work.vae, work.test)
    effects, rows, strips = {}, [], []
    for name, (without, having) in known.items():
        others = set(range(10)) - set(having) if without is None else without
        in_train = torch.isin(train_labels[: len(work.x)], torch.tensor([*others, *having]))
        has = torch.isin(train_labels[: len(work.x)], torch.tensor(having))
        vector = attribute_vector(train_codes[in_train], has[in_train])
        start = test_codes[torch.isin(test_labels, torch.tensor(sorted(others)))]
        effects[name] = attribute_effect(
            work.vae.decode,
            start,
            vector,
            partial(probability_of, judge, having),
            strengths=STRENGTHS,
            seed=work.settings.seed,
        )
        work.results[f"attribute_{len(effects)}"] = effects[name]
        rows.append(attribute_row(name, len(start), effects[name]))
        with torch.no_grad():
            moved = start[0] + torch.tensor(STRENGTHS)[:, None] * vector
            strips.append(work.vae.decode(moved))
    return {
        "attributes": attributes_figure(work, effects, strips),
        "attributes_verdict": attributes_verdict(effects),
        "attributes_rows": rows,
        "judge_right": percent(judge.score(work.test.numpy(), test_labels.numpy())),
    }


def attribute_row(name: str, num_codes: int, effect: Result) -> dict[str, str]:
    """The probability of an attribute by how much of its vector is added."""
    at = effect.sel(strength=[0.0, 1.0, 1.5])
    columns = (at.strength.values, at.probability.values, at.probability_se.values)
    return {
        "attribute": name,
        "test codes": str(num_codes),
        **{f"{s:g} x": percent(float(p), float(e)) for s, p, e in zip(*columns, strict=True)},
        "other directions, 1.5 x": percent(float(at["control"][-1]), float(at["control_se"][-1])),
    }


def attributes_figure(
    work: Work, effects: Mapping[str, Result], strips: Sequence[Tensor]
) -> Figure:
    """Probabilities of the attributes, and a datum to which each vector is added."""
    figure = Figure(figsize=(12.0, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    plot_attribute_effects(dict(effects), left)
    plot_picture_rows(
        torch.stack(list(strips)),
        work.shape,
        [name.replace(" (", "\n(") for name in effects],
        right,
        columns=[f"{s:g} x" for s in STRENGTHS],
        title="the first test datum without it, and its vector added",
        pixels=work.data.pixels,
    )
    return figure


def attributes_verdict(effects: Mapping[str, Result]) -> str:
    """Which vectors do more than other directions of equal length."""
    worked = []
    for name, effect in effects.items():
        gain = float((effect.probability - effect.control).values[-1])
        error = float(np.hypot(effect.probability_se, effect.control_se).values[-1])
        if gain > 2 * error:
            first, last = (percent(float(effect["probability"][i])) for i in (0, -1))
            worked.append(f"{name}, from {first} to {last}")
    return (
        "Adding the vector once and a half raises the attribute's probability by more than "
        f"directions of equal length do for {len(worked)} of {len(effects)} attributes"
        + (": " + "; ".join(worked))
        * bool(worked)
    )


def probability_of(judge: Any, classes: Sequence[int], pictures: Tensor) -> np.ndarray:
    """The judge's probability that a picture is of one of the classes."""
    columns = np.isin(judge.classes_, classes)
    return np.asarray(judge.predict_proba(pictures.numpy())[:, columns].sum(1))


# --- units ----------------------------------------------------------------------------------------


def tell_units(work: Work) -> dict[str, Any]:
    """What each unit does, and that collapsed ones do nothing."""
    vae, settings = work.vae, work.settings
    step = max(1, len(work.x) // settings.num_surgery)
    surgery = elbo_surgery(vae.model, vae.guide, work.x[::step], seed=settings.seed)
    codes = codes_of(vae, work.test)
    effects = unit_effects(vae.decode, codes[:500])
    work.results.update(surgery=surgery, units=effects)
    activity, effect = surgery["activity"].values, effects["effect"].values
    errors = np.hypot(effects["effect_se"].values, effects["quadrature_error"].values)
    above = surgery.provenance["config"]["active_above"]
    active = activity > above
    order = np.argsort(-activity)
    rows = [
        {
            "unit": f"z{i + 1}",
            "activity": f"{activity[i]:.4f}",
            "effect on a pixel": f"{effect[i]:.4f} ± {errors[i]:.4f}",
            "": "active" if active[i] else "collapsed",
        }
        for i in order
    ]
    values = torch.linspace(-2, 2, 9)
    with torch.no_grad():
        strips = traverse(vae.decode, codes[0], order.tolist(), values)
    figure = Figure(figsize=(11.5, 6.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    plot_units(activity, effect, left, active_above=above)
    plot_picture_rows(
        strips,
        work.shape,
        [f"$z_{{{i + 1}}}$" + ("" if active[i] else " collapsed") for i in order],
        right,
        columns=[f"{v:g}" for v in values.tolist()],
        title="one test datum, one unit moved at a time",
        pixels=work.data.pixels,
    )
    if active.all() or not active.any():
        verdict = f"All {len(active)} units are {'active' if active.all() else 'collapsed'}"
    else:
        strong = effect > 2 * effect[~active].max()
        verdict = (
            f"{int(strong.sum())} of {len(active)} units do anything to speak of: they move a "
            f"pixel by {effect[strong].min():.3f} to {effect[strong].max():.3f}, the others "
            f"({int((~active).sum())} collapsed and {int((active & ~strong).sum())} active by a "
            f"little) by at most {effect[~strong].max():.3f}"
            if strong.any()
            else f"No active unit does more than twice what a collapsed one does, {len(active)} "
            "units in all"
        )
    return {
        "units": figure,
        "units_verdict": verdict,
        "units_rows": rows,
        "active_above": above,
    }
