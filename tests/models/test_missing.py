"""Missing entries of Gaussian mixtures, against marginals of torch and gradients of these."""

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_vae.inference.em import fit_em, standard_errors
from pyro_vae.models import GaussianMixture
from pyro_vae.models.mixtures.missing import MissingGaussianProblem

COVARIANCES = ["full", "tied", "diag", "spherical"]


def incomplete(num_data=90, dim=3, share=0.3, seed=0):
    """Three correlated clusters far from the origin, with entries left out; a row has one left."""
    rng = np.random.default_rng(seed)
    root = np.tril(0.6 * rng.normal(size=(dim, dim))) + np.eye(dim)
    locs = np.array([5.0, 0.0, -40.0])[:dim] + 4 * rng.normal(size=(3, dim))
    x = locs[rng.integers(3, size=num_data)] + rng.normal(size=(num_data, dim)) @ root.T
    gone = rng.uniform(size=x.shape) < share
    gone[gone.all(1), 0] = False
    return torch.tensor(np.where(gone, np.nan, x))


def reference(x, weights, locs, covariances):
    """log p(x_o, z = k), one datum at a time, by the marginal of torch."""
    rows = []
    for row in x:
        o = ~row.isnan()
        parts = MultivariateNormal(locs[:, o], covariances[:, o][:, :, o])
        rows.append(weights.log() + parts.log_prob(row[o]))
    return torch.stack(rows)


def dense(covariance, covariances, number, dim=3):
    """The covariance matrix of each component."""
    if covariance == "diag":
        return covariances.diag_embed()
    if covariance == "spherical":
        return covariances[:, None].expand(number, dim).diag_embed()
    return covariances.expand(number, dim, dim)


def fitted(x, covariance="full", num_components=3, **options):
    mixture = GaussianMixture(num_components, x.shape[1], covariance, missing="marginalise")
    return mixture.double(), fit_em(mixture, x, progress=False, **options)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_scores_are_those_of_the_marginal(covariance):
    x = incomplete(num_data=50)
    mixture, _ = fitted(x, covariance, max_iterations=5)
    joint = reference(x, mixture.weights, mixture.locs, mixture.dense_covariances).detach()
    assert (mixture.score_samples(x) - joint.logsumexp(1)).abs().max() < 1e-10
    assert (mixture.predict_proba(x) - joint.softmax(1)).abs().max() < 1e-10
    assert torch.equal(mixture.predict(x), joint.argmax(1))
    wrong = reference(x, mixture.weights, mixture.locs, 1.01 * mixture.dense_covariances)
    assert (mixture.score_samples(x) - wrong.logsumexp(1)).abs().max() > 1e-3


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_a_fit_climbs_to_where_the_gradient_of_the_marginal_is_zero(covariance):
    x = incomplete(num_data=40)
    for number in (1, 2):
        mixture, fit = fitted(x, covariance, number, max_iterations=5000, tolerance=1e-14, seed=1)
        history = fit.history
        assert float(history.log_evidence_total.diff("step").min()) > -1e-8
        assert float(history.gap_total.min()) > -1e-8
        assert abs(float(history.entropy_residual[-1])) < 1e-5
        values = mixture.fitted_values()
        locs = values["locs"].detach().requires_grad_()
        covariances = values["covariances"].detach().requires_grad_()
        logits = values["weights"].detach().log().requires_grad_()
        wide = dense(covariance, covariances, number)
        total = reference(x, logits.softmax(0), locs, wide).logsumexp(1).sum()
        assert float(total.detach()) == pytest.approx(
            float(history.log_evidence_total[-1]), abs=1e-8
        )
        gradients = torch.autograd.grad(total, [logits, locs, covariances])
        assert max(float(g.abs().max()) for g in gradients) < 2e-3
        moved = reference(x, logits.softmax(0), locs + 0.01, wide).logsumexp(1).sum()
        assert float(torch.autograd.grad(moved, locs)[0].abs().max()) > 2e-2


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_with_nothing_missing_the_path_is_the_usual_one(covariance):
    x = incomplete(share=0.0)
    mixture = GaussianMixture(3, 3, covariance).double().initialize(x)
    weights = torch.linspace(0.5, 2.0, len(x))
    problems = [mixture.prepare(x, weights), MissingGaussianProblem(mixture, x, weights, ())]
    ends = []
    for problem in problems:
        parameters = problem.read()
        for _ in range(4):
            expected = problem.e_step(parameters, about=problem.origin(parameters))
            parameters = problem.m_step(expected.statistics, parameters)
        joint = problem.expected_log_joint(expected.statistics, parameters)
        ends.append((parameters.log_weights, parameters.locs, parameters.roots, joint, expected))
    for usual, own in zip(*(end[:3] for end in ends), strict=True):
        assert (usual - own).abs().max() < 1e-10
    assert ends[0][3] == pytest.approx(ends[1][3], abs=1e-9)
    assert ends[0][4].log_likelihood == pytest.approx(ends[1][4].log_likelihood, abs=1e-9)
    assert ends[0][4].entropy == pytest.approx(ends[1][4].entropy, abs=1e-9)


@pytest.mark.parametrize("method", ["online", "hard", "monte_carlo"])
def test_other_methods_come_near_the_maximum(method):
    x = incomplete(num_data=80, seed=4)
    start, exact = fitted(x, "full", 2, tolerance=1e-7, max_iterations=300)
    mixture = GaussianMixture.from_parameters(
        *(value.detach() for value in start.fitted_values().values()), missing="marginalize"
    )
    end = fit_em(
        mixture, x, method=method, initialization="given", max_iterations=4, progress=False
    )
    gained = float(end.history.log_evidence[-1] - exact.history.log_evidence[-1])
    assert -0.05 < gained < 1e-6
    assert float(end.history.gap.min()) > -1e-12


def test_a_row_of_no_weight_and_the_units_of_the_data_change_nothing():
    x = incomplete(num_data=60)
    _, fit = fitted(x, max_iterations=6, initialization="k-means")
    scale, shift = torch.tensor([1e-3, 7.0, 1e4]), torch.tensor([0.0, 30.0, -1e4])
    _, moved = fitted(x * scale + shift, max_iterations=6, initialization="k-means")
    total = (~x.isnan()).double() @ scale.log()
    difference = fit.history.log_evidence_total - moved.history.log_evidence_total
    assert np.abs(difference.values - float(total.sum())).max() < 1e-7
    weights = torch.ones(len(x))
    weights[7] = 0.0
    kept = torch.arange(len(x)) != 7
    ends = []
    for data, each in ((x, weights), (x[kept], None)):
        wide = 9 * torch.eye(3).expand(2, 3, 3)
        start = GaussianMixture.from_parameters(
            torch.tensor([0.3, 0.7]), x[:2].nan_to_num(), wide, missing="marginalise"
        )
        end = fit_em(start, data, sample_weights=each, initialization="given", max_iterations=9)
        ends.append(float(end.history.log_evidence_total[-1]))
    assert ends[0] == pytest.approx(ends[1], abs=1e-9)


def test_what_cannot_be_marginalised_is_refused():
    x = incomplete()
    with pytest.raises(ValueError, match=r"hold NaN or .* missing='marginalise'"):
        GaussianMixture(2, 3).double().score_samples(x)
    mixture = GaussianMixture(2, 3, missing="marginalise").double()
    assert GaussianMixture(**mixture.config).missing == "marginalise"
    empty = x.clone()
    empty[[4, 31]] = torch.nan
    with pytest.raises(ValueError, match=r"rows \[4, 31\] have no entry"):
        fit_em(mixture, empty)
    unseen = x.clone()
    unseen[:, 1] = torch.nan
    unseen[:, 0] = 1.0
    with pytest.raises(ValueError, match=r"features \[1\] are never observed"):
        fit_em(mixture, unseen)
    with pytest.raises(ValueError, match="infinite"):
        fit_em(mixture, x.nan_to_num(nan=torch.inf))
    for method, words in (("incremental", "take back"), ("variational_bayes", "missing entries")):
        with pytest.raises(ValueError, match=words):
            fit_em(mixture, x, method=method)
    with pytest.raises(ValueError, match="missing is"):
        GaussianMixture(2, 3, missing="drop")


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("method", ["oakes", "louis"])
def test_standard_errors_are_of_the_marginal(covariance, method):
    x = incomplete(num_data=60, dim=2)
    mixture, _ = fitted(x, covariance, 2, max_iterations=500, tolerance=1e-12, seed=1)
    form = mixture.natural_form(x)
    values = form.fitted(form.theta)
    joint = reference(
        x, values["weights"], values["locs"], dense(covariance, values["covariances"], 2, 2)
    )
    shift = (~x.isnan()).double() @ mixture.prepare(x).coordinates[1].log()
    assert (form.log_joint(form.theta, form.x) - shift[:, None] - joint).abs().max() < 1e-9

    def total(theta):
        return form.log_joint(theta, form.x).logsumexp(1).sum()

    wanted = torch.linalg.inv(-torch.autograd.functional.hessian(total, form.theta)).diagonal()
    result = standard_errors(mixture, x, method=method)
    assert result.natural_se[0].item() == pytest.approx(float(wanted[0].sqrt()), rel=1e-6)
