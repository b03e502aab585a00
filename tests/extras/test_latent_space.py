"""Attributes, units and compression against decoders and data whose answers are known."""

import math

import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from pyro_vae.extras.latents import (
    attribute_effect,
    attribute_vector,
    compression,
    kl_from_standard_normal,
    relative_error,
    traverse,
    unit_effects,
)

# --- attributes


def test_an_attribute_vector_is_a_difference_of_means() -> None:
    codes = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 4.0], [10.0, 1.0, 0.0]])
    vector = attribute_vector(codes, torch.tensor([True, True, False]))
    assert vector.tolist() == [-8.0, -1.0, 3.0]
    for has in (torch.tensor([True] * 3), torch.tensor([False] * 3)):
        with pytest.raises(ValueError, match="data with it and data without"):
            attribute_vector(codes, has)


def judge(pictures: Tensor) -> Tensor:
    """Sees the first pixel alone."""
    return pictures[:, 0].sigmoid()


def test_the_right_direction_does_more_than_others_and_a_wrong_one_does_not() -> None:
    codes = torch.randn(40, 6)
    decoder = torch.nn.Linear(6, 9, bias=False)
    vector = 5 * decoder.weight[0] / decoder.weight[0].norm()  # raises the first pixel most
    strengths = (0.0, 0.5, 2.0)
    before = torch.get_rng_state()
    result = attribute_effect(decoder, codes, vector, judge, strengths=strengths, num_controls=30)
    assert torch.equal(before, torch.get_rng_state())
    with torch.no_grad():
        for i, strength in enumerate(strengths):
            wanted = judge(decoder(codes) + strength * decoder(vector))
            assert float(result["probability"][i]) == pytest.approx(float(wanted.mean()))
            assert float(result["probability_se"][i]) == pytest.approx(
                float(wanted.std()) / math.sqrt(40)
            )
    # At strength 0 nothing was added in any direction.
    assert float(result["control"][0]) == pytest.approx(float(result["probability"][0]))
    assert float(result["control_se"][0]) == pytest.approx(0, abs=1e-12)
    gain = (result["probability"] - result["control"]).values[-1]
    assert gain > 4 * math.hypot(result["probability_se"][-1], result["control_se"][-1])
    blind = torch.linalg.svd(decoder.weight[:1]).Vh[-1].detach()  # does not touch that pixel
    nothing = attribute_effect(decoder, codes, blind, judge, strengths=strengths)
    assert nothing["probability"].values == pytest.approx([float(nothing["probability"][0])] * 3)


def test_controls_are_as_long_as_the_vector_and_lie_where_codes_vary() -> None:
    seen: list[Tensor] = []

    def decoder(z: Tensor) -> Tensor:
        seen.append(z)
        return z

    codes = torch.randn(20, 3) * torch.tensor([1.0, 3.0, 0.0])
    vector = torch.tensor([3.0, 0.0, 4.0])
    attribute_effect(decoder, codes, vector, judge, strengths=(2.0,), num_controls=7)
    moves = [z - codes for z in seen]
    assert torch.allclose(moves[0], 2 * vector)
    assert len(moves) == 8
    for move in moves[1:]:
        assert float(move[0].norm()) == pytest.approx(10.0)
        assert float(move[0, 2].abs()) < 1e-12
    with pytest.raises(ValueError, match="must be at least 2"):
        attribute_effect(decoder, codes[:1], vector, judge)


# --- units


def test_a_traversal_moves_one_unit_at_a_time() -> None:
    code, values = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-5.0, 5.0])
    moved = traverse(lambda z: 10 * z, code, [2, 0], values)
    assert moved.tolist() == [
        [[10.0, 20.0, -50.0], [10.0, 20.0, 50.0]],
        [[-50.0, 20.0, 30.0], [50.0, 20.0, 30.0]],
    ]
    assert code.tolist() == [1.0, 2.0, 3.0]


def test_the_effect_of_a_unit_of_a_linear_decoder_is_its_column() -> None:
    weights = torch.tensor([[1.0, 0.0, 0.3], [2.0, 0.0, 0.1]])
    result = unit_effects(lambda z: z @ weights.T, torch.randn(5, 3), num_values=400)
    # The quantiles' variance is a little under 1: their tails are cut at 1/800.
    wanted = weights.square().mean(0).sqrt()
    assert result["effect"].values == pytest.approx(wanted.numpy(), rel=0.005)
    assert float(result["effect"][1]) == 0.0  # exactly: a collapsed unit does nothing
    assert result["effect_se"].values == pytest.approx([0, 0, 0], abs=1e-9)


def test_the_effect_of_a_gated_unit_depends_on_the_code() -> None:
    def decoder(z: Tensor) -> Tensor:
        return (z[..., :1] * z[..., 1:]).expand(*z.shape[:-1], 4)

    codes = torch.randn(60, 2) + 1.0
    result = unit_effects(decoder, codes, num_values=300)
    for unit, other in ((0, 1), (1, 0)):
        squares = codes[:, other].square()  # of z_i z_j with z_i ~ N(0, 1) the variance is z_j^2
        wanted, error = squares.mean().sqrt(), squares.std() / math.sqrt(60)
        assert float(result["effect"][unit]) == pytest.approx(float(wanted), rel=0.01)
        assert float(result["effect_se"][unit]) == pytest.approx(
            float(error / (2 * wanted)), rel=0.02
        )
    with pytest.raises(ValueError, match="at least 2 codes"):
        unit_effects(decoder, codes[:1])


# --- compression


def test_the_mean_loses_all_and_the_data_nothing() -> None:
    x = torch.randn(30, 4) + 5
    assert relative_error(x, x) == (0.0, 0.0)
    value, error = relative_error(x, x.mean(0).expand(30, 4))
    assert value == pytest.approx(1.0)
    assert error == pytest.approx(0.0, abs=1e-12)
    assert relative_error(x, torch.zeros(30, 4))[0] > 1


def test_the_error_of_a_share_is_that_of_repeated_data() -> None:
    """The delta method against 400 draws of the data, whose spread is sure to a 28th."""
    keep = torch.tensor([0.0, 1.0, 1.0])  # loses the first feature: a third of the variance
    x = torch.distributions.StudentT(8.0).sample(torch.Size([400, 150, 3]))
    values, errors = torch.tensor([relative_error(y, keep * y) for y in x]).T
    spread = float(values.std())
    # About their own mean the data have a part 1 - 1/150 of their squares; the ratio's own bias is
    # of the order of its variance.
    wanted = 150 / 149 / 3
    assert float(values.mean()) == pytest.approx(wanted, abs=4 * spread / 20 + spread**2)
    assert float(errors.mean()) == pytest.approx(spread, rel=4 / 28)


def test_principal_components_lose_the_variance_that_is_left() -> None:
    scales = torch.tensor([5.0, 3.0, 1.0, 0.5, 0.1])
    x = torch.randn(80, 5) * scales
    pca = PCA(2).fit(x.numpy())
    other = x.flip(1)
    result = compression(
        {
            "two components": lambda y: torch.as_tensor(
                pca.inverse_transform(pca.transform(y.numpy()))
            ),
            "all": lambda y: y,
        },
        {"own": x, "flipped": other},
    )
    own, flipped = result["relative_error"].sel(code="two components").values
    assert own == pytest.approx(1 - pca.explained_variance_ratio_.sum())
    assert flipped > 10 * own
    assert result["relative_error"].sel(code="all").values.tolist() == [0.0, 0.0]
    squared = result["squared_error"].sel(code="two components", distribution="own")
    assert float(squared) == pytest.approx(own * float(x.var(0, correction=0).mean()))


def test_what_has_no_share_is_refused() -> None:
    with pytest.raises(ValueError, match="no variance"):
        relative_error(torch.ones(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="the same at least 2 rows"):
        relative_error(torch.ones(3, 2), torch.zeros(4, 2))


# --- codes against the prior


def test_the_kl_of_codes_is_that_of_their_normal() -> None:
    codes = torch.randn(50, 3) @ torch.randn(3, 3) + torch.tensor([1.0, 0.0, -2.0])
    own = MultivariateNormal(codes.mean(0), codes.T.cov(correction=0))
    wanted = kl_divergence(own, MultivariateNormal(torch.zeros(3), torch.eye(3)))
    assert kl_from_standard_normal(codes) == pytest.approx(float(wanted))


def test_codes_with_the_priors_moments_have_no_kl_and_too_few_are_refused() -> None:
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert kl_from_standard_normal(corners) == pytest.approx(0.0, abs=1e-12)
    assert kl_from_standard_normal(corners[:, :1]) == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="give more"):
        kl_from_standard_normal(corners[:2])
