"""Deterministic torch networks: the functions inside the models. Nothing here knows of Pyro."""

from collections.abc import Sequence
from itertools import pairwise
from types import MappingProxyType

from torch import nn

__all__ = ["ACTIVATIONS", "mlp"]

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
    if min(sizes) < 1:
        raise ValueError(f"Every layer needs at least one unit, but the sizes are {sizes}.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"Unknown activation {activation!r}: choose one of {sorted(ACTIVATIONS)}.")
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])
