"""Likelihoods against quadrature in SciPy and against hand-written formulas."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from pyro_vae.models import (
    Bernoulli,
    CategoricalLevels,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    Likelihood,
    make_likelihood,
)

# Both sides of the switch from series to closed form (|l| = 0.2), and far out.
LOGITS = [0.0, 1e-6, 1e-3, 0.0041, 0.1999, 0.2001, 1.0, 5.0, 15.0, 20.0, 40.0, 300.0]
FAILURE_RATE = 2e-5


def one_pixel(logit, dtype=torch.float64):
    return torch.tensor([logit], dtype=dtype)


def quadrature(logit):
    """Log-normaliser and mean of exp((x - 1/2) l - |l|/2) on [0, 1], by adaptive quadrature."""
    corner = 1.0 if logit > 0 else 0.0
    split = min(max(corner - np.sign(logit) * min(1.0, 10 / max(abs(logit), 1.0)), 0.0), 1.0)

    def integral(power):
        parts = [
            integrate.quad(
                lambda x: x**power * np.exp((x - 0.5) * logit - abs(logit) / 2), *limits, epsabs=0
            )[0]
            for limits in ((0.0, split), (split, 1.0))
            if limits[0] < limits[1]
        ]
        return sum(parts)

    return np.log(integral(0)) + abs(logit) / 2, integral(1) / integral(0)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("logit", LOGITS)
def test_continuous_bernoulli_is_a_density_with_that_mean(logit, sign):
    logit = sign * logit
    log_normaliser, mean = quadrature(logit)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-6)):
        output = one_pixel(logit, dtype).requires_grad_()
        likelihood = ContinuousBernoulli().distribution(output)
        for x in (0.0, 0.3, 1.0):
            value = likelihood.log_prob(one_pixel(x, dtype))
            expected = (x - 0.5) * logit - log_normaliser
            assert value.item() == pytest.approx(expected, rel=tolerance, abs=tolerance)
            (gradient,) = torch.autograd.grad(value, output)
            assert gradient.item() == pytest.approx(x - mean, abs=tolerance)
        picture = ContinuousBernoulli().mean(output)
        assert picture.item() == pytest.approx(mean, abs=tolerance)
        assert likelihood.mean.item() == picture.item()


def test_torchs_own_continuous_bernoulli_would_fail_that_test():
    log_normaliser, _ = quadrature(20.0)
    clamped = torch.distributions.ContinuousBernoulli(logits=one_pixel(20.0, torch.float32))
    error = clamped.log_prob(one_pixel(0.0, torch.float32)).item() - (-10.0 - log_normaliser)
    assert error == pytest.approx(-0.2268, abs=1e-3)


@pytest.mark.parametrize(
    ("logit", "wrong"),
    [(-60.0, -40.0), (-3.0, -1.0), (0.0, 2.0), (1e-4, 2.0), (3.0, 5.0), (60.0, 90.0)],
)
def test_continuous_bernoulli_draws_pass_a_goodness_of_fit_test(logit, wrong):
    draws = ContinuousBernoulli().distribution(one_pixel(logit)).sample((2000,)).squeeze(-1)

    def cdf(x, logit=logit):
        return x if logit == 0 else np.expm1(x * logit) / np.expm1(logit)

    assert ((draws >= 0) & (draws <= 1)).all()
    assert stats.kstest(draws.numpy(), cdf).pvalue > FAILURE_RATE
    assert stats.kstest(draws.numpy(), lambda x: cdf(x, wrong)).pvalue < FAILURE_RATE


def test_continuous_bernoulli_draws_are_reparameterised():
    """The derivative of a draw is -(dF/dl)/p, here by finite differences of the CDF."""
    logit = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
    draw = ContinuousBernoulli().distribution(logit).rsample()
    (gradient,) = torch.autograd.grad(draw.sum(), logit)
    x, step = draw.item(), 1e-5

    def cdf(x, logit):
        return np.expm1(x * logit) / np.expm1(logit)

    by_logit = (cdf(x, 1.3 + step) - cdf(x, 1.3 - step)) / (2 * step)
    density = (cdf(x + step, 1.3) - cdf(x - step, 1.3)) / (2 * step)
    assert gradient.item() == pytest.approx(-by_logit / density, rel=1e-7)


def test_continuous_bernoulli_in_a_plate_expands_and_validates():
    likelihood = ContinuousBernoulli().distribution(torch.randn(3, dtype=torch.float64))
    expanded = likelihood.expand((5,))
    assert expanded.batch_shape == (5,)
    assert expanded.event_shape == (3,)
    x = torch.rand(5, 3, dtype=torch.float64)
    torch.testing.assert_close(expanded.log_prob(x), likelihood.log_prob(x))
    with pytest.raises(ValueError, match="support"):
        expanded.log_prob(x + 1)


def test_bernoulli_by_hand():
    output = torch.randn(4, 2, 3, dtype=torch.float64)
    x = torch.randint(2, (2, 3)).double()
    probs = 1 / (1 + torch.exp(-output))
    expected = torch.where(x == 1, probs, 1 - probs).log().sum(-1)
    torch.testing.assert_close(Bernoulli().distribution(output).log_prob(x), expected)
    torch.testing.assert_close(Bernoulli().mean(output), probs)


@pytest.mark.parametrize("scale", [0.3, "shared", "pixel"])
def test_gaussian_by_hand(scale):
    likelihood = Gaussian(scale, min_scale=0.01).double()
    output = torch.randn(4, 2, likelihood.num_parameters(3), dtype=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64)
    scales = {
        0.3: np.full((4, 2, 3), 0.3),
        "shared": np.full((4, 2, 3), 1.0),
        "pixel": 0.01 + np.exp(output[..., 3:].numpy()),
    }[scale]
    expected = stats.norm.logpdf(x.numpy(), output[..., :3].numpy(), scales).sum(-1)
    value = likelihood.distribution(output).log_prob(x).detach().numpy()
    np.testing.assert_allclose(value, expected, rtol=1e-7)  # the shared scale starts in float32
    np.testing.assert_array_equal(likelihood.mean(output).numpy(), output[..., :3].numpy())
    assert sum(p.numel() for p in likelihood.parameters()) == (scale == "shared")


def test_learned_scales_are_bounded_below():
    collapse = torch.full((1, 2), -1e4)
    assert Gaussian("pixel", min_scale=0.02).scale(collapse).item() == pytest.approx(0.02)
    shared = Gaussian("shared", min_scale=0.02)
    torch.nn.init.constant_(shared.raw_scale, -1e4)
    assert shared.scale(collapse).item() == pytest.approx(0.02)


BAD = {
    "bernoulli": [0.5, 2.0, -1.0, np.nan, np.inf],
    "continuous_bernoulli": [1.001, -0.001, np.nan, np.inf],
    "gaussian": [np.nan, np.inf, -np.inf],
}


@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name in BAD for bad in BAD[name]])
def test_data_off_the_support_are_refused(name, bad):
    x = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    make_likelihood(name).check(x)
    x[1, 2] = bad
    with pytest.raises(
        ValueError, match="NaN or infinite" if not np.isfinite(bad) else "data|Grey"
    ):
        make_likelihood(name).check(x)


def test_grey_pixels_under_a_bernoulli_are_told_the_way_out():
    with pytest.raises(ValueError, match="binarise them, or use the 'continuous_bernoulli'"):
        Bernoulli().check(torch.tensor([[0.0, 0.4, 1.0]]))


def test_large_finite_data_whose_sum_overflows_are_accepted():
    Gaussian().check(torch.full((2, 3), 3e38, dtype=torch.float32))


@pytest.mark.parametrize(
    ("given", "kind", "measure"),
    [
        ("bernoulli", Bernoulli, "binary"),
        ("continuous_bernoulli", ContinuousBernoulli, "grey"),
        ("gaussian", Gaussian, "real"),
        ({"name": "gaussian", "scale": 0.2}, Gaussian, "real"),
        ({"name": "gaussian", "scale": "pixel", "min_scale": 0.1}, Gaussian, "real"),
    ],
)
def test_a_likelihood_is_rebuilt_from_its_config(given, kind, measure):
    likelihood = make_likelihood(given)
    assert type(likelihood) is kind
    assert likelihood.measure == measure
    again = make_likelihood(json.loads(json.dumps(likelihood.config)))
    assert again.config == likelihood.config
    if not isinstance(given, str):
        assert given.items() <= likelihood.config.items()
    assert make_likelihood(likelihood) is likelihood


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda: make_likelihood("poisson"), ValueError),
        (lambda: make_likelihood({"scale": 1.0}), ValueError),
        (lambda: make_likelihood({"name": "bernoulli", "scale": 1.0}), TypeError),
        (lambda: Gaussian("feature"), ValueError),
        (lambda: Gaussian(0.0), ValueError),
        (lambda: Gaussian(float("nan")), ValueError),
        (lambda: Gaussian(min_scale=0.0), ValueError),
        (Likelihood, TypeError),
    ],
)
def test_refusals(build, error):
    with pytest.raises(error):
        build()


# --- grey levels ----------------------------------------------------------------------------------

GREY_LEVELS: list[dict[str, Any]] = [
    {"name": "categorical", "levels": 6},
    {"name": "discretized_logistic", "levels": 6, "scale": "shared"},
    {"name": "discretized_logistic", "levels": 6, "scale": "pixel", "min_scale": 0.01},
    {"name": "discretized_logistic", "levels": 6, "components": 3},
    {"name": "discretized_logistic", "levels": 6, "components": 2, "scale": "shared"},
]


def grey(spec, num_pixels=2):
    likelihood = make_likelihood(spec).double()
    return likelihood, torch.randn(4, 3, likelihood.num_parameters(num_pixels))


def enumerated(likelihood, output):
    """The log-probability of every level of every pixel, `[levels, 4, 3, pixels]`."""
    levels = torch.linspace(0, 1, likelihood.levels)[:, None, None, None]
    pixels = likelihood.distribution(output).base_dist
    return levels, pixels.log_prob(levels.expand(-1, 4, 3, 2))


@pytest.mark.parametrize("spec", GREY_LEVELS)
def test_the_levels_probabilities_sum_to_one_and_have_that_mean(spec):
    likelihood, output = grey(spec)
    for scale in (1.0, 30.0):  # also where probabilities underflow
        levels, log_probs = enumerated(likelihood, scale * output)
        torch.testing.assert_close(log_probs.exp().sum(0), torch.ones(4, 3, 2))
        assert log_probs.isfinite().all()
        mean = (levels * log_probs.exp()).sum(0)
        torch.testing.assert_close(likelihood.mean(scale * output), mean)
    assert not torch.allclose(log_probs[1:].exp().sum(0), torch.ones(4, 3, 2))


@pytest.mark.parametrize("spec", GREY_LEVELS)
def test_draws_of_levels_follow_their_probabilities(spec):
    likelihood, output = grey(spec)
    log_probs = enumerated(likelihood, output)[1].detach()
    draws = likelihood.distribution(output).sample((3000,))
    counts = torch.stack([(draws * 5).round() == level for level in range(6)]).double().sum(1)
    likelihood.check(draws)
    expected = 3000 * log_probs.exp()
    kept = expected[:, 0, 0, 0] > 1  # what a chi-square needs
    observed, wanted = counts[kept, 0, 0, 0], expected[kept, 0, 0, 0]
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    assert stats.chi2.sf(statistic, int(kept.sum())) > FAILURE_RATE
    wrong = counts[kept, 1, 1, 1]
    assert stats.chi2.sf(float(((wrong - wanted) ** 2 / wanted).sum()), int(kept.sum())) < 1e-3


def test_categorical_levels_by_hand():
    likelihood, output = grey(GREY_LEVELS[0])
    x = torch.tensor([[0.2, 1.0], [0.0, 0.6], [0.8, 0.4]])
    logits = output.reshape(4, 3, 6, 2).numpy()
    log_probs = logits - np.log(np.exp(logits).sum(2, keepdims=True))
    index = (x.numpy() * 5).round().astype(int)
    expected = np.zeros((4, 3))
    for row in range(3):
        for pixel in range(2):
            expected[:, row] += log_probs[:, row, index[row, pixel], pixel]
    np.testing.assert_allclose(likelihood.distribution(output).log_prob(x), expected, rtol=1e-12)


@pytest.mark.parametrize("components", [1, 3])
def test_the_discretized_logistic_by_the_logistic_cdf(components):
    likelihood, output = grey(
        {"name": "discretized_logistic", "levels": 6, "components": components}
    )
    blocks = output.reshape(4, 3, -1, components, 2).numpy()
    loc, scale = 0.5 + blocks[:, :, 0], 1e-3 + (0.1 - 1e-3) * np.exp(blocks[:, :, 1])
    weight: Any = 1.0
    if components > 1:
        weight = np.exp(blocks[:, :, 2]) / np.exp(blocks[:, :, 2]).sum(2, keepdims=True)
    _, log_probs = enumerated(likelihood, output)
    for level in range(6):
        upper = 1.0 if level == 5 else stats.logistic.cdf((level + 0.5) / 5, loc, scale)
        lower = 0.0 if level == 0 else stats.logistic.cdf((level - 0.5) / 5, loc, scale)
        expected = (weight * (upper - lower)).sum(2)
        np.testing.assert_allclose(log_probs[level].exp(), expected, rtol=1e-9, atol=1e-14)


@pytest.mark.float32
def test_far_tails_keep_a_gradient_in_single_precision():
    likelihood = make_likelihood({"name": "discretized_logistic", "levels": 256})
    output = torch.tensor([[30.0, -6.0]]).requires_grad_()  # 30 grey ranges off, scale 0.001
    value = likelihood.distribution(output).log_prob(torch.tensor([[128 / 255]]))
    assert value.isfinite()
    assert value < -5000
    (gradient,) = torch.autograd.grad(value.sum(), output)
    assert gradient.isfinite().all()
    assert gradient[0, 0] < -100


@pytest.mark.parametrize("spec", GREY_LEVELS)
def test_data_between_the_levels_are_told_the_way_out(spec):
    likelihood = make_likelihood(spec)
    assert likelihood.measure == "counts"
    for dtype in (torch.float32, torch.float64):
        likelihood.check(torch.arange(6, dtype=dtype)[None] / 5)
    for x, message in [
        (torch.tensor([[0.3, 1.0]]), "round them"),
        (torch.tensor([[0.0, 4.0]]), "divide pixels 0..5 by 5"),
        (torch.tensor([[0.0, -0.2]]), "divide"),
        (torch.tensor([[0.0, np.nan]]), "NaN or infinite"),
    ]:
        with pytest.raises(ValueError, match=message):
            likelihood.check(x)
    expanded = likelihood.distribution(torch.zeros(likelihood.num_parameters(2))).expand((3,))
    with pytest.raises(ValueError, match="support"):
        expanded.log_prob(torch.tensor([[0.3, 1.0]]))


def test_pixels_of_256_levels_lie_on_their_grid_in_single_precision():
    x = torch.arange(256, dtype=torch.float32)[None] / 255
    CategoricalLevels().check(x)
    DiscretizedLogistic().check(x)
    with pytest.raises(ValueError, match="grey levels"):
        CategoricalLevels().check(x + torch.rand_like(x) / 512)


@pytest.mark.parametrize("spec", GREY_LEVELS)
def test_a_likelihood_of_levels_is_rebuilt_from_its_config(spec):
    likelihood = make_likelihood(spec)
    again = make_likelihood(json.loads(json.dumps(likelihood.config)))
    assert again.config == likelihood.config
    assert spec.items() <= likelihood.config.items()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CategoricalLevels(1), "at least 2"),
        (lambda: DiscretizedLogistic(components=0), "components"),
        (lambda: DiscretizedLogistic(scale="feature"), "'shared' or 'pixel'"),
        (lambda: DiscretizedLogistic(min_scale=0.5), "min_scale"),
    ],
)
def test_refusals_of_levels(build, message):
    with pytest.raises(ValueError, match=message):
        build()
