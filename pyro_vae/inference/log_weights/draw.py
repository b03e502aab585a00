r"""The primitive: everything that this library measures is a reduction of log weights.

.. math:: \log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn} \mid x_n), \qquad
          z_{kn} \sim q(\cdot \mid x_n)

Their mean over particles estimates the ELBO, their log-mean-exp the importance-weighted bound
(Burda et al. 2016), their tail gives the Pareto k-hat and their spread the effective sample size.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.checks import check_count
from pyro_vae.data import Seed, as_seed
from pyro_vae.inference.programs import (
    Pair,
    Program,
    program_scope,
    tool,
)
from pyro_vae.results import ShortRepr

__all__ = [
    "SplitLogWeights",
    "effective_sample_size",
    "elbo",
    "importance_bound",
    "log_weights",
    "mean_error",
]


@dataclass(frozen=True, repr=False)
class SplitLogWeights(ShortRepr):
    r"""Log weights of a pair with global latents, in nats and in two parts.

    .. math:: \log \frac{p(x, z, \theta_k)}{q(z, \theta_k \mid x)}
              = \log \frac{p(\theta_k)}{q(\theta_k)}
              + \sum_n \log \frac{p(x_n, z_{kn} \mid \theta_k)}{q(z_{kn} \mid x_n, \theta_k)}

    Their means over particles are the parts of the ELBO. An importance weight is their sum alone:
    the log-mean-exp of one datum's part, by global latents that all data share, estimates no
    log p(x_n).

    Attributes:
        global_log_weights: Of the global latents, `[particles]`.
        log_weights: Of each datum given these, `[particles, batch]`.
        global_latents: Their names.
    """

    global_log_weights: Float[Tensor, " particles"]
    log_weights: Float[Tensor, "particles batch"]
    global_latents: tuple[str, ...]

    @property
    def joint(self) -> Float[Tensor, "particles 1"]:
        """One weight per particle on all data."""
        return (self.global_log_weights + self.log_weights.sum(1))[:, None]


@tool
def log_weights(
    model: Program,
    guide: Program,
    x: Any,
    num_particles: int = 1,
    *,
    joint: bool | None = None,
    seed: Seed | None = None,
) -> Float[Tensor, "particles batch"] | SplitLogWeights:
    r"""Draws particles from a guide; returns the log importance weight of each, per datum.

    Any Pyro model and guide will do whose sites all lie in one batch plate, or outside it where
    they are global latents, with weights of their own (`SplitLogWeights`). That plate may have
    any name and dim, a stated size or none, and may be subsampled (the factor N/B is left out: it
    belongs outside any reduction; `all_data` undoes the subsampling). Inner plates, masks,
    auxiliary sites of autoguides and `pyro.deterministic` are understood; discrete latents that the
    model marks (`infer={"enumerate": "parallel"}`) and the guide leaves out are summed out, in
    inner plates and chains (`pyro.markov`) too. Programs that cannot run
    their particles in one tensor program are found out and run one particle at a time. Gradients
    flow.

    Args:
        model: The generative program, called as `model(x)`.
        guide: The program of the approximate posterior, called as `guide(x)`.
        x: The data; a tuple stands for several arguments, a dict for keyword arguments.
        num_particles: Draws from the guide for each datum.
        joint: None for what the plates say. True for one weight per particle on the full data: the
            sum over all sites, whatever plates they are in, sequential ones too. False for weights
            per datum alone, which refuses global latents.
        seed: Seeds the draws and leaves the caller's random state alone. With None the draws come
            from the global stream, and equal those of `pyro.infer.Trace_ELBO` from the same state.

    Returns:
        Log weights in nats, `[particles, batch]`; `[particles, 1]` if `joint` is True; in two parts
        if it is None and latents are global.

    Raises:
        ProgramError: If the pair has no such weights; the sentence names the site and says what to
            do. See `inspect_programs` for the list.
        ValueError: If `num_particles` is no integer from 1.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def exact(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> log_weights(model, exact, torch.tensor([0.0, 1.0]), num_particles=2, seed=0)
        tensor([[-1.2655, -1.5155],
                [-1.2655, -1.5155]])
    """
    seed = as_seed(seed)
    check_count("num_particles", num_particles)
    with program_scope(seed):
        pair = Pair.inspect(model, guide, x, joint=joint, num_particles=num_particles)
        if joint is None and pair.structure.split is not None:
            parts = pair.split_log_weights(num_particles)
            return SplitLogWeights(*parts, pair.structure.split.global_latents)
        return pair.log_weights(num_particles)


def elbo(log_weights: Float[Tensor, "particles batch"]) -> Float[Tensor, " batch"]:
    """The ELBO per datum in nats, the mean of the log weights over particles.

    References:
        Kingma & Welling (2014), Auto-encoding variational Bayes.
    """
    return log_weights.mean(0)


def importance_bound(log_weights: Float[Tensor, "particles batch"]) -> Float[Tensor, " batch"]:
    """The importance-weighted bound per datum in nats, the log-mean-exp over particles.

    Its expectation is below log p(x) and rises to it with the number of particles.

    References:
        Burda, Grosse & Salakhutdinov (2016), Importance weighted autoencoders.
    """
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def effective_sample_size(log_weights: Float[Tensor, "particles batch"]) -> Float[Tensor, " batch"]:
    r"""Effective sample size per datum, :math:`(\sum w)^2 / \sum w^2`, between 1 and K.

    References:
        Kong (1992), A note on importance sampling using standardized weights.
    """
    return torch.exp(2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0))


def mean_error(draws: Float[Tensor, "draws *rest"]) -> Float[Tensor, "*rest"]:
    """Standard error of the mean of independent draws; nan from a single one."""
    if len(draws) < 2:
        return torch.full_like(draws[0], math.nan)
    return draws.std(0) / math.sqrt(len(draws))
