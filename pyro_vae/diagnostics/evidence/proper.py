"""Whether every latent has a prior that integrates to one: without it there is no evidence."""

import math
from collections.abc import Callable

import pyro
import torch
from pyro.distributions import ImproperUniform, MaskedDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyro_vae.inference.programs import (
    Pair,
    ProgramError,
    Site,
    weighted_sites,
)
from pyro_vae.inference.supports import support_of, transform_of

__all__ = ["check_proper"]

# How far out a density is looked at, in unconstrained space: as far as its transform can follow.
_REACHES = (1e12, 1e6, 1e3, 300.0, 80.0, 20.0)


def check_proper(pair: Pair) -> None:
    """Refuses models with an improper prior, for their p(x) is infinite or means nothing.

    Found are `ImproperUniform`, sites whose density is masked out altogether, and densities that
    do not fall however far a latent moves: one that can be integrated has to, in unconstrained
    space.

    Raises:
        ProgramError: If a prior is improper; names the site.
    """
    for name, site in weighted_sites(pair.first_run()[1]).items():
        if not site["is_observed"] and _is_improper(site):
            raise ProgramError(
                f"the prior of the model's latent site '{name}' is improper, so its evidence log "
                "p(x) does not exist; give it a proper prior (sample_posterior works without)"
            )


def _is_improper(site: Site) -> bool:
    if site["mask"] is not None and not bool(torch.as_tensor(site["mask"]).any()):
        return True
    fn = site["fn"]
    while fn is not None:
        if isinstance(fn, ImproperUniform):
            return True
        if isinstance(fn, MaskedDistribution) and not bool(torch.as_tensor(fn._mask).any()):
            return True
        fn = getattr(fn, "base_dist", None)
    return _never_falls(site)


def _never_falls(site: Site) -> bool:
    """Whether a density, as one of unconstrained latents, does not fall on one side."""
    fn, value = site["fn"], site["value"]
    try:
        if support_of(fn).is_discrete or not isinstance(value, Tensor):
            return False
        transform = transform_of(fn)
    except (AttributeError, NotImplementedError):  # no line to walk along: taken at its word
        return False
    free = transform.inv(value)

    def log_density(step: float) -> tuple[Tensor, Tensor] | None:
        """The density a step away and its precision; None where numbers do not go so far."""
        u = free + step
        try:
            moved = transform(u)
            followed = (transform.inv(moved) - u).abs() < 1e-3 * abs(step)  # else it is at an edge
            if not bool(followed.all()) or not bool(support_of(fn).check(moved).all()):
                return None
            log_jacobian = transform.log_abs_det_jacobian(u, moved)
            log_prob = fn.log_prob(moved)
        except torch.linalg.LinAlgError:
            return None
        log_jacobian = sum_rightmost(log_jacobian, max(0, log_jacobian.dim() - log_prob.dim()))
        total = log_prob + log_jacobian
        if bool((total.isnan() | (total == math.inf)).any()):
            return None
        size = 1 + log_prob.abs() + log_jacobian.abs()
        return total, size * torch.finfo(total.dtype).eps ** 0.75

    with pyro.validation_enabled(False):
        return any(_stays(log_density, side) for side in (-1.0, 1.0))


def _stays(log_density: Callable[[float], tuple[Tensor, Tensor] | None], side: float) -> bool:
    """Whether no entry of a density falls over the outer half of the way that numbers go."""
    for reach in _REACHES:
        near, far = log_density(side * reach / 2), log_density(side * reach)
        if near is not None and far is not None:
            falls = (far[0] < near[0] - far[1]) | (far[0] == -math.inf)
            return not bool(falls.any())
    return False
