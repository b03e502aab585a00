"""A model for a data set by names: what fits, what goes together, and what says why not."""

from typing import Any

import pytest
import torch

from pyro_vae.data import Dataset
from pyro_vae.models import (
    AUTOENCODERS,
    VAE,
    Autoencoder,
    ModelSpec,
    TwoLayerVAE,
    VampPrior,
    build_model,
    choose_binarization,
    choose_likelihood,
    data_pseudo_inputs,
    model_name,
    on_levels,
)
from pyro_vae.models.choices import MODELS, find_levels


def made(levels: int | None = 5, measure: Any = "grey", image: bool = True) -> Dataset:
    """Grey pixels on so many levels, or on none."""
    top = 1 if levels is None else levels - 1
    x = torch.arange(42 * 6).reshape(42, 6) % (top + 1) / top
    x = torch.rand(42, 6) if levels is None else x
    x = x.to(torch.float32)
    return Dataset("made", x, x[:4], measure, image_shape=(2, 3) if image else None)


# --- what fits the data


@pytest.mark.parametrize(
    ("measure", "asked", "given"),
    [
        ("binary", None, "bernoulli"),
        ("grey", None, "continuous_bernoulli"),
        ("real", None, "gaussian"),
        ("counts", None, "discretized_logistic"),
        ("grey", "categorical", "categorical"),
        ("grey", "gaussian", "gaussian"),
        ("binary", "bernoulli", "bernoulli"),
    ],
)
def test_a_likelihood_fits_the_measure(measure: str, asked: str | None, given: str) -> None:
    assert choose_likelihood(measure, asked) == given


@pytest.mark.parametrize(
    ("measure", "asked", "says"),
    [
        ("grey", "bernoulli", "'continuous_bernoulli', .* or 'categorical', or binarise the data"),
        ("binary", "gaussian", "use 'bernoulli', or leave them grey"),
        ("real", "bernoulli", r"use 'gaussian'$"),
        ("binary", "bernouli", "Unknown likelihood 'bernouli'"),
        ("counts", "gaussian", r"use 'discretized_logistic' or 'categorical'$"),
    ],
)
def test_a_likelihood_that_does_not_fit_is_refused(
    measure: str, asked: str | None, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        choose_likelihood(measure, asked)


def test_grey_pixels_become_binary_where_that_is_meant() -> None:
    assert choose_binarization("grey", None) == "dynamic"
    assert choose_binarization("grey", "bernoulli") == "dynamic"
    assert choose_binarization("grey", "gaussian") is None
    assert choose_binarization("real", None) is None


def test_the_levels_of_data_are_found() -> None:
    for levels in (2, 5, 17, 256):
        x = (torch.arange(300 * 6).reshape(300, 6) % levels / (levels - 1)).to(torch.float32)
        assert find_levels(Dataset("made", x, x[:2], "grey")) == levels
    with pytest.raises(ValueError, match="no grid of up to 256 grey levels"):
        find_levels(made(levels=None))


def test_a_grid_that_only_the_last_rows_need_is_found() -> None:
    x = torch.zeros(1300, 4, dtype=torch.float32)
    x[:, 0] = torch.arange(1300) % 3 / 2
    x[-1, 1] = 1 / 4
    assert find_levels(Dataset("made", x, x[:2], "grey")) == 5
    assert find_levels(Dataset("made", x[:-1], x[:2], "grey")) == 3
    assert find_levels(Dataset("made", x[:-1], x[-1:], "grey")) == 5  # nor may the test set lie off


def test_data_become_counts_where_levels_have_probabilities() -> None:
    dataset, chosen = on_levels(made(), "discretized_logistic")
    assert dataset.measure == "counts"
    assert chosen == {"name": "discretized_logistic", "levels": 5}
    assert (
        build_model(dataset, ModelSpec(likelihood=chosen, latent_dim=2)).likelihood.measure
        == "counts"
    )
    again = on_levels(dataset, chosen)
    assert again[1] == chosen
    same, plain = on_levels(made(), "gaussian")
    assert (same.measure, plain) == ("grey", "gaussian")
    _, finer = on_levels(made(), {"name": "categorical", "levels": 9})  # k / 4 is k / 8 as well
    assert finer == {"name": "categorical", "levels": 9}
    with pytest.raises(ValueError, match="not on its 4 grey levels"):
        on_levels(made(), {"name": "categorical", "levels": 4})


# --- what goes together


def test_every_model_is_built_by_its_name() -> None:
    kinds = {"vae": VAE, "two_layer": TwoLayerVAE}
    for name in MODELS:
        built = build_model(made(), ModelSpec(name, latent_dim=4, hidden=(6,), activation="relu"))
        assert type(built).__name__ == kinds.get(name, Autoencoder).__name__
        assert built.data_dim == 6
        assert built.activation == "relu"
        assert built.likelihood.config == {"name": "continuous_bernoulli"}
        if name in AUTOENCODERS:
            assert built.kind.config["name"] == name


def test_the_upper_layer_has_half_of_everything_or_what_it_is_given() -> None:
    built = build_model(made(), ModelSpec("two_layer", latent_dim=5, hidden=(9, 4)))
    assert (built.latent_dims, built.hidden) == ((5, 2), ((9, 4), (4, 2)))
    model = {"name": "two_layer", "upper_dim": 3, "upper_hidden": [7]}
    built = build_model(made(), ModelSpec(model, latent_dim=5, hidden=(9, 4)))
    assert (built.latent_dims, built.hidden) == ((5, 3), ((9, 4), (7,)))
    paper = build_model(made(), ModelSpec("two_layer", latent_dim=100, hidden=(200, 200)))
    assert (paper.latent_dims, paper.hidden) == ((100, 50), ((200, 200), (100, 100)))


def test_convolutions_get_the_shape_of_the_pictures() -> None:
    network = build_model(made(), ModelSpec(network={"name": "conv", "channels": [2]})).config[
        "network"
    ]
    assert network == {"name": "conv", "channels": [2], "image_shape": [2, 3]}
    with pytest.raises(ValueError, match="has no pictures to convolve"):
        build_model(made(image=False), ModelSpec(network="conv"))


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"model": "spars"}, "no model 'spars'.*Did you mean 'sparse'"),
        ({"model": {"name": "vae", "level": 1}}, "has no argument 'level': it has none"),
        ({"model": {"name": "two_layer", "dim": 1}}, "it has upper_dim, upper_hidden"),
        ({"model": {"name": "sparse", "level": 1}}, "autoencoder 'sparse' .*: it has strength"),
        ({"model": "sparse", "prior": "flow"}, "takes no prior.*use the model 'vae'"),
        ({"model": "denoising", "posterior": "full"}, "takes no posterior.*guide is a point"),
        ({"model": "undercomplete", "latent_dim": 6}, "learns the identity"),
        ({"model": "two_layer", "prior": "vamp"}, "use the 'mixture' or 'flow' prior"),
        ({"model": "two_layer", "posterior": "iaf", "latent_dim": 3}, "use posterior='diagonal'"),
        ({"posterior": "iaf", "latent_dim": 1}, "use posterior='diagonal'"),
        ({"prior": "flow", "latent_dim": 1}, "use prior='mixture'"),
        ({"prior": {"name": "mixture", "size": 2}}, "'mixture' has no argument 'size': it has num"),
        ({"prior": {"name": "mixture", "num_components": "two"}}, "mixture:num_components=two is"),
        ({"prior": "beta"}, "Unknown prior 'beta': choose one of"),
        ({"posterior": "beta"}, "Unknown posterior 'beta': choose one of"),
        ({"network": "beta"}, "Unknown network 'beta': choose one of"),
        ({"likelihood": "bernoulli"}, "or binarise the data"),
        ({"likelihood": {"name": "gaussian", "scale": "big"}}, "'shared', 'pixel' or a positive"),
        ({"activation": "cosine"}, "Unknown activation 'cosine'"),
        ({"network": "residual", "hidden": ()}, "at least one hidden size"),
    ],
)
def test_what_cannot_be_built_says_why(parts: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build_model(made(), ModelSpec(**parts))


def test_names_of_models() -> None:
    assert model_name({"name": "sparse", "strength": 2.0}) == "sparse"
    with pytest.raises(ValueError, match="no model 'gan'; there are vae, two_layer"):
        model_name("gan")


def test_pseudo_inputs_start_at_data() -> None:
    x = made().train.double()
    prior = {"name": "vamp", "num_pseudo_inputs": 4}
    module = build_model(made(), ModelSpec(prior=prior, latent_dim=2)).double()
    data_pseudo_inputs(module, x)
    assert isinstance(module.prior, VampPrior)
    distance = torch.cdist(module.prior.pseudo_inputs.detach(), x.clamp(0.01, 0.99)).amin(1)
    assert distance.max() < 1e-6
    before = module.prior.raw.clone()
    data_pseudo_inputs(module, x[:3])  # too few
    assert torch.equal(module.prior.raw, before)
    data_pseudo_inputs(build_model(made(), ModelSpec()), x)  # has none


@pytest.mark.parametrize(
    ("likelihood", "network"),
    [("bernoulli", "mlp"), ("continuous_bernoulli", "residual"), ("bernoulli", "residual")],
)
def test_a_decoder_starts_at_the_mean_of_the_data(likelihood: str, network: str) -> None:
    """Else hidden units hold the background, and latents far from any datum turn it over."""
    mean = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.9, 0.0])
    x = (torch.rand(4000, 6) < mean).to(torch.float32)
    dataset = Dataset("made", x, x[:4], "binary" if likelihood == "bernoulli" else "grey")
    module = build_model(
        dataset, ModelSpec(latent_dim=2, likelihood=likelihood, network=network)
    ).double()
    bias = module.decoder[-1].bias.detach()
    started = module.likelihood.mean(bias)
    assert torch.allclose(started, x.mean(0).double().clamp(0.01, 0.99), atol=1e-5)
    plain = VAE(6, 2, likelihood=likelihood).double().decoder[-1].bias.detach()
    assert not torch.allclose(module.likelihood.mean(plain), started, atol=0.1)


def test_other_decoders_start_as_they_are() -> None:
    for likelihood, dataset in (("gaussian", made(measure="real")), ("categorical", made())):
        chosen = on_levels(dataset, choose_likelihood(dataset.measure, likelihood))
        torch.manual_seed(0)
        module = build_model(chosen[0], ModelSpec(latent_dim=2, likelihood=chosen[1]))
        torch.manual_seed(0)
        plain = VAE(6, 2, likelihood=chosen[1])
        assert torch.equal(module.decoder[-1].bias, plain.decoder[-1].bias)


def test_photographs_stay_grey_unless_binary_pixels_are_asked_for() -> None:
    assert choose_binarization("grey", None, "light") is None
    assert choose_binarization("grey", "bernoulli", "light") == "dynamic"
    assert choose_likelihood("grey", None, "light") == "discretized_logistic"
    assert choose_likelihood("grey", "gaussian", "light") == "gaussian"
    assert choose_likelihood("binary", None, "light") == "bernoulli"
