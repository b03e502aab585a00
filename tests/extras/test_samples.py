"""Measures of samples against closed forms, hand-made clouds and counted frequencies."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from pyro_vae.data import load_dataset
from pyro_vae.extras.samples import (
    high_frequency_power,
    make_features,
    nearest_training_distance,
    neighbours,
    precision_recall,
    sample_quality,
)
from pyro_vae.extras.samples.frechet import frechet_distance, frechet_distance_infinity
from pyro_vae.results import IncomparableError, load_result

STANDARD_ERRORS = 4.5  # two-sided failure rate 7e-6 a comparison


def cloud(count, mean, root):
    """Rows whose mean is `mean` and whose covariance is root^T root, exactly."""
    rows = torch.randn(count, len(root))
    rows = torch.linalg.qr(rows - rows.mean(0)).Q * math.sqrt(count - 1)
    return rows @ root + mean


# --- Frechet distance -----------------------------------------------------------------------------


def test_diagonal_covariances():
    a, b = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 1.0, 0.25])
    shift = torch.tensor([1.0, -2.0, 0.5])
    expected = float(shift.square().sum() + (a - b).square().sum())
    found = frechet_distance(cloud(20, torch.zeros(3), a.diag()), cloud(31, shift, b.diag()))
    assert found == pytest.approx(expected, rel=1e-12)


def test_equal_means_and_commuting_covariances_in_a_turned_frame():
    turn = torch.linalg.qr(torch.randn(4, 4)).Q
    a, b = torch.tensor([2.0, 1.0, 0.1, 3.0]), torch.tensor([1.0, 1.5, 0.2, 0.3])
    first, second = (cloud(25, torch.ones(4), s.diag() @ turn) for s in (a, b))
    assert frechet_distance(first, second) == pytest.approx(float((a - b).square().sum()))


def test_full_covariances_agree_with_the_matrix_square_root():
    a, b = torch.randn(50, 5) @ torch.randn(5, 5) + 1, torch.randn(40, 5) @ torch.randn(5, 5)
    ca, cb = a.T.cov().numpy(), b.T.cov().numpy()
    square = np.square((a.mean(0) - b.mean(0)).numpy()).sum()
    overlap = np.trace(scipy.linalg.sqrtm(ca @ cb)).real
    expected = square + np.trace(ca) + np.trace(cb) - 2 * overlap
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


def test_singular_covariances_of_fewer_rows_than_features():
    # Two rows each: covariances are u u^T and v v^T, so the overlap is |u . v|.
    u, v = torch.randn(2, 9)
    first = torch.stack([u, -u]) / math.sqrt(2)
    second = torch.stack([v, -v]) / math.sqrt(2) + 1
    expected = 9 + float(u @ u + v @ v - 2 * (u @ v).abs())
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


def test_a_set_is_at_distance_zero_of_itself_also_when_singular():
    x = torch.randn(6, 30)
    assert frechet_distance(x, x[torch.randperm(6)]) < 1e-12
    assert frechet_distance(x, x + 0.1) == pytest.approx(30 * 0.01)


def test_extrapolation_takes_out_the_bias_and_its_error_is_the_spread():
    scale = (torch.arange(1, 13.0)).rsqrt()
    exact = 0.04 * float(scale.square().sum()) + 0.25
    shift = torch.zeros(12)
    shift[0] = 0.5
    runs = [
        frechet_distance_infinity(
            0.8 * torch.randn(120, 12) * scale + shift, torch.randn(200, 12) * scale, num_groups=10
        )
        for _ in range(60)
    ]
    raw, value, error = torch.tensor(
        [(r.distance, r.infinity, r.standard_error) for r in runs]
    ).unbind(1)
    of_mean = value.std() / math.sqrt(60)
    assert abs(value.mean() - exact) < STANDARD_ERRORS * of_mean
    assert raw.mean() - exact > STANDARD_ERRORS * of_mean  # what it corrects is there
    # A variance of 60 draws has a relative standard error of sqrt(2 / 59), halved for its root.
    assert abs(error.mean() / value.std() - 1) < STANDARD_ERRORS * math.sqrt(2 / 59) / 2


def test_between_equal_distributions_the_extrapolation_is_zero():
    found = torch.tensor(
        [
            frechet_distance_infinity(
                torch.randn(90, 8), torch.randn(300, 8), num_groups=9
            ).infinity
            for _ in range(40)
        ]
    )
    assert abs(found.mean()) < STANDARD_ERRORS * found.std() / math.sqrt(40)


def test_extrapolation_starts_from_the_plain_distance_and_follows_its_seed():
    a, b = torch.randn(41, 6), torch.randn(57, 6) + 1
    before = torch.get_rng_state()
    found = frechet_distance_infinity(a, b, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.distance == pytest.approx(frechet_distance(a, b), rel=1e-12)
    assert found == frechet_distance_infinity(a, b, seed=3)
    assert found.infinity != frechet_distance_infinity(a, b, seed=4).infinity


def test_groups_of_one_row_are_the_ordinary_jackknife():
    a, b = torch.randn(7, 3), torch.randn(7, 3) + 1
    order = torch.Generator().manual_seed(0)
    a_order, b_order = torch.randperm(7, generator=order), torch.randperm(7, generator=order)
    left_out = [
        frechet_distance(a[torch.arange(7) != i], b[torch.arange(7) != j])
        for i, j in zip(a_order.tolist(), b_order.tolist(), strict=True)
    ]
    found = frechet_distance_infinity(a, b, num_groups=7)
    assert found.infinity == pytest.approx(7 * found.distance - 6 * np.mean(left_out))
    assert found.standard_error == pytest.approx(math.sqrt(6) * np.std(left_out))


# --- precision and recall -------------------------------------------------------------------------


def test_identical_clouds_have_all_and_disjoint_clouds_nothing():
    x = torch.randn(50, 4)
    same = precision_recall(x, x[torch.randperm(50)])
    assert (same.precision, same.recall) == (1, 1)
    apart = precision_recall(x, x + 100)
    assert (apart.precision, apart.recall) == (0, 0)
    assert 0 < apart.precision_se < 0.05


def test_points_on_a_line_counted_by_hand():
    data = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # radii of one neighbour: 1, 1, 2, 4
    samples = torch.tensor([[-1.5], [-0.5], [2.5], [11.5], [10.5]])  # 1, 1, 3, 1, 1
    found = precision_recall(samples, data, k=1)
    assert found.precision == pytest.approx(3 / 5)  # -0.5, 2.5 and 10.5
    assert found.recall == pytest.approx(3 / 4)  # 0, 1 and 3
    # Of the balls around 0, 1, 3, 7 the samples -0.5, 2.5, 10.5 lie in: 0; 3; 7.
    only = np.array([1, 0, 1, 1])
    asked = (4 / 7) * (3 / 7) / 5
    expected = math.sqrt(asked + np.square(only - only.mean()).sum() / 25)
    assert found.precision_se == pytest.approx(expected)


def test_two_neighbours_make_larger_balls():
    data = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # radii 3, 2, 3, 6
    samples = torch.tensor([[-2.5], [12.5], [13.5]])
    assert precision_recall(samples, data, k=2).precision == pytest.approx(2 / 3)
    assert precision_recall(samples, data, k=1).precision == 0


def test_a_dropped_mode_costs_recall_and_outliers_cost_precision():
    data = torch.randn(200, 2) + torch.tensor([[50.0, 0.0], [-50.0, 0.0]]).repeat(100, 1)
    one_mode = torch.randn(200, 2) + torch.tensor([50.0, 0.0])
    dropped = precision_recall(one_mode, data)
    assert dropped.precision > 0.85
    assert dropped.recall < 0.5 + 1e-9
    assert dropped.recall > 0.35
    half = torch.cat([data[:100] + 0.01, torch.randn(100, 2) + torch.tensor([0.0, 400.0])])
    outliers = precision_recall(half, data)
    assert outliers.precision == pytest.approx(0.5, abs=0.05)
    assert outliers.recall > 0.85


def test_standard_errors_of_shares_are_not_too_small():
    found = [precision_recall(torch.randn(60, 3) + 0.7, torch.randn(60, 3)) for _ in range(60)]
    for name in ("precision", "recall"):
        values = np.array([getattr(r, name) for r in found])
        error = np.mean([getattr(r, f"{name}_se") for r in found])
        low = 1 - STANDARD_ERRORS * math.sqrt(2 / 59) / 2
        assert low * values.std(ddof=1) < error < 3 * values.std(ddof=1)


def test_many_points_are_compared_in_parts(monkeypatch):
    a, b = torch.randn(30, 2), torch.randn(40, 2) + 0.5
    whole = precision_recall(a, b)
    monkeypatch.setattr(neighbours, "_CHUNK", 90)
    assert precision_recall(a, b) == whole


# --- high frequencies -----------------------------------------------------------------------------


def frequencies(height, width):
    """Radius of every frequency of a picture, counted out without a transform."""

    def fold(index, size):
        return min(index, size - index) / size

    return {
        (r, c): math.hypot(fold(r, height), fold(c, width))
        for r, c in itertools.product(range(height), range(width))
    }


def test_white_noise_is_flat():
    height, width, count = 5, 8, 400
    radius = frequencies(height, width)
    above = sum(r > 0.3 for r in radius.values())
    noise = torch.randn(count, height * width)
    found = high_frequency_power(noise, (height, width), cutoff=0.3)
    # Half of the frequencies are conjugates of the others: their power has variance 2 at most.
    error = math.sqrt(2 / (count * above))
    expected = above / (height * width - 1)
    assert abs(found.fraction - expected) < STANDARD_ERRORS * expected * error
    assert 0.2 < expected < 0.8
    flat = (found.power - 1).abs()
    assert bool((flat < STANDARD_ERRORS * math.sqrt(2 / count)).all())
    # By Parseval's theorem the total is the variance of the pixels within the image.
    assert torch.allclose(found.total, noise.var(1, correction=0))


@pytest.mark.parametrize(("rows", "columns"), [(1, 0), (0, 2), (2, 3), (3, 6)])
def test_a_sinusoid_has_all_its_power_at_its_frequency(rows, columns):
    height, width = 6, 12
    r, c = torch.meshgrid(torch.arange(6.0), torch.arange(12.0), indexing="ij")
    wave = torch.cos(2 * math.pi * (rows * r / height + columns * c / width) + 0.3).flatten()
    found = high_frequency_power(5 + torch.stack([wave, 2 * wave]), (height, width), cutoff=0.3)
    radius = frequencies(height, width)[rows, columns]
    assert found.fraction == pytest.approx(float(radius > 0.3), abs=1e-12)
    ring = found.power.argmax()
    assert abs(float(found.frequency[ring]) - radius) <= 0.5 / width + 1e-12
    assert found.power[ring] > 0.999 * found.power.sum()
    # The variance of a wave is half its squared amplitude, or more at the highest frequencies.
    assert torch.allclose(found.total, wave.var(correction=0) * torch.tensor([1.0, 4.0]))


def test_blur_takes_high_frequencies_away_and_contrast_does_not_change_their_share():
    images = torch.randn(30, 49)
    grid = images.reshape(-1, 7, 7)
    blurred = ((grid + grid.roll(1, 1)) / 2).flatten(1)  # passes cos^2(pi f) of the power
    before, after = (high_frequency_power(x, (7, 7)) for x in (images, blurred))
    assert after.fraction < before.fraction
    assert float(after.high.sum()) < 0.7 * float(before.high.sum())
    scaled = high_frequency_power(3 * images + 1, (7, 7))
    assert scaled.fraction == pytest.approx(before.fraction)
    assert torch.allclose(scaled.high, 9 * before.high)


def test_channels_are_averaged():
    images = torch.randn(4, 3, 20)
    found = high_frequency_power(images.flatten(1), (3, 5, 4))
    each = [high_frequency_power(images[:, i], (5, 4)) for i in range(3)]
    assert torch.allclose(found.high, sum(e.high for e in each) / 3)
    assert torch.allclose(found.power, sum(e.power for e in each) / 3)


def test_constant_images_have_no_share():
    assert math.isnan(high_frequency_power(torch.ones(2, 16), (4, 4)).fraction)


# --- memorising -----------------------------------------------------------------------------------


def test_distances_by_hand():
    train = torch.tensor([[0.0], [10.0], [30.0]])
    found = nearest_training_distance(
        torch.tensor([[1.0], [12.0]]), train, torch.tensor([[4.0], [14.0], [20.0]])
    )
    assert found.samples.tolist() == pytest.approx([1, 2])
    assert found.held_out.tolist() == pytest.approx([4, 4, 10])
    assert found.ratio == pytest.approx(1.5 / 6)
    # Shares of the second nearest: 1/9, 2/12 against 4/6, 4/14, 10/10.
    assert (found.copied, found.copied_expected) == (1, 1 / 4)
    # Of 6 pairs none has the sample further; the spread without ties is sqrt(2 * 3 * 6 / 12).
    assert found.z == pytest.approx(-3 / math.sqrt(3))
    error = math.hypot(math.sqrt(0.5 / 2), 0.25 * math.sqrt(12 / 3)) / 6
    assert found.ratio_se == pytest.approx(error)


def test_copies_are_found_and_fresh_draws_are_not():
    train, test, fresh = torch.randn(200, 6), torch.randn(150, 6), torch.randn(120, 6)
    copies = nearest_training_distance(train[:120], train, test)
    assert copies.ratio < 1e-6
    assert copies.copied == 1
    assert copies.p_value < 1e-30
    near = nearest_training_distance(train[:120] + 0.01 * fresh, train, test)
    assert near.ratio < 0.05
    assert near.z < -10
    honest = nearest_training_distance(fresh, train, test)
    assert abs(honest.z) < STANDARD_ERRORS
    assert abs(honest.ratio - 1) < STANDARD_ERRORS * honest.ratio_se
    assert honest.p_value > 1e-5


def test_a_few_copies_among_fresh_draws_are_counted():
    train, test = torch.randn(200, 6), torch.randn(150, 6)
    mixed = torch.cat([train[:30], torch.randn(120, 6)])
    found = nearest_training_distance(mixed, train, test)
    assert 0.2 <= found.copied < 0.25


def test_smooth_samples_of_noisy_data_lie_near_but_are_not_copies():
    train, test = torch.randn(200, 40), torch.randn(150, 40)
    found = nearest_training_distance(0.2 * torch.randn(100, 40), train, test)
    assert found.ratio < 0.9
    assert found.z < -STANDARD_ERRORS
    assert found.copied < 0.2


def test_the_p_value_is_uniform_for_fresh_draws_and_copied_is_as_expected():
    found = [
        nearest_training_distance(torch.randn(30, 3), torch.randn(50, 3), torch.randn(20, 3))
        for _ in range(100)
    ]
    p = np.array([f.p_value for f in found])
    # Share of p-values below 1/2, whose standard error is 1 / (2 sqrt(100)).
    assert abs((p < 0.5).mean() - 0.5) < STANDARD_ERRORS * 0.05
    copied = np.array([f.copied for f in found])
    assert found[0].copied_expected == 1 / 21
    assert abs(copied.mean() - 1 / 21) < STANDARD_ERRORS * copied.std() / 10


def test_data_that_were_copied_twice_do_not_break_the_share():
    train = torch.randn(30, 2).repeat(2, 1)
    found = nearest_training_distance(train[:10] + 0.0, train, torch.randn(20, 2))
    assert found.ratio < 1e-6
    assert found.copied == 0  # as its note says


# --- all together ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def space(digits):
    return make_features("pca", digits.train, dim=20, data_name="digits' training images")


def blur(rows):
    grid = rows.reshape(-1, 8, 8)
    for dim in (1, 2):
        grid = (grid + grid.roll(1, dim)) / 2
    return grid.flatten(1)


def numbers(result):
    return {name: float(result[name]) for name in result.data_vars}


def test_digits_are_called_what_they_are(digits, space):
    train, test = digits.train, digits.test
    cases = {
        "real": test,
        "blurred": blur(test),
        "noise": torch.rand(360, 64),
        "copies": train[torch.randperm(len(train))[:360]],
        "half the classes": test[digits.test_labels < 5],
    }
    found = {
        name: numbers(sample_quality(x, train, test, features=space, image_shape=(8, 8)))
        for name, x in cases.items()
    }
    real = found["real"]
    for name in ("frechet_distance", "precision", "recall", "high_frequency_ratio"):
        assert real[name] == pytest.approx(real[f"{name}_held_out"], abs=1e-9)
    assert real["nearest_distance_ratio"] == pytest.approx(1)
    assert real["copied_fraction"] == 0
    assert 0.95 < real["high_frequency_ratio"] < 1.05
    assert min(real["precision"], real["recall"]) > 0.85
    for name in ("blurred", "noise", "half the classes"):
        assert found[name]["frechet_distance"] > 5 * real["frechet_distance"], name
        assert found[name]["copied_fraction"] < 0.02, name
    assert found["blurred"]["high_frequency_ratio"] < 0.5
    assert found["noise"]["high_frequency_ratio"] > 1.3
    assert found["noise"]["high_frequency_fraction"] > 2 * real["high_frequency_fraction"]
    assert found["noise"]["precision"] < 0.1
    assert found["half the classes"]["precision"] > 0.85
    assert found["half the classes"]["recall"] < 0.65
    assert found["copies"]["copied_fraction"] > 0.95
    assert found["copies"]["nearest_distance_ratio"] < 1e-6
    assert found["copies"]["precision"] > 0.85  # blind to memorising
    assert found["copies"]["frechet_distance"] < 2 * real["frechet_distance"]


def test_the_result_says_which_space_how_many_and_what_they_are_beside(digits, space, tmp_path):
    result = sample_quality(digits.test[:300], digits.train, digits.test, features=space, seed=5)
    assert "high_frequency_ratio" not in result
    config = result.provenance["config"]
    assert config["feature_space"] == space.name
    assert config["feature_fingerprint"] == space.fingerprint
    assert (config["num_samples"], config["num_train"]) == (300, 1437)
    assert result.frechet_distance.attrs["feature_space"] == space.name
    assert result.precision_held_out.attrs["feature_space"] == space.name
    assert "feature_space" not in result.nearest_distance_ratio.attrs
    assert result.quantity("frechet_distance").bound == "upper"
    text = result.summary()
    assert space.name in text
    assert "300 samples" in text
    # Every fifth of the digits, ordered by class, is nearer to the others than independent draws.
    assert "the split is balanced or dependent" in text
    assert load_result(result.save(tmp_path / "quality.nc")).identical(result)


def test_independent_data_and_enough_of_them_need_no_warning():
    train, test, samples = torch.randn(200, 4), torch.randn(80, 4), torch.randn(100, 4)
    space = make_features("pixels", train)
    text = sample_quality(samples, train, test, features=space).summary()
    assert "balanced or dependent" not in text
    assert "fewer than twice" not in text
    assert "80 samples" in text
    wide = torch.randn(200, 50)
    few = sample_quality(
        wide[:60], wide[60:120], wide[120:180], features=make_features("pixels", wide)
    )
    assert "60 samples are fewer than twice the 50 features" in few.summary()


def test_distances_of_other_spaces_data_or_numbers_refuse_to_be_compared(digits, space):
    def distance(samples, features=space, test=digits.test, **settings):
        result = sample_quality(samples, digits.train, test, features=features, **settings)
        return result.quantity("frechet_distance")

    good, bad = digits.test, digits.test + 0.2
    assert distance(good) < distance(bad)
    assert distance(bad).difference(distance(good)).value > 0
    other = make_features("pca", digits.train, dim=21)
    for against in (
        distance(good, other),
        distance(good[:300]),
        distance(good, test=digits.test[:300]),
        distance(good, k=4),
    ):
        with pytest.raises(IncomparableError, match="data_sha256"):
            distance(bad).difference(against)


def test_the_choice_follows_the_seed_and_the_callers_random_state_stays(digits, space):
    def run(seed):
        return sample_quality(
            digits.train[:200], digits.train, digits.test[:90], features=space, seed=seed
        )

    before = torch.get_rng_state()
    first = run(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert numbers(first) == numbers(run(1))
    assert numbers(first)["frechet_distance"] != numbers(run(2))["frechet_distance"]


def with_inf(x):
    x = x.clone()
    x[0, 0] = math.inf
    return x


def quality(x, y, z, **settings):
    return sample_quality(x, y, z, features=make_features("pixels", torch.randn(9, 6)), **settings)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: frechet_distance(x[:1], x), "a has 1 rows, but at least 2"),
        (lambda x: frechet_distance(x, x[:, :5]), "b has 5 features, but 6"),
        (lambda x: frechet_distance(x, with_inf(x)), "b has values that are not finite in 1 of 40"),
        (lambda x: frechet_distance_infinity(x, x[:19]), "b has 19 rows, but at least 20"),
        (lambda x: frechet_distance_infinity(x, x, num_groups=1), "at least 2"),
        (lambda x: precision_recall(x[:3], x), "samples has 3 rows, but at least 4"),
        (lambda x: precision_recall(x, x, k=0), "k is 0"),
        (lambda x: precision_recall(x, x[:, :2]), "data has 2 features"),
        (lambda x: high_frequency_power(x, (2, 4)), "does not have the 6 pixels"),
        (lambda x: high_frequency_power(x, (6,)), "height, width"),
        (lambda x: high_frequency_power(x, (2, 3), cutoff=0.7), "between 0 and 0.601"),
        (lambda x: high_frequency_power(x, (2, 3), cutoff=0.0), "between 0 and 0.601"),
        (lambda x: high_frequency_power(with_inf(x), (2, 3)), "not finite"),
        (lambda x: nearest_training_distance(x[:1], x, x), "samples has 1 rows"),
        (lambda x: nearest_training_distance(x, x, x[:, 1:]), "test has 5 features"),
        (lambda x: nearest_training_distance(x, 0 * x, 0 * x), "hold out data that differ"),
        (lambda x: quality(x[:19], x, x + 1), "samples has 19 rows, but at least 20"),
        (lambda x: quality(x, x, with_inf(x)), "test has values that are not finite"),
        (lambda x: quality(x, x[:, :5], x), "train has 5 features, but 6"),
        (lambda x: quality(x, x, x + 1, image_shape=(4, 2)), "does not have the 6 pixels"),
        (lambda x: quality(x, 0 * x, x, image_shape=(2, 3)), "lower the cutoff"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(call, says):
    with pytest.raises(ValueError, match=says):
        call(torch.randn(40, 6))
