"""Monte-Carlo EM of programs whose posterior has no closed form: the E step is a Markov chain."""

import math
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.checks import check_count, check_positive
from pyro_vae.inference.estimators import Objective
from pyro_vae.inference.mcmc import hmc_step
from pyro_vae.inference.programs import Arguments, Pair, Program, UnconstrainedModel
from pyro_vae.inference.tempered import Tempered

__all__ = ["MonteCarloEM"]

_ADAPTATION = 0.1  # of the log step size, for an acceptance that is off by one


@final
class MonteCarloEM(Objective):
    r"""Monte-Carlo EM as a loss for `fit`: the guide has no part in it.

    For each mini-batch `num_particles` chains of HMC start at draws of the prior and move
    `num_steps` times towards p(z | x); the model then maximises the mean of log p(x, z) where they
    stand, whose gradient is that of log p(x) once the chains have forgotten their start (Fisher's
    identity). The step size follows the acceptance, from one call to the next.

    Args:
        num_particles: Chains for each datum.
        num_steps: Trajectories of each chain.
        num_leapfrog: Steps of a trajectory.
        step_size: To begin with.
        target_accept: The acceptance that the step size aims at.
        joint: True for models with global latents.

    Raises:
        ValueError: If a setting is out of its range.
        ProgramError: From every method, if a latent is discrete or a point mass.

    Note: the value, the mean of log p(x, z), bounds nothing; a guide is passed to `fit` for the
        sites' sake and left as it is.

    References:
        Wei & Tanner (1990), A Monte Carlo implementation of the EM algorithm; Kingma & Welling
        (2014), Auto-encoding variational Bayes, appendix E, for this use of HMC.
    """

    bound_kind = "objective"
    value_name = "MCEM"
    unbiased = False

    def __init__(
        self,
        num_particles: int = 1,
        *,
        num_steps: int = 10,
        num_leapfrog: int = 10,
        step_size: float = 0.1,
        target_accept: float = 0.9,
        joint: bool = False,
    ) -> None:
        super().__init__(num_particles, joint=joint)
        for name, count in (("num_steps", num_steps), ("num_leapfrog", num_leapfrog)):
            check_count(name, count)
        check_positive("step_size", step_size)
        if not 0 < target_accept < 1:
            raise ValueError(f"target_accept must lie between 0 and 1, not {target_accept!r}")
        self.num_steps, self.num_leapfrog = num_steps, num_leapfrog
        self.step_size, self.target_accept = step_size, target_accept
        self._step = step_size  # as it has been adapted

    def _surrogate(
        self, model: Program, guide: Program, arguments: Arguments
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, ""], float]:
        structure = self.structure_of(model, guide, arguments)
        args, kwargs = arguments
        pair = Pair(model, guide, kwargs if kwargs and not args else args, structure)
        latent_model = UnconstrainedModel(pair, has_guide=False)
        u = self._e_step(latent_model)
        value = latent_model.log_density(u).mean(0)
        return value, value.sum(), structure.scale

    @torch.no_grad()
    def _e_step(self, latent_model: UnconstrainedModel) -> Float[Tensor, "chains batch dim"]:
        """Where the chains stand, `[chains, batch, dim]`."""
        target = Tempered(latent_model, capture=False)
        point = target(latent_model.draw(self.num_particles))
        for _ in range(self.num_steps):
            # Lengths differ, so that no trajectory closes on itself.
            step = self._step * (0.8 + 0.4 * torch.rand_like(point.log_density))
            moved = hmc_step(
                target,
                point,
                step,
                num_leapfrog=self.num_leapfrog,
                active=latent_model.active,
            )
            point = moved.point
            excess = float(moved.acceptance.mean()) - self.target_accept
            self._step *= math.exp(_ADAPTATION * excess)
        return point.u
