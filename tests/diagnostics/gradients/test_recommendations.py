"""Slopes of the signal-to-noise ratio, against power laws with noise of known size."""

import numpy as np
import pytest

from pyro_vae.diagnostics.gradients import slope_rows, snr_slopes
from pyro_vae.results import label, make_result

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
