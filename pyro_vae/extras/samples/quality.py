"""How good generated samples are beside real data: in shape, in detail, and as copies.

No single number says whether samples are good, and the likelihood does not. Here are four, each of
which is blind to something: the Frechet distance (of two means and covariances in a feature space),
precision and recall (are samples where data are, and data where samples are), the power at high
spatial frequencies (blur), and the distance to the nearest training datum (memorising).
`sample_quality` takes them all, and beside each the same number for **held-out real data**: what
perfect samples would get. A number without it says little.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.data import Seed, as_seed
from pyro_vae.extras.samples.features import Features, check_rows
from pyro_vae.extras.samples.frechet import (
    _STANDARD_ERRORS,
    FrechetEstimate,
    _shuffled,
    frechet_distance_infinity,
)
from pyro_vae.extras.samples.neighbours import (
    NearestDistances,
    PrecisionRecall,
    _ratio_of_means,
    _share_error,
    nearest_training_distance,
    precision_recall,
)
from pyro_vae.extras.samples.power import _CUTOFF, PowerSpectrum, high_frequency_power
from pyro_vae.results import Result, label, make_result, sha256_of

__all__ = ["sample_quality"]


def sample_quality(
    samples: Float[Tensor, "samples pixels"],
    train: Float[Tensor, "train _pixels"],
    test: Float[Tensor, "held_out _pixels"],
    *,
    features: Features,
    image_shape: Sequence[int] | None = None,
    k: int = 3,
    cutoff: float = _CUTOFF,
    num_groups: int = 20,
    seed: Seed = 0,
) -> Result:
    r"""Measures samples against training data, with held-out data measured in the same way.

    As many samples as held-out data are used (a random choice of the more numerous), so that a
    number ``foo`` and its counterpart ``foo_held_out``, which real data get, have much the same
    bias.

    Args:
        samples: Generated data, shape (samples, pixels), in the units of the data. Say which they
            are: draws of the likelihood and its means differ, and means are smoother.
        train: What the generator was trained on; also what is compared with.
        test: Data it was not trained on.
        features: The space of Frechet distance, precision and recall, from `make_features`.
        image_shape: (height, width) or (channels, height, width); without it the high frequencies
            are left out.
        k: Neighbours, see `precision_recall`.
        cutoff: In cycles per pixel, see `high_frequency_power`.
        num_groups: Groups of the jackknife, see `frechet_distance_infinity`.
        seed: Of the choice and the grouping. The caller's random state stays as it is.

    Returns:
        Pure numbers without dims, each but the last three also as ``..._held_out``:

        ===========================  =====  ========================================================
        name                         bound  meaning
        ===========================  =====  ========================================================
        `frechet_distance`           upper  in expectation an upper bound of that between the
                                            generator and **these** training data
        `frechet_distance_infinity`  none   the same, extrapolated in 1/n
        `precision`                  none   share of samples in a k-nearest-neighbour ball of the
                                            training data
        `recall`                     none   share of training data in such a ball of the samples
        `high_frequency_ratio`       none   with `image_shape`: power above the cutoff over that of
                                            the training data
        `high_frequency_fraction`    none   with `image_shape`: its share of all power
        `nearest_distance_ratio`     none   mean distance to the nearest training datum over that of
                                            held-out data
        `nearest_distance_z`         none   rank test of these distances; far below 0: samples lie
                                            too near
        `copied_fraction`            none   share of samples whose nearest training datum stands out
                                            more than that of every held-out datum
        ===========================  =====  ========================================================

        All but `nearest_distance_z` have standard errors `*_se`; Frechet distances are squared, and
        the last three are taken in the pixels. What depends on the feature space names it in its
        attribute ``feature_space``. The ``data_sha256`` covers data, feature space, settings and
        number of samples: quantities that differ in one of them refuse to be compared.

    Raises:
        ValueError: If there are fewer than max(3, k + 1, num_groups) samples or data, the numbers
            of pixels differ, a value is not finite, `image_shape` does not fit, or the training
            data have no power above the cutoff.

    Example:
        >>> import torch
        >>> from pyro_vae.extras.samples.features import make_features
        >>> train, test, fresh = torch.randn(3, 90, 4, generator=torch.Generator().manual_seed(1))
        >>> space = make_features("pixels", train)
        >>> result = sample_quality(0.1 * fresh, train, test, features=space)
        >>> float(result.frechet_distance) > 5 * float(result.frechet_distance_held_out)
        True
    """
    seed = as_seed(seed)
    rows = {"samples": samples, "train": train, "test": test}
    least = max(3, k + 1, num_groups)
    checked = {
        name: check_rows(name, x, minimum=least, data_dim=features.data_dim)
        for name, x in rows.items()
    }
    generator = torch.Generator().manual_seed(seed)
    size = min(len(checked["samples"]), len(checked["test"]), len(checked["train"]))
    chosen = {name: x[_shuffled(len(x), generator)[:size]] for name, x in checked.items()}
    whole, part = features(checked["train"]), features(chosen["train"])
    spectra = (
        None
        if image_shape is None
        else {
            name: high_frequency_power(x, image_shape, cutoff=cutoff)
            for name, x in {**chosen, "train": checked["train"]}.items()
        }
    )
    variables: dict[str, Any] = {}
    for name, end in (("samples", ""), ("test", "_held_out")):
        own = features(chosen[name])
        frechet = frechet_distance_infinity(own, whole, num_groups=num_groups, seed=seed)
        shares = precision_recall(own, part, k)
        variables |= _in_features(frechet, shares, features.name, end)
        if spectra is not None:
            variables |= _in_frequencies(spectra[name], spectra["train"], end)
    variables |= _memorising(
        nearest_training_distance(chosen["samples"], checked["train"], checked["test"])
    )
    config = {
        "feature_space": features.name,
        "feature_fingerprint": features.fingerprint,
        "num_samples": size,
        "num_train": len(train),
        "image_shape": None if image_shape is None else list(image_shape),
        "k": k,
        "cutoff": cutoff,
        "num_groups": num_groups,
    }
    settings = np.array([repr(sorted(config.items()))])
    return make_result(
        variables,
        function="sample_quality",
        config=config,
        seed=seed,
        data_sha256=sha256_of(train, test, settings),
        notes=_notes(features, size, variables, len(train), len(test)),
    )


def _pure(value: float, description: str, bound: str = "none", **attrs: str) -> tuple[Any, ...]:
    about = label(unit="none", reduction="none", bound=bound, description=description)
    return (), value, {**about, **attrs}


def _in_features(
    frechet: FrechetEstimate, shares: PrecisionRecall, space: str, end: str
) -> dict[str, Any]:
    whose = "held-out data" if end else "samples"
    numbers = {
        "frechet_distance": (
            frechet.distance,
            frechet.standard_error,
            "upper",
            f"squared Frechet distance of {whose} to training data",
        ),
        "frechet_distance_infinity": (
            frechet.infinity,
            frechet.standard_error,
            "none",
            f"squared Frechet distance of {whose} to training data, extrapolated in 1/n",
        ),
        "precision": (
            shares.precision,
            shares.precision_se,
            "none",
            f"share of {whose} in a {shares.k}-nearest-neighbour ball of the training data",
        ),
        "recall": (
            shares.recall,
            shares.recall_se,
            "none",
            f"share of training data in a {shares.k}-nearest-neighbour ball of {whose}",
        ),
    }
    variables: dict[str, Any] = {}
    for name, (value, error, bound, description) in numbers.items():
        variables[name + end] = _pure(value, description, bound, feature_space=space)
        variables[f"{name}{end}_se"] = ((), error, {})
    return variables


def _in_frequencies(own: PowerSpectrum, real: PowerSpectrum, end: str) -> dict[str, Any]:
    if float(real.high.sum()) == 0.0:
        raise ValueError(
            f"the training data have no power above {real.cutoff:g} cycles per pixel: lower the "
            "cutoff"
        )
    ratio, error = _ratio_of_means(own.high, real.high)
    rest = own.high - own.fraction * own.total
    fraction_error = float(rest.std()) / math.sqrt(len(rest)) / float(own.total.mean())
    above = f"above {own.cutoff:g} cycles per pixel"
    return {
        f"high_frequency_ratio{end}": _pure(ratio, f"power {above} over that of training data"),
        f"high_frequency_ratio{end}_se": ((), error, {}),
        f"high_frequency_fraction{end}": _pure(own.fraction, f"share of the power {above}"),
        f"high_frequency_fraction{end}_se": ((), fraction_error, {}),
    }


def _memorising(found: NearestDistances) -> dict[str, Any]:
    return {
        "nearest_distance_ratio": _pure(
            found.ratio, "mean distance to the nearest training datum over that of held-out data"
        ),
        "nearest_distance_ratio_se": ((), found.ratio_se, {}),
        "nearest_distance_z": _pure(
            found.z, "rank test of these distances; far below 0: samples lie too near"
        ),
        "copied_fraction": _pure(
            found.copied,
            "share of samples whose nearest training datum stands out more than that of every "
            f"held-out datum; {found.copied_expected:.2g} expected of fresh draws",
        ),
        "copied_fraction_se": ((), _share_error(found.copied, len(found.samples)), {}),
    }


def _notes(
    features: Features, size: int, found: dict[str, Any], num_train: int, num_test: int
) -> list[str]:
    notes = [
        f"Feature space: {features.name}. Frechet distance, precision and recall in another space "
        "are other quantities, and none of them is the FID of the Inception network.",
        f"{size} samples, and {size} held-out data beside them, against {num_train} training data. "
        "The Frechet distance falls with their number, so one from another number is not "
        "comparable; frechet_distance_infinity has the part in 1/n removed.",
        "Standard errors of Frechet distances are a jackknife's, those of precision and recall err "
        "on the large side; all leave out how the generator's training varies.",
        "A nearest distance ratio under 1 is memorising, or samples smoother than noisy data; a "
        f"copied fraction far above 1/{num_test + 1} is memorising.",
    ]
    floor = "frechet_distance_infinity_held_out"
    value, error = found[floor][1], found[f"{floor}_se"][1]
    if value < -_STANDARD_ERRORS * error:
        notes.append(
            "The held-out data are nearer to the training data than independent draws would be "
            f"(extrapolated distance {value:.3g} +- {error:.2g}, below 0): the split is balanced "
            "or dependent, and perfect samples would get a Frechet distance above theirs."
        )
    if size < 2 * features.dim:
        notes.append(
            f"{size} samples are fewer than twice the {features.dim} features: the bias of the "
            "Frechet distance does not follow 1/n yet, so do not trust its extrapolation. Take "
            "more samples or fewer features."
        )
    return notes
