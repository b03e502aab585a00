"""How often the tools run a model before they do what they were asked for."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_vae import LinearGaussian, fit, log_evidence, log_weights, posterior_quality
from pyro_vae.inference.programs import Pair, inspect_programs, program_scope


class Counted:
    """A program that counts its runs."""

    def __init__(self, program: Callable[..., Any]) -> None:
        self.program, self.runs = program, 0

    def __call__(self, *args: Any) -> Any:
        self.runs += 1
        return self.program(*args)


def noticing(model: Counted, before: list[int]) -> Trace_ELBO:
    """A loss that writes down the number of the model's runs as a step begins."""

    class Noticed(Trace_ELBO):
        def differentiable_loss(self, *args: Any, **kwargs: Any) -> Any:
            before.append(model.runs)
            return super().differentiable_loss(*args, **kwargs)

        def loss_and_grads(self, *args: Any, **kwargs: Any) -> Any:
            before.append(model.runs)
            return super().loss_and_grads(*args, **kwargs)

    return Noticed()


@pytest.fixture
def linear() -> LinearGaussian:
    return LinearGaussian(data_dim=3, latent_dim=2)


@pytest.mark.parametrize("num_data", [40, 600])
def test_fit_runs_the_model_three_times_before_its_first_step(linear, num_data):
    x = linear.sample(num_data)
    model = Counted(linear.model)
    before: list[int] = []
    fit(model, linear.guide, x, loss=noticing(model, before), epochs=1, progress=False)
    assert 1 <= before[0] <= 3


def test_importance_evidence_inspects_in_three_runs(linear):
    x = linear.sample(600)
    model = Counted(linear.model)
    log_evidence(model, linear.exact_guide, x, num_particles=10, progress=False)
    assert model.runs <= 3 + 1  # one run draws all particles


def test_joint_weights_inspect_in_three_runs(linear):
    x = linear.sample(5)
    model = Counted(linear.model)
    log_weights(model, linear.exact_guide, x, 10, joint=True)
    assert model.runs <= 3 + 1


def test_quality_of_600_data_inspects_in_ten_runs(linear, monkeypatch):
    x = linear.sample(600)
    model = Counted(linear.model)
    drawing = 0
    own = Pair.draws

    def draws(pair, num_particles):
        nonlocal drawing
        before = model.runs
        found = own(pair, num_particles)
        drawing += model.runs - before
        return found

    monkeypatch.setattr(Pair, "draws", draws)
    posterior_quality(model, linear.exact_guide, x, num_particles=100, checks=(), progress=False)
    assert drawing == 3  # chunks of 200 data
    assert model.runs - drawing <= 10


def test_a_pair_that_particles_cannot_share_is_looked_at_run_by_run():
    """The short way is for pairs without a fault: this one is found out by the long one."""

    def scalar(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            assert z.dim() == 1  # as a program that is written for one particle has it
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    model, x = Counted(scalar), torch.randn(5)
    structure = inspect_programs(model, guide, ((x,), {}))
    assert not structure.vectorizable
    assert model.runs > 3
    weights = log_weights(scalar, guide, x, 3)
    exact = dist.Normal(0.0, 2.0**0.5).log_prob(x)
    assert torch.allclose(weights, exact.expand(3, 5))


def test_parts_are_cut_only_where_programs_weigh_them_as_in_all_data(linear):
    """A parameter sliced by position gives the first rows' values to every chunk."""
    x = linear.sample(20)
    means = torch.randn(20, 2)

    def by_position(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(means[: len(x)], 1.0).to_event(1))

    with program_scope(0):
        whole = Pair.inspect(linear.model, by_position, x)
        assert whole.sliceable(8) is None
        amortised = Pair.inspect(linear.model, linear.guide, x).sliceable(8)
        assert amortised is not None
        assert amortised.axes == (0,)
        part = amortised.rows(slice(16, 24))
        assert part.num_data == 4
        assert part.bytes_of_particle == pytest.approx(amortised.bytes_of_particle * 4 / 20)


def test_subsampled_data_are_not_cut_again(linear):
    """Their weights stand for data that the program left out, a part's for fewer."""

    def subsampled(program):
        def run(x):
            with pyro.poutine.scale(scale=2.0):
                program(x)

        return run

    x = linear.sample(20)
    with program_scope(0):
        pair = Pair.inspect(subsampled(linear.model), subsampled(linear.guide), x)
        assert pair.structure.scale == 2.0
        assert pair.sliceable(8) is None


def test_another_guide_has_not_run_yet(linear):
    """The first run of the pair is of the guide that it had."""
    x = linear.sample(20)
    with program_scope(0):
        pair = Pair.inspect(linear.model, linear.guide, x)
        first, _ = pair.first_run()
        other, _ = pair.with_guide(linear.exact_guide).first_run()
    means = [trace.nodes["z"]["fn"].base_dist.loc for trace in (first,)]
    assert not torch.equal(means[0], linear.posterior(x).mean)
    assert torch.allclose(other.nodes["z"]["fn"].mean, linear.posterior(x).mean)
