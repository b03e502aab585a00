"""The oracle itself, against dense torch and SciPy normals and scikit-learn."""

import jaxtyping
import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from scipy import stats
from sklearn.decomposition import PCA, FactorAnalysis
from torch.distributions import MultivariateNormal, kl_divergence

from pyro_vae.models import LinearGaussian

NUM_DATA, DATA_DIM, LATENT_DIM = 7, 5, 3
COVARIANCES = ["isotropic", "diagonal"]
STANDARD_ERRORS = 5  # a two-sided failure rate of 6e-7 a number


def parameters(covariance, data_dim=DATA_DIM, latent_dim=LATENT_DIM):
    rng = np.random.default_rng(1)
    shape = () if covariance == "isotropic" else (data_dim,)
    noise_variance = np.asarray(rng.uniform(0.3, 2.0, shape))
    return rng.normal(size=(data_dim, latent_dim)), rng.normal(size=data_dim), noise_variance


def build(covariance, **sizes):
    tensors = [torch.as_tensor(p) for p in parameters(covariance, **sizes)]
    return LinearGaussian.from_parameters(*tensors)


def dense(covariance):
    """Mean, cov(x) and cov(x, z) of the joint normal of (x, z), in NumPy."""
    weight, bias, noise_variance = parameters(covariance)
    marginal = weight @ weight.T + np.diag(np.broadcast_to(noise_variance, DATA_DIM))
    return bias, marginal, weight


def data():
    return torch.as_tensor(np.random.default_rng(2).normal(size=(NUM_DATA, DATA_DIM)))


def any_gaussian():
    """A mean and a dense covariance per datum, nothing like the posterior."""
    rng = np.random.default_rng(3)
    root = rng.normal(size=(NUM_DATA, LATENT_DIM, LATENT_DIM))
    covariance = root @ root.swapaxes(1, 2) + 0.1 * np.eye(LATENT_DIM)
    return torch.as_tensor(rng.normal(size=(NUM_DATA, LATENT_DIM))), torch.as_tensor(covariance)


def close(actual, expected, tolerance=1e-12):
    np.testing.assert_allclose(
        np.asarray(actual.detach()), np.asarray(expected), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_log_evidence_is_that_of_the_dense_normal(covariance):
    bias, marginal, _ = dense(covariance)
    expected = stats.multivariate_normal(bias, marginal).logpdf(data().numpy())
    close(build(covariance).log_evidence(data()), expected)
    with pytest.raises(AssertionError):
        close(build(covariance).log_evidence(data()), expected + 1e-9)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_posterior_is_the_conditional_of_the_dense_joint(covariance):
    bias, marginal, cross = dense(covariance)
    gain = np.linalg.solve(marginal, cross).T
    posterior = build(covariance).posterior(data())
    assert posterior.batch_shape == (NUM_DATA,)
    assert posterior.event_shape == (LATENT_DIM,)
    close(posterior.mean, (data().numpy() - bias) @ gain.T)
    expected = np.eye(LATENT_DIM) - gain @ cross
    close(posterior.covariance_matrix, np.broadcast_to(expected, (NUM_DATA, 3, 3)))
    close(build(covariance).posterior_precision, np.linalg.inv(expected))


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_kl_and_elbo_of_any_gaussian(covariance):
    model, (loc, spread) = build(covariance), any_gaussian()
    bias, marginal, cross = dense(covariance)
    gain = np.linalg.solve(marginal, cross).T
    exact = MultivariateNormal(
        (data() - torch.as_tensor(bias)) @ torch.as_tensor(gain).T,
        torch.as_tensor(np.eye(LATENT_DIM) - gain @ cross),
    )
    divergence = kl_divergence(MultivariateNormal(loc, spread), exact)
    close(model.kl_to_posterior(data(), loc, spread), divergence)
    log_evidence = stats.multivariate_normal(bias, marginal).logpdf(data().numpy())
    close(model.elbo(data(), loc, spread), log_evidence - divergence.numpy())
    shared = kl_divergence(MultivariateNormal(loc, spread[0]), exact)
    close(model.kl_to_posterior(data(), loc, spread[0]), shared)
    close(model.elbo(data(), loc, spread[0]), log_evidence - shared.numpy())


def test_the_best_diagonal_posterior_is_the_best_and_leaves_diagonal_gap():
    model = build("diagonal")
    best = model.best_diagonal_posterior(data())
    _, marginal, cross = dense("diagonal")
    precision = np.linalg.inv(np.eye(LATENT_DIM) - cross.T @ np.linalg.solve(marginal, cross))
    close(best.variance, np.broadcast_to(1 / np.diag(precision), (NUM_DATA, LATENT_DIM)))
    gap = (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1]) / 2
    assert gap > 0.05
    close(model.diagonal_gap(), gap)
    close(model.kl_to_posterior(data(), best.mean, best.variance.diag_embed()), np.full(7, gap))
    close(best.mean, model.posterior(data()).mean.detach())
    for factor in (0.9, 1.1):
        scaled = (factor * best.variance).diag_embed()
        assert (model.kl_to_posterior(data(), best.mean, scaled) > gap + 1e-3).all()
        shifted = best.mean + (factor - 1)
        assert (
            model.kl_to_posterior(data(), shifted, best.variance.diag_embed()) > gap + 1e-3
        ).all()


POSTERIORS = {
    "guide": "amortized_posterior",
    "exact_guide": "posterior",
    "best_diagonal_guide": "best_diagonal_posterior",
}


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("guide", ["guide", "exact_guide", "best_diagonal_guide"])
def test_programs_have_the_hand_written_log_densities(covariance, guide):
    model = build(covariance)
    guide_trace = poutine.trace(getattr(model, guide)).get_trace(data())
    model_trace = poutine.trace(poutine.replay(model.model, guide_trace)).get_trace(data())
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    z = guide_trace.nodes["z"]["value"].detach().numpy()
    weight, bias, noise_variance = parameters(covariance)
    prior = stats.norm.logpdf(z).sum(-1)
    likelihood = stats.norm.logpdf(data(), z @ weight.T + bias, np.sqrt(noise_variance)).sum(-1)
    close(model_trace.nodes["z"]["log_prob"], prior)
    close(model_trace.nodes["x"]["log_prob"], likelihood)
    if guide == "exact_guide":
        mean, marginal, _ = dense(covariance)
        evidence = stats.multivariate_normal(mean, marginal).logpdf(data())
        expected = prior + likelihood - evidence  # Bayes' rule
    elif guide == "best_diagonal_guide":
        best = model.best_diagonal_posterior(data())
        loc, scale = best.mean.detach().numpy(), best.stddev.detach().numpy()
        expected = stats.norm.logpdf(z, loc, scale).sum(-1)
    else:
        affine = model.recognition.affine
        loc = data().numpy() @ affine.weight.detach().numpy().T + affine.bias.detach().numpy()
        scale = model.recognition.log_scale.detach().exp().numpy()
        expected = stats.norm.logpdf(z, loc, scale).sum(-1)
    close(guide_trace.nodes["z"]["log_prob"], expected)


@pytest.mark.parametrize(
    ("guide", "names"),
    [
        ("guide", {"recognition"}),
        ("exact_guide", {"generative"}),
        ("best_diagonal_guide", {"generative"}),
        ("model", {"generative"}),
    ],
)
def test_each_program_registers_what_it_uses(guide, names):
    model = build("diagonal")
    pyro.clear_param_store()
    getattr(model, guide)(data())
    registered = dict(pyro.get_param_store().named_parameters())
    assert {name.split("$$$")[0] for name in registered} == names
    used = sum(p.numel() for part in names for p in getattr(model, part).parameters())
    assert sum(p.numel() for p in registered.values()) == used


@pytest.mark.parametrize("guide", ["guide", "exact_guide", "best_diagonal_guide"])
def test_monte_carlo_elbo_agrees_with_the_closed_form(guide):
    """Vectorised Trace_ELBO: its mean is within its standard error of `elbo`."""
    model = build("diagonal")
    q = getattr(model, POSTERIORS[guide])(data())
    is_dense = isinstance(q, MultivariateNormal)
    spread = q.covariance_matrix if is_dense else q.variance.diag_embed()
    expected = model.elbo(data(), q.mean, spread).sum().item()
    loss = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1).loss
    draws = np.array([-loss(model.model, getattr(model, guide), data()) for _ in range(30)])
    error = draws.std(ddof=1) / np.sqrt(len(draws))
    assert abs(draws.mean() - expected) <= STANDARD_ERRORS * error + 1e-10
    if guide == "exact_guide":
        assert draws.std() < 1e-11
        close(model.elbo(data(), q.mean, spread), model.log_evidence(data()).detach())
    else:
        assert expected + STANDARD_ERRORS * error < model.log_evidence(data()).sum()


def test_gradients_of_the_evidence_agree_with_the_dense_normal():
    model = build("diagonal")
    inputs = [torch.as_tensor(p).requires_grad_() for p in parameters("diagonal")]
    weight, bias, noise_variance = inputs
    marginal = weight @ weight.T + noise_variance.diag()
    expected = torch.autograd.grad(
        MultivariateNormal(bias, marginal).log_prob(data()).sum(), inputs
    )
    affine, log_scale = model.generative.affine, model.generative.log_scale
    actual = torch.autograd.grad(
        model.log_evidence(data()).sum(), [affine.weight, affine.bias, log_scale]
    )
    close(actual[0], expected[0])
    close(actual[1], expected[1])
    close(actual[2], expected[2] * 2 * noise_variance.detach())


def test_samples_have_the_moments_of_the_marginal():
    model, num = build("diagonal"), 20_000
    generator = torch.Generator().manual_seed(4)
    x = model.sample(num, generator=generator).numpy()
    bias, marginal, _ = dense("diagonal")
    error = np.sqrt(np.diag(marginal) / num)
    assert (abs(x.mean(0) - bias) < STANDARD_ERRORS * error).all()
    variance_of_covariance = marginal**2 + np.outer(np.diag(marginal), np.diag(marginal))
    error = np.sqrt(variance_of_covariance / num)
    assert (abs(np.cov(x.T) - marginal) < STANDARD_ERRORS * error).all()
    noiseless = marginal - np.diag(parameters("diagonal")[2])
    assert (abs(np.cov(x.T) - noiseless) > STANDARD_ERRORS * error).any()
    again = model.sample(num, generator=torch.Generator().manual_seed(4)).numpy()
    np.testing.assert_array_equal(x, again)


def test_ppca_optimum_agrees_with_scikit_learn():
    num_data, data_dim = 60, 6
    rng = np.random.default_rng(5)
    x = rng.normal(size=(num_data, data_dim)) @ rng.normal(size=(data_dim, data_dim)) + 3
    pca = PCA(2, svd_solver="full").fit(x)
    model = LinearGaussian.ppca_optimum(torch.as_tensor(x), latent_dim=2)
    # scikit-learn divides by N - 1: its covariance is N / (N - 1) times the maximum's.
    ratio = (num_data - 1) / num_data
    close(model.noise_variance, np.full(data_dim, pca.noise_variance_ * ratio), 1e-10)
    marginal = pca.get_covariance() * ratio
    close(model.weight @ model.weight.mT + model.noise_variance.diag(), marginal, 1e-10)
    expected = stats.multivariate_normal(pca.mean_, marginal).logpdf(x).sum()
    total = LinearGaussian.ppca_log_likelihood(torch.as_tensor(x), 2)
    assert total.item() == pytest.approx(expected, rel=1e-11)
    assert model.log_evidence(torch.as_tensor(x)).sum().item() == pytest.approx(expected, rel=1e-11)
    q = model.amortized_posterior(torch.as_tensor(x))
    bound = model.elbo(torch.as_tensor(x), q.mean, q.variance.diag_embed())
    close(bound, model.log_evidence(torch.as_tensor(x)).detach(), 1e-10)


def test_log_evidence_scores_as_scikit_learns_pca_and_factor_analysis():
    rng = np.random.default_rng(6)
    x = rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6)) * np.array([0.5, 1, 2, 1, 3, 1])
    pca = PCA(2, svd_solver="full").fit(x)
    scales = np.sqrt(pca.explained_variance_ - pca.noise_variance_)
    ppca = LinearGaussian.from_parameters(
        torch.as_tensor((pca.components_.T * scales).copy()),
        torch.as_tensor(pca.mean_),
        torch.tensor(pca.noise_variance_, dtype=torch.float64),
    )
    close(ppca.log_evidence(torch.as_tensor(x)), pca.score_samples(x), 1e-10)
    factors = FactorAnalysis(2, max_iter=20, tol=1e-1).fit(x)
    fitted = LinearGaussian.from_parameters(
        torch.as_tensor(factors.components_.T.copy()),
        torch.as_tensor(factors.mean_),
        torch.as_tensor(factors.noise_variance_),
    )
    close(fitted.log_evidence(torch.as_tensor(x)), factors.score_samples(x), 1e-10)
    close(fitted.posterior(torch.as_tensor(x)).mean, factors.transform(x), 1e-10)


@pytest.mark.parametrize(("num_data", "data_dim"), [(30, 5), (8, 11)])
def test_the_optimum_is_a_maximum(num_data, data_dim):
    """Also with fewer data than features, where scikit-learn leaves zero eigenvalues out."""
    scales = np.arange(1, data_dim + 1)
    x = torch.as_tensor(np.random.default_rng(7).normal(size=(num_data, data_dim)) * scales)
    model = LinearGaussian.ppca_optimum(x, latent_dim=2)
    best = model.log_evidence(x).sum()
    marginal = model.weight @ model.weight.mT + model.noise_variance.diag()
    dense_total = MultivariateNormal(x.mean(0), marginal).log_prob(x).sum().item()
    total = LinearGaussian.ppca_log_likelihood(x, 2).item()
    assert total == pytest.approx(dense_total, rel=1e-12)
    assert total >= PCA(2, svd_solver="full").fit(x.numpy()).score(x.numpy()) * num_data
    gradients = torch.autograd.grad(best, list(model.generative.parameters()))
    assert max(gradient.abs().max().item() for gradient in gradients) < 1e-10
    for name, parameter in model.state_dict().items():
        moved = LinearGaussian(**model.config).double()
        moved.load_state_dict(model.state_dict() | {name: parameter + 0.05})
        loss = (best - moved.log_evidence(x).sum()).item()
        assert (loss > 1e-3) == name.startswith("generative")


def test_float32_with_many_features_and_little_noise():
    """MNIST-like sizes and a signal-to-noise ratio of 1e4: float32 agrees with float64."""
    rng = np.random.default_rng(8)
    weight = torch.as_tensor(rng.normal(size=(784, 20)))
    exact = LinearGaussian.from_parameters(
        weight, torch.zeros(784, dtype=torch.float64), torch.tensor(1e-2, dtype=torch.float64)
    )
    x = exact.sample(9, generator=torch.Generator().manual_seed(9))
    reference = exact.log_evidence(x).detach()
    dense_reference = MultivariateNormal(
        torch.zeros(784, dtype=torch.float64),
        weight @ weight.mT + 1e-2 * torch.eye(784, dtype=torch.float64),
    ).log_prob(x)
    close(reference, dense_reference, 1e-9)
    single = LinearGaussian.from_parameters(
        weight.float(), torch.zeros(784).float(), torch.tensor(1e-2).float()
    ).log_evidence(x.float())
    assert single.dtype == torch.float32
    close(single.double(), reference, 1e-4)


def test_config_rebuilds_the_architecture():
    model = build("diagonal")
    again = LinearGaussian(**model.config).double()
    again.load_state_dict(model.state_dict())
    close(again.log_evidence(data()), model.log_evidence(data()).detach(), 0)
    assert LinearGaussian(4, 2).config["covariance"] == "isotropic"


@pytest.mark.parametrize("program", ["model", "guide", "exact_guide", "log_evidence"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x[:, :-1], "shape"),
        (lambda x: x[None], "shape"),
        (lambda x: x[:0], "at least one"),
        (lambda x: x.float(), "float64"),
        (lambda x: x.long(), "float64"),
        (lambda x: x / 0, "NaN or infinite"),
    ],
)
def test_data_that_cannot_be_taken_are_refused(program, spoil, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # ours, as users meet it
    with pytest.raises(ValueError, match=message):
        getattr(build("diagonal"), program)(spoil(data()))


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda: LinearGaussian(3, 2, covariance="full"), "isotropic"),
        (lambda: LinearGaussian(3, 0), "positive"),
        (
            lambda: LinearGaussian.from_parameters(
                torch.ones(3, 2), torch.ones(3), torch.tensor(0.0)
            ),
            "positive",
        ),
        (
            lambda: LinearGaussian.from_parameters(torch.ones(3, 2), torch.ones(3), torch.ones(2)),
            "noise_variance",
        ),
        (lambda: LinearGaussian.ppca_optimum(data(), latent_dim=DATA_DIM), "latent_dim"),
        (lambda: LinearGaussian.ppca_optimum(data()[:2], latent_dim=1), "no variance"),
        (
            lambda: build("diagonal").elbo(
                data(), torch.zeros(7, 3).double(), -torch.eye(3).double()
            ),
            "not positive definite",
        ),
    ],
)
def test_refusals(build_it, message):
    with pytest.raises(ValueError, match=message):
        build_it()
