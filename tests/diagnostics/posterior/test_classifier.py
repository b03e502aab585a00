"""What the classifier two-sample test tells apart, and how often it errs where nothing differs."""

import math

import pytest
import torch
from test_two_sample import FAULTS

from pyro_vae.diagnostics.posterior.c2st import classifier_two_sample


def best_accuracy(shift: float) -> float:
    """Of any classifier of N(shift, 1) and N(0, 1): Phi(shift / 2)."""
    return 0.5 * (1 + math.erf(shift / 2 / math.sqrt(2)))


def test_equal_samples_are_told_apart_by_chance():
    size, data = 60, 120
    found = classifier_two_sample(torch.randn(size, data, 2), torch.randn(size, data, 2))
    # 4 standard errors of the mean, with the variance that shared training draws make.
    error = math.sqrt((1 + 2 / math.pi) / (4 * 2 * size * data))
    assert abs(found.accuracy.mean() - 0.5) < 4 * error
    # At most 5 % of 120, and 3.5 standard errors of a binomial count; a bare binomial has 8 %.
    assert (found.p_value <= 0.05).sum() <= 6 + 3.5 * math.sqrt(data * 0.05 * 0.95)
    assert found.p_value.std() > 0.2


@pytest.mark.parametrize("kind", ["quadratic", "mlp"])
def test_samples_20_sd_apart_are_told_apart(kind):
    data = 20 if kind == "quadratic" else 2
    found = classifier_two_sample(
        torch.randn(60, data, 1) + 20, torch.randn(40, data, 1), kind=kind
    )
    assert (found.accuracy > 0.99).all()
    assert (found.p_value < 1e-8).all()


def test_accuracy_comes_close_to_the_best_one():
    shift, size, data = 1.0, 250, 20
    found = classifier_two_sample(torch.randn(size, data, 1) + shift, torch.randn(size, data, 1))
    error = 4 * math.sqrt(0.25 / (2 * size * data))
    # A fifth of the draws are left out, and few features learnt: it is at most 0.01 from the best.
    assert (
        best_accuracy(shift) - 0.01 - error < found.accuracy.mean() < best_accuracy(shift) + error
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_seen(fault):
    wrong, right = FAULTS[fault]
    sample, reference = wrong(torch.randn(300, 10, 2)), right(torch.randn(330, 10, 2))
    found = classifier_two_sample(sample, reference)
    assert (found.p_value <= 0.05).double().mean() >= 0.8
    assert found.accuracy.mean() > 0.55


def test_the_network_sees_what_squares_and_products_do_not():
    sign = torch.where(torch.rand(300, 1, 1) < 0.5, 1.0, -1.0)
    sample = sign * 0.98 + 0.2 * torch.randn(300, 1, 1)  # two modes, mean 0 and sd 1
    reference = torch.randn(300, 1, 1)
    network = classifier_two_sample(sample, reference, kind="mlp", folds=2)
    assert network.accuracy.item() > 0.65
    assert network.p_value.item() < 1e-3
    assert classifier_two_sample(sample, reference).accuracy.item() < 0.6


def test_few_draws_in_many_dimensions_go_without_products():
    sample, reference = torch.randn(60, 10, 12), torch.randn(60, 10, 12)
    sample[..., 1] = sample[..., 0]
    # 120 draws, 90 features with products: the correlation is left out, a scale is not.
    assert classifier_two_sample(sample, reference).accuracy.mean() < 0.55
    assert classifier_two_sample(2 * reference.flip(0), reference).accuracy.mean() > 0.75
    many = torch.randn(300, 5, 12)
    many[..., 1] = many[..., 0]
    assert classifier_two_sample(many, torch.randn(300, 5, 12)).accuracy.mean() > 0.65


def test_units_and_constants_do_not_matter():
    sample, reference = torch.randn(40, 4, 2) + 0.3, torch.randn(50, 4, 2)
    found = classifier_two_sample(sample, reference)
    units = torch.tensor([1e4, 1e-4])
    moved = classifier_two_sample(3 + sample * units, 3 + reference * units)
    torch.testing.assert_close(moved.accuracy, found.accuracy)
    constant = torch.full((20, 1, 2), 0.1)
    equal = classifier_two_sample(constant, constant)
    assert equal.accuracy.item() == pytest.approx(0.5)
    assert equal.p_value.item() > 0.4
    assert classifier_two_sample(constant, constant + 1).accuracy.item() == 1.0


def test_results_follow_the_seed_and_not_the_callers_random_state():
    sample, reference = torch.randn(30, 4, 2), torch.randn(25, 4, 2)
    state = torch.get_rng_state()
    first = classifier_two_sample(sample, reference, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.accuracy, classifier_two_sample(sample, reference, seed=3).accuracy)
    other = classifier_two_sample(sample, reference, seed=4)
    assert not torch.equal(first.accuracy, other.accuracy)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_draw_that_is_not_finite_spoils_its_own_datum_alone(bad):
    sample, reference = torch.randn(20, 3, 2), torch.randn(25, 3, 2)
    whole = classifier_two_sample(sample, reference)
    reference[7, 1, 0] = bad
    found = classifier_two_sample(sample, reference)
    for good, spoilt in zip(whole, found, strict=True):
        assert spoilt[1].isnan()
        assert torch.equal(spoilt[[0, 2]], good[[0, 2]])


@pytest.mark.float32
def test_single_precision_draws_give_double_precision_results():
    found = classifier_two_sample(torch.randn(20, 2, 1), torch.randn(20, 2, 1))
    assert found.accuracy.dtype == found.p_value.dtype == torch.float64


def test_what_cannot_be_classified_is_refused():
    z = torch.randn(10, 2, 3)
    with pytest.raises(ValueError, match=r"sample has 4 draws .* at least 5 are needed; draw more"):
        classifier_two_sample(z[:4], z)
    with pytest.raises(ValueError, match="reference has 1 draws"):
        classifier_two_sample(z, z[:1], folds=2)
    with pytest.raises(ValueError, match="folds must be at least 2, not 1"):
        classifier_two_sample(z, z, folds=1)
    with pytest.raises(ValueError, match="kind is 'quadratic' or 'mlp', not 'tree'"):
        classifier_two_sample(z, z, kind="tree")
    with pytest.raises(ValueError, match="no dimension"):
        classifier_two_sample(z[..., :0], z[..., :0])
