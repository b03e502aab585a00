"""What codes are good for: as features of a classifier, and to compress."""

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from sklearn.decomposition import PCA
from sklearn.feature_extraction.image import extract_patches_2d
from torch import Tensor

from analyses.latent_space.work import (
    Codes,
    Settings,
    Work,
    codes_of,
    compared,
    labelled,
    make,
    percent,
    train,
)
from analyses.pages import figure_of
from pyro_vae import load_dataset
from pyro_vae.extras.latents import FeatureSets, compression, feature_quality
from pyro_vae.plots import plot_compression, plot_feature_quality
from pyro_vae.results import Result

OTHER = {"mnist": "fashion_mnist", "fashion_mnist": "mnist"}


# --- features -------------------------------------------------------------------------------------


def tell_features(work: Work) -> dict[str, Any]:
    """How well codes serve a linear classifier and k-means; nothing where there are no classes."""
    if work.data.test_labels is None:
        return {}
    x, labels = labelled(work)
    size = work.settings.latent_dim
    pca = PCA(size, random_state=work.settings.seed).fit(work.x.numpy())
    sets: dict[str, FeatureSets] = {
        "PCA": [(pca.transform(x.numpy()), pca.transform(work.test.numpy()))],
        "raw pixels": [(x, work.test)],
    }
    for name, trained in work.models.items():
        sets[name] = [(codes_of(m, x), codes_of(m, work.test)) for m in trained]
    found = feature_quality(
        sets,
        labels,
        work.data.test_labels,
        num_bootstrap=work.settings.num_bootstrap,
        seed=work.settings.seed,
    )
    work.results["features"] = found
    return {
        "features": figure_of(plot_feature_quality(found)),
        "features_verdict": features_verdict(found, size),
        "features_rows": feature_rows(found),
        "features_notes": found.provenance["notes"],
        "num_labels": len(x),
    }


def feature_rows(found: Result) -> list[dict[str, str]]:
    """A row for each code; the first is PCA's, which the others are compared with."""

    def cell(name: str, i: int) -> str:
        return percent(float(found[name][i]), float(found[f"{name}_se"][i]))

    def rand(i: int) -> str:
        value, error = (float(found[n][i]) for n in ("adjusted_rand", "adjusted_rand_se"))
        return f"{value:.3f} ± {error:.3f}"

    return [
        {
            "code": str(name),
            "numbers": str(int(found["code_dim"][i])),
            "linear classifier": cell("probe_accuracy", i),
            "less PCA's": cell("probe_gain", i) if i else "",
            "k-means": cell("cluster_accuracy", i),
            "k-means less PCA's": cell("cluster_gain", i) if i else "",
            "adjusted Rand": rand(i),
        }
        for i, name in enumerate(found["features"].values)
    ]


def features_verdict(found: Result, size: int) -> str:
    """Which trained codes beat PCA, by each measure, and how raw pixels do."""
    sentences = []
    names = found["features"].values
    trained = slice(2, None)
    for kind, text in (("probe", "a linear classifier"), ("cluster", "k-means")):
        gain, error = found[f"{kind}_gain"].values, found[f"{kind}_gain_se"].values
        better = [
            n
            for n, g, e in zip(names[trained], gain[trained], error[trained], strict=True)
            if g > 2 * e
        ]
        worse = [
            n
            for n, g, e in zip(names[trained], gain[trained], error[trained], strict=True)
            if g < -2 * e
        ]
        pixels = compared(gain[1], error[1], "better than", "worse than", "no different from")
        sentences.append(
            f"for {text}, of the trained codes of {size} numbers "
            f"{', '.join(better) or 'none'} {'are' if len(better) > 1 else 'is'} better than PCA's "
            f"and {', '.join(worse) or 'none'} worse, and all pixels are {pixels} PCA's"
        )
    text = "; ".join(sentences)
    return text[0].upper() + text[1:]


# --- compression ----------------------------------------------------------------------------------


def patches(shape: tuple[int, int], count: int, test: bool, seed: int) -> Tensor:
    """Grey patches of scikit-learn's two photographs: test patches from their right fifths."""
    found = []
    for i, image in enumerate(load_sample_images().images):
        grey = image.mean(2) / 255
        cut = 4 * grey.shape[1] // 5
        part = grey[:, cut:] if test else grey[:, :cut]
        number = (count + 1) // 2
        found.append(
            extract_patches_2d(part, shape, max_patches=number, random_state=seed + 2 * i + test)
        )
    return torch.as_tensor(np.concatenate(found)[:count].reshape(count, -1), dtype=torch.float32)


def distributions(work: Work, root: str | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Training and test data of the models' own and of two other distributions."""
    seed, name = work.settings.seed, work.data.name
    if name in OTHER:
        other = load_dataset(OTHER[name], root)
        others = (other.train[: len(work.x)], other.test)
        text = OTHER[name].replace("_", "-")
    else:
        others = (
            patches(work.shape, len(work.x), False, seed),
            patches(work.shape, max(len(work.test), 500), True, seed),
        )
        text = "photographs"
    shuffle = torch.randperm(work.x.shape[1], generator=torch.Generator().manual_seed(seed))
    return {
        name.replace("_", "-"): (work.x, work.test),
        text: others,
        "shuffled pixels": (work.x[:, shuffle], work.test[:, shuffle]),
    }


def tell_compression(work: Work, root: str | None) -> dict[str, Any]:
    """What a code compresses that was trained on something else."""
    sets = distributions(work, root)
    codes: dict[str, Codes] = {}
    for kind in ("PCA", "autoencoder"):
        for place, (name, (x, _)) in enumerate(sets.items()):
            if kind == "PCA":
                codes[f"PCA of {name}"] = projection(x, work.settings)
                continue
            module = work.models["undercomplete"][0]
            if place:
                module = make("undercomplete", x, work.settings)
                train(module, x, work.settings, work.progress)
            codes[f"autoencoder of {name}"] = module.reconstruct
    found = compression(codes, {name: test for name, (_, test) in sets.items()})
    work.results["compression"] = found
    rows = [
        {
            "code trained on": str(code),
            **{
                str(name): percent(
                    float(found["relative_error"].sel(code=code, distribution=name)),
                    float(found["relative_error_se"].sel(code=code, distribution=name)),
                )
                for name in found["distribution"].values
            },
        }
        for code in found["code"].values
    ]
    own, other, _ = sets
    error = {
        (kind, source, target): float(
            found["relative_error"].sel(code=f"{kind} of {source}", distribution=target)
        )
        for kind in ("PCA", "autoencoder")
        for source in (own, other)
        for target in (own, other)
    }
    verdict = "; ".join(
        f"the {kind} of {own} loses {percent(error[kind, own, own])} of the variance of {own} "
        f"and {percent(error[kind, own, other])} of that of {other}, where one trained on {other} "
        f"loses {percent(error[kind, other, other])}"
        for kind in ("autoencoder", "PCA")
    )
    return {
        "compression": figure_of(plot_compression(found)),
        "compression_verdict": verdict[0].upper() + verdict[1:],
        "compression_rows": rows,
        "num_pixels": work.x.shape[1],
    }


def projection(x: Tensor, settings: Settings) -> Codes:
    """From data to what the principal components of x keep of them."""
    pca = PCA(settings.latent_dim, random_state=settings.seed).fit(x.numpy())

    def reconstruct(other: Tensor) -> Tensor:
        return torch.as_tensor(pca.inverse_transform(pca.transform(other.numpy())))

    return reconstruct
