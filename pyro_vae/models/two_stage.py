r"""A second VAE on the codes of a first: the two-stage remedy for a prior that codes do not follow.

A trained VAE has codes whose law over the data, the aggregated posterior
:math:`q(z) = \mathbb E_x\, q(z \mid x)`, is not the prior that samples are drawn from. A second
VAE, trained on these codes with the first one held fixed, learns that law. Here the two are one
pair of programs, with a bound on log p(x) as any other.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
from jaxtyping import Float
from torch import Tensor

from pyro_vae.checks import refuses_in_words
from pyro_vae.models.parts import DiagonalPosterior, Gaussian, StandardNormal, mlp
from pyro_vae.models.vae import VAE, _VariationalAutoencoder

__all__ = ["TwoStageVAE"]


class TwoStageVAE(_VariationalAutoencoder):
    r"""A trained VAE, held fixed, whose prior is a second VAE on its codes.

    .. math:: u \sim \mathcal N(0, I), \quad z \mid u \sim \mathcal N(f_2(u), s^2 I), \quad
              x \mid z \sim p_1(x \mid z); \qquad
              z \mid x \sim q_1(z \mid x), \quad u \mid z \sim q_2(u \mid z)

    with one learned scale s. What of the ELBO of this pair depends on the second stage is the mean
    over the data and over q1(z | x) of the second VAE's own ELBO on z: fitting the pair is the
    second stage, and the bound on log p(x) that it gives compares with that of the first VAE. The
    most it can gain over a standard normal prior is :math:`\mathrm{KL}(q(z) \,\|\, \mathcal N(0,
    I))`, and on held-out data it may lose.

    Args:
        first: The trained VAE. Its encoder and decoder are copied as they are now, without
            gradient: it is left as it is, and training it further changes nothing here. Its prior
            is dropped. A mapping, `VAE.config`, gives an untrained one, to load weights into.
        hidden: Sizes of the hidden layers from z to u; from u to z they are in reverse order.
        latent_dim: Number of latents u; None for as many as the first VAE has.
        activation: The name of the activation of these layers, see `networks.ACTIVATIONS`.

    Raises:
        ValueError: If `first` is no VAE, or a size or the activation cannot be used.

    Note: where the first decoder's scale is fixed too large, codes carry too little information,
        which no prior can put right: learn the scale first (Dai & Wipf).

    References:
        Dai & Wipf (2019), Diagnosing and enhancing VAE models, arXiv:1903.05789.

    Example:
        >>> import torch
        >>> two_stage = TwoStageVAE(VAE(6, 2, (5,), "gaussian"), hidden=(4,))
        >>> two_stage.sample(7).shape
        torch.Size([7, 6])
        >>> sorted({name.split(".")[0] for name, p in two_stage.named_parameters()
        ...         if p.requires_grad})
        ['conditional', 'upper_decoder', 'upper_encoder']
    """

    @refuses_in_words
    def __init__(
        self,
        first: VAE | Mapping[str, Any],
        hidden: Sequence[int] = (100, 100),
        latent_dim: int | None = None,
        activation: str = "tanh",
    ) -> None:
        super().__init__()
        if isinstance(first, Mapping):
            first = VAE(**first)
        if type(first) is not VAE:
            raise ValueError(
                f"first is a trained VAE or its config, not a {type(first).__name__}: a second "
                "stage needs an encoder with one layer of latents"
            )
        upper = first.latent_dim if latent_dim is None else latent_dim
        self.data_dim = first.data_dim
        self.latent_dims = (first.latent_dim, upper)
        self.hidden = tuple(hidden)
        self.activation = activation
        self._first_config = first.config
        for name in ("encoder", "decoder", "likelihood", "posterior"):
            setattr(self, name, copy.deepcopy(getattr(first, name)).requires_grad_(False))
        self.prior = StandardNormal(upper)
        self.conditional = Gaussian("shared")  # p(z | u)
        self.upper_posterior = DiagonalPosterior(upper)
        lower, outputs = first.latent_dim, self.upper_posterior.num_parameters
        self.upper_encoder = mlp(lower, self.hidden, outputs, activation)
        self.upper_decoder = mlp(upper, self.hidden[::-1], lower, activation)
        self.to(next(first.decoder.parameters()))  # its dtype and device

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments: `TwoStageVAE(**m.config)` has this architecture."""
        return {
            "first": self._first_config,
            "hidden": list(self.hidden),
            "latent_dim": self.latent_dims[1],
            "activation": self.activation,
        }

    def model(self, x: Float[Tensor, "batch features"]) -> None:
        """The generative program: sites "u", "z" and, observed, "x", in the plate "data".

        Raises:
            ValueError: If x has the wrong shape or dtype, or lies off the likelihood's support.
        """
        self._check_observed(x)
        pyro.module("upper_decoder", self.upper_decoder)
        pyro.module("conditional", self.conditional)
        prior = self._prior()
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", prior)
            z = pyro.sample("z", self.conditional.distribution(self.upper_decoder(u)))
            self._observe(z, x)

    def guide(self, x: Float[Tensor, "batch features"]) -> None:
        """The amortised posterior as a program: sites "z", then "u", in the plate "data".

        Raises:
            ValueError: If x has the wrong shape or dtype, or holds NaN or infinite values.
        """
        pyro.module("upper_encoder", self.upper_encoder)
        posterior = self.encode(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", posterior)
            pyro.sample("u", self.upper_posterior.distribution(self.upper_encoder(z)))

    def _draw_latents(self, num_samples: int) -> Float[Tensor, "samples latent"]:
        u = self._prior().sample((num_samples,))
        return self.conditional.distribution(self.upper_decoder(u)).sample()
