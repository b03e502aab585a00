r"""Posteriors: what an encoder's output says about the latents of one datum, :math:`q(z \mid x)`.

A posterior is a small `nn.Module` that turns the encoder's output into a reparameterised
distribution over the whole latent vector, normalised in closed form. `make_posterior` chooses one.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast, final

import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions.transforms import ConditionalAffineAutoregressive
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional

from pyro_vae.models.parts.networks import Autoregressive

__all__ = [
    "DiagonalPosterior",
    "FullPosterior",
    "InverseAutoregressivePosterior",
    "LowRankPosterior",
    "Posterior",
    "make_posterior",
]

_MIN_SCALE = 1e-6


class Posterior(nn.Module, ABC):
    """The abstract posterior; its subclasses are final.

    Args:
        latent_dim: Number of latents of one datum.
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be positive, not {latent_dim}")
        self.latent_dim = latent_dim

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """A JSON-able mapping from which `make_posterior` rebuilds this posterior."""

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """The number of outputs that the encoder must have."""

    @abstractmethod
    def distribution(self, encoder_output: Float[Tensor, "*batch outputs"]) -> Distribution:
        """The distribution of z given the encoder's output.

        Args:
            encoder_output: Shape (*batch, num_parameters).

        Returns:
            A distribution with batch shape `batch` and event shape (latent,).
        """

    def location(
        self, encoder_output: Float[Tensor, "*batch outputs"]
    ) -> Float[Tensor, "*batch latent"]:
        """The one point that stands for the posterior in pictures: its mean, where it has one."""
        return encoder_output[..., : self.latent_dim]

    def _scale(self, raw: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch latent"]:
        # Never zero, and linear in raw for large ones, where an exponential would overflow.
        return _MIN_SCALE + functional.softplus(raw)


@final
class DiagonalPosterior(Posterior):
    r""":math:`\mathcal N(\mu(x), \operatorname{diag} \sigma^2(x))`.

    The scale is :math:`10^{-6} + \mathrm{softplus}(r)` of the encoder's output r.
    """

    @property
    def config(self) -> dict[str, Any]:
        """See `Posterior.config`."""
        return {"name": "diagonal"}

    @property
    def num_parameters(self) -> int:
        """Means, then unconstrained scales."""
        return 2 * self.latent_dim

    def distribution(self, encoder_output: Float[Tensor, "*batch outputs"]) -> Distribution:
        """See `Posterior.distribution`."""
        loc, raw_scale = encoder_output.chunk(2, dim=-1)
        return dist.Normal(loc, self._scale(raw_scale)).to_event(1)


@final
class FullPosterior(Posterior):
    r""":math:`\mathcal N(\mu(x), L(x) L(x)^\top)` with a lower triangular L.

    The diagonal of L is :math:`10^{-6} + \mathrm{softplus}(r)`; the encoder has H (H + 3) / 2
    outputs for H latents.
    """

    @property
    def config(self) -> dict[str, Any]:
        """See `Posterior.config`."""
        return {"name": "full"}

    @property
    def num_parameters(self) -> int:
        """Means, unconstrained diagonal of L, and what lies below it, row by row."""
        return 2 * self.latent_dim + self.latent_dim * (self.latent_dim - 1) // 2

    def distribution(self, encoder_output: Float[Tensor, "*batch outputs"]) -> Distribution:
        """See `Posterior.distribution`."""
        size = self.latent_dim
        loc, raw, below = encoder_output.split([size, size, self.num_parameters - 2 * size], -1)
        row, column = torch.tril_indices(size, size, -1, device=loc.device)
        lower = loc.new_zeros(*loc.shape, size)
        lower[..., row, column] = below
        return dist.MultivariateNormal(loc, scale_tril=lower + self._scale(raw).diag_embed())


@final
class LowRankPosterior(Posterior):
    r""":math:`\mathcal N(\mu(x), F(x) F(x)^\top + \operatorname{diag} \sigma^2(x))`.

    Args:
        latent_dim: Number of latents of one datum.
        rank: Number of columns of F.
    """

    def __init__(self, latent_dim: int, rank: int = 2) -> None:
        super().__init__(latent_dim)
        if rank < 1:
            raise ValueError(f"rank must be positive, not {rank}")
        self.rank = rank

    @property
    def config(self) -> dict[str, Any]:
        """See `Posterior.config`."""
        return {"name": "low_rank", "rank": self.rank}

    @property
    def num_parameters(self) -> int:
        """Means, unconstrained scales, and the rows of F."""
        return (2 + self.rank) * self.latent_dim

    def distribution(self, encoder_output: Float[Tensor, "*batch outputs"]) -> Distribution:
        """See `Posterior.distribution`."""
        size = self.latent_dim
        loc, raw, factor = encoder_output.split([size, size, self.rank * size], -1)
        return dist.LowRankMultivariateNormal(
            loc, factor.unflatten(-1, (size, self.rank)), self._scale(raw).square()
        )


@final
class InverseAutoregressivePosterior(Posterior):
    r"""A diagonal normal, sent through gated autoregressive steps that also see the encoder.

    .. math:: z_0 = \mu(x) + \sigma(x) \epsilon, \qquad
              z_t = g_t \odot z_{t-1} + (1 - g_t) \odot m_t, \qquad
              g_t = \operatorname{sigmoid}(s_t + 2)

    where :math:`(m_t, s_t)_i` depend on the context c(x) and on :math:`z_{t-1}` before i; the order
    is reversed from step to step. The gate is kept above :math:`e^{-5}`.

    Args:
        latent_dim: Number of latents of one datum.
        num_steps: Number of steps.
        hidden: Sizes of the hidden layers of each step's network.
        context_dim: Size of the context that the encoder gives.

    Note: a draw costs one pass a step. The density at a value that was not drawn from this very
        distribution, which score terms (sticking the landing, DReG) and a `VampPrior` need, costs
        one pass for each latent a step. One latent has nothing before it: use another posterior.

    References:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever & Welling (2016), Improved variational
        inference with inverse autoregressive flow, arXiv:1606.04934.
    """

    def __init__(
        self,
        latent_dim: int,
        num_steps: int = 2,
        hidden: Sequence[int] = (64,),
        context_dim: int = 16,
    ) -> None:
        super().__init__(latent_dim)
        if num_steps < 1 or context_dim < 1:
            raise ValueError(
                f"num_steps and context_dim must be positive, not {num_steps} and {context_dim}"
            )
        if latent_dim < 2:
            raise ValueError(
                "an autoregressive flow of one latent is affine: use posterior='diagonal'"
            )
        self.num_steps, self.hidden, self.context_dim = num_steps, tuple(hidden), context_dim
        self.steps = nn.ModuleList(
            ConditionalAffineAutoregressive(
                _Gated(latent_dim, self.hidden, context_dim=context_dim, reverse=step % 2 == 1)
            )
            for step in range(num_steps)
        )

    @property
    def config(self) -> dict[str, Any]:
        """See `Posterior.config`."""
        return {
            "name": "iaf",
            "num_steps": self.num_steps,
            "hidden": list(self.hidden),
            "context_dim": self.context_dim,
        }

    @property
    def num_parameters(self) -> int:
        """Means and unconstrained scales of the start, and the context."""
        return 2 * self.latent_dim + self.context_dim

    def distribution(self, encoder_output: Float[Tensor, "*batch outputs"]) -> Distribution:
        """See `Posterior.distribution`."""
        size = self.latent_dim
        loc, raw, context = encoder_output.split([size, size, self.context_dim], -1)
        start = dist.Normal(loc, self._scale(raw)).to_event(1)
        return dist.TransformedDistribution(start, self._conditioned(context))

    def location(
        self, encoder_output: Float[Tensor, "*batch outputs"]
    ) -> Float[Tensor, "*batch latent"]:
        """Where the flow sends the mean of its start; its own mean has no closed form."""
        size = self.latent_dim
        z, _, context = encoder_output.split([size, size, self.context_dim], -1)
        for step in self._conditioned(context):
            z = step(z)
        return z

    def _conditioned(self, context: Float[Tensor, "*batch context"]) -> list[Any]:
        # New transforms at each call: they remember their last draw, with its graph.
        return [cast(Any, step).condition(context) for step in self.steps]


class _Gated(Autoregressive):
    """The gated step of Kingma et al., in the form that Pyro's transform takes: shift, log g."""

    def forward(
        self, inputs: Float[Tensor, "*batch dim"], context: Tensor | None = None
    ) -> tuple[Float[Tensor, "*batch dim"], ...]:
        target, raw = super().forward(inputs, context)
        log_gate = functional.logsigmoid(raw + 2)
        return -torch.expm1(log_gate) * target, log_gate


_POSTERIORS: Mapping[str, type[Posterior]] = MappingProxyType(
    {
        "diagonal": DiagonalPosterior,
        "full": FullPosterior,
        "iaf": InverseAutoregressivePosterior,
        "low_rank": LowRankPosterior,
    }
)


def make_posterior(posterior: str | Mapping[str, Any] | Posterior, latent_dim: int) -> Posterior:
    """Turns a name or a `Posterior.config` into a posterior; an instance passes through.

    Args:
        posterior: `"diagonal"`, `"full"`, `"low_rank"`, `"iaf"`; a mapping with such a `"name"` and
            the arguments of its class, without `latent_dim`; or a posterior.
        latent_dim: Number of latents of one datum.

    Raises:
        ValueError: If the name is unknown or missing, or an instance has another number of latents.
        TypeError: If an argument is not one of that posterior's.

    Example:
        >>> make_posterior({"name": "low_rank", "rank": 1}, latent_dim=3).num_parameters
        9
    """
    if isinstance(posterior, Posterior):
        if posterior.latent_dim != latent_dim:
            raise ValueError(
                f"the posterior was made for {posterior.latent_dim} latents, but the model has "
                f"{latent_dim}: make it with latent_dim={latent_dim}"
            )
        return posterior
    arguments = {"name": posterior} if isinstance(posterior, str) else dict(posterior)
    name = str(arguments.pop("name", None))
    if name not in _POSTERIORS:
        raise ValueError(f"Unknown posterior {name!r}: choose one of {sorted(_POSTERIORS)}")
    return _POSTERIORS[name](latent_dim, **arguments)
