"""Numbers of components side by side, on data whose number is planted."""

import math

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture as Theirs

from pyro_vae.inference.em import compare_num_components
from pyro_vae.models import GaussianMixture, PoissonMixture


def planted(num_data, seed):
    rng = np.random.default_rng(seed)
    z = rng.integers(3, size=num_data)
    locs = np.array([[0.0, 0.0], [5.0, 1.0], [-1.0, 5.0]])[z]
    return torch.as_tensor(locs + rng.normal(size=(num_data, 2)))


def test_the_planted_number_is_found_by_all():
    """Three clusters five standard deviations apart: no criterion errs there (0 of 12 seeds)."""
    x = planted(150, 0)
    found = compare_num_components(
        lambda k: GaussianMixture(k, 2, "diag"),
        x,
        range(1, 5),
        validation=planted(150, 1),
        num_restarts=2,
        max_iterations=60,
        tolerance=1e-5,
    )
    for name in ("bic_evidence", "icl_evidence", "bound", "bound_over_labels"):
        assert int(found.num_components[found[name].values.argmax()]) == 3
        assert f"{name} chooses 3" in found.provenance["verdict"][0]
    # Held-out data punish a superfluous component by little: 3 is not worse than fewer.
    assert float(found.validation_log_evidence.sel(num_components=3)) > float(
        found.validation_log_evidence.sel(num_components=2)
    )
    assert (np.diff(found.log_likelihood) > 0).all()
    assert found.bound.attrs["bound"] == "lower"
    assert found.validation_log_evidence.attrs["reduction"] == "per datum"
    labels = found.bound_over_labels - found.bound
    np.testing.assert_allclose(labels, [math.log(math.factorial(k)) for k in range(1, 5)])
    theirs = Theirs(3, covariance_type="diag", n_init=3, random_state=0, reg_covar=0, tol=1e-5)
    theirs.fit(x.numpy())
    at = found.sel(num_components=3)
    assert float(at.bic_evidence) == pytest.approx(-theirs.bic(x.numpy()) / 2, abs=0.1)
    q = theirs.predict_proba(x.numpy())
    entropy = -np.sum(q * np.log(q.clip(1e-300)))
    assert float(at.bic_evidence - at.icl_evidence) == pytest.approx(entropy, rel=0.05)


def test_one_cluster_is_one():
    rng = np.random.default_rng(0)
    x = torch.as_tensor(rng.poisson(4.0, size=(100, 2)) * 1.0)
    found = compare_num_components(
        lambda k: PoissonMixture(k, 2), x, (1, 2), num_restarts=1, max_iterations=100
    )
    for name in ("bic_evidence", "icl_evidence", "bound"):
        assert int(found[name].values.argmax()) == 0
    assert "validation_log_evidence" not in found


def test_numbers_that_are_none():
    for numbers, message in (((), "at least one"), ((0, 1), "numbers must be")):
        with pytest.raises(ValueError, match=message):
            compare_num_components(lambda k: PoissonMixture(k, 2), torch.ones(3, 2), numbers)
