"""Deterministic torch networks: the functions inside the models. Nothing here knows of Pyro.

An encoder maps rows of features to rows of outputs, a decoder rows of latents to rows of outputs;
both take any leading dimensions (data, particles). `make_network` chooses how they are built.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "ACTIVATIONS",
    "Autoregressive",
    "Convolutional",
    "Network",
    "Perceptron",
    "Residual",
    "make_network",
    "mlp",
    "residual",
]

ACTIVATIONS = MappingProxyType(
    {
        "elu": nn.ELU,
        "gelu": nn.GELU,
        "relu": nn.ReLU,
        "sigmoid": nn.Sigmoid,
        "silu": nn.SiLU,
        "softplus": nn.Softplus,
        "tanh": nn.Tanh,
    }
)


def mlp(
    in_dim: int, hidden: Sequence[int], out_dim: int, activation: str = "tanh"
) -> nn.Sequential:
    """Builds a multilayer perceptron that broadcasts over any leading dimensions.

    Args:
        in_dim: Size of the last dimension of the input.
        hidden: Sizes of the hidden layers, first to last; empty gives one affine map.
        out_dim: Size of the last dimension of the output, which has no activation.
        activation: A name in `ACTIVATIONS`, applied after every hidden layer.

    Returns:
        A map from shape (*batch, in_dim) to shape (*batch, out_dim), initialised as `torch.nn`
        does.

    Raises:
        ValueError: If a size is not positive, or the activation is unknown.

    Example:
        >>> import torch
        >>> mlp(3, (5,), 2)(torch.zeros(7, 4, 3)).shape
        torch.Size([7, 4, 2])
    """
    sizes = (in_dim, *hidden, out_dim)
    _check_sizes(sizes, activation)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def residual(
    in_dim: int, hidden: Sequence[int], out_dim: int, activation: str = "tanh"
) -> nn.Sequential:
    r"""Builds a residual network: a block for each hidden size between two affine maps.

    A block is :math:`h \mapsto P h + W_2\, a(W_1\, a(h))`, where P is the identity unless the size
    changes. :math:`W_2` starts at zero, so that the network starts as an affine map.

    Args:
        in_dim: Size of the last dimension of the input.
        hidden: Sizes of the blocks, first to last; at least one.
        out_dim: Size of the last dimension of the output, which has no activation.
        activation: A name in `ACTIVATIONS`.

    Raises:
        ValueError: If there is no block, a size is not positive, or the activation is unknown.

    References:
        He, Zhang, Ren & Sun (2016), Identity mappings in deep residual networks, arXiv:1603.05027.
    """
    _check_sizes((in_dim, *hidden, out_dim), activation)
    if not hidden:
        raise ValueError("a residual network needs at least one hidden size; give one, or use mlp")
    sizes = (hidden[0], *hidden)
    blocks = [_ResidualBlock(a, b, activation) for a, b in pairwise(sizes)]
    ends = nn.Linear(in_dim, hidden[0]), nn.Linear(hidden[-1], out_dim)
    return nn.Sequential(ends[0], *blocks, ACTIVATIONS[activation](), ends[1])


class _ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, activation: str) -> None:
        super().__init__()
        self.shortcut = nn.Identity() if in_dim == out_dim else nn.Linear(in_dim, out_dim)
        self.first, self.second = nn.Linear(in_dim, out_dim), nn.Linear(out_dim, out_dim)
        self.activation = ACTIVATIONS[activation]()
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, inputs: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        inner = self.first(self.activation(inputs))
        return self.shortcut(inputs) + self.second(self.activation(inner))


# --- how encoders and decoders are built ----------------------------------------------------------


class Network(ABC):
    """How the encoder and the decoder of a model are built; the subclasses are final."""

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """A JSON-able mapping from which `make_network` rebuilds this."""

    @abstractmethod
    def encoder(
        self, data_dim: int, hidden: Sequence[int], out_dim: int, activation: str
    ) -> nn.Module:
        """A map from (*batch, data_dim) to (*batch, out_dim)."""

    @abstractmethod
    def decoder(
        self, in_dim: int, hidden: Sequence[int], data_dim: int, out_dim: int, activation: str
    ) -> nn.Module:
        """A map from (*batch, in_dim) to (*batch, out_dim).

        The outputs are out_dim / data_dim blocks of one number per feature. `hidden` is that of
        the encoder: it is used in reverse order.
        """


@final
class Perceptron(Network):
    """Multilayer perceptrons, see `mlp`."""

    @property
    def config(self) -> dict[str, Any]:
        """See `Network.config`."""
        return {"name": "mlp"}

    def encoder(
        self, data_dim: int, hidden: Sequence[int], out_dim: int, activation: str
    ) -> nn.Module:
        """See `Network.encoder`."""
        return mlp(data_dim, hidden, out_dim, activation)

    def decoder(
        self, in_dim: int, hidden: Sequence[int], data_dim: int, out_dim: int, activation: str
    ) -> nn.Module:
        """See `Network.decoder`."""
        return mlp(in_dim, hidden[::-1], out_dim, activation)


@final
class Residual(Network):
    """Residual networks with a block for each hidden size, see `residual`."""

    @property
    def config(self) -> dict[str, Any]:
        """See `Network.config`."""
        return {"name": "residual"}

    def encoder(
        self, data_dim: int, hidden: Sequence[int], out_dim: int, activation: str
    ) -> nn.Module:
        """See `Network.encoder`."""
        return residual(data_dim, hidden, out_dim, activation)

    def decoder(
        self, in_dim: int, hidden: Sequence[int], data_dim: int, out_dim: int, activation: str
    ) -> nn.Module:
        """See `Network.decoder`."""
        return residual(in_dim, hidden[::-1], out_dim, activation)


@final
class Convolutional(Network):
    """Convolutions of stride 2, then a perceptron with the hidden layers; the decoder mirrors it.

    Args:
        channels: Channels after each convolution, each of which halves height and width.
        image_shape: (height, width) or (channels, height, width) of an observation, whose pixels
            are flattened in that order; None for square pictures of one channel.

    Raises:
        ValueError: If a size is not positive; and when networks are built, if the shape does not
            have as many pixels as the data have features.
    """

    def __init__(
        self, channels: Sequence[int] = (16, 32), image_shape: Sequence[int] | None = None
    ) -> None:
        if not channels or min(channels) < 1:
            raise ValueError(f"channels needs positive numbers, not {tuple(channels)}")
        if image_shape is not None and (len(image_shape) not in (2, 3) or min(image_shape) < 1):
            raise ValueError(
                "image_shape is (height, width) or (channels, height, width), not "
                f"{tuple(image_shape)}"
            )
        self.channels = tuple(channels)
        self.image_shape = None if image_shape is None else tuple(image_shape)

    @property
    def config(self) -> dict[str, Any]:
        """See `Network.config`."""
        shape = None if self.image_shape is None else list(self.image_shape)
        return {"name": "conv", "channels": list(self.channels), "image_shape": shape}

    def encoder(
        self, data_dim: int, hidden: Sequence[int], out_dim: int, activation: str
    ) -> nn.Module:
        """See `Network.encoder`."""
        shapes = self._shapes(data_dim)
        _check_sizes((data_dim, *hidden, out_dim), activation)
        layers: list[nn.Module] = []
        for (before, *_), (after, *_) in pairwise(shapes):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), ACTIVATIONS[activation]()]
        head = mlp(math.prod(shapes[-1]), hidden, out_dim, activation)
        return nn.Sequential(_OnImages(nn.Sequential(*layers), shapes[0]), head)

    def decoder(
        self, in_dim: int, hidden: Sequence[int], data_dim: int, out_dim: int, activation: str
    ) -> nn.Module:
        """See `Network.decoder`."""
        blocks, rest = divmod(out_dim, data_dim)
        if rest:
            raise ValueError(f"{out_dim} outputs are not a whole number for each of {data_dim}")
        first, *inner = self._shapes(data_dim)
        shapes = [(blocks * first[0], *first[1:]), *inner]
        layers: list[nn.Module] = [ACTIVATIONS[activation]()]
        for before, after in pairwise(shapes[::-1]):
            # Undoes the halving: n pixels came from 2n or, if they were odd in number, from 2n - 1.
            odd = (1 - after[1] % 2, 1 - after[2] % 2)
            layers += [
                nn.ConvTranspose2d(before[0], after[0], 3, 2, padding=1, output_padding=odd),
                ACTIVATIONS[activation](),
            ]
        head = mlp(in_dim, hidden[::-1], math.prod(shapes[-1]), activation)
        return nn.Sequential(head, _OnImages(nn.Sequential(*layers[:-1]), shapes[-1]))

    def _shapes(self, data_dim: int) -> list[tuple[int, int, int]]:
        """(channels, height, width) of the picture and after each convolution."""
        side = math.isqrt(data_dim)
        if self.image_shape is None and side**2 != data_dim:
            raise ValueError(
                f"{data_dim} features are not a square picture: pass network={{'name': 'conv', "
                "'image_shape': (height, width)}"
            )
        shape = self.image_shape or (side, side)
        if math.prod(shape) != data_dim:
            raise ValueError(
                f"a picture of shape {shape} has {math.prod(shape)} pixels, but the data have "
                f"{data_dim} features"
            )
        color, height, width = (1, *shape)[-3:]
        shapes = [(color, height, width)]
        for channels in self.channels:
            height, width = (height + 1) // 2, (width + 1) // 2
            shapes.append((channels, height, width))
        return shapes


class _OnImages(nn.Module):
    """Rows of pixels in and out, pictures inside; any leading dimensions."""

    def __init__(self, layers: nn.Module, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.layers = layers
        self.shape = shape

    def forward(self, rows: Float[Tensor, "*batch pixels"]) -> Float[Tensor, "*batch outputs"]:
        images = self.layers(rows.reshape(-1, *self.shape))
        return images.reshape(*rows.shape[:-1], -1)


_NETWORKS: Mapping[str, type[Network]] = MappingProxyType(
    {"conv": Convolutional, "mlp": Perceptron, "residual": Residual}
)


def make_network(network: str | Mapping[str, Any] | Network) -> Network:
    """Turns a name or a `Network.config` into a network; an instance passes through.

    Args:
        network: `"mlp"`, `"conv"`, `"residual"`; a mapping with such a `"name"` and the arguments
            of its class; or a network.

    Raises:
        ValueError: If the name is unknown or missing.
        TypeError: If an argument is not one of that network's.
    """
    if isinstance(network, Network):
        return network
    arguments = {"name": network} if isinstance(network, str) else dict(network)
    name = str(arguments.pop("name", None))
    if name not in _NETWORKS:
        raise ValueError(f"Unknown network {name!r}: choose one of {sorted(_NETWORKS)}")
    return _NETWORKS[name](**arguments)


# --- for flows ------------------------------------------------------------------------------------


class Autoregressive(nn.Module):
    """A masked perceptron whose i-th outputs depend on earlier inputs alone, and on a context.

    It has what Pyro's autoregressive transforms ask of their network. Pyro's own
    `AutoRegressiveNN` draws its order at random, keeps it as integers among the weights, and
    cannot be inverted in another dtype than torch's default one.

    Args:
        dim: Number of inputs.
        hidden: Sizes of the hidden layers; at least one.
        num_outputs: Outputs for each input.
        context_dim: Size of the context; 0 for none.
        reverse: Whether the order is last to first.

    Attributes:
        permutation: Indices of the inputs in their order.

    Raises:
        ValueError: If a size is not positive.

    References:
        Germain, Gregor, Murray & Larochelle (2015), MADE: masked autoencoder for distribution
        estimation, arXiv:1502.03509.
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int],
        num_outputs: int = 2,
        context_dim: int = 0,
        *,
        reverse: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes((dim, *hidden, num_outputs), "elu")
        if not hidden:
            raise ValueError("a masked perceptron needs at least one hidden layer")
        self.dim, self.num_outputs = dim, num_outputs
        self.permutation = list(range(dim))[:: -1 if reverse else 1]
        order = torch.empty(dim, dtype=torch.long, device="cpu")
        order[self.permutation] = torch.arange(dim, device="cpu")
        # Degree d means: may depend on the inputs up to the d-th. Those of degree -1 see the
        # context alone.
        lowest = -1 if context_dim else 0
        degrees = [
            lowest + torch.arange(size, device="cpu") % max(dim - 1 - lowest, 1) for size in hidden
        ]
        seen = torch.cat([torch.full((context_dim,), -1, device="cpu"), order])
        layers = []
        for before, after in pairwise([seen, *degrees]):
            layers.append(_MaskedLinear(after[:, None] >= before))
        last = order.repeat(num_outputs)[:, None] > degrees[-1]
        self.layers = nn.ModuleList([*layers, _MaskedLinear(last)])

    def get_permutation(self) -> list[int]:
        """The order, as Pyro's conditional transforms ask for it."""
        return self.permutation

    def forward(
        self,
        inputs: Float[Tensor, "*batch dim"],
        context: Float[Tensor, "*#batch context"] | None = None,
    ) -> tuple[Float[Tensor, "*batch dim"], ...]:
        """The outputs, each with one number for every input."""
        # Pyro's inverses start from zeros of torch's default dtype.
        hidden = inputs.to(next(self.parameters()))
        if context is not None:
            context = context.expand(*hidden.shape[:-1], -1)
            hidden = torch.cat([context, hidden], dim=-1)
        for layer in self.layers[:-1]:
            hidden = functional.elu(layer(hidden))
        outputs = self.layers[-1](hidden)
        return outputs.chunk(self.num_outputs, dim=-1)


class _MaskedLinear(nn.Linear):
    """An affine map of which the mask lets some weights through."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.to(self.weight))

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight * self.mask, self.bias)


def _check_sizes(sizes: Sequence[int], activation: str) -> None:
    if min(sizes) < 1:
        raise ValueError(f"every layer needs at least one unit, but the sizes are {tuple(sizes)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"Unknown activation {activation!r}: choose one of {sorted(ACTIVATIONS)}")
