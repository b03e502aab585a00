r"""Priors of the latents, :math:`p(z)`.

A prior is a small `nn.Module` that gives a distribution over the whole latent vector, with a
normalised density: mixtures are summed inside, without enumeration. `make_prior` chooses one.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, final

import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions.transforms import AffineAutoregressive, AffineCoupling, Permute
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_vae.models.parts.networks import Autoregressive, mlp

__all__ = ["FlowPrior", "MixturePrior", "Prior", "StandardNormal", "VampPrior", "make_prior"]

Encoder = Callable[[Float[Tensor, "batch features"]], Distribution]


class Prior(nn.Module, ABC):
    """The abstract prior; its subclasses are final.

    Args:
        latent_dim: Number of latents of one datum.

    Attributes:
        uses_encoder: Whether the prior is made of the model's own posteriors.
    """

    uses_encoder: ClassVar[bool] = False

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be positive, not {latent_dim}")
        self.latent_dim = latent_dim

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """A JSON-able mapping from which `make_prior` rebuilds this prior."""

    @abstractmethod
    def distribution(self, encode: Encoder, like: Tensor) -> Distribution:
        """The distribution of z.

        Args:
            encode: The posterior of rows of data, for priors with `uses_encoder`.
            like: Any tensor of the dtype and on the device of the model.

        Returns:
            A distribution with batch shape () and event shape (latent,).
        """


@final
class StandardNormal(Prior):
    r""":math:`\mathcal N(0, I)`."""

    @property
    def config(self) -> dict[str, Any]:
        """See `Prior.config`."""
        return {"name": "normal"}

    def distribution(self, encode: Encoder, like: Tensor) -> Distribution:
        """See `Prior.distribution`."""
        return dist.Normal(like.new_zeros(self.latent_dim), 1.0).to_event(1)


@final
class MixturePrior(Prior):
    r"""A learned mixture of diagonal normals, :math:`\sum_c \pi_c \mathcal N(\mu_c, \sigma_c^2)`.

    It starts with equal weights, unit scales and means drawn from N(0, I). Scales are
    :math:`10^{-3} + e^r`, so that a component cannot become a point.

    Args:
        latent_dim: Number of latents of one datum.
        num_components: Number of components.

    References:
        Dilokthanakul et al. (2016), Deep unsupervised clustering with Gaussian mixture variational
        autoencoders, arXiv:1611.02648; Tomczak & Welling (2018).
    """

    def __init__(self, latent_dim: int, num_components: int = 10) -> None:
        super().__init__(latent_dim)
        if num_components < 1:
            raise ValueError(f"num_components must be positive, not {num_components}")
        self.num_components = num_components
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.locs = nn.Parameter(torch.randn(num_components, latent_dim))
        start = math.log(1 - _MIN_SCALE)
        self.raw_scales = nn.Parameter(torch.full((num_components, latent_dim), start))

    @property
    def config(self) -> dict[str, Any]:
        """See `Prior.config`."""
        return {"name": "mixture", "num_components": self.num_components}

    def distribution(self, encode: Encoder, like: Tensor) -> Distribution:
        """See `Prior.distribution`."""
        parts = dist.Normal(self.locs, _MIN_SCALE + self.raw_scales.exp()).to_event(1)
        return _Mixture(self.logits.log_softmax(-1), parts)


_MIN_SCALE = 1e-3


@final
class VampPrior(Prior):
    r"""The mean of the posteriors of learned pseudo-inputs, :math:`\frac1C \sum_c q(z \mid u_c)`.

    Args:
        latent_dim: Number of latents of one datum.
        data_dim: Number of features of a pseudo-input.
        num_pseudo_inputs: Number C of pseudo-inputs.
        bounded: Whether data lie in [0, 1]; pseudo-inputs are then a sigmoid of the parameters.

    Note: pseudo-inputs start as noise around the middle; `initialize` sets them to data, from which
        training goes on faster. With an "iaf" posterior each density costs a pass for each latent.

    References:
        Tomczak & Welling (2018), VAE with a VampPrior, arXiv:1705.07120.
    """

    uses_encoder = True

    def __init__(
        self, latent_dim: int, data_dim: int, num_pseudo_inputs: int = 50, bounded: bool = True
    ) -> None:
        super().__init__(latent_dim)
        if num_pseudo_inputs < 1:
            raise ValueError(f"num_pseudo_inputs must be positive, not {num_pseudo_inputs}")
        self.num_pseudo_inputs, self.bounded = num_pseudo_inputs, bounded
        self.raw = nn.Parameter(torch.randn(num_pseudo_inputs, data_dim))

    @property
    def config(self) -> dict[str, Any]:
        """See `Prior.config`."""
        return {
            "name": "vamp",
            "num_pseudo_inputs": self.num_pseudo_inputs,
            "bounded": self.bounded,
        }

    @property
    def pseudo_inputs(self) -> Float[Tensor, "pseudo features"]:
        """The pseudo-inputs u, in the data's own units."""
        return self.raw.sigmoid() if self.bounded else self.raw

    @torch.no_grad()
    def initialize(self, x: Float[Tensor, "pseudo features"]) -> None:
        """Sets the pseudo-inputs to data, moved off 0 and 1 by a hundredth if bounded.

        Args:
            x: As many rows as there are pseudo-inputs.

        Raises:
            ValueError: If the shape is another one.
        """
        if x.shape != self.raw.shape:
            raise ValueError(
                f"there are {len(self.raw)} pseudo-inputs of {self.raw.shape[1]} features, but x "
                f"has shape {tuple(x.shape)}: pass so many rows of the data"
            )
        self.raw.copy_(x.clamp(0.01, 0.99).logit() if self.bounded else x)

    def distribution(self, encode: Encoder, like: Tensor) -> Distribution:
        """See `Prior.distribution`."""
        equal = like.new_full((self.num_pseudo_inputs,), -math.log(self.num_pseudo_inputs))
        return _Mixture(equal, encode(self.pseudo_inputs))


@final
class FlowPrior(Prior):
    r"""A standard normal sent through learned, invertible steps.

    `"coupling"` steps change one half of the latents by an affine map that the other half gives,
    and reverse the order; draws and densities cost one pass a step. `"autoregressive"` steps give
    densities in one pass, and draws in a pass for each latent. The steps start as the identity.

    Args:
        latent_dim: Number of latents of one datum.
        kind: `"coupling"` or `"autoregressive"`.
        num_steps: Number of steps.
        hidden: Sizes of the hidden layers of each step's network.

    Note: log-scales of a step are kept in [-5, 3].

    References:
        Dinh, Sohl-Dickstein & Bengio (2017), Density estimation using Real NVP, arXiv:1605.08803;
        Papamakarios, Pavlakou & Murray (2017), Masked autoregressive flow, arXiv:1705.07057.
    """

    def __init__(
        self,
        latent_dim: int,
        kind: str = "coupling",
        num_steps: int = 4,
        hidden: Sequence[int] = (64,),
    ) -> None:
        super().__init__(latent_dim)
        if kind not in ("coupling", "autoregressive"):
            raise ValueError(f"kind is 'coupling' or 'autoregressive', not {kind!r}")
        if latent_dim < 2:
            raise ValueError("a flow of one latent is affine: use prior='mixture'")
        if num_steps < 1:
            raise ValueError(f"num_steps must be positive, not {num_steps}")
        self.kind, self.num_steps, self.hidden = kind, num_steps, tuple(hidden)
        self.split = latent_dim // 2
        self.networks = nn.ModuleList(self._network(step) for step in range(num_steps))

    @property
    def config(self) -> dict[str, Any]:
        """See `Prior.config`."""
        return {
            "name": "flow",
            "kind": self.kind,
            "num_steps": self.num_steps,
            "hidden": list(self.hidden),
        }

    def distribution(self, encode: Encoder, like: Tensor) -> Distribution:
        """See `Prior.distribution`."""
        start = dist.Normal(like.new_zeros(self.latent_dim), 1.0).to_event(1)
        # New transforms at each call: they remember their last value, with its graph.
        if self.kind == "autoregressive":
            steps = [AffineAutoregressive(network).inv for network in self.networks]
            return dist.TransformedDistribution(start, steps)
        turned = torch.arange(self.latent_dim - 1, -1, -1, device=like.device)
        steps = []
        for network in self.networks:
            steps += [AffineCoupling(self.split, _Halves(network)), Permute(turned)]
        return dist.TransformedDistribution(start, steps)

    def _network(self, step: int) -> nn.Module:
        if self.kind == "autoregressive":
            network: Any = Autoregressive(self.latent_dim, self.hidden, reverse=step % 2 == 1)
            last = network.layers[-1]
        else:
            network = mlp(self.split, self.hidden, 2 * (self.latent_dim - self.split), "elu")
            last = network[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return network


class _Halves:
    """A network whose output is shift and log-scale, as Pyro's coupling asks for them."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, inputs: Float[Tensor, "*batch split"]) -> tuple[Tensor, ...]:
        return self.network(inputs).chunk(2, dim=-1)


class _Mixture(dist.TorchDistribution):
    """A mixture of distributions over vectors, summed; a draw has no gradient."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(
        self,
        log_weights: Float[Tensor, " components"],
        components: Any,
        batch_shape: torch.Size = torch.Size(),  # noqa: B008 - immutable
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.log_weights, self.components = log_weights, components
        super().__init__(batch_shape, components.event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "_Mixture":
        new = self._get_checked_instance(_Mixture, _instance)
        _Mixture.__init__(
            new, self.log_weights, self.components, torch.Size(batch_shape), validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Float[Tensor, "*any latent"]) -> Float[Tensor, "*any"]:
        if self._validate_args:
            self._validate_sample(value)
        # Written out for every component: flows do not broadcast a value against their context.
        every = value[..., None, :].expand(*value.shape[:-1], len(self.log_weights), -1)
        log_probs = (self.log_weights + self.components.log_prob(every)).logsumexp(-1)
        shape = torch.broadcast_shapes(log_probs.shape, self.batch_shape)
        return log_probs.expand(shape)

    def sample(self, sample_shape: Any = ()) -> Float[Tensor, "*any latent"]:
        with torch.no_grad():
            shape = (*sample_shape, *self.batch_shape)
            chosen = dist.Categorical(logits=self.log_weights).sample(torch.Size(shape))
            every = self.components.sample(torch.Size(shape))
            index = chosen[..., None, None].expand(*shape, 1, every.shape[-1])
            return every.gather(-2, index).squeeze(-2)


_PRIORS: Mapping[str, type[Prior]] = MappingProxyType(
    {"flow": FlowPrior, "mixture": MixturePrior, "normal": StandardNormal, "vamp": VampPrior}
)


def make_prior(
    prior: str | Mapping[str, Any] | Prior,
    latent_dim: int,
    *,
    data_dim: int | None = None,
    bounded: bool = True,
) -> Prior:
    """Turns a name or a `Prior.config` into a prior; an instance passes through.

    Args:
        prior: `"normal"`, `"mixture"`, `"vamp"`, `"flow"`; a mapping with such a `"name"` and the
            arguments of its class, without dimensions; or a prior.
        latent_dim: Number of latents of one datum.
        data_dim: Number of features of one observation; None where no encoder leads straight from
            them to these latents, which a `VampPrior` needs.
        bounded: Whether data lie in [0, 1]; what a `VampPrior` takes if it is not told.

    Raises:
        ValueError: If the name is unknown or missing, an instance has other dimensions, or the
            prior cannot stand here.
        TypeError: If an argument is not one of that prior's.

    Example:
        >>> make_prior({"name": "mixture", "num_components": 4}, latent_dim=2).locs.shape
        torch.Size([4, 2])
    """
    if not isinstance(prior, Prior):
        arguments: dict[str, Any] = {"name": prior} if isinstance(prior, str) else dict(prior)
        name = str(arguments.pop("name", None))
        if name not in _PRIORS:
            raise ValueError(f"Unknown prior {name!r}: choose one of {sorted(_PRIORS)}")
        if name == "vamp":
            arguments = {"data_dim": data_dim or 1, "bounded": bounded} | arguments
        prior = _PRIORS[name](latent_dim, **arguments)
    if prior.latent_dim != latent_dim:
        raise ValueError(
            f"the prior was made for {prior.latent_dim} latents, but the model has {latent_dim}: "
            f"make it with latent_dim={latent_dim}"
        )
    if isinstance(prior, VampPrior) and data_dim is None:
        raise ValueError(
            "a VampPrior mixes posteriors q(z | u), which have no closed form for latents that "
            "are inferred by way of others: use the 'mixture' or 'flow' prior"
        )
    if isinstance(prior, VampPrior) and prior.raw.shape[1] != data_dim:
        raise ValueError(
            f"the VampPrior has pseudo-inputs of {prior.raw.shape[1]} features, but the data have "
            f"{data_dim}: make it with data_dim={data_dim}"
        )
    return prior
