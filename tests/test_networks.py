"""The perceptron against the same arithmetic in NumPy."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pyro_vae.networks import ACTIVATIONS, mlp

NUMPY_ACTIVATIONS: dict[str, Callable] = {
    "elu": lambda a: np.where(a > 0, a, np.expm1(a)),
    "relu": lambda a: np.maximum(a, 0),
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
    "silu": lambda a: a / (1 + np.exp(-a)),
    "softplus": lambda a: np.log1p(np.exp(a)),
    "tanh": np.tanh,
}


@pytest.mark.parametrize("activation", NUMPY_ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(), (4,), (4, 6)])
def test_forward_is_affine_maps_and_activations(activation, hidden):
    net = mlp(3, hidden, 5, activation).double()
    inputs = np.random.default_rng(0).normal(size=(7, 2, 3))
    weights = [w.detach().numpy() for w in net.parameters()]
    expected = inputs
    for layer in range(len(hidden) + 1):
        expected = expected @ weights[2 * layer].T + weights[2 * layer + 1]
        if layer < len(hidden):
            expected = NUMPY_ACTIVATIONS[activation](expected)
    output = net(torch.as_tensor(inputs)).detach().numpy()
    assert output.shape == (7, 2, 5)
    np.testing.assert_allclose(output, expected, atol=1e-14)


def test_leading_dimensions_are_independent_rows():
    net = mlp(3, (4,), 2).double()
    inputs = torch.randn(5, 6, 3, dtype=torch.float64)
    torch.testing.assert_close(net(inputs)[4, 1], net(inputs[4, 1]), rtol=0, atol=1e-14)


def test_activations_have_no_shared_state_and_are_all_usable():
    for name in ACTIVATIONS:
        assert mlp(1, (2, 2), 1, name)(torch.zeros(1)).isfinite().all()
    net = mlp(1, (2, 2), 1)
    assert net[1] is not net[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, (0,), 2), "at least one unit"),
        ((3, (4,), 0), "at least one unit"),
        ((3, (4,), 2, "tanhh"), "choose one of"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        mlp(*arguments)
