"""Factors of few numbers: tables of quantiles, and how often intervals hold a planted truth."""

import math

import numpy as np
import pytest

from pyro_vae.intervals import enough_for_a_mean, mean_factor, student_factor, variance_factor

Z = 1.959964


def test_student_s_factor_is_that_of_tables():
    # 97.5 % quantiles of Student's t: 12.7062, 2.3646 and 1.9840 for 1, 7 and 99 degrees.
    expected = [12.7062 / Z, 2.3646 / Z, 1.9842 / Z]
    assert student_factor(np.array([2, 8, 100])) == pytest.approx(expected, rel=1e-4)
    assert math.isnan(student_factor(1))


@pytest.mark.parametrize("freedom", [3, 7, 40])
def test_the_variance_of_few_normal_numbers_is_held(freedom):
    """20,000 replications: a coverage of 0.95 is known to 0.15 %; four of that is the room."""
    square = np.random.default_rng(0).chisquare(freedom, 20_000) / freedom
    error = square * math.sqrt(2 / freedom)
    held = np.mean(np.abs(square - 1) <= Z * variance_factor(freedom) * error)
    assert abs(held - 0.95) < 0.0062
    assert np.mean(np.abs(square - 1) <= Z * error) < 0.93  # the delta method alone


@pytest.mark.parametrize(("size", "least", "bare"), [(8, 0.87, 0.83), (60, 0.93, 0.925)])
def test_means_of_skewed_numbers_are_held_more_often(size, least, bare):
    """Minus chi-square with one degree of freedom, as ELBOs are; rates known to 0.4 %."""
    values = -np.random.default_rng(1).chisquare(1, (4000, size))
    away = np.abs(values.mean(1) + 1)
    error = values.std(1, ddof=1) / math.sqrt(size)
    factors = np.array([mean_factor(row) for row in values])
    assert np.mean(away <= Z * factors * error) > least - 0.012
    assert np.mean(away <= Z * error) < bare + 0.012


def test_few_and_skewed_numbers_are_not_enough():
    normal = np.random.default_rng(2).normal(size=100)
    assert enough_for_a_mean(normal)
    assert mean_factor(normal) == pytest.approx(1.9842 / Z, rel=0.01)
    assert not enough_for_a_mean(normal[:29])
    assert not enough_for_a_mean(np.exp(2 * normal))
    assert mean_factor(np.zeros(5)) == pytest.approx(2.7764 / Z, rel=1e-4)
