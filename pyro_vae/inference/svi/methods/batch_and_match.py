"""Batch and match as a fitting method: a normal distribution whose scores are the posterior's."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vae.inference.log_weights import pareto_khat
from pyro_vae.inference.optimisation import find_paths
from pyro_vae.inference.refit import Normal, match_scores
from pyro_vae.inference.svi.evaluation import TrainedPair
from pyro_vae.inference.svi.methods.deterministic import balanced_noise
from pyro_vae.inference.svi.methods.gaussian import GuideNormal
from pyro_vae.inference.svi.methods.pathfinder import usable_normals
from pyro_vae.inference.svi.methods.rule import MethodRule, constrained, posterior_result
from pyro_vae.inference.tempered import Tempered, in_double
from pyro_vae.results import Result

__all__ = ["BatchAndMatchRule"]

_FULL_MATCHES = 15  # before steps shrink
_APART = 10  # updates between two normals that are compared
_FEWEST = 40
_DRAWS, _ONE_BY_ONE = 1000, 100  # for means and sds in constrained space


class BatchAndMatchRule(MethodRule):
    r"""Updates of `refit.batch_and_match` until the normal stands still.

    It does so when the symmetrised KL between it and the one ten updates ago,
    :math:`(\operatorname{KL}(a \| b) + \operatorname{KL}(b \| a)) / 2`, is below the threshold. It
    begins at the guide's normal, or at that of the path from it to a mode if its ELBO is higher.

    Args:
        pair: What is fitted.
        limit: The most updates.
        num_draws: Of each update; twice as many as there are latents, at least 16, if None.
        seed: Seeds the draws.

    References:
        Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei & Saul (2024), Batch and match: black-box
        variational inference with a score-based divergence.
    """

    def __init__(self, pair: TrainedPair, limit: int, num_draws: int | None, seed: int) -> None:
        super().__init__(pair, "matching", limit, seed)
        self.num_draws = num_draws
        self.normal = GuideNormal(pair)
        self.normal.check_writable()
        self.target = in_double(Tempered(self.normal.latent_model))
        together = self.normal.latent_model.structure.vectorizable
        self.count = max(_DRAWS if together else _ONE_BY_ONE, 2 * self.normal.dim)
        unset = torch.zeros(1, self.normal.dim).double()
        self.now = self.before = Normal(unset, torch.diag_embed(unset + 1))

    def begin(self) -> None:
        """Before the first step: where the guide is now."""
        if not self.state.steps:
            with torch.no_grad(), self.pair.measuring(self.seed):
                self.now = self.before = self._start()

    def _start(self) -> Normal:
        """The guide's normal, or that on the way from it to a mode, by their ELBOs.

        Full matches lose their way where scores are those of a tail.
        """
        loc, root = (part.double() for part in self.normal.read())
        guide = Normal(loc[None], (root if root.dim() == 2 else root.diag())[None])
        model = self.normal.latent_model
        _, path = usable_normals(find_paths(Tempered(model), loc.to(model.like)[None, None]))
        starts = [guide, path] if len(path.loc) else [guide]
        return max(starts, key=lambda normal: float(self._log_weights(normal).mean()))

    def _log_weights(self, normal: Normal) -> Tensor:
        """Of balanced draws, `[draws, 1]`."""
        u = normal.from_noise(balanced_noise(self.count, self.normal.dim, self.seed)[:, None])
        found = self.target(u).log_density - normal.log_prob(u)
        return torch.nan_to_num(found, nan=-math.inf)

    def advance(self, *_args: Any, **_kwargs: Any) -> float:
        """One update, written into the guide."""
        state = self.state
        shrinking = max(state.steps - _FULL_MATCHES + 1, 0)
        with torch.no_grad(), self.pair.measuring(self.seed + 7919 * state.steps):
            self.now, log_weights = match_scores(self.target, self.now, shrinking, self.num_draws)
            self.normal.write(self.now.loc[0], self.now.chol[0])
        done = state.steps + 1
        if done % _APART == 0:
            state.gain = _symmetrised_kl(self.now, self.before)
            self._close(_APART, math.nan, math.nan, state.gain, 0.0)
            self.before = self.now
            if done >= _FEWEST and state.gain <= self.threshold:
                self.finish(converged=True)
        return -float(log_weights.mean())

    def step(self) -> bool:
        """Takes note of an update; True of every tenth, which is compared."""
        super().step()
        return self.state.ended or self.state.steps % _APART == 0

    # -- files and results

    def tensors(self) -> dict[str, Tensor]:
        """The normal, and the one that it is compared with."""
        parts = {"now": self.now, "before": self.before}
        return {f"{n}.{key}": getattr(p, key) for n, p in parts.items() for key in ("loc", "chol")}

    def restore(self, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `saved` and `tensors` gave."""
        super().restore(saved, tensors)
        self.now, self.before = (
            Normal(tensors[f"{name}.loc"], tensors[f"{name}.chol"]) for name in ("now", "before")
        )

    def posterior(self, config: Mapping[str, Any], data_sha256: str | None) -> Result:
        """Mean and sd of the fitted normal, and the k-hat of its draws' weights."""
        with torch.no_grad(), self.pair.measuring(self.seed):
            noise = balanced_noise(self.count, self.normal.dim, self.seed)
            u = self.now.from_noise(noise[:, None])
            khat = pareto_khat(self._log_weights(self.now))[0]
            draws, names = constrained(self.normal.latent_model, u[:, 0])
        columns = {
            "mean": (("latent",), draws.mean(0), "mean of draws of q"),
            "sd": (("latent",), draws.std(0, correction=0), "standard deviation of draws of q"),
            "khat": ((), khat, "Pareto k-hat of their importance weights"),
        }
        return posterior_result(
            columns,
            names,
            num_draws=self.count,
            seed=self.seed,
            config=config,
            data_sha256=data_sha256,
            notes=[],
        )


def _symmetrised_kl(a: Normal, b: Normal) -> float:
    """In nats, of normal distributions of one datum."""
    total = 0.0
    for p, q in ((a, b), (b, a)):
        both = [
            torch.distributions.MultivariateNormal(n.loc[0], scale_tril=n.chol[0]) for n in (p, q)
        ]
        total += float(torch.distributions.kl_divergence(*both))
    return total / 2
