"""Bernoulli and Poisson mixtures, against SciPy and EM written out in NumPy."""

import jaxtyping
import numpy as np
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from scipy import special, stats

from pyro_vae.inference.em import fit_em
from pyro_vae.inference.log_weights import log_weights
from pyro_vae.models import BernoulliMixture, PoissonMixture, SingularComponentError

NUM_DATA, DIM, NUM_COMPONENTS = 157, 5, 3
STANDARD_ERRORS = 5  # a two-sided failure rate of 6e-7 a number
FAMILIES = [BernoulliMixture, PoissonMixture]
DISTRIBUTIONS = {BernoulliMixture: stats.bernoulli, PoissonMixture: stats.poisson}


def parameters(family):
    rng = np.random.default_rng(1)
    weights = rng.dirichlet(np.full(NUM_COMPONENTS, 5.0))
    shape = (NUM_COMPONENTS, DIM)
    means = {
        BernoulliMixture: lambda: rng.uniform(0.05, 0.95, shape),
        PoissonMixture: lambda: rng.gamma(1.0, 4.0, shape) + 0.2,
    }[family]()
    return weights, means


def build(family, **arguments):
    weights, means = (torch.as_tensor(p) for p in parameters(family))
    return family.from_parameters(weights, means, **arguments)


def data(family, num_data=NUM_DATA):
    rng = np.random.default_rng(2)
    weights, means = parameters(family)
    z = rng.choice(NUM_COMPONENTS, size=num_data, p=weights)
    return DISTRIBUTIONS[family](means[z]).rvs(random_state=rng).astype(float)


def log_joint(family, x, weights, means):
    log_mass = DISTRIBUTIONS[family](means).logpmf(x[:, None])
    return np.log(weights) + log_mass.sum(-1)


def reference(family, x, iterations):
    """EM as the textbook has it, and its log-likelihood before each M step."""
    weights, means = parameters(family)
    totals = []
    for _ in range(iterations):
        joint = log_joint(family, x, weights, means)
        totals.append(special.logsumexp(joint, axis=1).sum())
        q = special.softmax(joint, axis=1)
        weights, means = q.mean(0), (q.T @ x) / q.sum(0)[:, None]
    return weights, means, totals


def close(actual, expected, tolerance=1e-12):
    actual = actual.detach() if isinstance(actual, torch.Tensor) else actual
    np.testing.assert_allclose(
        np.asarray(actual), np.asarray(expected), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_mass_is_that_of_scipy(family):
    x, mixture = data(family), build(family)
    joint = log_joint(family, x, *parameters(family))
    evidence = special.logsumexp(joint, axis=1)
    t = torch.as_tensor(x)
    close(mixture.score_samples(t), evidence)
    close(mixture.log_evidence(t), evidence)
    close(mixture.predict_proba(t), np.exp(joint - evidence[:, None]))
    assert mixture.predict(t).tolist() == joint.argmax(1).tolist()
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    for guide in (mixture.guide, lambda x: None):
        assert -loss.loss(mixture.model, guide, t) == pytest.approx(evidence.sum(), abs=1e-9)
    with torch.no_grad():
        mixture.generative.natural[2, 1] += 1e-3
    assert np.abs(mixture.score_samples(t).numpy() - evidence).max() > 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_em_is_the_textbooks(family):
    x, mixture = data(family), build(family)
    weights, means, totals = reference(family, x, 12)
    fitted = fit_em(
        mixture, torch.as_tensor(x), initialization="given", max_iterations=12, tolerance=0.0
    )
    close(fitted.parameters["weights"], weights, 1e-11)
    name = "probs" if family is BernoulliMixture else "rates"
    close(fitted.parameters[name], means, 1e-11)
    history = fitted.history
    close(history.log_evidence_total[history.phase == "E"][:-1], totals, 1e-12)
    assert np.diff(history.bound_total).min() > -1e-10
    close(history.log_evidence_total, history.bound_total + history.gap_total, 1e-12)
    assert history.log_evidence.attrs["measure"] == mixture.measure
    earlier = reference(family, x, 11)
    assert np.abs(fitted.parameters[name].numpy() - earlier[1]).max() > 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_repetitions(family):
    x = torch.as_tensor(data(family, 50))
    counts = torch.as_tensor(np.random.default_rng(9).integers(0, 4, 50))
    histories = [
        fit_em(build(family), rows, sample_weights=weights, initialization="given").history
        for rows, weights in ((x, counts), (x.repeat_interleave(counts, 0), None), (x, None))
    ]
    close(histories[0].log_evidence[-1], histories[1].log_evidence[-1], 1e-11)
    assert abs(float(histories[0].log_evidence[-1] - histories[2].log_evidence[-1])) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_have_the_mean_of_the_mixture(family):
    weights, means = parameters(family)
    x, z = build(family).sample(20_000, generator=torch.Generator().manual_seed(3))
    variances = {BernoulliMixture: means * (1 - means), PoissonMixture: means}[family]
    for k in range(NUM_COMPONENTS):
        chosen = x[z == k].numpy()
        error = np.sqrt(variances[k] / len(chosen))
        assert (np.abs(chosen.mean(0) - means[k]) / error).max() < STANDARD_ERRORS
        share = np.sqrt(weights[k] * (1 - weights[k]) / len(x))
        assert abs(len(chosen) / len(x) - weights[k]) < STANDARD_ERRORS * share
    error = np.sqrt(variances[0] / (z == 0).sum().item())
    assert (np.abs(x[z == 0].mean(0).numpy() - means[1]) / error).max() > STANDARD_ERRORS


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exact_guide_has_equal_weights(family):
    mixture = build(family, enumerate=False)
    x = torch.as_tensor(data(family, 11))
    evidence = special.logsumexp(log_joint(family, x.numpy(), *parameters(family)), axis=1)
    weights = log_weights(mixture.model, mixture.guide, x, num_particles=4)
    close(weights, np.broadcast_to(evidence, (4, 11)), 1e-11)
    other = build(family, enumerate=False, guide="amortized", hidden=(4,))
    assert log_weights(other.model, other.guide, x, num_particles=4).std(0).max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_features_without_any_counts_stay_finite(family):
    """The maximum lies at probability or rate 0, which has no finite logarithm."""
    x = torch.as_tensor(data(family))
    x[:, 2] = 0.0
    mixture = family(2, DIM)
    fitted = fit_em(mixture, x)
    assert all(bool(v.isfinite().all()) for v in fitted.parameters.values())
    assert bool(fitted.history.bound.notnull().all())
    assert mixture.score_samples(x).isfinite().all()
    name = "probs" if family is BernoulliMixture else "rates"
    assert float(fitted.parameters[name][:, 2].max()) < 1e-11
    assert float(fitted.parameters[name][:, 1].min()) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_one_component_is_the_mean(family):
    x = data(family)
    fitted = fit_em(family(1, DIM), torch.as_tensor(x))
    close(list(fitted.parameters.values())[1], x.mean(0)[None])
    assert fitted.config["fit_em"]["converged"]


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_numbers_give_what_their_values_give(family):
    x = torch.as_tensor(data(family))
    parts = [fit_em(family(2, DIM), rows, max_iterations=7).parameters for rows in (x, x.long())]
    close(parts[0]["weights"], parts[1]["weights"], 0)


def test_a_starved_component_is_named():
    mixture = build(PoissonMixture)
    with torch.no_grad():
        mixture.generative.natural[1] = 12.0  # rates of 160,000
    with pytest.raises(SingularComponentError, match=r"Component 1 of 3 holds .* fewer"):
        fit_em(mixture, torch.as_tensor(data(PoissonMixture)), initialization="given")


@pytest.mark.parametrize("family", FAMILIES)
def test_data_that_cannot_be_fitted(family, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # ours, as users meet it
    x = torch.as_tensor(data(family))
    for spoilt, message in (
        (x + 0.5, "0 or 1" if family is BernoulliMixture else "counts"),
        (-x - 1, "0 or 1" if family is BernoulliMixture else "counts"),
        (x / 0, "NaN or infinite"),
        (x[:1], "1 data cannot hold 3 components"),
        (x[:, 1:], "shape"),
        (x[:1].repeat(9, 1), "distinct rows"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_em(build(family), spoilt)
        if message not in ("distinct rows", "1 data cannot hold 3 components"):
            with pytest.raises(ValueError, match=message):
                build(family).model(spoilt)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BernoulliMixture.from_parameters(torch.ones(1), torch.ones(1, 3)), "between"),
        (lambda: PoissonMixture.from_parameters(torch.ones(1), torch.zeros(1, 3)), "positive"),
        (lambda: PoissonMixture.from_parameters(torch.ones(2), torch.ones(2, 3)), "sum to 2"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("family", FAMILIES)
def test_config_and_state_rebuild_the_mixture(family):
    mixture = build(family, guide="amortized", hidden=(4,))
    again = family(**mixture.config)
    again.load_state_dict(mixture.state_dict())
    x = torch.as_tensor(data(family))
    close(again.score_samples(x), mixture.score_samples(x), 0)
    free = NUM_COMPONENTS - 1 + NUM_COMPONENTS * DIM
    total = float(mixture.score_samples(x).sum())
    assert mixture.aic(x) == pytest.approx(2 * free - 2 * total, rel=1e-13)
    assert mixture.bic(x) == pytest.approx(np.log(NUM_DATA) * free - 2 * total, rel=1e-13)
