"""Comparison of gradient estimators against closed forms: one normal latent, one binary latent."""

import copy
import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_vae.diagnostics.gradients import compare as gradient_compare
from pyro_vae.diagnostics.gradients import (
    compare_estimators,
    enumerated_bound,
    estimator_rows,
    recommend_estimators,
    snr_slopes,
)
from pyro_vae.diagnostics.gradients import measurement as gradient_measurement
from pyro_vae.diagnostics.gradients import sampler as gradient_sampler
from pyro_vae.diagnostics.gradients.statistics import cross_fitted
from pyro_vae.inference.estimators import Estimator, make_estimator
from pyro_vae.inference.estimators.bounds import Coefficients, LeaveOneOut, Renyi
from pyro_vae.inference.log_weights import elbo
from pyro_vae.inference.programs import ProgramError, UnfittedWarning
from pyro_vae.inference.svi import fit
from pyro_vae.results import load_result

N = 5
STANDARD_ERRORS = 4.5  # two-sided failure rate 7e-6 a comparison


class Normal(nn.Module):
    r"""z ~ N(theta, 1), x | z ~ N(z, 1), q = N(phi, s^2) for every datum.

    With one particle the pathwise gradient is theta + x - 2 z in phi and z - theta in theta;
    sticking the landing adds (z - phi) / s^2 to the first. All is linear in z, so means and
    variances have closed forms.
    """

    def __init__(self, theta=0.3, phi=-0.4, scale=0.9):
        super().__init__()
        self.theta, self.phi = (nn.Parameter(torch.tensor(v)) for v in (theta, phi))
        self.scale = scale

    def model(self, x):
        theta = pyro.param("theta", self.theta)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x):
        phi = pyro.param("phi", self.phi)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(phi, self.scale))

    def reference(self, x):
        theta, phi = self.theta.detach(), self.phi.detach()
        return {"phi": theta + x.mean() - 2 * phi, "theta": phi - theta}

    def elbo(self, x):
        theta, phi, s2 = self.theta.item(), self.phi.item(), self.scale**2
        entropy = 0.5 * math.log(2 * math.pi * math.e * s2)
        away = (phi - theta) ** 2 + s2 + (x - phi).square().mean().item() + s2
        return entropy - math.log(2 * math.pi) - 0.5 * away


class Bit(nn.Module):
    """One binary latent: P(z=1) = 0.3, x | z ~ Bernoulli(sigmoid(theta_z)), q = Bernoulli."""

    def __init__(self, theta=(-0.5, 1.2), phi=0.4):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))
        self.phi = nn.Parameter(torch.tensor(phi))

    def model(self, x):
        theta = pyro.param("theta", self.theta)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            logits = theta[0] + (theta[1] - theta[0]) * z
            pyro.sample("x", dist.Bernoulli(logits=logits), obs=x)

    def guide(self, x):
        phi = pyro.param("phi", self.phi)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=phi))

    def exact(self, x, particles):
        """The importance bound by a loop over all outcomes, written out."""
        q = torch.stack([1 - self.phi.sigmoid(), self.phi.sigmoid()])
        prior = torch.tensor([0.7, 0.3])
        p_one = self.theta.sigmoid()
        likelihood = x[:, None] * p_one + (1 - x[:, None]) * (1 - p_one)
        ratio = prior * likelihood / q
        total = torch.zeros(len(x))
        for outcome in itertools.product((0, 1), repeat=particles):
            mean = sum(ratio[:, k] for k in outcome) / particles
            total = total + math.prod([q[k] for k in outcome]) * mean.log()
        return total


@pytest.fixture
def x():
    return torch.tensor([0.5, -1.0, 2.0, 0.1, 0.7])


@pytest.fixture
def bits():
    return torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])


def compare(pair, x, *args, **kwargs):
    return compare_estimators(pair.model, pair.guide, x, *args, progress=False, **kwargs)


def test_value_variance_snr_and_bias_are_those_of_the_closed_form(x):
    pair = Normal()
    found = compare(
        pair,
        x,
        ["PathwiseELBO", "StickingTheLanding"],
        [1, 4],
        repeats=120,
        reference=pair.reference(x),
    )
    s = pair.scale
    variances = {
        ("PathwiseELBO", "guide"): 4 * s**2,
        ("StickingTheLanding", "guide"): (1 / s - 2 * s) ** 2,
        ("PathwiseELBO", "model"): s**2,
        ("StickingTheLanding", "model"): s**2,
    }
    gradients_of = {"guide": pair.reference(x)["phi"], "model": pair.reference(x)["theta"]}
    for (name, group), single in variances.items():
        for k in (1, 4):
            row = found.sel(estimator=name, num_particles=k, parameter=group)
            variance = single / (N * k)
            assert abs(row.variance - variance) < STANDARD_ERRORS * row.variance_se
            assert abs(row.variance - 3 * variance) > STANDARD_ERRORS * row.variance_se
            snr = abs(gradients_of[group].item()) / variance**0.5
            assert abs(row.snr - snr) < STANDARD_ERRORS * row.snr_se
            assert abs(row.value - pair.elbo(x)) < STANDARD_ERRORS * row.value_se
            assert abs(row.value - pair.elbo(x) - 0.5) > STANDARD_ERRORS * row.value_se
            assert row.verdict == "no bias seen"
            norm = abs(gradients_of[group].item())
            assert abs(row.gradient_norm - norm) < STANDARD_ERRORS * row.gradient_norm_se
            passes = k * (2 if name == "StickingTheLanding" else 1)
            assert found.passes.sel(estimator=name, num_particles=k) == passes
            assert row.efficiency == pytest.approx(float(row.variance) * passes)
            assert row.efficiency_se == pytest.approx(float(row.variance_se) * passes)
    assert (found.bound == "ELBO").all()


class TooLong(Estimator):
    """The pathwise ELBO with a gradient of the latents that is a tenth too long."""

    value_name = "ELBO"

    def coefficients(self, log_weights):
        each = torch.full_like(log_weights, 1 / len(log_weights))
        return Coefficients(elbo(log_weights), each, 1.1 * each, -each, None)


@pytest.mark.parametrize("given", [True, False], ids=["exact", "pooled"])
def test_an_estimator_wrong_by_a_tenth_is_found_out_and_a_right_one_is_not(x, given):
    pair = Normal(phi=-1.5, scale=0.3)
    reference = pair.reference(x)
    found = compare(
        pair,
        x,
        ["PathwiseELBO", TooLong],
        [2],
        repeats=80,
        reference=reference if given else None,
    ).sel(num_particles=2)
    assert found.verdict.sel(estimator="TooLong", parameter="guide") == "biased"
    others = found.verdict.sel(estimator="PathwiseELBO")
    assert (others == "no bias seen").all()
    assert found.verdict.sel(estimator="TooLong", parameter="model") == "no bias seen"
    row = found.sel(estimator="TooLong", parameter="guide")
    # The path term of phi, of which a tenth is too much, is the gradient of log w in z.
    s = pair.scale
    bias = 0.1 * reference["phi"].item()
    assert abs(row.bias - bias) < STANDARD_ERRORS * row.bias_se
    assert row.bias_se < 0.2 * bias
    assert s < 1
    notes = " ".join(found.provenance["notes"])
    assert ("exact gradient given" in notes) == given
    assert ("pooled reference, 400 further draws of PathwiseELBO" in notes) == (not given)


def test_scores_without_a_bias_are_no_larger_than_normal_ones():
    generator = torch.Generator().manual_seed(3)
    for entries in (1, 4, 300):
        scores = []
        for _ in range(500):
            draws = torch.randn(40, entries, generator=generator)
            draws[:, 0] *= 10
            pooled = torch.randn(30, entries, generator=generator)
            pooled[:, 0] *= 10
            scores.append(cross_fitted(draws, pooled))
        # P(z > 2) is 0.023 one-sided and 0.046 two-sided; 4.5 binomial sds above the latter.
        assert np.mean(np.array(scores) > 2) < 0.046 + STANDARD_ERRORS * (0.046 / 500) ** 0.5
        shifted = cross_fitted(draws + 1.5, pooled)
        assert shifted > 2 or entries == 1


def test_sticking_the_landing_has_no_variance_at_the_posterior():
    x = torch.full((N,), 0.8)
    pair = Normal(theta=0.2, phi=0.5, scale=0.5**0.5)
    found = compare(pair, x, ["PathwiseELBO", "StickingTheLanding", "DReG"], [3], repeats=20)
    guide = found.sel(parameter="guide", num_particles=3)
    assert (guide.variance.sel(estimator=["StickingTheLanding", "DReG"]) < 1e-28).all()
    assert guide.variance.sel(estimator="PathwiseELBO") > 0.01
    assert (guide.verdict == "no bias seen").all()  # rounding is no bias


def test_enumerated_bounds_are_those_of_a_loop_over_outcomes(bits):
    pair = Bit()
    for particles in (1, 2, 3):
        got = enumerated_bound(pair.model, pair.guide, bits, "IWAE", particles)
        want = pair.exact(bits, particles)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
        for a, b in zip(
            torch.autograd.grad(got.sum(), list(pair.parameters())),
            torch.autograd.grad(want.sum(), list(pair.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    lower = enumerated_bound(pair.model, pair.guide, bits)
    torch.testing.assert_close(lower, pair.exact(bits, 1), rtol=1e-12, atol=1e-13)
    assert (pair.exact(bits, 2) > lower + 1e-3).all()


def test_enumeration_covers_several_sites_events_and_categories():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            b = pyro.sample("b", dist.Bernoulli(torch.tensor([0.4, 0.9])).to_event(1))
            pyro.sample("x", dist.Normal(a + b.sum(-1), 1.0), obs=x)

    x = torch.tensor([0.3, 2.0, -1.0, 4.0])

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
            p = torch.stack([0.2 + 0.2 * a, torch.full(a.shape, 0.5)], -1)
            pyro.sample("b", dist.Bernoulli(p).to_event(1))

    total = torch.zeros(len(x))
    for a, b, c in itertools.product(range(3), (0, 1), (0, 1)):
        p_b, p_c = 0.2 + 0.2 * a, 0.5
        q = [0.5, 0.3, 0.2][a] * (p_b if b else 1 - p_b) * p_c
        p = [0.2, 0.3, 0.5][a] * (0.4 if b else 0.6) * (0.9 if c else 0.1)
        density = (-0.5 * (x - a - b - c) ** 2).exp() / math.sqrt(2 * math.pi)
        total += q * (p * density / q).log()
    torch.testing.assert_close(enumerated_bound(model, guide, x), total, rtol=1e-12, atol=1e-13)


def test_enumeration_says_what_it_cannot(x, bits):
    normal, pair = Normal(), Bit()
    with pytest.raises(ProgramError, match="'z' is a Normal, which has no finite support"):
        enumerated_bound(normal.model, normal.guide, x)
    with pytest.raises(ValueError, match="not 'Renyi'"):
        enumerated_bound(pair.model, pair.guide, bits, "Renyi")
    with pytest.raises(ValueError, match="use fewer particles"):
        enumerated_bound(pair.model, pair.guide, bits, "IWAE", 600_000)

    def many(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(20)).to_event(1))
            pyro.sample("x", dist.Bernoulli(0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(20)).to_event(1))

    with pytest.raises(ValueError, match="1,048,576 states"):
        enumerated_bound(many, guide, bits)


def test_discrete_latents_against_exact_gradients(bits):
    pair = Bit(phi=1.5)

    def exact(bound, particles):
        return pair.exact(bits, particles if bound == "IWAE" else 1)

    found = compare(
        pair,
        bits,
        ["LeaveOneOut", "VIMCO", "ReweightedWakeSleep", RenyiELBO(vectorize_particles=True)],
        [3],
        repeats=150,
        reference=exact,
    ).sel(num_particles=3)
    assert found.estimator.values[-1] == "Pyro RenyiELBO(alpha=0)"
    assert found.bound.values.tolist() == ["ELBO", "IWAE", "IWAE", "IWAE"]
    guide = found.sel(parameter="guide")
    assert guide.verdict.values.tolist() == ["no bias seen", "no bias seen", "biased", "biased"]
    assert (found.verdict.sel(parameter="model") == "no bias seen").all()
    (wanted,) = torch.autograd.grad(pair.exact(bits, 3).mean(), [pair.phi])
    assert guide.bias.values[-1] == pytest.approx(abs(wanted.item()))  # its gradient is 0
    notes = " ".join(found.provenance["notes"])
    assert "Pyro RenyiELBO(alpha=0) with K = 3 gives 'guide' no gradient at all" in notes
    elbo_value = pair.exact(bits, 1).mean().item()
    row = found.sel(estimator="LeaveOneOut")
    assert abs(row.value - elbo_value) < STANDARD_ERRORS * row.value_se


def test_pyros_elbo_stands_in_the_table_beside_ours(x):
    pair = Normal()
    found = compare(
        pair,
        x,
        {"ours": "PathwiseELBO", "loop": Trace_ELBO(), "vectors": Trace_ELBO},
        [1, 3],
        repeats=40,
        reference="none",
    )
    ours, loop = (found.sel(estimator=name) for name in ("ours", "loop"))
    error = np.hypot(ours.variance_se, loop.variance_se)
    assert (abs(ours.variance - loop.variance) < STANDARD_ERRORS * error).all()
    assert (abs(ours.variance - 4 * loop.variance) > STANDARD_ERRORS * error).any()
    assert Trace_ELBO().num_particles == 1


def test_pyros_max_plate_nesting_follows_the_particles(x):
    given = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    assert given.max_plate_nesting == 2
    found = compare(Normal(), x, [given], [1, 4], repeats=8)
    assert np.isfinite(found.variance.values).all()
    assert (given.num_particles, given.max_plate_nesting) == (2, 2)


def numpy_words():
    return np.random.get_state(legacy=False)["state"]["key"].copy()  # noqa: NPY002


def test_nothing_of_the_callers_moves(x):
    pair = Normal()
    pair.phi.grad = torch.tensor(7.0)
    data = x.clone().requires_grad_()
    pyro.param("own", torch.tensor(3.0))
    store = copy.deepcopy(pyro.get_param_store().get_state())
    before = [p.detach().clone() for p in pair.parameters()]
    random_state = torch.get_rng_state()
    numpy_state = numpy_words()
    given = LeaveOneOut(5)
    compare(pair, data, ["PathwiseELBO", given], [2], repeats=8)
    assert given.num_particles == 5
    assert pair.phi.grad == 7.0
    assert pair.theta.grad is None
    assert data.grad is None
    assert all(torch.equal(a, b) for a, b in zip(before, pair.parameters(), strict=True))
    assert torch.equal(random_state, torch.get_rng_state())
    assert (numpy_state == numpy_words()).all()
    after = pyro.get_param_store().get_state()
    assert after["params"].keys() == store["params"].keys()
    assert torch.equal(after["params"]["own"], store["params"]["own"])


def test_same_seed_same_numbers_and_another_seed_others(x):
    first, again = (compare(Normal(), x, ["DReG"], [2], repeats=8) for _ in range(2))
    other = compare(Normal(), x, ["DReG"], [2], repeats=8, seed=1)
    assert (first.variance == again.variance).all()
    assert (first.bias_z == again.bias_z).all()
    assert (first.variance != other.variance).all()


def test_parameters_of_the_store_and_of_fitted_programs(x):
    def model(x):
        scale = pyro.param("scale", torch.tensor(1.5), dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(()))
        scale = pyro.param("scale", torch.tensor(1.5), dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    fitted = fit(model, guide, x, epochs=3, progress=False)
    state = {name: value.clone() for name, value in fitted.parameters.items()}
    found = compare(fitted, x, ["PathwiseELBO"], [2], repeats=8)
    assert found.parameter.values.tolist() == ["guide", "both"]
    assert all(torch.equal(state[n], v) for n, v in fitted.parameters.items())
    few = {"estimators": ["PathwiseELBO"], "num_particles": [2], "repeats": 8, "progress": False}
    with pytest.warns(UnfittedWarning, match="without the fitted values of"):
        start = compare_estimators(model, guide, x, **few)
    assert (abs(start.value - found.value) > 1e-9).all()  # the fitted values were used


def test_groups_by_pattern(x):
    found = compare(Normal(), x, ["DReG"], [2], repeats=8, parameters=["th*", "phi"])
    assert found.parameter.values.tolist() == ["th*", "phi"]
    named = compare(Normal(), x, ["DReG"], [2], repeats=8, parameters={"all": ["th*", "phi"]})
    total = found.variance.sum("parameter").values
    np.testing.assert_allclose(named.variance.sel(parameter="all").values, total, rtol=1e-12)


def test_a_large_group_is_represented_by_some_of_its_entries(monkeypatch):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(40))

        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(40), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        def guide(self, x):
            loc = pyro.param("loc", self.loc)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    pair, x = Wide(), torch.zeros(3, 40)
    whole = compare(pair, x, ["PathwiseELBO"], [1], repeats=40, reference="none")
    monkeypatch.setattr(gradient_sampler, "_MAX_ENTRIES", 10)
    part = compare(pair, x, ["PathwiseELBO"], [1], repeats=40, reference="none")
    assert any("10 of the 40 entries of 'guide'" in n for n in part.provenance["notes"])
    # Every entry has the variance 4 / 3, so the total scaled up from ten is that of all.
    assert abs(part.variance - 160 / 3).item() < 4.5 * 2 * part.variance_se.item()
    assert abs(whole.variance - 160 / 3).item() < 4.5 * whole.variance_se.item()


def test_what_cannot_be_measured_is_nan_with_a_note(x):
    found = compare(Normal(), x, ["LeaveOneOut", "PathwiseELBO", "SleepPhi"], [1, 2], repeats=8)
    first = found.sel(estimator="LeaveOneOut", num_particles=1)
    assert np.isnan(first.value)
    assert (first.verdict == "not measured").all()
    notes = found.provenance["notes"]
    assert any("LeaveOneOut is left out with K = 1" in note for note in notes)
    sleep = found.sel(estimator="SleepPhi", num_particles=2)
    assert (sleep.verdict == "no reference").all()
    assert any("SleepPhi has no reference for the bound 'sleep'" in note for note in notes)
    assert any("bound_kind" in note for note in notes)
    assert found.bound_kind.values.tolist() == ["lower", "lower", "objective"]
    assert found.value.attrs["bound"] == "none"


def test_estimators_that_refuse_are_left_out_unless_asked_for(bits):
    found = compare(Bit(), bits, num_particles=[2], repeats=8)
    assert "LeaveOneOut" in found.estimator
    assert "StraightThrough" in found.estimator
    assert "DReG" not in found.estimator
    notes = " ".join(found.provenance["notes"])
    assert "DReG is left out: DReG needs reparameterised latents" in notes
    with pytest.raises(ProgramError, match="DReG needs reparameterised latents"):
        compare(Bit(), bits, ["LeaveOneOut", "DReG"], [2], repeats=8)
    with pytest.raises(ValueError, match="needs num_particles >= 2"):
        compare(Bit(), bits, ["VIMCO"], [1], repeats=8)
    with pytest.raises(NotImplementedError):
        compare(Bit(), bits, [TraceMeanField_ELBO()], [2], repeats=8)


def test_the_common_set_on_continuous_latents_has_nothing_to_relax(x):
    found = compare(Normal(), x, num_particles=[2], repeats=8)
    assert "StraightThrough" not in found.estimator
    assert {"PathwiseELBO", "DReG", "VIMCO"} <= set(found.estimator.values)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"estimators": ["Nonsense"]}, "no estimator 'Nonsense'; there are PathwiseELBO"),
        ({"estimators": [3]}, "3 is not an estimator"),
        ({"estimators": []}, "no estimator to compare"),
        ({"estimators": ["DReG", "DReG"]}, "two estimators are called 'DReG'"),
        ({"estimators": [LeaveOneOut(2, joint=True)]}, "make them agree"),
        ({"num_particles": [2, 2]}, "different whole numbers"),
        ({"num_particles": [0]}, "different whole numbers"),
        ({"repeats": 7}, "from 8"),
        ({"parameters": ["decoder*"]}, "no parameter matches 'decoder\\*'; there are phi, theta"),
        ({"parameters": []}, "parameters is empty"),
        ({"reference": "pooled"}, "must be gradients by name"),
        ({"reference": {"phi": torch.zeros(())}}, "lacks the gradient of parameter 'theta'"),
        (
            {"reference": {"phi": torch.zeros(2), "theta": torch.zeros(())}},
            r"'phi' has shape \(2,\)",
        ),
    ],
)
def test_errors_say_what_to_do(x, changed, says):
    arguments = {"estimators": ["PathwiseELBO"], "num_particles": [1], "repeats": 8, **changed}
    with pytest.raises(ValueError, match=says):
        compare(Normal(), x, **arguments)


def test_options_of_instances_are_kept_and_shown(x):
    found = compare(Normal(), x, [Renyi(2, alpha=0.25), "RenyiDReG"], [3], repeats=8)
    assert found.estimator.values.tolist() == ["Renyi(alpha=0.25)", "RenyiDReG"]
    assert found.bound.values.tolist() == ["Renyi(alpha=0.25)", "Renyi(alpha=0.5)"]
    assert sum("pooled reference" in note for note in found.provenance["notes"]) == 2


def test_labels_and_round_trip(x, tmp_path):
    found = compare(Normal(), x, ["PathwiseELBO", "DReG"], [1, 2], repeats=8)
    chosen = found.sel(estimator="DReG", num_particles=2)
    value = chosen.quantity("value")
    assert (value.unit, value.reduction, value.bound) == ("nats", "per datum", "lower")
    assert (value.num_particles, value.measure) == (2, "real")
    assert value.standard_error == pytest.approx(float(chosen.value_se))
    assert found.variance.attrs["unit"] == "nats squared"
    assert found.seconds.attrs["unit"] == "seconds"
    assert found.bytes.attrs["unit"] == "bytes"
    assert found.snr.attrs["noise_floor"] == pytest.approx(8**-0.5)
    assert (found.snr_is_noise == (found.snr < 8**-0.5)).all()
    assert load_result(found.save(tmp_path / "gradients.nc")).identical(found)
    rows = estimator_rows(found, "guide")
    assert len(rows) == 4
    assert rows[0]["estimator"] == "PathwiseELBO"
    assert "variance" in found.table()


def test_bias_can_be_left_out(x):
    found = compare(Normal(), x, ["PathwiseELBO"], [1], repeats=8, reference="none")
    assert np.isnan(found.bias).all()
    assert (found.verdict == "no reference").all()
    assert found.provenance["notes"][0] == "Bias was not measured: reference='none'."


def test_joint_numbers_are_totals(x):
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))

    found = compare_estimators(
        model,
        guide,
        x,
        ["PathwiseELBO"],
        [1],
        repeats=60,
        reference="none",
        joint=True,
        progress=False,
    ).sel(estimator="PathwiseELBO", num_particles=1, parameter="guide")
    # d/dz of the log joint is sum x - (N + 1) z, with z ~ N(0, 1).
    assert abs(found.variance - (N + 1) ** 2) < STANDARD_ERRORS * found.variance_se
    assert found.value.attrs["reduction"] == "total"
    with pytest.raises(ProgramError, match="joint=True"):
        compare_estimators(
            model, guide, x, ["PathwiseELBO"], [1], repeats=8, joint=False, progress=False
        )


def gradients_one_by_one(estimator, model, guide, x, leaves, repeats):
    """Gradients of the mean bound by `loss_and_grads`, from the seed of a comparison."""
    estimator.loss(model, guide, x)  # inspects, which draws
    pyro.set_rng_seed(0)
    rows = []
    for _ in range(repeats):
        for leaf in leaves:
            leaf.grad = None
        estimator.loss_and_grads(model, guide, x)
        rows.append(torch.cat([-leaf.grad.reshape(-1) for leaf in leaves]))
    return torch.stack(rows)


class Mixed(nn.Module):
    """A binary latent and a normal one that depends on it."""

    def __init__(self):
        super().__init__()
        self.logit, self.loc = nn.Parameter(torch.tensor(0.4)), nn.Parameter(torch.randn(2))

    def model(self, x):
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(0.3))
            z = pyro.sample("z", dist.Normal(b, 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    def guide(self, x):
        logit, loc = pyro.param("logit", self.logit), pyro.param("loc", self.loc)
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(logits=logit))
            pyro.sample("z", dist.Normal(loc[0] + loc[1] * b, 0.8))


@pytest.mark.parametrize("at_once", [True, False])
def test_shared_draws_give_each_estimator_its_own_gradient(x, at_once, monkeypatch):
    names = ["PathwiseELBO", "ScoreFunction", "ImportanceWeighted", "VIMCO", "ReweightedWakeSleep"]
    monkeypatch.setattr(gradient_sampler, "_ROOM_AT_ONCE", 2**26 if at_once else 0)
    pair = Mixed()
    found = compare(pair, x, names, [3], repeats=8, reference="none", parameters={"all": ["*"]})
    for name in names:
        own = gradients_one_by_one(
            make_estimator(name, 3), pair.model, pair.guide, x, list(pair.parameters()), 8
        )
        chosen = found.sel(estimator=name).squeeze()
        assert chosen.variance.item() == pytest.approx((own / N).var(0).sum().item(), rel=1e-9)
        assert chosen.gradient_norm.item() == pytest.approx((own / N).mean(0).norm().item())


@pytest.fixture
def counted():
    """A program with a global latent that takes one particle at a time, and counts its runs."""
    loc = nn.Parameter(torch.tensor(0.2))
    runs = []

    def model(x):
        runs.append(1)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(float(z.detach()) * 0 + z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", loc), 1.0))

    return model, guide, loc, runs


def test_particles_one_by_one_share_their_runs(x, counted, monkeypatch):
    model, guide, loc, runs = counted
    monkeypatch.setattr(gradient_compare, "_RUNS_ONE_BY_ONE", 5 * 24)
    monkeypatch.setattr(gradient_measurement, "_TIMING_ROUNDS", 1)
    names = ["PathwiseELBO", "AnalyticELBO", "DReG", "VIMCO"]
    found = compare_estimators(model, guide, x, names, [2, 5], joint=True, progress=False)
    repeats = found.provenance["config"]["repeats"]
    assert repeats == 24
    # Of 5 particles each draw of the estimators takes two passes and, twice as often, one of the
    # references takes one; admitting and timing take two passes of 7 particles for each estimator.
    assert len(runs) < repeats * 5 * (2 + 2) + 2 * len(names) * 7 * 2 + 100
    own = gradients_one_by_one(
        make_estimator("DReG", 5, joint=True), model, guide, x, [loc], repeats
    )
    dreg = found.sel(estimator="DReG", num_particles=5, parameter="guide")
    assert dreg.variance.item() == pytest.approx(own.var().item(), rel=1e-9)
    # d/dz of the log joint is sum x - (N + 1) z; the mean of K of them has 1 / K of its variance.
    few = found.sel(estimator="PathwiseELBO", num_particles=2, parameter="guide")
    assert abs(few.variance - (N + 1) ** 2 / 2) < STANDARD_ERRORS * few.variance_se
    assert abs(few.variance - (N + 1) ** 2 / 2 * 5) > STANDARD_ERRORS * few.variance_se
    assert (found.verdict.sel(parameter="guide") == "no bias seen").all()


def test_subsampled_plates_are_per_datum_too(x):
    pair = Normal()

    def model(x):
        theta = pyro.param("theta", pair.theta)
        with pyro.plate("data", N, subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x):
        phi = pyro.param("phi", pair.phi)
        with pyro.plate("data", N, subsample_size=2):
            pyro.sample("z", dist.Normal(phi, pair.scale))

    found = compare_estimators(
        model,
        guide,
        x,
        ["PathwiseELBO"],
        [2],
        repeats=100,
        reference=pair.reference(x),
        progress=False,
    )
    assert (found.verdict == "no bias seen").all()
    row = found.sel(estimator="PathwiseELBO", num_particles=2)
    assert abs(row.value - pair.elbo(x)) < STANDARD_ERRORS * row.value_se


def test_gradients_that_are_not_finite_are_told(x):
    pair = Normal()

    class Broken(Estimator):
        value_name = "ELBO"

        def coefficients(self, log_weights):
            each = torch.full_like(log_weights, 1 / len(log_weights))
            return Coefficients(elbo(log_weights), each, each * math.nan, -each, None)

    found = compare(pair, x, [Broken], [2], repeats=8, reference=pair.reference(x))
    assert np.isnan(found.variance.sel(parameter="guide")).all()
    assert any("8 of 8 gradients of 'guide' are not finite" in n for n in found.provenance["notes"])


def test_averaging_over_particles_gives_a_slope_of_one_half(x):
    found = compare(Normal(), x, ["PathwiseELBO"], [1, 4, 16], repeats=60, reference="none")
    slopes = snr_slopes(found).sel(estimator="PathwiseELBO")
    assert (abs(slopes.slope - 0.5) < STANDARD_ERRORS * slopes.slope_se).all()


def test_memory_grows_with_the_particles(x):
    found = compare(Normal(), x, ["PathwiseELBO"], [2, 200], repeats=8)
    few, many = found.bytes.values[0]
    assert many > 10 * few > 0


def test_passes_are_counted_whoever_runs_the_programs(x):
    """Ours and Pyro's, of all particles together and of one after the other."""
    pair, k = Normal(), 3

    names = ["PathwiseELBO", "DReG", Trace_ELBO(vectorize_particles=True), Trace_ELBO()]
    found = compare(pair, x, names[:3], [k], repeats=8, reference="none")
    assert found.passes.values[:, 0].tolist() == [k, 2 * k, k]
    looped = compare(pair, x, {"looped": names[3]}, [k], repeats=8, reference="none")
    assert looped.passes.item() == k
    assert "Seconds are those of one thread of " in " ".join(found.provenance["notes"])


def test_recommendations_do_not_depend_on_the_clock(x):
    found = compare(
        Normal(phi=-1.5),
        x,
        ["PathwiseELBO", "ScoreFunction", "StickingTheLanding"],
        [4],
        repeats=40,
    )
    rows = recommend_estimators(found)
    found["seconds"].values[:] = found["seconds"].values[::-1] * np.array([[1e3], [1.0], [1e-3]])
    assert recommend_estimators(found) == rows


def test_recommendations_rank_what_is_unbiased_by_variance_and_passes(x):
    found = compare(
        Normal(phi=-1.5),
        x,
        ["PathwiseELBO", "ScoreFunction", "DReG", "VIMCO", "WakeDReG"],
        [4],
        repeats=40,
    )
    by_bound = {row["bound"]: row for row in recommend_estimators(found)}
    assert by_bound["ELBO"]["recommended"] == "PathwiseELBO"
    assert by_bound["ELBO"]["next"].startswith("ScoreFunction (")
    assert by_bound["IWAE"]["recommended"] == "DReG"
    assert by_bound["IWAE"]["biased"] == "WakeDReG"
    # Of use to nobody who maximises this bound, however quiet it is.
    guide = found.sel(parameter="guide", num_particles=4)
    assert guide.verdict.sel(estimator="WakeDReG") == "biased"


def test_what_is_biased_by_design_is_not_recommended_even_if_it_was_not_seen(x):
    found = compare(Normal(phi=-0.1), x, ["VIMCO", "ReweightedWakeSleep"], [2], repeats=8)
    found["verdict"].values[:] = "no bias seen"
    (row,) = recommend_estimators(found)
    assert (row["recommended"], row["biased"]) == ("VIMCO", "(ReweightedWakeSleep)")
