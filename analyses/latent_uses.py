"""What codes are good for: as features of a classifier, and to compress."""

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images
from sklearn.decomposition import PCA
from sklearn.feature_extraction.image import extract_patches_2d
from torch import Tensor

from analyses.latent_work import (
    Codes,
    Settings,
    Work,
    codes_of,
    compared,
    labelled,
    make,
    percent,
    train,
    unlabelled,
)
from analyses.sections import Section
from pyro_vae import load_dataset
from pyro_vae.extras.latents import FeatureSets, compression, feature_quality
from pyro_vae.plots import plot_compression, plot_feature_quality
from pyro_vae.results import Result

OTHER = {"mnist": "fashion_mnist", "fashion_mnist": "mnist"}


# --- features -------------------------------------------------------------------------------------


def features_section(work: Work) -> Section:
    """How well codes serve a linear classifier and k-means."""
    title = "How well codes serve"
    if work.data.test_labels is None:
        return unlabelled(work, "features", title)
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
    rows = []
    for i, name in enumerate(found["features"].values):
        cell = {
            key: (float(found[key][i]), float(found[f"{key}_se"][i]))
            for key in (
                "probe_accuracy",
                "probe_gain",
                "cluster_accuracy",
                "cluster_gain",
                "adjusted_rand",
            )
        }
        rand, rand_se = cell["adjusted_rand"]
        rows.append(
            {
                "code": str(name),
                "numbers": str(int(found["code_dim"][i])),
                "linear classifier": percent(*cell["probe_accuracy"]),
                "less PCA's": percent(*cell["probe_gain"]) if i else "",
                "k-means": percent(*cell["cluster_accuracy"]),
                "k-means less PCA's": percent(*cell["cluster_gain"]) if i else "",
                "adjusted Rand": f"{rand:.3f} ± {rand_se:.3f}",
            }
        )
    figure = plot_feature_quality(found).figure
    assert isinstance(figure, Figure)
    return Section(
        "features",
        title,
        f"{features_verdict(found, size)}. Errors hold the draw of the test data and, for trained "
        f"codes, that of {work.settings.trainings} trainings; the classifier learned from "
        f"{len(x)} labels.",
        (rows,),
        figure,
        tuple(found.provenance["notes"]),
    )


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


def compression_section(work: Work, root: str | None) -> Section:
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
    figure = plot_compression(found).figure
    assert isinstance(figure, Figure)
    return Section(
        "compression",
        "What a code compresses",
        f"{verdict[0].upper() + verdict[1:]}. All codes have {work.settings.latent_dim} numbers "
        f"for {work.x.shape[1]} pixels; 100 % is what their mean alone would lose. "
        "Shuffled pixels are the same pictures with their pixels in another order: as "
        "compressible, but only by a code trained on them.",
        (rows,),
        figure,
    )


def projection(x: Tensor, settings: Settings) -> Codes:
    """From data to what the principal components of x keep of them."""
    pca = PCA(settings.latent_dim, random_state=settings.seed).fit(x.numpy())

    def reconstruct(other: Tensor) -> Tensor:
        return torch.as_tensor(pca.inverse_transform(pca.transform(other.numpy())))

    return reconstruct
