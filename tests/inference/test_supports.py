"""The transforms that torch lacks: onto their support, back, and the volume that they stretch."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch.autograd.functional import jacobian

from pyro_vae.inference.supports import family_of, support_of, transform_of

LOWER = torch.tril_indices(3, 3)
IN_TRIANGLE = (lambda y: y[LOWER[0], LOWER[1]], 6)
CASES = {
    "Wishart": (dist.Wishart(torch.tensor(5.0), torch.eye(3)), *IN_TRIANGLE),
    "ProjectedNormal": (dist.ProjectedNormal(torch.tensor([1.0, 0.5, 0.2])), lambda y: y, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_a_transform_stretches_volumes_as_it_says(name):
    fn, free_entries, dim = CASES[name]
    transform, u = transform_of(fn), torch.linspace(-0.7, 0.9, dim)
    y = transform(u)
    assert bool(support_of(fn).check(y).all())
    assert transform.inv(y).tolist() == pytest.approx(u.tolist())
    by_hand = jacobian(lambda v: free_entries(transform(v)), u)
    stretched = 0.5 * torch.logdet(by_hand.T @ by_hand)  # also of a surface within a space
    assert float(transform.log_abs_det_jacobian(u, y)) == pytest.approx(float(stretched))
    assert transform.inverse_shape((4, *y.shape)) == (4, dim)
    assert transform.forward_shape((4, dim)) == (4, *y.shape)


def test_the_support_of_moved_draws_is_where_the_transforms_take_them():
    positive = dist.transforms.ExpTransform()
    above = support_of(
        dist.TransformedDistribution(
            dist.Normal(0.0, 1.0), [positive, dist.transforms.AffineTransform(1.0, 2.0)]
        )
    )
    below = support_of(
        dist.TransformedDistribution(
            dist.Normal(0.0, 1.0), [positive, dist.transforms.AffineTransform(1.0, -2.0)]
        )
    )
    points = torch.tensor([-3.0, 0.9, 1.1, 8.0])
    assert above.check(points).tolist() == [False, False, True, True]
    assert below.check(points).tolist() == [True, True, False, False]


def test_the_support_of_a_mixture_is_that_of_its_components_together():
    parts = dist.Uniform(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 5.0]))
    support = support_of(dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts))
    points = torch.tensor([-0.1, 0.5, 1.5, 4.0, 5.1])
    assert support.check(points).tolist() == [False, True, True, True, False]


def test_an_angle_takes_one_turn():
    support = support_of(dist.VonMises(0.0, 1.0))
    assert support.check(torch.tensor([-4.0, -3.0, 3.0, 4.0])).tolist() == [
        False,
        True,
        True,
        False,
    ]
    assert float(support.upper_bound) == pytest.approx(math.pi)


def test_a_family_has_its_name_under_every_wrapper():
    assert family_of(dist.Gamma(torch.ones(2), 1.0).to_event(1).mask(True)) == "Gamma"
