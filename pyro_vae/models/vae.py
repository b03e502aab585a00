r"""The variational autoencoder as a Pyro model and guide.

.. math:: p(z) = \mathcal N(0, I), \quad x \sim p(x \mid f(z)), \quad
          q(z \mid x) = \mathcal N\bigl(\mu(x), \mathrm{diag}\,\sigma^2(x)\bigr)

with multilayer perceptrons for the decoder f and the encoder :math:`(\mu, \sigma)`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions.util import is_validation_enabled
from torch import Tensor, nn
from torch.distributions import Independent
from torch.nn import functional

from pyro_vae.models.likelihoods import Likelihood, check_batch, check_finite, make_likelihood
from pyro_vae.networks import mlp

__all__ = ["VAE"]

_MIN_POSTERIOR_SCALE = 1e-6


class VAE(nn.Module):
    r"""A variational autoencoder with a standard normal prior and a diagonal normal guide.

    The guide's scale is :math:`10^{-6} + \mathrm{softplus}(r)` of the encoder's output r: it is
    never zero, and linear in r for large r, where an exponential would overflow. The default
    activation is tanh, as in Kingma & Welling: log p(x, z) is then smooth in z, on which the
    gradient-based references (HMC, annealed importance sampling) rely.

    Args:
        data_dim: Number of features of one observation.
        latent_dim: Number of latents of one observation.
        hidden: Sizes of the encoder's hidden layers; the decoder has them in reverse order.
        likelihood: A name, a mapping of a name and its arguments, or an instance: see
            `make_likelihood`.
        activation: The name of the activation of the hidden layers, see `networks.ACTIVATIONS`.

    References:
        Kingma & Welling (2014), Auto-encoding variational Bayes, arXiv:1312.6114, appendix C.

    Example:
        >>> vae = VAE(data_dim=6, latent_dim=2, hidden=(5,))
        >>> vae.encode(torch.zeros(4, 6)).mean.shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        hidden: Sequence[int] = (400,),
        likelihood: str | Mapping[str, Any] | Likelihood = "bernoulli",
        activation: str = "tanh",
    ) -> None:
        super().__init__()
        self.data_dim = data_dim
        self.latent_dim = latent_dim
        self.hidden = tuple(hidden)
        self.activation = activation
        self.likelihood = make_likelihood(likelihood)
        self.encoder = mlp(data_dim, self.hidden, 2 * latent_dim, activation)
        num_outputs = self.likelihood.num_parameters(data_dim)
        self.decoder = mlp(latent_dim, self.hidden[::-1], num_outputs, activation)

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
        }

    def model(self, x: Float[Tensor, "batch features"]) -> None:
        """The generative program: sites "z" and, observed, "x", in the plate "data".

        Raises:
            ValueError: If x has the wrong shape or dtype, or lies off the likelihood's support.
        """
        self._check_batch(x)
        if is_validation_enabled():  # a graph cannot be captured through a branch on data
            self.likelihood.check(x)
        decoder = pyro.module("decoder", self.decoder)
        likelihood = pyro.module("likelihood", self.likelihood)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", likelihood.distribution(decoder(z)), obs=x)

    def guide(self, x: Float[Tensor, "batch features"]) -> None:
        """The amortised posterior as a program: site "z" in the plate "data".

        Raises:
            ValueError: If x has the wrong shape or dtype, or holds NaN or infinite values.
        """
        pyro.module("encoder", self.encoder)
        posterior = self.encode(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior)

    def encode(self, x: Float[Tensor, "batch features"]) -> Independent:
        """The approximate posterior q(z | x).

        Returns:
            A diagonal normal of batch shape (batch,) and event shape (latent,).

        Raises:
            ValueError: If x has the wrong shape or dtype, or holds NaN or infinite values.
        """
        self._check_batch(x)
        if is_validation_enabled():  # the support is the model's business
            check_finite(x)
        loc, raw_scale = self.encoder(x).chunk(2, dim=-1)
        scale = _MIN_POSTERIOR_SCALE + functional.softplus(raw_scale)
        return dist.Normal(loc, scale).to_event(1)

    def decode(self, z: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch features"]:
        """The mean of x given z, the pixel values that pictures show."""
        return self.likelihood.mean(self.decoder(z))

    def reconstruct(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        """The mean of x given the posterior mean of z: `decode(encode(x).mean)`."""
        return self.decode(self.encode(x).mean)

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
        like = next(self.decoder.parameters())
        with _as_global_stream(generator):
            z = torch.randn(num_samples, self.latent_dim, dtype=like.dtype, device=like.device)
            output = self.decoder(z)
            if mean:
                return self.likelihood.mean(output)
            return self.likelihood.distribution(output).sample()

    def _check_batch(self, x: Tensor) -> None:
        check_batch(x, self.data_dim, like=next(self.encoder.parameters()))


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
