"""Pathfinder as a fitting method: normals on the ways to the modes, weighted by importance."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.inference.draws import systematic_index
from pyro_vae.inference.log_weights import (
    effective_sample_size,
    khat_threshold,
    pareto_tail,
    smoothed_log_weights,
)
from pyro_vae.inference.optimisation import PathNormals, find_paths, starting_points
from pyro_vae.inference.programs import ProgramError
from pyro_vae.inference.refit import Normal, weighted_normal
from pyro_vae.inference.svi.evaluation import TrainedPair
from pyro_vae.inference.svi.methods.gaussian import GuideNormal
from pyro_vae.inference.svi.methods.rule import MethodRule, constrained, posterior_result
from pyro_vae.inference.svi.optimizer import TrainingError
from pyro_vae.inference.tempered import Tempered
from pyro_vae.results import Result

__all__ = ["PathfinderRule", "usable_normals"]


class PathfinderRule(MethodRule):
    r"""One step that climbs all paths and writes what they found into the guide.

    Half of the paths start from draws of the guide, the others from the prior. With several paths,
    draws of their normals :math:`q_1, \dots, q_P` are weighted by :math:`p(x, u) / \frac{1}{P}
    \sum_p q_p(u)` (the paper has the density of the draw's own path below the fraction), smoothed
    and resampled. The guide becomes the normal with the mean and covariance of the weighted draws
    where k-hat lets them count, else the path's normal of the highest ELBO.

    Args:
        pair: What is fitted.
        num_draws: Draws that are weighted, and taken again.
        num_paths: P.
        seed: Seeds starts and draws.

    References:
        Zhang, Carpenter, Gelman & Vehtari (2022), Pathfinder: Parallel quasi-Newton variational
        inference, JMLR 23; Veach & Guibas (1995), Optimally combining sampling techniques for Monte
        Carlo rendering (the mixture's density).
    """

    def __init__(self, pair: TrainedPair, num_draws: int, num_paths: int, seed: int) -> None:
        super().__init__(pair, "Pathfinder", 1, seed)
        self.num_draws, self.num_paths = num_draws, num_paths
        self.normal = GuideNormal(pair)
        self.normal.check_writable()
        self.found: dict[str, Tensor] = {}

    def advance(self, *_args: Any, **_kwargs: Any) -> float:
        """All of it."""
        with torch.no_grad(), self.pair.measuring(self.seed):
            target = Tempered(self.normal.latent_model)
            paths = find_paths(target, self._starts(target))
            usable, normals = usable_normals(paths)
            if not bool(usable.any()):
                raise TrainingError(
                    "no path of Pathfinder has a normal distribution with a finite ELBO; raise "
                    "num_paths, or start from another guide"
                )
            u, log_q = _mixture_draws(normals, self.num_draws)
            log_joint = self._log_joint(u)
            log_weights = torch.nan_to_num(log_joint - log_q, nan=-torch.inf)
            tail = pareto_tail(log_weights[:, None])
            smoothed = smoothed_log_weights(log_weights[:, None], tail)
            index = systematic_index(smoothed, len(u), self.seed)[:, 0]
            elbos = paths.elbo[:, 0][usable]
            best = int(elbos.argmax())
            fitted = Normal(normals.loc[best, None], normals.chol[best, None])
            if len(normals.loc) > 1 and float(tail.khat) < khat_threshold(len(u)):
                around = weighted_normal(u[:, None], smoothed, shrink=False)
                fitted = around if bool(around.chol.isfinite().all()) else fitted
            self.normal.write(fitted.loc[0], fitted.chol[0])
            self.found = {
                "draws": u[index] if self.num_paths > 1 else u,
                "khat": tail.khat[0],
                "ess": effective_sample_size(log_weights[:, None])[0].double(),
                "path_elbo": paths.elbo[:, 0].double(),
            }
        self.finish(converged=not bool(paths.moving.all()))
        self._close(1, math.nan, math.nan, 0.0, 0.0)
        return -float(elbos[best])

    def _starts(self, target: Tempered) -> Float[Tensor, "paths 1 dim"]:
        from_guide = (self.num_paths + 1) // 2
        starts = [starting_points(target, from_guide, "guide").u]
        if rest := self.num_paths - from_guide:
            try:
                starts.append(starting_points(target, rest, "prior").u)
            except ProgramError:  # the prior does not meet the likelihood: the guide must do
                starts.append(starting_points(target, rest, "guide").u)
        return torch.cat(starts)

    def _log_joint(self, u: Float[Tensor, "draws dim"]) -> Float[Tensor, " draws"]:
        model = self.normal.latent_model
        return model.log_density(u[:, None].to(model.like))[:, 0].double()

    # -- files and results

    def tensors(self) -> dict[str, Tensor]:
        """What was found."""
        return self.found

    def restore(self, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `saved` and `tensors` gave."""
        super().restore(saved, tensors)
        self.found = dict(tensors)

    def posterior(self, config: Mapping[str, Any], data_sha256: str | None) -> Result:
        """The draws, resampled where there are several paths, and what their weights say."""
        with torch.no_grad(), self.pair.measuring(self.seed):
            draws, names = constrained(self.normal.latent_model, self.found["draws"])
        columns = {
            "mean": (("latent",), draws.mean(0), "mean of the draws"),
            "sd": (("latent",), draws.std(0), "standard deviation of the draws"),
            "draws": (("sample", "latent"), draws, "draws, resampled if there are several paths"),
            "khat": ((), self.found["khat"], "Pareto k-hat of the weights of the paths' draws"),
            "ess": ((), self.found["ess"], "effective draws by these weights"),
            "elbo": (("path",), self.found["path_elbo"], "of the normal of each path"),
        }
        return posterior_result(
            columns,
            names,
            num_draws=len(draws),
            seed=self.seed,
            config=config,
            data_sha256=data_sha256,
            notes=[],
        )


def usable_normals(paths: PathNormals) -> tuple[Tensor, Normal]:
    """Which paths have a normal distribution, and those, a path a row, in double precision."""
    covariance = paths.covariance.dense()[:, 0].double()
    chol, failed = torch.linalg.cholesky_ex((covariance + covariance.mT) / 2)
    loc = paths.loc[:, 0].double()
    usable = (failed == 0) & loc.isfinite().all(-1) & paths.elbo[:, 0].isfinite()
    return usable, Normal(loc[usable], chol[usable])


def _mixture_draws(
    normals: Normal, num_draws: int
) -> tuple[Float[Tensor, "draws dim"], Float[Tensor, " draws"]]:
    """As many draws of each path, and log densities of their mixture."""
    each = -(-num_draws // len(normals.loc))
    u = normals.draw(each).flatten(0, 1)[:num_draws]
    every = normals.log_prob(u[:, None].expand(-1, len(normals.loc), -1))
    return u, every.logsumexp(1) - torch.tensor(float(every.shape[1])).log()
