"""Networks against the same arithmetic in NumPy, and against what they may not see."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pyro_vae.models.parts import ACTIVATIONS, Convolutional, make_network, mlp
from pyro_vae.models.parts.networks import Autoregressive, residual

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


NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp"},
    "residual": {"name": "residual"},
    "conv": {"name": "conv", "channels": [2, 3], "image_shape": [1, 3, 4]},
}


@pytest.mark.parametrize("spec", NETWORKS.values(), ids=NETWORKS)
def test_encoders_and_decoders_map_rows_one_by_one(spec):
    network = make_network(spec)
    encoder = network.encoder(12, (6, 5), 4, "tanh")
    decoder = network.decoder(2, (6, 5), 12, 24, "tanh")
    rows, codes = torch.randn(3, 7, 12), torch.randn(3, 7, 2)
    for net, inputs, size in ((encoder, rows, 4), (decoder, codes, 24)):
        outputs = net(inputs)
        assert outputs.shape == (3, 7, size)
        torch.testing.assert_close(outputs[2, 4], net(inputs[2, 4]), rtol=0, atol=1e-13)
        torch.testing.assert_close(outputs[1], net(inputs[1]), rtol=0, atol=1e-13)
    again = make_network(json.loads(json.dumps(network.config)))
    assert again.config == network.config
    assert make_network(network) is network


def test_a_residual_network_by_hand():
    net = residual(3, (4, 5), 2, "relu")
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    weights = {name: value.detach().numpy() for name, value in net.named_parameters()}
    inputs = np.random.default_rng(0).normal(size=(7, 3))

    def affine(name, h):
        return h @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    h = affine("0", inputs)
    h = h + affine("1.second", np.maximum(affine("1.first", np.maximum(h, 0)), 0))
    inner = affine("2.second", np.maximum(affine("2.first", np.maximum(h, 0)), 0))
    h = affine("2.shortcut", h) + inner
    expected = affine("4", np.maximum(h, 0))
    np.testing.assert_allclose(net(torch.as_tensor(inputs)).detach(), expected, atol=1e-12)


def test_a_residual_network_starts_without_its_blocks():
    net = residual(3, (4, 4), 2)
    inputs = torch.randn(5, 3)
    torch.testing.assert_close(net(inputs), net[-1](torch.tanh(net[0](inputs))))


@pytest.mark.parametrize("shape", [(8, 8), (28, 28), (7, 5), (3, 5, 6), (1, 1)])
def test_convolutions_of_any_picture_lead_back_to_its_size(shape):
    size = int(np.prod(shape))
    network = Convolutional((2, 3, 2), shape)
    assert network.encoder(size, (4,), 3, "relu")(torch.rand(2, size)).shape == (2, 3)
    outputs = network.decoder(3, (4,), size, 2 * size, "relu")(torch.rand(2, 3))
    assert outputs.shape == (2, 2 * size)


def test_a_convolutional_encoder_sees_the_picture_the_right_way_up():
    """A shift of the picture by the stride shifts the features, away from the border."""
    encoder: Any = Convolutional((1,), (16, 16)).encoder(256, (), 1, "relu")
    convolution = encoder[0]
    picture = torch.zeros(16, 16)
    picture[6:9, 5:8] = torch.rand(3, 3)
    features = convolution(picture.reshape(1, -1)).reshape(8, 8)
    moved = convolution(picture.roll((2, 4), (0, 1)).reshape(1, -1)).reshape(8, 8)
    inner = (slice(2, 7), slice(3, 7))
    torch.testing.assert_close(moved[inner], features.roll((1, 2), (0, 1))[inner])
    assert not torch.allclose(moved[inner], features[inner])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dim", [1, 4])
def test_masked_perceptrons_see_earlier_inputs_and_the_context_alone(dim, reverse):
    net = Autoregressive(dim, (9, 8), num_outputs=3, context_dim=2, reverse=reverse)
    z, context = torch.randn(dim), torch.randn(2)
    by_inputs = torch.autograd.functional.jacobian(lambda u: torch.stack(net(u, context)), z)
    by_context = torch.autograd.functional.jacobian(lambda c: torch.stack(net(z, c)), context)
    order = net.permutation
    assert order == list(range(dim))[:: -1 if reverse else 1]
    for jacobian in by_inputs:
        seen = jacobian[order][:, order] != 0
        assert torch.equal(seen, torch.ones(dim, dim).tril(-1).bool())
    assert (by_context != 0).all()
    outputs = net(torch.randn(5, 6, dim), torch.randn(6, 2))
    assert [output.shape for output in outputs] == [(5, 6, dim)] * 3
    plain = Autoregressive(dim, (9,))
    assert len(plain(torch.randn(5, dim))) == 2


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: make_network("transformer"), ValueError, "choose one of"),
        (lambda: make_network({"name": "mlp", "channels": [2]}), TypeError, "argument"),
        (lambda: residual(3, (), 2), ValueError, "at least one hidden"),
        (lambda: residual(3, (2,), 2, "tanhh"), ValueError, "choose one of"),
        (lambda: Convolutional(()), ValueError, "channels"),
        (lambda: Convolutional((2,), (3,)), ValueError, "height, width"),
        (lambda: Convolutional().encoder(12, (), 2, "relu"), ValueError, "not a square picture"),
        (lambda: Convolutional((2,), (3, 3)).encoder(12, (), 2, "relu"), ValueError, "9 pixels"),
        (lambda: Convolutional().decoder(2, (), 9, 10, "relu"), ValueError, "whole number"),
        (lambda: Autoregressive(3, ()), ValueError, "at least one hidden"),
        (lambda: Autoregressive(0, (2,)), ValueError, "at least one unit"),
    ],
)
def test_refusals_of_networks(build, error, message):
    with pytest.raises(error, match=message):
        build()
