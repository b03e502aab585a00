"""Monte-Carlo EM against the gradient of a log p(x) in closed form."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_vae.inference.em import MonteCarloEM

REPEATS, DATA = 4000, 3
ERRORS = 5.0  # standard errors: 6e-7 a number, 4e-6 for the six of a test


class Line:
    """z ~ N(0, 1), x ~ N(w z + b, 1) with w and b of each datum's own."""

    def __init__(self, repeats: int) -> None:
        self.data = torch.tensor([-1.0, 0.5, 2.5])
        self.x = self.data.repeat(repeats)
        self.w, self.b, self.loc = (
            torch.full_like(self.x, value).requires_grad_() for value in (0.8, 0.3, 0.0)
        )

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.w * z + self.b, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc, 1.0))

    def exact(self) -> Tensor:
        """The gradient of log N(x; b, 1 + w^2), [data, 2]."""
        w, b = (v[:DATA].detach().clone().requires_grad_() for v in (self.w, self.b))
        evidence = torch.distributions.Normal(b, (1 + w**2).sqrt()).log_prob(self.data)
        return torch.stack(torch.autograd.grad(evidence.sum(), (w, b)), 1)


def worst_score(loss: MonteCarloEM, line: Line) -> float:
    value = -loss.differentiable_loss(line.model, line.guide, line.x)
    found = torch.stack(torch.autograd.grad(value, (line.w, line.b)), 1)
    drawn = found.unflatten(0, (REPEATS, DATA))
    error = drawn.std(0) / math.sqrt(REPEATS)
    return float(((drawn.mean(0) - line.exact()) / error).abs().max())


def test_the_gradient_is_that_of_log_evidence_once_the_start_is_forgotten() -> None:
    line = Line(REPEATS)
    assert worst_score(MonteCarloEM(2, num_steps=12, num_leapfrog=6, step_size=0.25), line) < ERRORS
    # Chains that hardly move stay draws of the prior.
    still = MonteCarloEM(1, num_steps=1, num_leapfrog=1, step_size=1e-4)
    assert worst_score(still, line) > 3 * ERRORS


def test_the_step_size_follows_the_acceptance_and_the_guide_gets_no_gradient() -> None:
    line = Line(2)
    for size, grows in ((1e-3, True), (20.0, False)):
        loss = MonteCarloEM(4, num_steps=3, num_leapfrog=2, step_size=size)
        loss.loss_and_grads(line.model, line.guide, line.x)
        assert (loss._step > size) == grows
        assert loss.step_size == size  # what it was made with
    assert line.loc.grad is None
    assert line.w.grad is not None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_steps": 0}, "num_steps must be an integer from 1"),
        ({"step_size": 0.0}, "step_size must be positive"),
        ({"target_accept": 1.0}, "target_accept must lie between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MonteCarloEM(1, **settings)
