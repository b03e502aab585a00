r"""How good generated samples are beside real data: in shape, in detail, and as copies.

No single number says whether samples are good, and the likelihood does not. Here are four, each of
which is blind to something: the Frechet distance (of two means and covariances in a feature space),
precision and recall (are samples where data are, and data where samples are), the power at high
spatial frequencies (blur), and the distance to the nearest training datum (memorising).
`sample_quality` takes them all, and beside each the same number for **held-out real data**: what
perfect samples would get. A number without it says little.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from pyro_vae.data import Seed, as_seed
from pyro_vae.extras.samples.features import Features, check_rows
from pyro_vae.results import Result, ShortRepr, label, make_result, sha256_of

__all__ = [
    "FrechetEstimate",
    "NearestDistances",
    "PowerSpectrum",
    "PrecisionRecall",
    "frechet_distance",
    "frechet_distance_infinity",
    "high_frequency_power",
    "nearest_training_distance",
    "precision_recall",
    "sample_quality",
]

# Sizes that must agree are checked in words, so annotations leave them open by an underscore.
Rows = Float64[Tensor, "_ features"]

_CUTOFF = 0.25  # cycles per pixel, half of the highest along a row
_CHUNK = 2**24  # distances held at once
_STANDARD_ERRORS = 3  # below 0 at which an extrapolated distance is called too small


# --- Frechet distance -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Moments:
    """Mean and scatter of rows; root^T root is the sum of squares about the mean."""

    count: int
    mean: Float64[Tensor, " features"]
    root: Float64[Tensor, "rank features"]


@dataclass(frozen=True)
class FrechetEstimate:
    """A Frechet distance, squared, with its error and without its bias.

    Attributes:
        distance: From all the rows, in squared units of the features; too large on average.
        infinity: With the part of the bias that falls as 1/n removed. May be negative by noise.
        standard_error: Of either, by the jackknife.
    """

    distance: float
    infinity: float
    standard_error: float


def frechet_distance(
    a: Float[Tensor, "samples features"], b: Float[Tensor, "data _features"]
) -> float:
    r"""The squared Frechet distance between the normals with the moments of two sets of features.

    .. math:: d^2 = \lVert m_a - m_b \rVert^2
                    + \mathrm{tr}\bigl(C_a + C_b - 2 (C_a C_b)^{1/2}\bigr)

    With :math:`C = R^\top R`, the last trace is the sum of the singular values of
    :math:`R_a R_b^\top`, which needs no matrix square root and is accurate for singular covariances
    too (fewer rows than features). Covariances are divided by n - 1.

    Args:
        a: Features of samples, from `Features`; at least 2.
        b: Features of data **in the same space**; at least 2.

    Returns:
        d squared, as published "FID" are, in squared units of the features.

    Raises:
        ValueError: If there are fewer than 2 rows, the numbers of features differ, or a value is
            not finite.

    Note: It is biased upwards: d squared is jointly convex in means and covariances, so on average
        it exceeds the distance between the populations of two independent sets, by nearly c/n (and
        with one set given, the distance of the other's population to that set). Distances from
        other numbers of rows are not comparable; `frechet_distance_infinity` takes the bias out.
        Means and covariances are all it sees, and a distance in another feature space is another
        quantity.

    References:
        Dowson & Landau (1982), The Frechet distance between multivariate normal distributions;
        Heusel et al. (2017), GANs trained by a two time-scale update rule, arXiv:1706.08500.

    Example:
        >>> import torch
        >>> a = torch.tensor([[0.0, 1.0], [2.0, 1.0], [1.0, 4.0]])
        >>> round(frechet_distance(a, a + torch.tensor([3.0, 4.0])), 6)
        25.0
    """
    first, second = _pair("a", a, "b", b, minimum=2)
    return _frechet(_moments(first), _moments(second))


def frechet_distance_infinity(
    a: Float[Tensor, "samples features"],
    b: Float[Tensor, "data _features"],
    *,
    num_groups: int = 20,
    seed: Seed = 0,
) -> FrechetEstimate:
    r"""The Frechet distance extrapolated to infinitely many rows, and its standard error.

    As in FID-infinity the bias is taken to be c/n, here with both sets finite. The extrapolation is
    the jackknife's: of G random groups of each set one is left out in turn, which gives
    :math:`d^2_{(g)}`, and

    .. math:: d^2_\infty = G d^2 - (G - 1) \overline{d^2_{(g)}}, \qquad
              \mathrm{se}^2 = \frac{G - 1}{G} \sum_g (d^2_{(g)} - \overline{d^2_{(g)}})^2

    Args:
        a: Features of samples; at least max(3, num_groups).
        b: Features of data in the same space; as many.
        num_groups: G, at least 2.
        seed: Of the grouping. The caller's random state stays as it is.

    Raises:
        ValueError: If there are too few rows, the numbers of features differ, or a value is not
            finite.

    Note: With fewer rows than about twice the features the bias does not follow c/n yet. Between
        equal distributions the standard error is too large (1.5 times, in simulations).

    References:
        Chong & Forsyth (2020), Effectively unbiased FID and Inception score and where to find them,
        arXiv:1911.07023; Efron & Stein (1981), The jackknife estimate of variance.
    """
    seed = as_seed(seed)
    if num_groups < 2:
        raise ValueError(f"num_groups is {num_groups}, but must be at least 2")
    first, second = _pair("a", a, "b", b, minimum=max(3, num_groups))
    generator = torch.Generator().manual_seed(seed)
    groups = [
        [
            _moments(rows[index])
            for index in _shuffled(len(rows), generator).tensor_split(num_groups)
        ]
        for rows in (first, second)
    ]
    distance = _frechet(*(_pooled(parts) for parts in groups))
    left_out = np.array(
        [
            _frechet(*(_pooled(parts[:i] + parts[i + 1 :]) for parts in groups))
            for i in range(num_groups)
        ]
    )
    spread = float(np.square(left_out - left_out.mean()).sum())
    return FrechetEstimate(
        distance=distance,
        infinity=num_groups * distance - (num_groups - 1) * float(left_out.mean()),
        standard_error=math.sqrt((num_groups - 1) / num_groups * spread),
    )


def _moments(rows: Rows) -> _Moments:
    mean = rows.mean(0)
    return _Moments(len(rows), mean, torch.linalg.qr(rows - mean, mode="r").R)


def _pooled(parts: Sequence[_Moments]) -> _Moments:
    """Moments of the rows of all parts, without going through the rows again."""
    counts = torch.tensor([part.count for part in parts], dtype=torch.float64)
    means = torch.stack([part.mean for part in parts])
    mean = counts @ means / counts.sum()
    between = counts.sqrt()[:, None] * (means - mean)
    stacked = torch.cat([*(part.root for part in parts), between])
    return _Moments(int(counts.sum()), mean, torch.linalg.qr(stacked, mode="r").R)


def _frechet(a: _Moments, b: _Moments) -> float:
    first, second = (part.root / math.sqrt(part.count - 1) for part in (a, b))
    overlap = torch.linalg.svdvals(first @ second.T).sum()
    squares = (a.mean - b.mean).square().sum() + first.square().sum() + second.square().sum()
    return max(float(squares - 2 * overlap), 0.0)


# --- precision and recall -------------------------------------------------------------------------


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision and recall of samples, in [0, 1].

    Attributes:
        precision: The share of samples that lie on the data's manifold (fidelity).
        recall: The share of data that lie on the samples' manifold (variety).
        precision_se: Standard error of `precision`.
        recall_se: Standard error of `recall`.
        k: The neighbour that sets the radius of a ball.
    """

    precision: float
    recall: float
    precision_se: float
    recall_se: float
    k: int


def precision_recall(
    samples: Float[Tensor, "samples features"], data: Float[Tensor, "data _features"], k: int = 3
) -> PrecisionRecall:
    r"""Improved precision and recall: each set's manifold is a union of k-nearest-neighbour balls.

    A point lies on the manifold of a set if it is within the distance from some point of the set to
    that point's k-th nearest neighbour in the set.

    The standard error joins the points that are asked about (a binomial share) and, by leaving each
    out with the other balls held fixed, the points whose balls answer. As a jackknife it errs on
    the large side: 1.1 to 2 times, in simulations.

    Args:
        samples: Features of samples; at least k + 1.
        data: Features of data in the same space, **as many**: the more points make the balls, the
            smaller they are, and precision and recall of unequal sets lean to one side.
        k: Neighbours; the paper takes 3.

    Raises:
        ValueError: If k is below 1, there are not k + 1 points in each set, the numbers of features
            differ, or a value is not finite.

    Note: Not even two sets of one distribution get 1: see the numbers of held-out data. One outlier
        in the data makes a large ball, and then bad samples count as good.

    References:
        Kynkaanniemi, Karras, Laine, Lehtinen & Aila (2019), Improved precision and recall metric
        for assessing generative models, arXiv:1904.06991.
    """
    if k < 1:
        raise ValueError(f"k is {k}, but must be at least 1")
    first, second = _pair("samples", samples, "data", data, minimum=k + 1)
    precision, precision_se = _covered_share(first, second, k)
    recall, recall_se = _covered_share(second, first, k)
    return PrecisionRecall(precision, recall, precision_se, recall_se, k)


def _covered_share(points: Rows, centres: Rows, k: int) -> tuple[float, float]:
    """The share of the points in any ball, and its standard error."""
    from sklearn.neighbors import NearestNeighbors

    distances, _ = NearestNeighbors(n_neighbors=k).fit(centres.numpy()).kneighbors()
    radii = torch.as_tensor(distances[:, -1])
    covered, only = 0, torch.zeros(len(centres), dtype=torch.float64)
    for part in points.split(max(_CHUNK // len(centres), 1)):
        inside: Bool[Tensor, "points centres"] = _distances(part, centres) <= radii
        balls = inside.sum(1)
        covered += int((balls > 0).sum())
        only += inside[balls == 1].sum(0)
    share = covered / len(points)
    answering = float((only - only.mean()).square().sum()) / len(points) ** 2
    return share, math.hypot(_share_error(share, len(points)), math.sqrt(answering))


def _share_error(share: float, count: int) -> float:
    """Binomial standard error; Laplace's rule keeps it from vanishing at 0 and 1."""
    smooth = (share * count + 1) / (count + 2)
    return math.sqrt(smooth * (1 - smooth) / count)


def _distances(a: Rows, b: Rows) -> Float64[Tensor, "a b"]:
    from sklearn.metrics import euclidean_distances

    return torch.as_tensor(euclidean_distances(a.numpy(), b.numpy()))


# --- power at high frequencies --------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class PowerSpectrum(ShortRepr):
    """How the variance of pixels within images spreads over spatial frequencies.

    Attributes:
        frequency: Centres of rings of frequencies, in cycles per pixel; 0, the mean, is left out.
        power: The mean over images and over the frequencies of a ring; that of white noise is its
            variance at every frequency.
        high: Of each image, the variance of its pixels that lies above the cutoff.
        total: Of each image, the variance of its pixels.
        cutoff: In cycles per pixel.
    """

    frequency: Float64[Tensor, " rings"]
    power: Float64[Tensor, " rings"]
    high: Float64[Tensor, " images"]
    total: Float64[Tensor, " images"]
    cutoff: float

    @property
    def fraction(self) -> float:
        """The share of all power that lies above the cutoff; nan if there is no power."""
        total = float(self.total.sum())
        return float(self.high.sum()) / total if total > 0 else math.nan


def high_frequency_power(
    images: Float[Tensor, "images pixels"],
    image_shape: Sequence[int],
    *,
    cutoff: float = _CUTOFF,
) -> PowerSpectrum:
    r"""Power spectrum of images, averaged over directions, and the power above a frequency.

    .. math:: P(f) = \frac{1}{HW} \Bigl\lvert \sum_{r, c} x_{rc}\,
              e^{-2 \pi i (f_1 r + f_2 c)} \Bigr\rvert^2, \qquad
              \mathrm{high} = \frac{1}{HW} \sum_{\lvert f \rvert > \mathrm{cutoff}} P(f)

    Blurred samples lack power above the cutoff, noisy ones have too much.

    Args:
        images: One flattened image a row.
        image_shape: (height, width) or (channels, height, width); channels are averaged.
        cutoff: In cycles per pixel, above 0; along a row or a column the highest is 0.5.

    Raises:
        ValueError: If the shape does not fit the rows, no frequency lies above the cutoff, or a
            value is not finite.

    Note: Images are taken as periodic: a picture whose opposite borders differ has power at high
        frequencies from the seam, samples and data alike.

    Example:
        >>> import torch
        >>> row = torch.tensor([1.0, -1.0, 1.0, -1.0])  # half a cycle per pixel
        >>> high_frequency_power(row.repeat(1, 3), (3, 4)).fraction
        1.0
    """
    rows = check_rows("images", images)
    if len(image_shape) not in (2, 3) or math.prod(image_shape) != rows.shape[1]:
        raise ValueError(
            f"image_shape {tuple(image_shape)} does not have the {rows.shape[1]} pixels of a row: "
            "give (height, width) or (channels, height, width)"
        )
    channels, height, width = (1, *image_shape)[-3:]
    pixels = height * width
    radius = torch.hypot(
        torch.fft.fftfreq(height, dtype=torch.float64)[:, None],
        torch.fft.fftfreq(width, dtype=torch.float64),
    ).flatten()
    if not 0 < cutoff < float(radius.max()):
        raise ValueError(
            f"cutoff is {cutoff}, but must lie between 0 and {float(radius.max()):.3f} cycles per "
            "pixel, the highest frequency of these images"
        )
    stacked = rows.reshape(-1, channels, height, width)
    power = torch.cat(
        [torch.fft.fft2(part).abs().square().mean(1).flatten(1) for part in stacked.split(4096)]
    )
    power /= pixels
    rings = (radius * max(height, width)).round().long()
    members = torch.bincount(rings, minlength=int(rings.max()) + 1)
    sums = torch.zeros(len(members), dtype=torch.float64).index_add_(0, rings, power.mean(0))
    used = torch.nonzero(members)[:, 0]
    used = used[used > 0]
    return PowerSpectrum(
        frequency=used.double() / max(height, width),
        power=sums[used] / members[used],
        high=power[:, radius > cutoff].sum(1) / pixels,
        total=power[:, radius > 0].sum(1) / pixels,
        cutoff=cutoff,
    )


# --- memorising -----------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class NearestDistances(ShortRepr):
    """Distances to the nearest training datum, of samples beside held-out data.

    Attributes:
        samples: Of each sample.
        held_out: Of each held-out datum.
        ratio: The mean of `samples` over the mean of `held_out`; well under 1 if samples are
            copies, over 1 if they lie where no data are.
        ratio_se: Its standard error, for this training set.
        z: Standardised rank sum; negative if samples lie nearer than held-out data do.
        p_value: One-sided: how probable so small a `z` is if samples were fresh draws of the data.
        copied: The share of samples whose nearest training datum stands out more than that of
            every held-out datum: by its distance over that of the second nearest.
        copied_expected: What `copied` is on average for fresh draws: 1 / (held-out data + 1).
    """

    samples: Float64[Tensor, " samples"]
    held_out: Float64[Tensor, " held_out"]
    ratio: float
    ratio_se: float
    z: float
    p_value: float
    copied: float
    copied_expected: float


def nearest_training_distance(
    samples: Float[Tensor, "samples features"],
    train: Float[Tensor, "train _features"],
    test: Float[Tensor, "held_out _features"],
) -> NearestDistances:
    r"""Compares distances to the nearest training datum: do samples copy what was trained on?

    The test is the Mann-Whitney test of the two sets of distances: the three-sample test of Meehan
    et al. with one cell.

    Args:
        samples: Samples, or features of them; at least 2.
        train: What the generator was trained on; at least 2.
        test: Data of the same distribution that it was not trained on; at least 2.

    Raises:
        ValueError: If there are fewer than 2 samples or held-out data, the numbers of features
            differ, a value is not finite, or all held-out data are copies of training data.

    Note: Where data are noisy, samples that are smoother lie nearer to **every** datum, with a
        ratio under 1 and a small p-value although nothing was copied. `copied` is made not to
        mistake these; but it overlooks the copying of data of which there are several alike.

    References:
        Meehan, Chaudhuri & Dasgupta (2020), A non-parametric test to detect data-copying in
        generative models, arXiv:2004.05675.
    """
    from scipy.stats import mannwhitneyu

    near, data = _pair("samples", samples, "train", train, minimum=2)
    held_out = check_rows("test", test, minimum=2, data_dim=data.shape[1])
    (own, own_share), (real, real_share) = _nearest(near, data), _nearest(held_out, data)
    if float(real.mean()) == 0.0:
        raise ValueError(
            "every held-out datum is a copy of a training datum: hold out data that differ"
        )
    size, other = len(own), len(real)
    found = mannwhitneyu(own.numpy(), real.numpy(), alternative="less", method="asymptotic")
    middle, spread = size * other / 2, math.sqrt(size * other * (size + other + 1) / 12)
    ratio, ratio_se = _ratio_of_means(own, real)
    return NearestDistances(
        samples=own,
        held_out=real,
        ratio=ratio,
        ratio_se=ratio_se,
        z=(float(found.statistic) - middle) / spread,
        p_value=float(found.pvalue),
        copied=float((own_share < real_share.min()).double().mean()),
        copied_expected=1 / (other + 1),
    )


def _nearest(rows: Rows, data: Rows) -> tuple[Float64[Tensor, " batch"], Float64[Tensor, " batch"]]:
    """Distance to the nearest datum, and its share of that to the second nearest."""
    from sklearn.neighbors import NearestNeighbors

    found, _ = NearestNeighbors(n_neighbors=2).fit(data.numpy()).kneighbors(rows.numpy())
    first, second = torch.as_tensor(found).unbind(1)
    return first, torch.where(second > 0, first / second, 1.0)


def _ratio_of_means(a: Float64[Tensor, " a"], b: Float64[Tensor, " b"]) -> tuple[float, float]:
    """Ratio of two independent means and its standard error to first order."""
    top, bottom = float(a.mean()), float(b.mean())
    ratio = top / bottom
    variance = float(a.var()) / len(a) + ratio**2 * float(b.var()) / len(b)
    return ratio, math.sqrt(variance) / bottom


# --- all together ---------------------------------------------------------------------------------


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
        Pure numbers, each but the last three also as ``..._held_out``: `frechet_distance` (in
        expectation an upper bound of that between the generator and **these** training data),
        `frechet_distance_infinity`, `precision`, `recall`, and with
        `image_shape` `high_frequency_ratio` (power above the cutoff over that of the training data)
        and `high_frequency_fraction` (its share of all power); then, in the pixels,
        `nearest_distance_ratio`, `nearest_distance_z`, `copied_fraction`. What depends on the
        feature space names it in its attribute ``feature_space``. The ``data_sha256`` covers data,
        feature space, settings and number of samples: quantities that differ in one of them refuse
        to be compared.

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


def _pair(name_a: str, a: Tensor, name_b: str, b: Tensor, *, minimum: int) -> tuple[Rows, Rows]:
    first = check_rows(name_a, a, minimum=minimum)
    return first, check_rows(name_b, b, minimum=minimum, data_dim=first.shape[1])


def _shuffled(count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator)
