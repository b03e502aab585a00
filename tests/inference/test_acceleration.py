"""SQUAREM: the optimum of EM in fewer passes over the data, and no half step that falls."""

import sys

import numpy as np
import pytest
import torch

from pyro_vae.inference.em import fit_em
from pyro_vae.inference.em.acceleration import Extrapolation
from pyro_vae.models import BernoulliMixture, GaussianMixture, PoissonMixture

FAMILIES = ("full", "tied", "diag", "spherical", "bernoulli", "poisson")


def overlapping(family, num_data=120):
    rng = np.random.default_rng(0)
    z = rng.integers(2, size=num_data)
    if family == "poisson":
        return torch.as_tensor(rng.poisson(np.array([[2.0, 6.0], [5.0, 3.0]])[z]) * 1.0)
    if family == "bernoulli":
        chances = np.array([[0.2, 0.3, 0.8, 0.5, 0.4], [0.7, 0.6, 0.3, 0.8, 0.2]])[z]
        return torch.as_tensor((rng.random(chances.shape) < chances) * 1.0)
    locs = np.array([[0.0, 0.0], [2.2, 0.8]])[z]
    return torch.as_tensor(locs + rng.normal(size=(num_data, 2)))


def run(family, x, **options):
    dim = x.shape[1]
    made = {"bernoulli": BernoulliMixture, "poisson": PoissonMixture}
    mixture = made[family](2, dim) if family in made else GaussianMixture(2, dim, family)
    options = {"max_iterations": 700, "tolerance": 1e-11, "seed": 1, **options}
    return fit_em(mixture, x, **options)


LONG = [("full", "exact"), ("tied", "exact"), ("diag", "exact"), ("bernoulli", "exact")]
LONG += [("tied", "variational_bayes")]
SHORT = [("spherical", "exact"), ("poisson", "exact"), ("poisson", "variational_bayes")]


@pytest.mark.parametrize(
    ("family", "method"),
    [*SHORT, *(pytest.param(*names, marks=pytest.mark.long) for names in LONG)],
)
def test_the_optimum_of_em_in_fewer_passes(family, method):
    x = overlapping(family)
    plain = run(family, x, method=method)
    fast = run(family, x, method=method, acceleration="squarem")
    assert plain.converged
    assert fast.converged
    assert float(fast.history.bound[-1]) == pytest.approx(float(plain.history.bound[-1]), abs=1e-7)
    for name, value in plain.parameters.items():
        np.testing.assert_allclose(fast.parameters[name], value, atol=2e-3)
    assert float(fast.history.data_passes[-1]) < 0.6 * float(plain.history.data_passes[-1])
    assert np.diff(fast.history.bound_total).min() > -1e-10
    if method == "exact":
        total = fast.history.bound_total + fast.history.gap_total
        np.testing.assert_allclose(total, fast.history.log_evidence_total, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("conjugate", [False, True])
def test_coordinates_lead_back(family, conjugate):
    x = overlapping(family)
    made = {"bernoulli": BernoulliMixture, "poisson": PoissonMixture}
    mixture = made[family](3, x.shape[1]) if family in made else GaussianMixture(3, 2, family)
    problem = mixture.prepare_conjugate(x) if conjugate else mixture.prepare(x)
    start = problem.initialize("k-means++", torch.Generator().manual_seed(0))
    vector = problem.unconstrained(start)
    again = problem.constrained(vector)
    np.testing.assert_allclose(problem.unconstrained(again), vector, atol=1e-12)
    q, other = problem.responsibilities(start), problem.responsibilities(again)
    np.testing.assert_allclose(q, other, atol=1e-12)
    moved = vector + 0.1 * torch.randn(len(vector))
    assert (problem.responsibilities(problem.constrained(moved)) - q).abs().max() > 1e-3
    np.testing.assert_allclose(
        problem.unconstrained(problem.constrained(moved))[3:], moved[3:], atol=1e-10
    )


def test_a_jump_along_a_geometric_path_ends_at_its_limit():
    """Where every step leaves 0.9 of the way, two steps tell where it ends."""

    class Line:
        def unconstrained(self, parameters):
            return parameters

        def constrained(self, vector):
            return vector

    limit, path = torch.tensor([2.0, -1.0, 0.5]), Extrapolation(Line())
    place = torch.tensor([0.0, 3.0, 0.0])
    away = []
    for _ in range(12):
        path.add(place)
        ahead = path.jump()
        if ahead is not None:
            path.settle(True)
            away.append(float((ahead - limit).norm()))
            place = ahead
            path.add(place)
        place = limit + 0.9 * (place - limit)
    assert away[0] > 0.1  # the first jumps are short
    assert away[-1] < 1e-10


def test_a_jump_to_a_worse_place_is_not_made(monkeypatch):
    """Jumps that end anywhere cost passes, but EM's own path is kept."""
    x = overlapping("full")
    right = Extrapolation.jump

    def wild(self):
        place = right(self)
        if place is None:
            return None
        vector = self._problem.unconstrained(place)
        return self._problem.constrained(vector + 3 * torch.randn_like(vector))

    plain = run("full", x, max_iterations=30, tolerance=0.0).history
    monkeypatch.setattr(Extrapolation, "jump", wild)
    torch.manual_seed(0)
    history = run("full", x, max_iterations=30, tolerance=0.0, acceleration="squarem").history
    np.testing.assert_allclose(history.bound, plain.bound, atol=1e-9)
    assert float(history.data_passes[-1]) > float(plain.data_passes[-1])


def test_large_data_have_no_row_before_a_jump(monkeypatch):
    x = overlapping("full")
    monkeypatch.setattr(
        sys.modules["pyro_vae.inference.em.fit_em"], "_MEASURED_RESPONSIBILITIES", 1
    )
    history = run("full", x, acceleration="squarem", max_iterations=40, tolerance=0.0).history
    assert np.diff(history.bound_total).min() > -1e-10
    assert history.sizes["step"] < 81
    np.testing.assert_allclose(history.bound + history.gap, history.log_evidence, atol=1e-12)


def test_methods_that_cannot_be_accelerated():
    x = overlapping("full")
    with pytest.raises(ValueError, match="cannot be accelerated"):
        run("full", x, method="online", acceleration="squarem")
