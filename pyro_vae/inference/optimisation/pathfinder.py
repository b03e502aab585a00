r"""Pathfinder: the normal distribution with the highest ELBO on an optimiser's way to a mode.

At every iterate of L-BFGS stands the normal with mean :math:`\theta + \Sigma \nabla \log p` and the
path's own inverse Hessian :math:`\Sigma`. The best of them, by an ELBO of a few draws, is a start
for Markov chains, or an approximation of its own. All chains and data climb together.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pyro_vae.inference.optimisation.lbfgs import Ascent, InverseHessian, climb
from pyro_vae.inference.programs import ProgramError
from pyro_vae.inference.tempered import Point, Tempered

__all__ = ["PathNormals", "find_paths", "starting_points"]

_STARTS = 20  # draws tried for a path that starts where the density is zero


class PathNormals(NamedTuple):
    """The best normal of each path.

    Attributes:
        loc: Its mean, `[chains, batch, dim]`.
        covariance: Its covariance, in factors.
        elbo: Of it in nats, `[chains, batch]`; -inf where no iterate had one.
        mode: Where the path ended, `[chains, batch, dim]`.
        moving: Whether it was on its way still, `[chains, batch]`.
    """

    loc: Float[Tensor, "chains batch dim"]
    covariance: InverseHessian
    elbo: Float[Tensor, "chains batch"]
    mode: Float[Tensor, "chains batch dim"]
    moving: Bool[Tensor, "chains batch"]

    def draw(
        self, count: int
    ) -> tuple[Float[Tensor, "draws chains batch dim"], Float[Tensor, "draws chains batch"]]:
        """Draws of each normal, and their log densities."""
        noise = torch.randn(count, *self.loc.shape).to(self.loc)
        centred, log_q = self.covariance.normal(noise)
        return self.loc + centred, log_q


def starting_points(target: Tempered, num_chains: int, start: str) -> Point:
    """Draws at which the density is positive.

    Args:
        target: The log joint.
        num_chains: So many for each datum.
        start: `"prior"` or `"guide"`: what draws them.

    Raises:
        ProgramError: If the density is zero at every draw that was tried; says of which data.
    """
    latent_model = target.latent_model
    u = latent_model.draw(num_chains, start)
    for _ in range(_STARTS):
        point = target(u)
        bad = (point.joint == -torch.inf) | ~point.joint.isfinite()
        if not bool(bad.any()):
            return point
        u = torch.where(bad[..., None], latent_model.draw(num_chains, start), u)
    data = sorted(set(torch.nonzero(bad)[:, 1].tolist()))
    listed = ", ".join(map(str, data[:5])) + (", ..." if len(data) > 5 else "")
    raise ProgramError(
        f"the log joint of datum {listed} is not finite at any of {_STARTS} draws of the {start}, "
        "so no chain can start there; leave the data out, or pass a guide that draws where the "
        "density is positive"
    )


def find_paths(
    target: Tempered,
    u: Float[Tensor, "chains batch dim"],
    *,
    num_iterations: int = 200,
    num_draws: int = 10,
) -> PathNormals:
    """Climbs from each start, and keeps the normal of the highest ELBO on each way.

    Args:
        target: The log joint.
        u: Starts of positive density.
        num_iterations: Steps of a path, at most.
        num_draws: Of each normal, for its ELBO.

    References:
        Zhang, Carpenter, Gelman & Vehtari (2022), Pathfinder: Parallel quasi-Newton variational
        inference, JMLR 23.
    """
    active = target.latent_model.active

    def value(at: Tensor) -> tuple[Tensor, Tensor]:
        point = target(at)
        return point.log_density, point.gradient * active

    best: PathNormals | None = None
    for now in climb(value, u, num_iterations=num_iterations):
        found = _normals(target, now, num_draws)
        if best is None:
            best = found
            continue
        better = found.elbo > best.elbo
        best = PathNormals(
            _where(better, found.loc, best.loc),
            InverseHessian(
                *(
                    _where(better, new, old)
                    for new, old in zip(found.covariance, best.covariance, strict=True)
                )
            ),
            _where(better, found.elbo, best.elbo),
            found.mode,
            found.moving,
        )
    assert best is not None
    return best


def _normals(target: Tempered, now: Ascent, num_draws: int) -> PathNormals:
    loc = now.u + now.inverse_hessian.times(now.gradient)
    normals = PathNormals(loc, now.inverse_hessian, now.log_density, now.u, now.moving)
    drawn, log_q = normals.draw(num_draws)
    usable = drawn.isfinite().all(-1)
    drawn = torch.where(usable[..., None], drawn, now.u)
    # The plain program: a graph for so many draws would not be used often enough to pay.
    joint = target.latent_model.log_density(drawn.flatten(0, 1)).unflatten(0, drawn.shape[:2])
    elbo = torch.where(usable, joint - log_q, -torch.inf).mean(0)
    return normals._replace(
        elbo=torch.nan_to_num(elbo, nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
    )


def _where(better: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(better.reshape(*better.shape, *[1] * (new.dim() - better.dim())), new, old)
