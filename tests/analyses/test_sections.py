"""What the analyses share."""

import math

import numpy as np
import pytest
from scipy.stats import sem

from analyses.sections import mean_and_error


def test_mean_and_error_are_those_of_the_known_values():
    values = np.array([1.0, math.nan, 4.0, -2.0, 0.5])
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(0.875)
    assert error == pytest.approx(sem(values, nan_policy="omit"))
    # Not the error over all five places.
    assert error != pytest.approx(np.nanstd(values, ddof=1) / math.sqrt(5))


def test_one_value_has_no_error_and_none_has_no_mean():
    mean, error = mean_and_error(np.array([3.0, math.nan]))
    assert mean == 3.0
    assert math.isnan(error)
    assert all(math.isnan(number) for number in mean_and_error(np.array([math.nan])))
