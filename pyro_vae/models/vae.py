r"""Variational autoencoders as Pyro models and guides.

.. math:: z \sim p(z), \quad x \sim p(x \mid f(z)), \quad q(z \mid x) = q(z; g(x))

with networks for the decoder f and the encoder g. Likelihood, prior, posterior and network are
parts that are chosen by name, and every choice goes with every other.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from jaxtyping import Float
from pyro.distributions.util import is_validation_enabled
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vae.checks import refuses_in_words
from pyro_vae.data import takes_arrays
from pyro_vae.models.parts import (
    DiagonalPosterior,
    Likelihood,
    Network,
    Posterior,
    Prior,
    check_batch,
    check_finite,
    make_likelihood,
    make_network,
    make_posterior,
    make_prior,
    mlp,
)

__all__ = ["VAE", "TwoLayerVAE"]


class _VariationalAutoencoder(nn.Module, ABC):
    """What is the same with one layer of latents and with two."""

    data_dim: int
    encoder: nn.Module
    decoder: nn.Module
    likelihood: Likelihood
    prior: Prior
    posterior: Posterior

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments: `type(m)(**m.config)` has this architecture."""

    @abstractmethod
    def _draw_latents(self, num_samples: int) -> Float[Tensor, "samples latent"]:
        """Draws from the prior what the decoder takes."""

    @takes_arrays()
    def encode(self, x: Float[Tensor, "batch features"]) -> Distribution:
        """The approximate posterior of the latents that the decoder takes.

        Returns:
            A distribution of batch shape (batch,) and event shape (latent,).

        Raises:
            ValueError: If x has the wrong shape or dtype, or holds NaN or infinite values.
        """
        self._check_data(x)
        return self._posterior(x)

    @takes_arrays()
    def decode(self, z: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch features"]:
        """The mean of x given z, the pixel values that pictures show."""
        return self.likelihood.mean(self.decoder(z))

    @takes_arrays()
    def reconstruct(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        """The mean of x given the posterior's location, which is its mean where it has one.

        Raises:
            ValueError: As `encode`.
        """
        self._check_data(x)
        return self.decode(self.posterior.location(self.encoder(x)))

    @torch.no_grad()
    def sample(
        self, num_samples: int, *, mean: bool = True, generator: torch.Generator | None = None
    ) -> Float[Tensor, "samples features"]:
        """Draws latents from the prior and decodes them.

        Args:
            num_samples: How many draws.
            mean: Whether to return the mean of x given each drawn z (smooth pictures), or a draw
                of x (what the model really says data look like).
            generator: The source of randomness, on the parameters' device; torch's global one if
                omitted, which is otherwise left untouched.

        Returns:
            The means or the draws, without gradient.
        """
        with _as_global_stream(generator):
            output = self.decoder(self._draw_latents(num_samples))
            if mean:
                return self.likelihood.mean(output)
            return self.likelihood.distribution(output).sample()

    def _posterior(self, x: Float[Tensor, "batch features"]) -> Distribution:
        return self.posterior.distribution(self.encoder(x))

    def _prior(self) -> Distribution:
        return self.prior.distribution(self._posterior, like=next(self.decoder.parameters()))

    def _observe(
        self, z: Float[Tensor, "*batch latent"], x: Float[Tensor, "batch features"]
    ) -> None:
        pyro.sample("x", self.likelihood.distribution(self.decoder(z)), obs=x)

    def _check_batch(self, x: Tensor) -> None:
        check_batch(x, self.data_dim, like=next(self.encoder.parameters()))

    def _check_data(self, x: Tensor) -> None:
        """What a guide takes: the support is the model's business."""
        self._check_batch(x)
        if is_validation_enabled():  # a graph cannot be captured through a branch on data
            check_finite(x)

    def _check_observed(self, x: Tensor) -> None:
        self._check_batch(x)
        if is_validation_enabled():
            self.likelihood.check(x)


class VAE(_VariationalAutoencoder):
    r"""A variational autoencoder with one layer of latents.

    By default the prior is a standard normal and the guide a diagonal one. The default activation
    is tanh, as in Kingma & Welling: log p(x, z) is then smooth in z, on which the gradient-based
    references (HMC, annealed importance sampling) rely.

    Args:
        data_dim: Number of features of one observation.
        latent_dim: Number of latents of one observation.
        hidden: Sizes of the encoder's hidden layers; the decoder has them in reverse order.
        likelihood: A name, a mapping of a name and its arguments, or an instance: see
            `make_likelihood`.
        activation: The name of the activation of the hidden layers, see `networks.ACTIVATIONS`.
        prior: Likewise, see `make_prior`: "normal", "mixture", "vamp" or "flow".
        posterior: Likewise, see `make_posterior`: "diagonal", "full", "low_rank" or "iaf".
        network: Likewise, see `networks.make_network`: "mlp", "conv" or "residual".

    Raises:
        ValueError: If a part is unknown, or was made for other dimensions.

    References:
        Kingma & Welling (2014), Auto-encoding variational Bayes, arXiv:1312.6114.

    Example:
        >>> vae = VAE(data_dim=6, latent_dim=2, hidden=(5,))
        >>> vae.encode(torch.zeros(4, 6)).mean.shape
        torch.Size([4, 2])
        >>> rich = VAE(6, 2, (5,), prior={"name": "vamp", "num_pseudo_inputs": 3}, posterior="iaf")
        >>> rich.config["prior"]["num_pseudo_inputs"]
        3
    """

    @refuses_in_words
    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        hidden: Sequence[int] = (400,),
        likelihood: str | Mapping[str, Any] | Likelihood = "bernoulli",
        activation: str = "tanh",
        prior: str | Mapping[str, Any] | Prior = "normal",
        posterior: str | Mapping[str, Any] | Posterior = "diagonal",
        network: str | Mapping[str, Any] | Network = "mlp",
    ) -> None:
        super().__init__()
        self.data_dim = data_dim
        self.latent_dim = latent_dim
        self.hidden = tuple(hidden)
        self.activation = activation
        self.network = make_network(network)
        self.likelihood = make_likelihood(likelihood)
        self.posterior = make_posterior(posterior, latent_dim)
        num_outputs = self.likelihood.num_parameters(data_dim)
        self.encoder = self.network.encoder(
            data_dim, self.hidden, self.posterior.num_parameters, activation
        )
        self.decoder = self.network.decoder(
            latent_dim, self.hidden, data_dim, num_outputs, activation
        )
        bounded = self.likelihood.measure != "real"
        self.prior = make_prior(prior, latent_dim, data_dim=data_dim, bounded=bounded)

    @classmethod
    def lecture(cls, data_dim: int = 784) -> "VAE":
        """The lecture's VAE: one hidden layer of 400 units, 20 latents, Bernoulli pixels."""
        return cls(data_dim, latent_dim=20, hidden=(400,), likelihood="bernoulli")

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments: `VAE(**vae.config)` has this architecture."""
        return {
            "data_dim": self.data_dim,
            "latent_dim": self.latent_dim,
            "hidden": list(self.hidden),
            "likelihood": self.likelihood.config,
            "activation": self.activation,
            "prior": self.prior.config,
            "posterior": self.posterior.config,
            "network": self.network.config,
        }

    @property
    def bound_ends_at_entropies(self) -> bool:
        """Whether the noise's scale and the latents' are free, so that `fit` reports a residual."""
        likelihood = self.likelihood.config
        return (
            self.prior.config["name"] == "normal"
            and self.posterior.config["name"] in ("diagonal", "full")
            and self.network.config["name"] == "mlp"
            and (likelihood["name"], likelihood.get("scale")) == ("gaussian", "shared")
            and all(p.requires_grad for p in self.parameters())
        )

    def model(self, x: Float[Tensor, "batch features"]) -> None:
        """The generative program: sites "z" and, observed, "x", in the plate "data".

        Raises:
            ValueError: If x has the wrong shape or dtype, or lies off the likelihood's support.
        """
        self._check_observed(x)
        pyro.module("decoder", self.decoder)
        pyro.module("likelihood", self.likelihood)
        pyro.module("prior", self.prior)
        if self.prior.uses_encoder:
            pyro.module("encoder", self.encoder)
            pyro.module("posterior", self.posterior)
        prior = self._prior()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            self._observe(z, x)

    def guide(self, x: Float[Tensor, "batch features"]) -> None:
        """The amortised posterior as a program: site "z" in the plate "data".

        Raises:
            ValueError: If x has the wrong shape or dtype, or holds NaN or infinite values.
        """
        pyro.module("encoder", self.encoder)
        pyro.module("posterior", self.posterior)
        posterior = self.encode(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior)

    def _draw_latents(self, num_samples: int) -> Float[Tensor, "samples latent"]:
        return self._prior().sample((num_samples,))


class TwoLayerVAE(_VariationalAutoencoder):
    r"""A variational autoencoder with a second stochastic layer.

    .. math:: p(z_2)\, p(z_1 \mid z_2)\, p(x \mid z_1), \qquad
              q(z_1 \mid x)\, q(z_2 \mid z_1)

    with a diagonal normal :math:`p(z_1 \mid z_2)`. Sites "z1" (below) and "z2" (on top).

    Args:
        data_dim: Number of features of one observation.
        latent_dims: Numbers of latents z1 and z2.
        hidden: Hidden layers between x and z1, and between z1 and z2.
        likelihood: As for `VAE`.
        activation: As for `VAE`.
        prior: That of z2, as for `VAE` but for the VampPrior.
        posterior: That of both layers, a name or a mapping as for `VAE`: each layer gets its own.
        network: Between x and z1, as for `VAE`; perceptrons lie between z1 and z2.

    Raises:
        ValueError: If a part is unknown, or cannot stand here.

    References:
        Burda, Grosse & Salakhutdinov (2016), Importance weighted autoencoders: the
        defaults are their model with two layers.

    Example:
        >>> deep = TwoLayerVAE(6, latent_dims=(4, 2), hidden=((5,), (3,)))
        >>> deep.sample(7).shape
        torch.Size([7, 6])
    """

    @refuses_in_words
    def __init__(
        self,
        data_dim: int,
        latent_dims: Sequence[int] = (100, 50),
        hidden: Sequence[Sequence[int]] = ((200, 200), (100, 100)),
        likelihood: str | Mapping[str, Any] | Likelihood = "bernoulli",
        activation: str = "tanh",
        prior: str | Mapping[str, Any] | Prior = "normal",
        posterior: str | Mapping[str, Any] = "diagonal",
        network: str | Mapping[str, Any] | Network = "mlp",
    ) -> None:
        super().__init__()
        if len(latent_dims) != 2 or len(hidden) != 2:
            raise ValueError(
                f"latent_dims and hidden each have two entries, below and on top, not "
                f"{len(latent_dims)} and {len(hidden)}"
            )
        if isinstance(posterior, Posterior):
            raise ValueError(
                "each layer needs a posterior of its own: pass a name or a mapping, such as "
                f"posterior={posterior.config}"
            )
        lower, upper = latent_dims
        self.data_dim = data_dim
        self.latent_dims = (lower, upper)
        self.hidden = tuple(tuple(sizes) for sizes in hidden)
        self.activation = activation
        self.network = make_network(network)
        self.likelihood = make_likelihood(likelihood)
        self.posterior = make_posterior(posterior, lower)
        self.upper_posterior = make_posterior(posterior, upper)
        self.conditional = DiagonalPosterior(lower)  # p(z1 | z2), of the same form
        self.prior = make_prior(prior, upper)
        num_outputs = self.likelihood.num_parameters(data_dim)
        below, above = self.hidden
        self.encoder = self.network.encoder(
            data_dim, below, self.posterior.num_parameters, activation
        )
        self.decoder = self.network.decoder(lower, below, data_dim, num_outputs, activation)
        self.upper_encoder = mlp(lower, above, self.upper_posterior.num_parameters, activation)
        self.upper_decoder = mlp(upper, above[::-1], self.conditional.num_parameters, activation)

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments: `TwoLayerVAE(**m.config)` has this architecture."""
        return {
            "data_dim": self.data_dim,
            "latent_dims": list(self.latent_dims),
            "hidden": [list(sizes) for sizes in self.hidden],
            "likelihood": self.likelihood.config,
            "activation": self.activation,
            "prior": self.prior.config,
            "posterior": self.posterior.config,
            "network": self.network.config,
        }

    def model(self, x: Float[Tensor, "batch features"]) -> None:
        """The generative program: sites "z2", "z1" and, observed, "x", in the plate "data".

        Raises:
            ValueError: If x has the wrong shape or dtype, or lies off the likelihood's support.
        """
        self._check_observed(x)
        for name in ("decoder", "upper_decoder", "likelihood", "prior"):
            pyro.module(name, getattr(self, name))
        prior = self._prior()
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", prior)
            z1 = pyro.sample("z1", self.conditional.distribution(self.upper_decoder(z2)))
            self._observe(z1, x)

    def guide(self, x: Float[Tensor, "batch features"]) -> None:
        """The amortised posterior as a program: sites "z1", then "z2", in the plate "data".

        Raises:
            ValueError: If x has the wrong shape or dtype, or holds NaN or infinite values.
        """
        for name in ("encoder", "upper_encoder", "posterior", "upper_posterior"):
            pyro.module(name, getattr(self, name))
        posterior = self.encode(x)
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", posterior)
            pyro.sample("z2", self.upper_posterior.distribution(self.upper_encoder(z1)))

    def _draw_latents(self, num_samples: int) -> Float[Tensor, "samples latent"]:
        z2 = self._prior().sample((num_samples,))
        return self.conditional.distribution(self.upper_decoder(z2)).sample()


@contextmanager
def _as_global_stream(generator: torch.Generator | None) -> Iterator[None]:
    """Lets the generator stand in for torch's global stream, which distributions draw from."""
    if generator is None:
        yield
        return
    device = generator.device
    on_cpu = device.type == "cpu"
    stream = torch.default_generator if on_cpu else torch.cuda.default_generators[device.index]
    before = stream.get_state()
    stream.set_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(stream.get_state())
        stream.set_state(before)
