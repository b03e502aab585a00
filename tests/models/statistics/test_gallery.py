"""The gallery's densities against loops over plain formulas; fits against quadrature and truth."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import expit, gammaln, logsumexp

from benchmarks.gallery import fit_gallery
from pyro_vae.inference.draws import draw_posterior
from pyro_vae.inference.log_weights import log_weights
from pyro_vae.models.statistics import GALLERY

ROWS, DRAWS = 3, 2


def few(x):
    return tuple(part[:ROWS] for part in x) if isinstance(x, tuple) else x[:ROWS]


def normal(x, loc=0.0, scale=1.0):
    return stats.norm.logpdf(x, loc, scale)


def half_normal(x, scale):
    return stats.halfnorm.logpdf(x, scale=scale)


def ordered_locs(at):
    log_p = normal(at["first"], 0, 3) + stats.lognorm.logpdf(at["gaps"], 1.0).sum()
    locs = [at["first"]]
    for gap in at["gaps"]:
        locs.append(locs[-1] + gap)
    return log_p + stats.lognorm.logpdf(at["scale"], 1.0), locs


def hierarchical_regression(at, group, predictor, y):
    log_p = normal(at["mean"], 0, 5) + half_normal(at["spread"], 2) + normal(at["slope"], 0, 2)
    log_p += half_normal(at["noise"], 2) + normal(at["intercept"], at["mean"], at["spread"]).sum()
    for g, z, value in zip(group, predictor, y, strict=True):
        log_p += normal(value, at["intercept"][g] + at["slope"] * z, at["noise"])
    return log_p


def logistic_regression(at, predictors, y):
    log_p = normal(at["intercept"], 0, 2.5) + normal(at["coefficients"], 0, 2.5).sum()
    for row, value in zip(predictors, y, strict=True):
        p = expit(at["intercept"] + row @ at["coefficients"])
        log_p += math.log(p if value else 1 - p)
    return log_p


def poisson_effects(at, counts):
    log_p = normal(at["mean"], 0, 2) + half_normal(at["spread"], 1)
    for z, row in zip(at["log_rate"], counts, strict=True):
        log_p += normal(z, at["mean"], at["spread"]) + stats.poisson.logpmf(row, math.exp(z)).sum()
    return log_p


def bayesian_mixture(at, x):
    log_p, locs = ordered_locs(at)
    log_p += stats.dirichlet.logpdf(at["weights"], [2.0, 2.0, 2.0])
    paths = [
        sum(
            math.log(at["weights"][k]) + normal(value, locs[k], at["scale"])
            for k, value in zip(path, x, strict=True)
        )
        for path in itertools.product(range(3), repeat=len(x))
    ]
    return log_p + logsumexp(paths)


def topic_model(at, counts):
    log_p = 0.0
    for k, topic in enumerate(at["topics"]):
        prior = np.full(12, 0.5)
        prior[4 * k] = 10.0
        log_p += stats.dirichlet.logpdf(topic, prior)
    for share, row in zip(at["proportions"], counts, strict=True):
        log_p += stats.dirichlet.logpdf(share, [0.7, 0.7, 0.7])
        log_p += gammaln(41.0) - gammaln(row + 1).sum()
        for word, count in enumerate(row):
            log_p += count * math.log(sum(share[k] * at["topics"][k, word] for k in range(3)))
    return log_p


def loadings(at):
    one, two, b = at["diagonal"][0], at["diagonal"][1], at["below"]
    return np.array([[one, *b[:4]], [0.0, two, *b[4:]]])


def bayesian_ppca(at, x):
    log_p = half_normal(at["diagonal"], 2).sum() + normal(at["below"]).sum()
    log_p += half_normal(at["noise"], 1)
    for z, row in zip(at["z"], x, strict=True):
        log_p += normal(z).sum() + normal(row, z @ loadings(at), at["noise"]).sum()
    return log_p


def hidden_markov(at, x):
    log_p, locs = ordered_locs(at)
    log_p += stats.beta.logpdf(at["stay"], 2, 2)
    for row in x:
        paths = []
        for path in itertools.product((0, 1), repeat=len(row)):
            moves = [at["stay"] if a == b else 1 - at["stay"] for a, b in itertools.pairwise(path)]
            seen = [normal(value, locs[k], at["scale"]) for k, value in zip(path, row, strict=True)]
            paths.append(math.log(0.5) + np.log(moves).sum() + sum(seen))
        log_p += logsumexp(paths)
    return log_p


def item_response(at, x):
    log_p = normal(at["difficulty"], 0, 2).sum()
    log_p += stats.lognorm.logpdf(at["discrimination"], 0.5).sum()
    for ability, row in zip(at["ability"], x, strict=True):
        p = expit(at["discrimination"] * (ability - at["difficulty"]))
        log_p += normal(ability) + np.log(np.where(row > 0, p, 1 - p)).sum()
    return log_p


DENSITIES = {
    f.__name__: f
    for f in (
        hierarchical_regression,
        logistic_regression,
        poisson_effects,
        bayesian_mixture,
        topic_model,
        bayesian_ppca,
        hidden_markov,
        item_response,
    )
}


@pytest.mark.parametrize("name", GALLERY)
def test_the_density_is_that_of_a_loop(name):
    example = GALLERY[name]
    x = few(example.simulate(0).x)
    draws = draw_posterior(example.model, example.make_guide(), x, num_draws=DRAWS, seed=1)
    given = [part.numpy() for part in (x if isinstance(x, tuple) else (x,))]
    for k in range(DRAWS):
        at = {site: value[k].numpy() for site, value in draws.latents.items()}
        expected = DENSITIES[name](at, *given)
        assert float(draws.log_joint[k, 0]) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", GALLERY)
def test_simulations_have_a_seed_and_a_truth_of_the_models_latents(name):
    example = GALLERY[name]
    before = torch.get_rng_state()
    one, same, other = example.simulate(3), example.simulate(3), example.simulate(4)
    assert torch.equal(torch.get_rng_state(), before)
    tensors = [
        found.x if isinstance(found.x, tuple) else (found.x,) for found in (one, same, other)
    ]
    assert all(map(torch.equal, tensors[0], tensors[1]))
    assert not torch.equal(tensors[0][-1], tensors[2][-1])
    draws = draw_posterior(
        example.model, example.make_guide(), few(one.x), num_draws=2, seed=0
    ).latents
    for site, value in one.truth.items():
        assert draws[site].shape[1:] == value.shape


def test_the_guide_of_ppca_has_the_exact_posterior_of_each_datum():
    example = GALLERY["bayesian_ppca"]
    x, guide = few(example.simulate(0).x), example.make_guide()
    found = log_weights(example.model, guide, x, DRAWS, seed=2).log_weights.detach()
    latents = draw_posterior(example.model, guide, x, num_draws=DRAWS, seed=2).latents
    for k in range(DRAWS):
        at = {site: value[k].numpy() for site, value in latents.items()}
        cov = loadings(at).T @ loadings(at) + at["noise"] ** 2 * np.eye(5)
        expected = stats.multivariate_normal.logpdf(x.numpy(), np.zeros(5), cov)
        np.testing.assert_allclose(found[k].numpy(), expected, rtol=1e-9)


# --- fits -----------------------------------------------------------------------------------------


def poisson_posterior(counts):
    """Means and sds of mean and spread: Gauss-Hermite over each effect, a grid over the two."""
    mean, spread = np.linspace(0.0, 1.4, 40), np.linspace(0.25, 1.6, 41)
    nodes, weights = np.polynomial.hermite_e.hermegauss(30)
    m, s = np.meshgrid(mean, spread, indexing="ij")
    z = m[..., None] + s[..., None] * nodes
    log_p = normal(m, 0, 2) + half_normal(s, 1)
    for row in counts.numpy():
        seen = row.sum() * z - len(row) * np.exp(z) - gammaln(row + 1).sum()
        log_p = log_p + logsumexp(seen, axis=-1, b=weights / math.sqrt(math.tau))
    p = np.exp(log_p - logsumexp(log_p))
    centre = np.array([(p * m).sum(), (p * s).sum()])
    return centre, np.sqrt([(p * m**2).sum(), (p * s**2).sum()] - centre**2)


@pytest.mark.long
def test_random_effects_have_the_posterior_of_quadrature():
    example = GALLERY["poisson_effects"]
    x = example.simulate(0).x
    fitted = fit_gallery(example.model, example.make_guide(), x, example.batch_size)
    centre, sd = poisson_posterior(x)
    drawn = draw_posterior(fitted.model, fitted.guide, x, num_draws=2000, seed=0).latents
    found = np.stack([drawn["mean"].numpy(), drawn["spread"].numpy()], 1)
    # 2000 draws: errors of 0.022 sds and 1.6 % of an sd; the rest is that of guide and training
    assert (np.abs(found.mean(0) - centre) < 0.25 * sd).all()
    assert (np.abs(np.log(found.std(0) / sd)) < 0.2).all()


def test_logistic_regression_has_the_posterior_of_importance_sampling():
    example = GALLERY["logistic_regression"]
    data = example.simulate(0)
    fitted = fit_gallery(example.model, example.make_guide(), data.x, example.batch_size)
    design = np.column_stack([np.ones(400), data.x[0].numpy()])
    y, beta = data.x[1].numpy(), np.zeros(5)
    for _ in range(20):  # Newton's method to the mode
        p = expit(design @ beta)
        precision = design.T @ (design * (p * (1 - p))[:, None]) + np.eye(5) / 2.5**2
        beta = beta + np.linalg.solve(precision, design.T @ (y - p) - beta / 2.5**2)
    proposal = stats.multivariate_t(beta, np.linalg.inv(precision), df=10, seed=0)
    trial = proposal.rvs(20_000)
    logits = trial @ design.T
    log_p = logits @ y - np.logaddexp(0, logits).sum(1) + normal(trial, 0, 2.5).sum(1)
    weights = np.exp(log_p - proposal.logpdf(trial) - (log_p - proposal.logpdf(trial)).max())
    weights /= weights.sum()
    centre = weights @ trial
    sd = np.sqrt(weights @ (trial - centre) ** 2)
    drawn = draw_posterior(fitted.model, fitted.guide, data.x, num_draws=2000, seed=0).latents
    found = np.column_stack([drawn["intercept"].numpy(), drawn["coefficients"].numpy()])
    assert (np.abs(found.mean(0) - centre) < 0.25 * sd).all()
    assert (np.abs(np.log(found.std(0) / sd)) < 0.2).all()
