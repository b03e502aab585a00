r"""Autoencoders as Pyro programs: the guide is a point mass at the code.

.. math:: h \sim p(h), \quad x \sim p(x \mid f(h)), \qquad q(h \mid x) = \delta_{g(x)}(h)

The ELBO of this pair is :math:`\log p(x \mid f(g(x))) + \log p(g(x))` without the entropy of q,
which a point mass does not have: minus a reconstruction error and a penalty, a MAP objective that
bounds nothing. `fit` trains it by the same SVI as everything else. What is called regularised
autoencoders are priors and guides:

- undercomplete: a flat prior, and fewer codes than features;
- sparse: a Laplace prior, whose penalty is :math:`\lambda \lVert h \rVert_1`;
- denoising: the guide sees a corrupted x, the likelihood scores the clean one;
- contractive: a factor :math:`\exp(-\lambda \lVert \partial g / \partial x \rVert_F^2)`.

Two lines turn an autoencoder into a variational one, the point into a normal and the flat prior
into :math:`\mathcal N(0, I)`::

    def model(x):
        pyro.module("decoder", autoencoder.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(code_dim), 1.0).to_event(1))  # was flat
            pyro.sample("x", likelihood.distribution(autoencoder.decoder(z)), obs=x)

    def guide(x):
        pyro.module("encoder", autoencoder.encoder)
        loc, scale = autoencoder.encode(x), ...  # a number, or a second output of the encoder
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))  # was Delta(loc)

Let the scale go to zero, and what is left of the ELBO (but for the entropy, which does not depend
on the means) is the autoencoder's objective again.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions.util import is_validation_enabled
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vae.checks import refuses_in_words
from pyro_vae.data import takes_arrays
from pyro_vae.models.parts import (
    ACTIVATIONS,
    Likelihood,
    Network,
    check_batch,
    check_finite,
    make_likelihood,
    make_network,
)

__all__ = [
    "Autoencoder",
    "AutoencoderKind",
    "Contractive",
    "Denoising",
    "Sparse",
    "Undercomplete",
    "make_kind",
    "squared_jacobian_norm",
]


class AutoencoderKind(ABC):
    """What keeps an autoencoder from the identity; the subclasses are final."""

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """A JSON-able mapping from which `make_kind` rebuilds this."""

    def prior(self, zeros: Float[Tensor, " code"]) -> Distribution:
        """The prior of the code: flat unless a subclass says otherwise.

        Args:
            zeros: A code of zeros, for its size, dtype and device.

        Returns:
            A distribution with event shape (code,). A flat one has log-density 0 everywhere, and is
            normal where it is drawn from.
        """
        return dist.Normal(zeros, 1.0).to_event(1).mask(False)

    def corrupt(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        """What the guide sees of x: x itself unless a subclass says otherwise."""
        return x


@final
class Undercomplete(AutoencoderKind):
    """A flat prior: what limits the code is its size alone."""

    @property
    def config(self) -> dict[str, Any]:
        """See `AutoencoderKind.config`."""
        return {"name": "undercomplete"}


@final
class Sparse(AutoencoderKind):
    r"""A Laplace prior of rate :math:`\lambda`: the penalty is :math:`\lambda \lVert h \rVert_1`.

    Args:
        strength: The rate, in nats per unit of the code. The objective also has the constant
            :math:`\log(\lambda / 2)` for each code.

    Note: it works against the decoder's weights, which may grow while codes shrink; compare codes
        of decoders of one scale.

    References:
        Olshausen & Field (1996), Emergence of simple-cell receptive field properties by learning a
        sparse code for natural images.
    """

    @refuses_in_words
    def __init__(self, strength: float = 1.0) -> None:
        self.strength = _positive("strength", strength)

    @property
    def config(self) -> dict[str, Any]:
        """See `AutoencoderKind.config`."""
        return {"name": "sparse", "strength": self.strength}

    def prior(self, zeros: Float[Tensor, " code"]) -> Distribution:
        """See `AutoencoderKind.prior`."""
        return dist.Laplace(zeros, 1 / self.strength).to_event(1)


@final
class Denoising(AutoencoderKind):
    r"""The guide sees a corrupted x, the likelihood scores the clean one.

    Args:
        noise: `"mask"` sets each feature to 0 with probability `level`; `"gaussian"` adds normal
            noise of standard deviation `level`.
        level: The probability or the standard deviation, in the data's own units.

    Note: the corruption is no latent: its draws come from torch's global stream, as `fit` seeds
        it, also in evaluation mode. `encode` and `reconstruct` see what they are given.

    References:
        Vincent, Larochelle, Bengio & Manzagol (2008), Extracting and composing robust features
        with denoising autoencoders.
    """

    @refuses_in_words
    def __init__(self, noise: str = "mask", level: float = 0.3) -> None:
        if noise not in ("mask", "gaussian"):
            raise ValueError(f"noise is 'mask' or 'gaussian', not {noise!r}")
        self.noise = noise
        self.level = _positive("level", level)
        if noise == "mask" and self.level >= 1:
            raise ValueError(f"a masking probability lies between 0 and 1, not at {level}")

    @property
    def config(self) -> dict[str, Any]:
        """See `AutoencoderKind.config`."""
        return {"name": "denoising", "noise": self.noise, "level": self.level}

    def corrupt(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        """See `AutoencoderKind.corrupt`."""
        if self.noise == "gaussian":
            return x + self.level * torch.randn_like(x)
        return x * (torch.rand_like(x) >= self.level)


@final
class Contractive(AutoencoderKind):
    r"""A factor :math:`\exp(-\lambda \lVert \partial g / \partial x \rVert_F^2)` in the model.

    Args:
        strength: The weight :math:`\lambda`.

    Note: it works against the decoder's weights as `Sparse` does: the published model ties them.

    References:
        Rifai, Vincent, Muller, Glorot & Bengio (2011), Contractive auto-encoders: explicit
        invariance during feature extraction.
    """

    @refuses_in_words
    def __init__(self, strength: float = 0.1) -> None:
        self.strength = _positive("strength", strength)

    @property
    def config(self) -> dict[str, Any]:
        """See `AutoencoderKind.config`."""
        return {"name": "contractive", "strength": self.strength}


_KINDS: Mapping[str, type[AutoencoderKind]] = MappingProxyType(
    {
        "contractive": Contractive,
        "denoising": Denoising,
        "sparse": Sparse,
        "undercomplete": Undercomplete,
    }
)


def make_kind(kind: str | Mapping[str, Any] | AutoencoderKind) -> AutoencoderKind:
    """Turns a name or an `AutoencoderKind.config` into a kind; an instance passes through.

    Args:
        kind: `"undercomplete"`, `"sparse"`, `"denoising"`, `"contractive"`; a mapping with such a
            `"name"` and the arguments of its class; or a kind.

    Raises:
        ValueError: If the name is unknown or missing.
        TypeError: If an argument is not one of that kind's.

    Example:
        >>> make_kind({"name": "denoising", "level": 0.5}).config["noise"]
        'mask'
    """
    if isinstance(kind, AutoencoderKind):
        return kind
    arguments = {"name": kind} if isinstance(kind, str) else dict(kind)
    name = str(arguments.pop("name", None))
    if name not in _KINDS:
        raise ValueError(f"Unknown kind of autoencoder {name!r}: choose one of {sorted(_KINDS)}")
    return _KINDS[name](**arguments)


class Autoencoder(nn.Module):
    """An autoencoder as a Pyro model and a guide that is a point.

    Args:
        data_dim: Number of features of one observation.
        code_dim: Number of codes of one observation.
        hidden: Sizes of the encoder's hidden layers; the decoder has them in reverse order. Empty
            gives the linear autoencoder.
        kind: A name, a mapping of a name and its arguments, or an instance: see `make_kind`.
        likelihood: As for `VAE`: its negative logarithm is the reconstruction error. A Gaussian of
            a fixed scale gives squared errors, a Bernoulli cross-entropies.
        activation: The name of the activation of the hidden layers, see `networks.ACTIVATIONS`.
        network: How encoder and decoder are built, see `networks.make_network`.

    Note: what `fit` calls `bound` is here the negative loss and labelled an objective. Log weights,
        evidence, gap and k-hat do not exist for a guide without a density, and refuse it.

    References:
        Hinton & Salakhutdinov (2006), Reducing the dimensionality of data with neural networks;
        Baldi & Hornik (1989) for the linear one.

    Example:
        >>> autoencoder = Autoencoder(data_dim=6, code_dim=2, hidden=(5,), kind="sparse")
        >>> autoencoder.reconstruct(torch.zeros(4, 6)).shape
        torch.Size([4, 6])
    """

    @refuses_in_words
    def __init__(
        self,
        data_dim: int,
        code_dim: int,
        hidden: Sequence[int] = (400,),
        kind: str | Mapping[str, Any] | AutoencoderKind = "undercomplete",
        likelihood: str | Mapping[str, Any] | Likelihood = "bernoulli",
        activation: str = "tanh",
        network: str | Mapping[str, Any] | Network = "mlp",
    ) -> None:
        super().__init__()
        self.data_dim = data_dim
        self.code_dim = code_dim
        self.hidden = tuple(hidden)
        self.activation = activation
        self.kind = make_kind(kind)
        self.network = make_network(network)
        self.likelihood = make_likelihood(likelihood)
        if isinstance(self.kind, Undercomplete) and code_dim >= data_dim:
            raise ValueError(
                f"an undercomplete code has fewer than the data's {data_dim} features, not "
                f"{code_dim}: with as many it learns the identity. Use a smaller code_dim or "
                "another kind"
            )
        self.encoder = self.network.encoder(data_dim, self.hidden, code_dim, activation)
        num_outputs = self.likelihood.num_parameters(data_dim)
        self.decoder = self.network.decoder(
            code_dim, self.hidden, data_dim, num_outputs, activation
        )

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments: `Autoencoder(**a.config)` has this architecture."""
        return {
            "data_dim": self.data_dim,
            "code_dim": self.code_dim,
            "hidden": list(self.hidden),
            "kind": self.kind.config,
            "likelihood": self.likelihood.config,
            "activation": self.activation,
            "network": self.network.config,
        }

    def model(self, x: Float[Tensor, "batch features"]) -> None:
        """The decoder as a program: sites "z" and, observed, "x", in the plate "data".

        A contractive one also has the factor "contraction".

        Raises:
            ValueError: If x has the wrong shape or dtype, or lies off the likelihood's support.
        """
        self._check_batch(x)
        if is_validation_enabled():  # a graph cannot be captured through a branch on data
            self.likelihood.check(x)
        decoder = pyro.module("decoder", self.decoder)
        likelihood = pyro.module("likelihood", self.likelihood)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.kind.prior(x.new_zeros(self.code_dim)))
            pyro.sample("x", likelihood.distribution(decoder(z)), obs=x)
            if isinstance(self.kind, Contractive):
                pyro.module("encoder", self.encoder)
                pyro.factor("contraction", -self.kind.strength * self.contraction(x))

    def guide(self, x: Float[Tensor, "batch features"]) -> None:
        """The encoder as a program: the point "z" in the plate "data".

        Raises:
            ValueError: If x has the wrong shape or dtype, or holds NaN or infinite values.
        """
        pyro.module("encoder", self.encoder)
        code = self.encode(self.kind.corrupt(x))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(code, event_dim=1))

    @takes_arrays()
    def encode(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch code"]:
        """The code of x, uncorrupted.

        Raises:
            ValueError: If x has the wrong shape or dtype, or holds NaN or infinite values.
        """
        self._check_batch(x)
        if is_validation_enabled():  # the support is the model's business
            check_finite(x)
        return self.encoder(x)

    @takes_arrays()
    def decode(self, z: Float[Tensor, "*batch code"]) -> Float[Tensor, "*batch features"]:
        """The mean of x given the code, the pixel values that pictures show."""
        return self.likelihood.mean(self.decoder(z))

    @takes_arrays()
    def reconstruct(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        """The mean of x given its code: `decode(encode(x))`."""
        return self.decode(self.encode(x))

    @takes_arrays()
    def contraction(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, " batch"]:
        r""":math:`\lVert \partial g / \partial x \rVert_F^2` of the encoder at each datum."""
        return squared_jacobian_norm(self.encoder, x)

    def _check_batch(self, x: Tensor) -> None:
        check_batch(x, self.data_dim, like=next(self.encoder.parameters()))


def squared_jacobian_norm(
    network: nn.Module, x: Float[Tensor, "batch inputs"]
) -> Float[Tensor, " batch"]:
    r"""The squared Frobenius norm of a network's Jacobian at each row, differentiable.

    With one hidden layer of activation a, weights V into it and W out of it,

    .. math:: \lVert W \operatorname{diag}(a') V \rVert_F^2
        = a'^\top \bigl[ (W^\top W) \circ (V V^\top) \bigr] a' ,

    whose cost for each row is the square of the hidden size: no Jacobian is formed. Of an affine
    network it is a constant. Of every other one the Jacobian is formed, by as many backward passes
    in one as there are outputs.

    Args:
        network: Works row by row (no batch normalisation).
        x: The rows.

    References:
        Rifai et al. (2011), for one layer.
    """
    layers = list(network) if isinstance(network, nn.Sequential) else []
    if len(layers) == 1 and isinstance(layers[0], nn.Linear):
        return layers[0].weight.square().sum().expand(len(x))
    if len(layers) == 3 and isinstance(layers[1], tuple(ACTIVATIONS.values())):
        into, activation, out = layers
        if isinstance(into, nn.Linear) and isinstance(out, nn.Linear):
            # A pull-back of ones through an elementwise function is its derivative.
            pulled = torch.func.vjp(activation, into(x))
            (slope,) = pulled[1](torch.ones_like(pulled[0]))
            gram = (out.weight.mT @ out.weight) * (into.weight @ into.weight.mT)
            return ((slope @ gram) * slope).sum(-1)
    jacobian = torch.func.vmap(torch.func.jacrev(network))(x)
    return jacobian.square().sum((-2, -1))


def _positive(name: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, not {value}")
    return float(value)
