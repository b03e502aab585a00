"""The figures of samples show what they say."""

import numpy as np
import pytest
import torch

from pyro_vae.extras.samples import high_frequency_power
from pyro_vae.plots import plot_power, plot_sample_rows, plot_sharpness

SHAPE = (4, 3)


def test_rows_of_samples_are_named_and_in_order():
    images = {"data": torch.rand(5, 12), "generator": torch.zeros(7, 12)}
    ax = plot_sample_rows(images, SHAPE, num_images=6, data="toys")
    assert [text.get_text() for text in ax.get_yticklabels()] == ["data", "generator"]
    assert "toys" in ax.get_title()
    (picture,) = ax.images
    shown = np.asarray(picture.get_array())
    assert np.allclose(shown[:4, :3], images["data"][0].reshape(SHAPE))
    # Five images of each, for the shorter row has no sixth.
    assert np.isfinite(shown).sum() == 2 * 5 * 12


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="not images of 5 x 5"):
        plot_sample_rows({"data": torch.rand(5, 12)}, (5, 5))
    with pytest.raises(ValueError, match="no images to show"):
        plot_sample_rows({}, SHAPE)


def test_every_generator_has_its_point():
    found = {"a": (1.0, 10.0, 1.0), "b": (3.0, 5.0, 0.5)}
    ax = plot_sharpness(found)
    points = {c.get_label(): c.lines[0].get_xydata().tolist() for c in ax.containers}
    assert points == {"a": [[1.0, 10.0]], "b": [[3.0, 5.0]]}
    assert ax.get_yscale() == "log"


def test_spectra_are_drawn_as_measured():
    spectra = {
        name: high_frequency_power(torch.rand(9, 36), (6, 6)) for name in ("data", "generator")
    }
    ax = plot_power(spectra)
    drawn = {line.get_label(): line for line in ax.lines}
    for name, spectrum in spectra.items():
        assert np.allclose(drawn[name].get_ydata(), spectrum.power)
        assert np.allclose(drawn[name].get_xdata(), spectrum.frequency)
