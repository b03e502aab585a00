"""Draws of the global latents moved to the posterior of all data, or of all but one."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.diagnostics.comparison.pointwise import GlobalDraws, GlobalModel
from pyro_vae.inference.log_weights import khat_threshold
from pyro_vae.inference.refit import WeightedDraws, match_moments

__all__ = ["Mover"]


@dataclass
class Mover:
    r"""Moment matching in unconstrained space.

    The densities of moved draws are evaluated anew after the last move, so that weights and
    predictive densities are of the same run also where latents of data are integrated out by draws.

    Attributes:
        model: Of the global latents, which have a transform onto their supports.
        draws: From the guide, or moved before.
    """

    model: GlobalModel
    draws: GlobalDraws
    _log_q: Tensor | None = field(default=None, init=False)

    @property
    def log_q(self) -> Float[Tensor, " draws"]:
        """Log density of what made the draws, in unconstrained space, in nats."""
        if self._log_q is None:
            assert self.draws.u is not None
            self._log_q = self.model.at(self.draws.u).log_ratio - self.draws.log_ratio
        return self._log_q

    def to_posterior(self, rows: Tensor | None) -> GlobalDraws:
        """Towards p(theta | x); with the pointwise densities of these rows, or of all."""
        found = self._moved(None, rows)
        return found._replace(surrogate=self.draws.surrogate, fit=self.draws.fit)

    def without(self, datum: int) -> GlobalDraws:
        """Towards p(theta | all data but one); with the pointwise density of that one."""
        return self._moved(datum, torch.tensor([datum]))

    def _moved(self, left_out: int | None, rows: Tensor | None) -> GlobalDraws:
        out = torch.tensor([] if left_out is None else [left_out], dtype=torch.long)

        def log_joint(u: Tensor) -> Tensor:
            at = self.model.at(u, out)
            found = at.log_ratio + at.log_likelihood - at.pointwise.sum(1)
            return found.nan_to_num(nan=-torch.inf)[:, None]

        u = self.draws.u
        assert u is not None
        start = WeightedDraws(u, log_joint(u), self.log_q[:, None])
        # Room for k-hat's own error, as in the ladder of `resolve`.
        moved = match_moments(log_joint, start, enough=khat_threshold(len(u)) - 0.1)
        found = self.model.at(moved.u, rows)
        return found._replace(log_ratio=found.log_ratio - moved.log_q[:, 0])
