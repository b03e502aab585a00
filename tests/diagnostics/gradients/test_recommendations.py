"""Slopes of the signal-to-noise ratio, against power laws with noise of known size."""

import numpy as np
import pytest

from pyro_vae.diagnostics.gradients import recommendation, slope_rows, snr_slopes
from pyro_vae.diagnostics.gradients.recommend import EstimatorComparison
from pyro_vae.results import label, load_result, make_result

STANDARD_ERRORS = 4.5  # two-sided failure rate 7e-6 a comparison


def synthetic(slope, *, repeats=10_000, relative=0.02):
    """A result whose SNR follows a power of K, apart from noise of known size."""
    particles = np.array([1, 4, 16, 64, 256])
    noise = np.random.default_rng(0).normal(size=5) * relative
    snr = 0.2 * particles**slope * np.exp(noise)
    pure = label(unit="none", reduction="none", bound="none")
    dims = ("estimator", "num_particles", "parameter")
    return make_result(
        {
            "snr": (dims, snr[None, :, None], pure | {"noise_floor": repeats**-0.5}),
            "snr_se": (dims, relative * snr[None, :, None], {}),
        },
        function="synthetic",
        config={},
        seed=0,
        data_sha256=None,
        coords={"estimator": ["one"], "num_particles": particles, "parameter": ["guide"]},
    )


@pytest.mark.parametrize("slope", [-0.5, 0.0, 0.5])
def test_slopes_are_found_with_their_errors(slope):
    found = snr_slopes(synthetic(slope)).squeeze()
    assert abs(found.slope - slope) < STANDARD_ERRORS * found.slope_se
    assert abs(found.slope - slope - 0.3) > STANDARD_ERRORS * found.slope_se
    assert found.slope_se < 0.02


def test_points_in_the_noise_are_left_out_of_slopes():
    result = synthetic(-0.5)
    result["snr"].values[0, -2:, 0] = 0.01  # at the noise floor
    found = snr_slopes(result)
    assert found.num_points.item() == 3
    assert abs(found.slope + 0.5).item() < STANDARD_ERRORS * found.slope_se.item()
    assert found.provenance["notes"] == ["2 points below twice the noise floor are left out."]
    none = snr_slopes(synthetic(-0.5, repeats=10))
    assert np.isnan(none.slope.item())


def test_slopes_stand_beside_the_theory():
    result = synthetic(-0.5)
    (row,) = slope_rows(result, {("one", "guide"): "-1/2"})
    assert list(row) == ["estimator", "parameter", "slope", "slope from K = 8", "theory, large K"]
    assert (row["estimator"], row["parameter"], row["theory, large K"]) == ("one", "guide", "-1/2")
    assert row["slope"].endswith("(4 points)")  # that at K = 256 lies in the noise
    assert row["slope from K = 8"].endswith("(2 points)")
    (other,) = slope_rows(result, {("another", "guide"): "-1/2"}, late=256)
    assert other["theory, large K"] == "-"
    assert other["slope from K = 256"] == "-"  # no slope without two points


def measured(costs, *, bounds, verdicts=None, particles=(1, 8), relative=0.01):
    """A comparison whose variance x time is known: [estimators, particles]."""
    costs = np.array(costs, dtype=float)[..., None]
    names = [f"Estimator{'X' * 9}{i}" for i in range(len(costs))]
    dims = ("estimator", "num_particles", "parameter")
    pure = label(unit="none", reduction="none", bound="none")
    words = np.full(costs.shape, "no bias seen") if verdicts is None else np.array(verdicts)
    variables = {
        name: (dims, costs, pure)
        for name in ("efficiency", "variance", "bias", "bias_z", "snr", "gradient_norm")
    }
    result = make_result(
        {
            **variables,
            **{f"{n}_se": (dims, relative * costs, {}) for n in ("efficiency", "variance")},
            "verdict": (dims, words.astype(str), {}),
            "value": (dims[:2], -costs[..., 0], label(bound="lower")),
        },
        function="compare_estimators",
        config={"repeats": 77},
        seed=0,
        data_sha256=None,
        coords={
            "estimator": names,
            "num_particles": list(particles),
            "parameter": ["guide"],
            "bound": ("estimator", list(bounds)),
            "claims_unbiased": ("estimator", [True] * len(names)),
        },
    )
    return EstimatorComparison(result.data_vars, result.coords, result.attrs), names


def test_a_recommendation_is_one_sentence_a_short_table_and_a_picture():
    result, names = measured([[4.0, 2.0], [3.0, 6.0], [5.0, 8.0]], bounds=["ELBO", "ELBO", "IWAE"])
    found = result.recommend()
    # Of one bound whatever its K the least cost counts; bounds of different K are different.
    assert found.sentence == (
        f"to maximise the ELBO, train with {names[0]} (K = 8): of the 2 estimators without a "
        f"measurable bias its gradient of 'guide' has the least variance x time ({names[1]} "
        f"3.00 ± 0.04 times as much); to maximise the IWAE bound with K = 8, train with {names[2]} "
        "(no other estimator of it was measured without a bias)."
    )
    assert [(row["bound"], row["K"]) for row in found.rows] == [
        ("ELBO", "1"),
        ("IWAE", "1"),
        ("ELBO", "8"),
        ("IWAE", "8"),
    ]
    ax = found.plot()
    assert {x for line in ax.lines for x in line.get_xdata()} == {2.0, 3.0, 4.0, 5.0, 6.0, 8.0}
    assert "variance x time" in ax.get_xlabel()


def test_neighbours_within_their_errors_are_not_parted():
    result, names = measured([[2.0], [2.1]], bounds=["ELBO"] * 2, particles=[4], relative=0.2)
    assert f"{names[0]} or {names[1]}" in result.recommend().sentence
    assert "not told apart" in result.recommend().sentence


def test_a_gradient_without_variance_is_said_to_have_none():
    result, names = measured([[0.0], [2.1]], bounds=["ELBO"] * 2, particles=[4])
    assert f"{names[0]} (K = 4), whose gradient of 'guide' has no" in result.recommend().sentence
    assert len(result.recommend().plot().lines) > 0


def test_nothing_is_recommended_where_no_bias_was_measured():
    unknown = [[["no reference"]], [["biased"]]]
    result, _ = measured([[2.0], [1.0]], bounds=["ELBO"] * 2, particles=[4], verdicts=unknown)
    found = result.recommend()
    assert found.sentence.startswith("no estimator can be recommended")
    assert not found.rows


def test_a_comparison_prints_short_and_names_estimators_in_full(tmp_path):
    result, names = measured(
        np.arange(1.0, 34.0).reshape(11, 3), bounds=["ELBO"] * 11, particles=[1, 8, 64]
    )
    text = repr(result)
    assert len(text.splitlines()) <= 25
    assert max(map(len, text.splitlines())) <= 100
    assert names[0] in text
    assert "…" not in text
    assert "77 gradients" in text
    assert "recommend()" in text
    html = result._repr_html_()
    assert names[0] in html
    # What was read back from a file, or is a part, still prints, and can be asked as well.
    loaded = load_result(result.save(tmp_path / "c.nc"))
    assert len(repr(loaded).splitlines()) <= 40
    assert recommendation(loaded).sentence == result.recommend().sentence
    assert "efficiency" in repr(result.sel(num_particles=8))
