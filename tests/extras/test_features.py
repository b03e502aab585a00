"""Feature spaces: what they are, what they say they are, and what they refuse."""

import math

import pytest
import torch

from pyro_vae.data import load_dataset
from pyro_vae.extras.samples import features as module
from pyro_vae.extras.samples import make_features
from pyro_vae.extras.samples.features import FEATURES

STANDARD_ERRORS = 4.5  # one-sided failure rate 3e-6 a comparison


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(module, "_STEPS", 30)


def blobs(count=60):
    labels = torch.arange(count) % 3
    return torch.randn(count, 12) + 4 * torch.eye(12)[labels], labels


def test_pixels_are_the_data():
    x = torch.randn(7, 5)
    space = make_features("pixels", x)
    assert torch.equal(space(x.float()), x.float().double())
    assert space.name.startswith("pixels, the 5 features")
    assert (space.kind, space.dim, space.data_dim) == ("pixels", 5, 5)


def test_pca_gives_the_leading_eigenvectors_and_their_share_of_the_variance():
    x = torch.randn(40, 6) @ torch.randn(6, 6) + 3
    space = make_features("pca", x, dim=2, data_name="forty points")
    values, vectors = torch.linalg.eigh(x.T.cov())
    kept = 100 * values[-2:].sum() / values.sum()
    expected = f"PCA, 2 components ({kept:.1f} % of the variance) of 40 rows of forty points"
    assert space.name == expected
    assert repr(space) == f"Features({expected})"
    fresh = torch.randn(9, 6)
    scores = (fresh - x.mean(0)) @ vectors[:, -2:].flip(1)
    assert torch.allclose(space(fresh).abs(), scores.abs(), atol=1e-10)
    assert not torch.allclose(space(fresh).abs(), (fresh @ vectors[:, -2:].flip(1)).abs())


def test_pca_takes_as_many_components_as_there_are():
    assert make_features("pca", torch.randn(50, 6)).dim == 6
    assert make_features("pca", torch.randn(5, 40)).dim == 4
    assert make_features("pca", torch.randn(50, 40)).dim == 32


def test_the_classifier_tells_digits_apart_and_cannot_learn_what_is_not_there(digits, monkeypatch):
    monkeypatch.setattr(module, "_STEPS", 300)
    space = make_features("classifier", digits.train, digits.train_labels, dim=24)
    assert space.accuracy > 0.93
    monkeypatch.setattr(module, "_STEPS", 60)
    shuffled = digits.train_labels[torch.randperm(len(digits.train))]
    blind = make_features("classifier", digits.train, shuffled, dim=24)
    assert blind.accuracy < 0.11 + STANDARD_ERRORS * math.sqrt(0.1 * 0.9 / 288)
    assert "24 units of the last hidden layer of a perceptron that tells 10 classes" in space.name
    assert f"trained on 1149 of 1437 rows of the given data, accuracy {space.accuracy:.3f}" in (
        space.name
    )
    found = space(digits.test)
    assert found.shape == (360, 24)
    assert found.dtype == torch.float64
    assert not found.requires_grad
    # The features themselves separate the classes: the nearest class mean is mostly the right one.
    train = space(digits.train)
    means = torch.stack([train[digits.train_labels == c].mean(0) for c in range(10)])
    nearest = torch.cdist(found, means).argmin(1)
    assert (nearest == digits.test_labels).double().mean() > 0.9


@pytest.mark.parametrize("shape", [(3, 4), (1, 3, 4)])
def test_images_are_told_apart_by_convolutions(shape, short):
    x, labels = blobs()
    space = make_features("classifier", x, labels, image_shape=shape, dim=5)
    assert "convolutional network" in space.name
    assert space(x[:4]).shape == (4, 5)
    # Not the map of a perceptron on the same rows.
    assert make_features("classifier", x, labels, dim=5).fingerprint != space.fingerprint


def test_the_seed_alone_decides_and_the_callers_world_stays(short):
    x, labels = blobs()
    before = torch.get_rng_state()
    first = make_features("classifier", x, labels, dim=3, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(3)
    torch.set_default_dtype(torch.float32)
    again = make_features("classifier", x, labels, dim=3, seed=1)
    torch.set_default_dtype(torch.float64)
    other = make_features("classifier", x, labels, dim=3, seed=2)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(first(x), again(x))
    assert not torch.equal(first(x), other(x))


@pytest.mark.parametrize("kind", FEATURES)
def test_spaces_of_other_data_have_other_fingerprints_and_many_rows_are_mapped_in_parts(
    kind, short, monkeypatch
):
    x, labels = blobs()
    space = make_features(kind, x, labels)
    other = make_features(kind, x + torch.randn(60, 12), labels)
    assert (space.fingerprint == other.fingerprint) == (kind == "pixels")
    whole = space(x)
    monkeypatch.setattr(module, "_CHUNK", 7)
    # Single precision inside the classifier; another batch size may round in another way.
    assert torch.allclose(space(x), whole, atol=1e-5)


def with_nan(x):
    x = x.clone()
    x[2, 1] = math.nan
    return x


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda x, y: make_features("inception", x), "'pixels', 'pca', 'classifier'"),
        (lambda x, y: make_features("pixels", x, dim=3), "leave dim out"),
        (lambda x, y: make_features("pca", x, dim=0), "at least 1"),
        (lambda x, y: make_features("pca", x, dim=13), "have 12 components"),
        (lambda x, y: make_features("pca", x[:1]), "at least 2 are needed"),
        (lambda x, y: make_features("pca", with_nan(x)), "not finite in 1 of 60 rows"),
        (lambda x, y: make_features("classifier", x), "pass labels"),
        (lambda x, y: make_features("classifier", x, y[:9]), "there are 9 for 60"),
        (lambda x, y: make_features("classifier", x, 0 * y), "there are 1, the smallest of 60"),
        (lambda x, y: make_features("classifier", x[:9], y[:9]), "the smallest of 3"),
        (lambda x, y: make_features("classifier", x, y, image_shape=(3, 5)), "12 features"),
        (lambda x, y: make_features("pixels", x)(x[:, :4]), "4 features, but 12"),
        (lambda x, y: make_features("pixels", x)(with_nan(x)), "not finite"),
        (lambda x, y: make_features("pixels", x)(x[:0]), "at least 1"),
    ],
)
def test_what_makes_no_space_is_refused_in_words(make, says, short):
    with pytest.raises(ValueError, match=says):
        make(*blobs())
