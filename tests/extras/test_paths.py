"""Lengths and shortest paths against surfaces whose geodesics are known."""

import math

import pytest
import torch
from torch import Tensor

from pyro_vae.extras.latents import magnification, shortest_path
from pyro_vae.extras.latents.paths import (
    curve_energy,
    curve_length,
    pulled_back_metric,
    straight_path,
)
from pyro_vae.models.parts import mlp

# A path of 32 points has steps of 1/31; chords and straight sides of the chart each shorten or
# lengthen a smooth curve by the square of that, times a curvature of order one.
RELATIVE = 2e-3


def polar(z: Tensor) -> Tensor:
    """Radius and angle in a plane of a space of three dimensions."""
    radius, angle = z[..., 0], z[..., 1]
    return torch.stack([radius * angle.cos(), radius * angle.sin(), 0 * radius], dim=-1)


def cylinder(z: Tensor) -> Tensor:
    """Angle and height on a cylinder of radius 2."""
    return torch.stack([2 * z[..., 0].cos(), 2 * z[..., 0].sin(), z[..., 1]], dim=-1)


def sphere(z: Tensor) -> Tensor:
    """Latitude and longitude on the unit sphere."""
    latitude, longitude = z[..., 0], z[..., 1]
    return torch.stack(
        [
            latitude.cos() * longitude.cos(),
            latitude.cos() * longitude.sin(),
            latitude.sin(),
        ],
        dim=-1,
    )


def hill(z: Tensor) -> Tensor:
    """A plane with a hill of height 2 at its origin."""
    return torch.cat([z, 2 * (-2 * z.square().sum(-1, keepdim=True)).exp()], dim=-1)


# --- the metric


def test_the_metric_of_a_linear_decoder_is_its_gram_matrix() -> None:
    weights = torch.randn(5, 3)
    metric = pulled_back_metric(lambda z: z @ weights.T + 1.0, torch.randn(4, 3))
    torch.testing.assert_close(metric, (weights.T @ weights).expand(4, 3, 3))


def test_the_metric_of_the_sphere_shrinks_towards_its_poles() -> None:
    z = torch.tensor([[0.0, 0.3], [1.0, -2.0], [1.5, 0.0]])
    cosine = z[:, 0].cos()
    torch.testing.assert_close(
        pulled_back_metric(sphere, z), torch.diag_embed(torch.stack([1 + 0 * cosine, cosine**2], 1))
    )
    torch.testing.assert_close(magnification(sphere, z), cosine)


def test_the_metric_needs_no_gradient_mode_and_leaves_none() -> None:
    network = mlp(2, (5,), 7)
    with torch.no_grad():
        metric = pulled_back_metric(network, torch.randn(3, 2))
    assert metric.shape == (3, 2, 2)
    assert all(p.grad is None for p in network.parameters())


# --- curves


def test_a_circle_of_latitude_has_its_length() -> None:
    path = straight_path(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0]), 9)
    torch.testing.assert_close(path[:, 1], torch.arange(9) / 4.0)
    # n chords of an arc of angle a on a circle of radius r sum to 2 r n sin(a / 2n).
    chords = 8 * 5
    wanted = 2 * math.cos(1.0) * chords * math.sin(2.0 / (2 * chords))
    assert float(curve_length(sphere, path, refine=5)) == pytest.approx(wanted, rel=1e-12)


def test_a_straight_line_at_even_steps_has_half_its_squared_length_as_energy() -> None:
    weights = torch.randn(4, 2)
    start, end = torch.randn(3, 2), torch.randn(3, 2)
    path = straight_path(start, end, 6)
    squares = ((end - start) @ weights.T).square().sum(1)
    torch.testing.assert_close(curve_energy(lambda z: z @ weights.T, path), squares / 2)
    uneven = path[:, [0, 1, 2, 5]]
    assert bool((curve_energy(lambda z: z @ weights.T, uneven) > squares / 2).all())


# --- shortest paths


def test_a_linear_decoder_leaves_straight_lines() -> None:
    weights = torch.randn(5, 3)
    start, end = torch.randn(2, 3), torch.randn(2, 3)
    found = shortest_path(lambda z: z @ weights.T, start, end, 11)
    wanted = ((end - start) @ weights.T).norm(dim=1)
    for name in ("length", "straight_length", "chord"):
        torch.testing.assert_close(torch.as_tensor(found[name].values), wanted)
    torch.testing.assert_close(
        torch.as_tensor(found["points"].values), straight_path(start, end, 11)
    )
    assert found["guess"].values.tolist() == ["none", "none"]
    assert found["converged"].values.all()


def test_polar_coordinates_lead_along_the_straight_line_of_the_plane() -> None:
    found = shortest_path(
        polar, torch.tensor([[1.0, 0.0], [1.0, 0.5]]), torch.tensor([[2.0, 2.0], [3.0, 1.0]])
    )
    for i, (a, b, angle) in enumerate([(1, 2, 2.0), (1, 3, 0.5)]):
        wanted = math.sqrt(a**2 + b**2 - 2 * a * b * math.cos(angle))  # law of cosines
        assert wanted <= float(found["length"][i]) <= wanted * (1 + RELATIVE)
        assert float(found["straight_length"][i]) > wanted * (1 + 10 * RELATIVE)
    # The radius dips below both ends: r(s) of the line from (1, 0 rad) to (2, 2 rad).
    assert found["points"].values[0, :, 0].min() < 0.99


def test_a_cylinder_is_flat() -> None:
    start, end = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 3.0]])
    found = shortest_path(cylinder, start, end)
    assert float(found["length"][0]) == pytest.approx(math.hypot(2 * 2.0, 3.0), rel=RELATIVE)
    assert float(found["chord"][0]) == pytest.approx(math.hypot(4 * math.sin(1.0), 3.0))
    wanted = straight_path(start, end, 32)
    torch.testing.assert_close(torch.as_tensor(found["points"].values), wanted, atol=1e-3, rtol=0)


def test_great_circles_are_found_on_the_sphere() -> None:
    start = torch.tensor([[0.8, 0.0], [-0.3, 0.2]])
    end = torch.tensor([[0.8, 1.9], [1.0, 1.0]])
    found = shortest_path(sphere, start, end)
    wanted = (sphere(start) * sphere(end)).sum(1).arccos()
    length = torch.as_tensor(found["length"].values)
    assert bool((length >= wanted * (1 - 1e-6)).all())
    assert bool((length <= wanted * (1 + RELATIVE)).all())
    # Along the circle of latitude it is cos(0.8) x 1.9, a tenth longer.
    assert float(found["straight_length"][0]) == pytest.approx(1.9 * math.cos(0.8), rel=1e-4)
    assert float(found["straight_length"][0]) > 1.05 * float(wanted[0])


def test_a_path_is_run_through_at_constant_speed() -> None:
    found = shortest_path(sphere, torch.tensor([[1.2, 0.0]]), torch.tensor([[1.0, 2.5]]))
    steps = sphere(torch.as_tensor(found["points"].values)).diff(dim=1).norm(dim=-1)
    straight = sphere(torch.as_tensor(found["straight_points"].values)).diff(dim=1).norm(dim=-1)
    assert float(steps.max() / steps.min()) < 1.01
    assert float(straight.max() / straight.min()) > 1.2


def test_codes_show_the_way_around_a_hill() -> None:
    """By symmetry nothing pulls the straight line off the top of the hill."""
    start = torch.tensor([[-1.5, 0.0]])
    alone = shortest_path(hill, start, -start)
    assert float(alone["length"][0]) > 5.0
    codes = torch.rand(300, 2) * 4 - 2
    around = shortest_path(hill, start, -start, through=codes)
    assert float(around["length"][0]) < 4.0
    assert around["guess"].values.tolist() == ["codes"]
    assert around["straight_length"].values == pytest.approx(alone["straight_length"].values)


def test_codes_out_of_reach_do_no_harm() -> None:
    start, end = torch.zeros(1, 2), torch.ones(1, 2)
    found = shortest_path(sphere, start, end, 7, through=torch.zeros(0, 2))
    assert found["length"].values == pytest.approx(shortest_path(sphere, start, end, 7)["length"])
    far = 100 + 0.01 * torch.randn(20, 2)
    # Both ends' nearest neighbours are one another, then far codes: a route exists, and is longer.
    assert float(shortest_path(sphere, start, end, 7, through=far)["length"][0]) < 1.3


def test_no_path_is_longer_than_the_straight_one_nor_shorter_than_the_chord() -> None:
    decoder = mlp(3, (8, 8), 6)
    for p in decoder.parameters():
        torch.nn.init.normal_(p)
    found = shortest_path(decoder, torch.randn(6, 3), torch.randn(6, 3), 16, max_steps=7)
    assert bool((found["length"] <= found["straight_length"]).all())
    assert bool((found["length"] >= found["chord"] * (1 - 1e-9)).all())
    assert bool((found["length"] < found["straight_length"]).any())
    assert not found["converged"].values.all()
    assert found.isel(pair=0).quantity("length").bound == "upper"


def test_equal_ends_are_a_path_of_length_zero() -> None:
    same = torch.randn(1, 2)
    assert float(shortest_path(sphere, same, same, 5)["length"][0]) == 0.0


def test_single_precision_works_and_gradients_are_left_alone() -> None:
    decoder = mlp(2, (5,), 4).float()
    found = shortest_path(decoder, torch.zeros(1, 2).float(), torch.ones(1, 2).float(), 9)
    assert found["points"].dtype == "float32"
    assert found["converged"].values.all()
    assert all(p.grad is None for p in decoder.parameters())


def test_what_makes_no_path_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 points"):
        shortest_path(sphere, torch.zeros(1, 2), torch.ones(1, 2), 2)
    with pytest.raises(ValueError, match="a start and an end for each pair"):
        shortest_path(sphere, torch.zeros(1, 2), torch.ones(3, 2))
