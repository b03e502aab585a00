"""Arguments that many tools check in common: what passes, and the sentence for what does not."""

import math

import numpy as np
import pytest

from pyro_vae.checks import check_count, check_max_memory, check_positive


def test_what_is_in_its_range_passes():
    check_count("n", 1)
    check_count("n", 0, 0)
    check_count("n", None, optional=True)
    check_positive("rate", 0.1)
    check_max_memory(math.inf)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1", None, np.int64(1)])
def test_a_count_that_is_none_is_said(value):
    with pytest.raises(ValueError, match=r"^n must be an integer from 1, not "):
        check_count("n", value)


def test_the_sentence_names_the_least_the_option_and_the_reason():
    with pytest.raises(ValueError, match="n must be an integer from 8 or None, not 7: too few"):
        check_count("n", 7, 8, optional=True, because=": too few")


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_what_is_not_positive_and_finite_is_said(value):
    with pytest.raises(ValueError, match="rate must be positive, not"):
        check_positive("rate", value)
    if value != math.inf:
        with pytest.raises(ValueError, match="max_memory is in GiB and must be positive"):
            check_max_memory(value)
