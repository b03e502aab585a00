"""Sparsity and sensitivity of codes against draws, functions and manifolds that are known."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Laplace

from pyro_vae.extras.latents import code_activity, directional_sensitivity, local_tangents

# --- sparsity


def test_draws_of_the_prior_meet_its_targets() -> None:
    rate, threshold = 2.5, 0.3
    codes = Laplace(torch.zeros(4), 1 / rate).sample((4000,))
    found = code_activity(codes, threshold=threshold, rate=rate)
    assert float(found.target_activation) == pytest.approx(1 / rate)
    assert float(found.target_share) == pytest.approx(math.exp(-rate * threshold))
    for name, target in (("mean_activation", 1 / rate), ("active_share", math.exp(-0.75))):
        score = (found[name].values - target) / found[f"{name}_se"].values
        assert abs(score).max() < 4.5, name  # 7e-6 a number, 6e-5 for eight
    wrong = code_activity(0.9 * codes, threshold=threshold, rate=rate)
    assert (wrong.mean_activation - 1 / rate).max() < -4 * wrong.mean_activation_se.max()


def test_shares_and_sparseness_of_codes_by_hand() -> None:
    codes = torch.tensor([[3.0, -4.0, 0.0], [0.0, 2.0, 0.0], [1.0, 1.0, -1.0], [0.0, 0.0, 0.0]])
    found = code_activity(codes, threshold=1.5)
    assert found.active_share.values.tolist() == [0.25, 0.5, 0.0]
    assert found.active_units.values == pytest.approx([2 / 3, 1 / 3, 0, 0])
    root = math.sqrt(3)
    expected = [(root - 7 / 5) / (root - 1), 1.0, 0.0, math.nan]
    assert found.hoyer.values == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert "target_share" not in found
    # The threshold left out does not depend on the code's scale.
    a, b = code_activity(codes), code_activity(100 * codes)
    assert a.active_share.values.tolist() == b.active_share.values.tolist()
    assert float(a.threshold) == pytest.approx(0.1 * math.sqrt(32 / 12))
    for settings in ({"threshold": 0.0}, {"rate": -1.0}):
        with pytest.raises(ValueError, match="must be positive"):
            code_activity(codes, **settings)
    with pytest.raises(ValueError, match="2 data and 2 units"):
        code_activity(codes[:, :1])


# --- directions


def circle(count: int, radius: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Points on a circle in seven dimensions, their tangents, and its plane."""
    angle = torch.linspace(0, 2 * math.pi, count + 1)[:-1]
    plane = torch.linalg.qr(torch.randn(7, 2)).Q
    x = radius * torch.stack([angle.cos(), angle.sin()], 1) @ plane.T
    tangent = torch.stack([-angle.sin(), angle.cos()], 1) @ plane.T
    return x, tangent[..., None], plane


def test_a_linear_encoder_has_the_singular_values_it_was_made_of() -> None:
    axes = torch.linalg.qr(torch.randn(5, 5)).Q
    gains = torch.tensor([3.0, 0.5])
    encoder = torch.nn.Linear(5, 2)
    with torch.no_grad():
        encoder.weight.copy_(gains[:, None] * axes[:, :2].T)
    x = torch.randn(4, 5)
    found = directional_sensitivity(encoder, x, axes[:, :1].expand(4, 5, 1))
    assert found.along.values == pytest.approx([3.0] * 4)
    assert found.across.values == pytest.approx([0.5 / math.sqrt(4)] * 4)  # one of four directions
    both = directional_sensitivity(encoder, x, axes[:, :2].expand(4, 5, 2))
    assert both.along.values == pytest.approx([math.sqrt((9 + 0.25) / 2)] * 4)
    assert both.across.values == pytest.approx([0.0] * 4, abs=1e-7)


def test_the_angle_moves_along_a_circle_and_the_radius_across() -> None:
    x, tangents, plane = circle(9)
    angle = directional_sensitivity(
        lambda v: torch.atan2(v @ plane[:, 1], v @ plane[:, 0])[:, None], x, tangents
    )
    assert angle.along.values == pytest.approx([0.5] * 9)  # one over the radius
    assert angle.across.values == pytest.approx([0.0] * 9, abs=1e-7)
    assert float(angle.ratio.min()) > 1e6
    radius = directional_sensitivity(lambda v: (v @ plane).norm(dim=-1, keepdim=True), x, tangents)
    assert radius.along.values == pytest.approx([0.0] * 9, abs=1e-7)
    assert radius.across.values == pytest.approx([1 / math.sqrt(6)] * 9)


def test_neighbours_know_the_tangents_of_a_noisy_circle() -> None:
    data, tangents, _ = circle(400)
    noisy = data + 0.02 * torch.randn_like(data)
    found = local_tangents(data[::40], noisy, 1, num_neighbours=25)
    cosines = (found * tangents[::40]).sum(1).abs()
    # 25 of 400 points span 0.75 of length, so their sd is 0.22; noise turns the axis by about
    # 0.02 / (0.22 sqrt(25)) a direction.
    assert float(cosines.min()) > 0.99
    assert torch.allclose(found.mT @ found, torch.ones(10, 1, 1))
    # Too few neighbours see the noise alone.
    few = local_tangents(data[::40], noisy, 1, num_neighbours=3)
    assert float((few * tangents[::40]).sum(1).abs().mean()) < float(cosines.mean())


def test_tangents_that_are_none_are_refused() -> None:
    x, tangents, plane = circle(5)
    for wrong in (2 * tangents, torch.eye(7).expand(5, 7, 7)):
        with pytest.raises(ValueError, match="orthonormal columns"):
            directional_sensitivity(lambda v: v @ plane, x, wrong)
    for count, neighbours in ((7, 5), (1, 1), (1, 6)):
        with pytest.raises(ValueError, match="neighbours"):
            local_tangents(x, x, count, num_neighbours=neighbours)
