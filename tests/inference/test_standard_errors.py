"""Louis's and Oakes's information beside the Hessian of log p(x), and closed forms."""

import numpy as np
import pytest
import torch

from pyro_vae.inference.em import fit_em, standard_errors
from pyro_vae.models import BernoulliMixture, GaussianMixture, PoissonMixture

KINDS = ("full", "tied", "diag", "spherical")
FAMILIES = (*KINDS, "bernoulli", "poisson")


def data(family, num_data=150, num_components=2, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.integers(num_components, size=num_data)
    if family == "bernoulli":
        chances = np.array([[0.1, 0.8, 0.3, 0.2], [0.7, 0.2, 0.9, 0.6]])[z]
        return torch.as_tensor((rng.random(chances.shape) < chances) * 1.0)
    if family == "poisson":
        return torch.as_tensor(rng.poisson(np.array([[2.0, 7.0, 1.0], [6.0, 1.0, 2.0]])[z]) * 1.0)
    locs = np.array([[50.0, 0.0], [52.5, 1.0]])[z]
    return torch.as_tensor(locs + rng.normal(size=(num_data, 2)) * np.array([1.0, 0.3]))


def fitted(family, x, num_components=2, tolerance=1e-13):
    made = {"bernoulli": BernoulliMixture, "poisson": PoissonMixture}
    dim = x.shape[1]
    if family in KINDS:
        mixture = GaussianMixture(num_components, dim, family).double()
    else:
        mixture = made[family](num_components, dim).double()
    fit_em(mixture, x, tolerance=tolerance, max_iterations=3000, seed=1)
    return mixture


def hessian_errors(mixture, x):
    """Errors of the module's own parameters by the Hessian of log p(x), and of what users see."""
    own = {n: p for n, p in mixture.named_parameters() if p.numel()}
    shapes = {n: p.shape for n, p in own.items()}
    flat = torch.cat([p.detach().flatten() for p in own.values()])

    def call(vector, read):
        parts = vector.split([s.numel() for s in shapes.values()])
        values = {n: v.reshape(s) for (n, s), v in zip(shapes.items(), parts, strict=True)}

        class Reader(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.mixture = mixture

            def forward(self):
                return read(self.mixture)

        named = {f"mixture.{n}": v for n, v in values.items()}
        return torch.func.functional_call(Reader(), named, ())

    information = -torch.autograd.functional.hessian(
        lambda v: call(v, lambda m: m.log_joint(x).logsumexp(1).sum()), flat
    )
    # A logit too many and the unused half of roots are flat: the pseudoinverse leaves them out.
    covariance = torch.linalg.pinv(information, hermitian=True, rtol=1e-10)
    seen = lambda m: torch.cat([v.flatten() for v in m.fitted_values().values()])  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(lambda v: call(v, seen), flat)
    return (jacobian @ covariance @ jacobian.mT).diagonal().sqrt()


@pytest.mark.parametrize("family", FAMILIES)
def test_both_formulas_are_the_hessian_of_the_evidence(family):
    """The Hessian is taken in other parameters (logits, log roots), of log p(x) itself."""
    x = data(family)
    mixture = fitted(family, x)
    wanted = hessian_errors(mixture, x)
    louis, oakes = (standard_errors(mixture, x, method=m) for m in ("louis", "oakes"))
    np.testing.assert_allclose(louis.fitted_se, wanted, rtol=1e-5)
    np.testing.assert_allclose(oakes.fitted_se, louis.fitted_se, rtol=1e-9)
    np.testing.assert_allclose(oakes.natural_se, louis.natural_se, rtol=1e-6)
    values = torch.cat([v.detach().flatten() for v in mixture.fitted_values().values()])
    np.testing.assert_allclose(louis.fitted, values, rtol=1e-9, atol=1e-12)
    assert float(louis.distance_to_maximum) < 1e-3
    assert 0 < float(louis.information_fraction) < 1
    assert mixture.num_parameters == louis.sizes["parameter"]
    assert len(set(louis.parameter.values)) == louis.sizes["parameter"]
    assert "verdict" not in louis.provenance


@pytest.mark.parametrize("kind", KINDS)
def test_of_one_component_they_are_those_of_a_sample(kind):
    """Means have sd / sqrt(N); variances v sqrt(2 / N), of spheres sqrt(2 / (N D))."""
    x = data(kind, 90)
    found = standard_errors(fitted(kind, x, 1), x)
    errors = dict(zip(found.fitted_parameter.values, found.fitted_se.values, strict=True))
    covariance = np.cov(x.numpy().T, bias=True)
    variances = np.diag(covariance)
    if kind == "spherical":
        variances = np.full(2, variances.mean())
    for d in range(2):
        assert errors[f"locs[0, {d}]"] == pytest.approx(np.sqrt(variances[d] / 90), rel=1e-8)
    assert errors["weights[0]"] == 0
    name = {
        "full": "covariances[0, 1, 1]",
        "tied": "covariances[1, 1]",
        "diag": "covariances[0, 1]",
    }
    size = 180 if kind == "spherical" else 90
    wanted = variances[1] * np.sqrt(2 / size)
    assert errors[name.get(kind, "covariances[0]")] == pytest.approx(wanted, rel=1e-8)
    if kind == "full":
        wanted = np.sqrt((variances.prod() + covariance[0, 1] ** 2) / 90)
        assert errors["covariances[0, 1, 0]"] == pytest.approx(wanted, rel=1e-8)


def test_the_natural_parameters_are_those_of_the_data():
    """One Gaussian: precision times loc and precision, in the data's units, from the sample."""
    x = data("diag", 90)
    found = standard_errors(fitted("diag", x, 1), x)
    natural = dict(zip(found.parameter.values, found.natural.values, strict=True))
    precision = 1 / x.numpy().var(0)
    assert natural["precisions[0, 1]"] == pytest.approx(precision[1], rel=1e-9)
    wanted = precision[0] * x.numpy()[:, 0].mean()
    assert natural["precision_locs[0, 0]"] == pytest.approx(wanted, rel=1e-9)
    errors = dict(zip(found.parameter.values, found.natural_se.values, strict=True))
    assert errors["precisions[0, 1]"] == pytest.approx(precision[1] * np.sqrt(2 / 90), rel=1e-7)
    covariance = found.natural_covariance
    assert np.sqrt(np.diag(covariance)) == pytest.approx(found.natural_se.values)


def test_weights_are_repetitions():
    x = data("poisson", 60)
    times = torch.arange(60) % 3
    repeated = x.repeat_interleave(times, 0)
    mixture = fitted("poisson", repeated)
    once = standard_errors(mixture, repeated)
    weighted = standard_errors(mixture, x, sample_weights=times)
    np.testing.assert_allclose(weighted.fitted_se, once.fitted_se, rtol=1e-9)


def test_components_that_are_one_are_said_not_numbered():
    """Two components at the same place: nothing tells their labels."""
    x = data("full")
    locs = x.mean(0).expand(2, 2).clone()
    covariance = x.T.cov(correction=0).expand(2, 2, 2).clone()
    mixture = GaussianMixture.from_parameters(torch.tensor([0.4, 0.6]), locs, covariance)
    found = standard_errors(mixture, x)
    assert np.isnan(found.fitted_se).all()
    assert np.isnan(found.natural_se).all()
    assert "cannot be told apart" in found.provenance["verdict"][0]


def test_parameters_that_are_no_maximum_are_said():
    x = data("poisson")
    mixture = fitted("poisson", x, tolerance=0.05)
    found = standard_errors(mixture, x)
    assert "Not at a maximum" in found.provenance["verdict"][0]


def test_what_cannot_be_used():
    x = data("poisson")
    mixture = fitted("poisson", x, tolerance=0.05)
    with pytest.raises(ValueError, match="louis, oakes"):
        standard_errors(mixture, x, method="sandwich")
    with pytest.raises(ValueError, match=r"shape \(150,\)"):
        standard_errors(mixture, x, sample_weights=torch.ones(3))
    with pytest.raises(ValueError, match=r"not its \.model"):
        standard_errors(mixture.model, x)
