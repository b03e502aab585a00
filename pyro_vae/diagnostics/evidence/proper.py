"""Whether every latent has a prior that integrates to one: without it there is no evidence."""

import torch
from pyro.distributions import ImproperUniform, MaskedDistribution
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_vae.inference.programs import (
    Pair,
    ProgramError,
    Site,
    support_of,
    weighted_sites,
)

__all__ = ["check_proper"]

_STEPS = (-1000.0, -10.0, 10.0, 1000.0)  # moves after which no proper density is the same


def check_proper(pair: Pair) -> None:
    """Refuses models with an improper prior, for their p(x) is infinite or means nothing.

    Found are `ImproperUniform`, sites whose density is masked out altogether, and densities that
    stay the same however far a latent moves.

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
    return _is_flat(site)


def _is_flat(site: Site) -> bool:
    """Whether the density of a latent without bounds is one constant."""
    fn, value = site["fn"], site["value"]
    try:
        support = support_of(fn)
    except (AttributeError, NotImplementedError):  # a user's distribution need not state one
        return False
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    bounded = isinstance(support, constraints.interval) or support is constraints.simplex
    if support.is_discrete or bounded or not isinstance(value, Tensor):
        return False
    try:
        transform = biject_to(support_of(fn))
    except NotImplementedError:  # no line to walk along: such a prior is taken at its word
        return False
    free = transform.inv(value)
    here = fn.log_prob(value)
    moved = [transform(free + step) for step in _STEPS]
    # Where rounding took a move off the support (exp(-1000) is 0) there is no density to compare.
    inside = [there for there in moved if bool(fn.support.check(there).all())]
    return all(bool((fn.log_prob(there) == here).all()) for there in inside)
