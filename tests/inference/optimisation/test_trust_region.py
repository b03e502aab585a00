"""The step of a trust region against the conditions that characterise it."""

import pytest
import torch

from pyro_vae.inference.optimisation import trust_region_step


def problem(values, scales):
    """A gradient and a Hessian with such curvatures, in units that differ."""
    size = len(values)
    rotation = torch.linalg.qr(torch.randn(size, size)).Q
    hessian = rotation @ torch.diag(torch.tensor(values)) @ rotation.T
    unit = torch.tensor(scales)
    return torch.randn(size) / unit, hessian / unit[:, None] / unit


def length(step, hessian):
    return float((step * hessian.diagonal().abs().sqrt()).norm())


def decrease(gradient, hessian, step):
    return -float(gradient @ step + 0.5 * step @ hessian @ step)


def test_within_the_radius_it_is_newton_s_step():
    gradient, hessian = problem([0.5, 2.0, 9.0, 1.0], [1.0, 1e-3, 50.0, 2.0])
    step, promised, held = trust_region_step(gradient, hessian, 1e3)
    torch.testing.assert_close(step, -torch.linalg.solve(hessian, gradient))
    assert not held
    assert promised == pytest.approx(decrease(gradient, hessian, step))


@pytest.mark.parametrize("values", [[0.5, 2.0, 9.0, 1.0], [-3.0, 2.0, 9.0, 1.0]])
def test_beyond_it_the_step_fulfils_the_conditions_of_more_and_sorensen(values):
    gradient, hessian = problem(values, [1.0, 1e-2, 50.0, 2.0])
    radius = 0.3
    step, promised, held = trust_region_step(gradient, hessian, radius)
    assert held
    assert length(step, hessian) == pytest.approx(radius, rel=1e-6)
    # (H + t D) s = -g with t >= 0 and H + t D positive semidefinite, D the units' square.
    squares = hessian.diagonal().abs()
    shift = -float((gradient + hessian @ step) @ step) / float((squares * step) @ step)
    rest = hessian @ step + shift * squares * step + gradient
    assert shift > 0
    assert (rest.abs() < 1e-6 * gradient.abs().max()).all()
    assert torch.linalg.eigvalsh(hessian + shift * squares.diag()).min() > -1e-9
    assert promised == pytest.approx(decrease(gradient, hessian, step))


def test_at_a_saddle_without_a_slope_it_goes_to_the_edge():
    hessian = torch.diag(torch.tensor([4.0, -1.0]))
    step, promised, held = trust_region_step(torch.zeros(2), hessian, 0.5)
    assert held
    torch.testing.assert_close(step.abs(), torch.tensor([0.0, 0.5]), atol=1e-6, rtol=0)
    assert promised == pytest.approx(0.125)


def test_numbers_that_nothing_depends_on_stay():
    hessian = torch.zeros(3, 3)
    hessian[1, 1] = 2.0
    step, promised, _ = trust_region_step(torch.tensor([0.0, 1.0, 0.0]), hessian, 9.0)
    torch.testing.assert_close(step, torch.tensor([0.0, -0.5, 0.0]))
    assert promised == pytest.approx(0.25)
    still, nothing, _ = trust_region_step(torch.zeros(3), torch.zeros(3, 3), 9.0)
    assert not still.any()
    assert nothing == 0.0
