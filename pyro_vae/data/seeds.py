"""Seeds: an integer, or a generator that one is drawn from."""

from typing import Any, TypeAlias, overload

import numpy as np
import torch

__all__ = ["Seed", "as_seed", "known_seed"]

Seed: TypeAlias = int | np.integer | np.random.Generator | torch.Generator
"""What every tool takes as its `seed`."""


@overload
def as_seed(seed: Seed) -> int: ...
@overload
def as_seed(seed: Seed | None) -> int | None: ...
def as_seed(seed: Any) -> int | None:
    """The integer that a result records as its seed.

    Args:
        seed: An integer is returned as it is, None too. From a `numpy.random.Generator` or a
            `torch.Generator` an integer is drawn, so that a second call with it gives another one.

    Raises:
        TypeError: If it is something else.
        ValueError: If an integer is out of range.

    Example:
        >>> as_seed(3), as_seed(np.random.default_rng(0)) == as_seed(np.random.default_rng(0))
        (3, True)
    """
    if isinstance(seed, np.random.Generator):
        return int(seed.integers(2**31))
    if isinstance(seed, torch.Generator):
        return int(torch.randint(2**31, (), generator=seed, device=seed.device))
    if seed is None:
        return None
    if isinstance(seed, int | np.integer) and not isinstance(seed, bool):
        if not 0 <= int(seed) < 2**32:
            raise ValueError(f"seed must be an integer from 0 to 2**32 - 1, not {seed}")
        return int(seed)
    raise TypeError(
        f"seed is an integer, a numpy.random.Generator or a torch.Generator, not {seed!r}"
    )


def known_seed(seed: Seed | None) -> int:
    """The same where None must become an integer too: one drawn from torch's global stream.

    Raises:
        TypeError: If it is something else.
    """
    found = as_seed(seed)
    return int(torch.randint(2**31, ())) if found is None else found
