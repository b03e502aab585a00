"""The gap against the linear Gaussian model, where every line of it has a closed form."""

import math
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_vae import LinearGaussian, log_evidence
from pyro_vae.diagnostics.gap import elbo_gap, elbo_surgery, gap_on_both
from pyro_vae.diagnostics.gap.elbo_gap import GAP_VARIABLES, _decompose
from pyro_vae.inference.log_weights import importance_bound_error, pareto_tail
from pyro_vae.inference.programs import ProgramError
from pyro_vae.inference.refit.refit_guide import refit_guide
from pyro_vae.results import Result, label, make_result, sha256_of

# 4 standard errors: one comparison of a mean fails at a rate of 6e-5.
ERRORS = 4.0


@pytest.fixture
def pair() -> LinearGaussian:
    return LinearGaussian.from_parameters(torch.randn(5, 3), torch.randn(5), torch.tensor(0.6))


def gap_of(model: Any, guide: Any, x: Any, **options: Any) -> Result:
    chosen = {"richer": (), "max_steps": 300, "num_particles": 500, "evidence": "exact", **options}
    return elbo_gap(model, guide, x, progress=False, **chosen)


def mean(result: Result, name: str) -> float:
    return result.quantity(name).value


def error(result: Result, name: str) -> float:
    return result.quantity(name).standard_error or 0.0


def shifted(pair: LinearGaussian, shift: Tensor, widened: float = 1.0) -> Any:
    def guide(x: Tensor) -> None:
        best = pair.best_diagonal_posterior(x)
        with pyro.plate("data", len(x)):
            fn = dist.Normal(best.mean + shift, widened * best.stddev)
            pyro.sample("z", fn.to_event(1))

    return guide


# --- the gap --------------------------------------------------------------------------------------


@pytest.mark.parametrize("evidence", ["exact", "importance"])
def test_an_exact_guide_has_no_gap(pair: LinearGaussian, evidence: str) -> None:
    x = pair.sample(6)
    found = gap_of(pair.model, pair.exact_guide, x, evidence=evidence, max_steps=20)
    for name in ("gap", "amortization_gap", "approximation_gap"):
        assert abs(found[name]).max() < 0.02  # a search that cannot rise may fall a little
    if evidence == "exact":
        assert abs(found["gap"]).max() < 1e-8


def test_the_data_are_those_of_the_batch_plate_wherever_it_lies() -> None:
    """Three data of two features, which lie in an outer plate and come first."""
    x = torch.randn(2, 3)

    def model(x: Tensor) -> None:
        with pyro.plate("data", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("features", 2, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def exact(x: Tensor) -> None:
        with pyro.plate("data", x.shape[1], dim=-1):
            pyro.sample("z", dist.Normal(x.sum(0) / 3, math.sqrt(1 / 3)))

    covariance = torch.eye(2) + torch.ones(2, 2)
    evidence = dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(x.T)
    found = gap_of(model, exact, x, evidence="importance", richer=("full",), max_steps=20)
    # A search that cannot rise may fall a little.
    assert found.log_evidence.values == pytest.approx(evidence.numpy(), abs=0.02)
    assert abs(found["gap"]).max() < 0.02
    with pytest.raises(ValueError, match="refitted to 3 data and got 2"):
        refit_guide(model, exact, x, max_steps=20, progress=False)(x[:, :2])


def test_the_gap_of_each_datum_is_its_divergence(pair: LinearGaussian) -> None:
    x = pair.sample(6)
    found = gap_of(pair.model, pair.guide, x, max_steps=20)
    q = pair.amortized_posterior(x)
    truth = pair.kl_to_posterior(x, q.mean, torch.diag_embed(q.variance)).detach()
    away = abs(torch.tensor(found["gap"].values) - truth)
    # Heavy-tailed log weights make a normal quantile a little low: 5 of 6 data at 6e-7.
    assert (away < 5 * torch.tensor(found["gap_se"].values)).all()
    assert (truth > 1.0).all()


def test_the_lines_add_up_and_are_labelled(pair: LinearGaussian) -> None:
    x = pair.sample(4)
    found = gap_of(pair.model, pair.guide, x, evidence="importance", richer=("full",), max_steps=40)
    assert {*GAP_VARIABLES, "elbo_refitted", "elbo_full", "gain_full", "ess", "khat"} <= set(found)
    parts = found["approximation_gap"] + found["amortization_gap"]
    assert abs(parts - found["gap"]).max() < 1e-10
    bounds = {name: found[name].attrs["bound"] for name in GAP_VARIABLES}
    assert bounds == {
        "log_evidence": "lower",
        "elbo": "lower",
        "gap": "lower",
        "approximation_gap": "none",  # a lower bound of log p(x) less one of the best ELBO
        "amortization_gap": "lower",
    }
    exact = gap_of(pair.model, pair.guide, x, max_steps=20)
    assert exact["gap"].attrs["bound"] == "unbiased"
    assert exact["approximation_gap"].attrs["bound"] == "upper"
    assert "num_particles" not in exact["log_evidence"].attrs
    assert any("raise max_steps" in note for note in exact.provenance["notes"])


@pytest.mark.long
def test_the_best_diagonal_guide_has_an_approximation_gap_alone(pair: LinearGaussian) -> None:
    x = pair.sample(6)
    found = gap_of(pair.model, pair.best_diagonal_guide, x, richer=("full",))
    precision = pair.posterior_precision.detach()
    least = float((precision.diagonal().log().sum() - precision.logdet()) / 2)
    assert least > 0.05
    assert abs(mean(found, "amortization_gap")) < 1e-3 + ERRORS * error(found, "amortization_gap")
    for name in ("approximation_gap", "gain_full"):
        assert abs(mean(found, name) - least) < 1e-3 + ERRORS * error(found, name)
    assert abs(mean(found, "log_evidence") - mean(found, "elbo_full")) < 1e-3


def test_a_shift_of_the_guide_is_amortisation_gap(pair: LinearGaussian) -> None:
    x = pair.sample(6)
    shift = torch.tensor([0.2, -0.1, 0.3])
    found = gap_of(pair.model, shifted(pair, shift), x)
    lost = float(shift @ pair.posterior_precision.detach() @ shift / 2)
    assert lost > 0.05
    assert abs(mean(found, "amortization_gap") - lost) < (
        1e-3 + ERRORS * error(found, "amortization_gap")
    )
    assert abs(mean(found, "approximation_gap") - float(pair.diagonal_gap().detach())) < (
        1e-3 + ERRORS * error(found, "approximation_gap")
    )


def test_a_worse_guide_has_a_wider_gap(pair: LinearGaussian) -> None:
    x = pair.sample(4)
    gaps = [
        gap_of(pair.model, guide, x, max_steps=20)
        for guide in (pair.best_diagonal_guide, shifted(pair, torch.zeros(3), widened=2.0))
    ]
    # log p - ELBO of scales twice too large: 3 (4 - 1 - log 4) / 2 nats more.
    rise = mean(gaps[1], "gap") - mean(gaps[0], "gap")
    expected = 1.5 * (3 - math.log(4))
    assert abs(rise - expected) < ERRORS * math.hypot(*(error(g, "gap") for g in gaps))


@pytest.mark.long
def test_a_proposal_that_was_fitted_gives_better_evidence(pair: LinearGaussian) -> None:
    x = pair.sample(4)
    guide = shifted(pair, torch.tensor([0.8, -0.8, 0.8]))
    ours = gap_of(pair.model, guide, x, evidence="importance", richer=("full",))
    theirs = log_evidence(pair.model, guide, x, num_particles=500, progress=False)
    assert (ours["ess"] > 5 * theirs["ess"]).all()
    assert abs(mean(ours, "log_evidence") - float(pair.log_evidence(x).detach().mean())) < 0.01


def test_evidence_from_elsewhere(pair: LinearGaussian) -> None:
    x = pair.sample(4)
    exact = log_evidence(pair.model, None, x, method="exact")
    quick = {"max_steps": 20, "num_particles": 10}
    given = gap_of(pair.model, pair.guide, x, evidence=exact, **quick)
    named = gap_of(pair.model, pair.guide, x, evidence={"method": "exact"}, **quick)
    assert given["gap"].equals(named["gap"])
    upper = make_result(
        {
            "log_evidence": ("datum", exact["log_evidence"].values + 1, label(bound="upper")),
            "log_evidence_se": ("datum", [0.5] * 4, label(bound="upper")),
        },
        function="test",
        config={},
        seed=None,
        data_sha256=sha256_of(x),
    )
    above = gap_of(pair.model, pair.guide, x, evidence=upper, **quick)
    assert above["gap"].attrs["bound"] == "upper"
    assert abs(above["gap"] - given["gap"] - 1).max() < 1e-10
    assert abs(above["gap_se"] ** 2 - given["gap_se"] ** 2 - 0.25).max() < 1e-10


def test_errors_of_differences_are_those_of_draws_made_again(pair: LinearGaussian) -> None:
    """Bootstrap: the particles of all guides are drawn together, 3000 times; its noise is 1.3 %."""
    x = torch.zeros(2, 5)
    fitted = [
        replace(
            refit_guide(pair.model, pair.guide, x, family=family, max_steps=2, progress=False),
            log_weight=torch.tensor(log_weight),
        )
        for family, log_weight in (("same", [-1.0, -3.0]), ("full", [-2.0, -1.0]))
    ]
    generator = torch.Generator().manual_seed(4)
    shared, own = (torch.randn(400, 2, generator=generator).double() for _ in range(2))
    weights = [0.7 * shared + 0.2 * own, 0.5 * shared - 3, 0.3 * own + 0.2 * shared - 2]
    found = _decompose(weights, fitted, None)
    rows = torch.randint(400, (3000, 400), generator=generator)
    amortised, refitted, full = (w[rows] for w in weights)  # [bootstrap, particles, datum]
    proposal = torch.stack([refitted[..., 0], full[..., 1]], -1)  # the family with more weight
    evidence = proposal.logsumexp(1) - math.log(400)
    chosen = torch.stack([weights[1][:, 0], weights[2][:, 1]], -1)
    bound = chosen.logsumexp(0) - math.log(400)
    assert (found["log_evidence"] - bound).abs().max() < 1e-12
    unseen = importance_bound_error(chosen, pareto_tail(chosen)).unseen  # no draws show it
    expected = {
        "gap": evidence - amortised.mean(1),
        "approximation_gap": evidence - refitted.mean(1),
        "amortization_gap": (refitted - amortised).mean(1),
        "gain_full": (full - refitted).mean(1),
        "elbo_full": full.mean(1),
    }
    for name, values in expected.items():
        seen = found[f"{name}_se"].square()
        if name in ("gap", "approximation_gap"):
            seen = seen - unseen.square()
        assert (seen.sqrt() / values.std(0) - 1).abs().max() < 0.07, name


def test_evidence_of_other_data_is_refused(pair: LinearGaussian) -> None:
    x = pair.sample(4)
    for other, says in ((pair.sample(4), "other data"), (pair.sample(3), "3 data and x of 4")):
        known = log_evidence(pair.model, None, other, method="exact")
        with pytest.raises(ValueError, match=says):
            gap_of(pair.model, pair.guide, x, evidence=known)


def test_evidence_below_the_elbo_is_pointed_out(pair: LinearGaussian) -> None:
    x = pair.sample(4)
    low = make_result(
        {"log_evidence": ("datum", pair.log_evidence(x).detach() - 50, label(bound="lower"))},
        function="test",
        config={},
        seed=None,
        data_sha256=sha256_of(x),
    )
    found = gap_of(pair.model, pair.best_diagonal_guide, x, evidence=low, max_steps=20)
    assert any("4 of 4 data the log evidence is below" in n for n in found.provenance["notes"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_particles": 1}, "num_particles"),
        ({"num_particles": True}, "num_particles"),
        ({"richer": ("fuller",)}, "richer"),
        ({"richer": "full"}, "richer"),
        ({"max_memory": 0.0}, "max_memory"),
        ({"evidence": "guess"}, "guess"),
        ({"evidence": {"num_particles": 5}}, "method"),
    ],
)
def test_bad_options_are_refused(pair: LinearGaussian, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        gap_of(pair.model, pair.guide, pair.sample(3), **options)


@pytest.mark.long
def test_chunks_of_particles_change_nothing_but_the_draws(pair: LinearGaussian) -> None:
    x = pair.sample(4)
    found = gap_of(pair.model, pair.exact_guide, x, max_steps=20, max_memory=1e-6)
    assert abs(found["gap"]).max() < 1e-8


def test_a_datum_of_zero_probability_is_infinite_and_spoils_no_other() -> None:
    x = torch.tensor([0.3, 5.0, 0.6])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("x", torch.where(x > 1, -math.inf, -0.5 * (z - x).square()))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0 * x, 1.0))

    found = gap_of(model, guide, x, evidence="importance", max_steps=200)
    assert found["elbo"].values[1] == -math.inf
    assert found["log_evidence"].values[1] == -math.inf
    truth = -0.25 * x**2 - 0.5 * math.log(2)  # of a normal of unit noise, without its constant
    for n in (0, 2):
        assert abs(float(found["log_evidence"][n]) - float(truth[n])) < 0.01
    assert found.quantity("elbo").value == -math.inf
    with pytest.raises(ValueError, match="nan"):
        found.quantity("gap")


# --- training and test data -----------------------------------------------------------------------


def test_both_data_sets_add_up(pair: LinearGaussian) -> None:
    training, test = pair.sample(5), pair.sample(4)
    options = {"evidence": "exact", "richer": (), "max_steps": 40, "num_particles": 50}
    both = gap_on_both(pair.model, pair.guide, training, test, progress=False, **options)
    assert (both.training.sizes["datum"], both.test.sizes["datum"]) == (5, 4)
    assert repr(both) == f"ELBO gaps of 5 training and 4 test data.\n{both.summary!r}"
    fall = mean(both.training, "elbo") - mean(both.test, "elbo")
    parts = [
        float(both.summary[f"{part}_generalization"])
        for part in ("model", "encoder", "approximation")
    ]
    assert abs(sum(parts) - fall) < 1e-10
    assert both.summary["elbo"].sel(split="test") == mean(both.test, "elbo")
    with pytest.raises(ValueError, match="one data set"):
        gap_on_both(pair.model, pair.guide, training, test, evidence=both.test)


# --- surgery --------------------------------------------------------------------------------------


def test_surgery_of_the_linear_gaussian_model(pair: LinearGaussian) -> None:
    x = pair.sample(6)
    found = elbo_surgery(pair.model, pair.guide, x, num_particles=400)
    q = pair.amortized_posterior(x)
    prior = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    rate = float(torch.distributions.kl_divergence(q, prior).mean().detach())
    noise = pair.noise_variance
    residual = (x - pair.bias - q.mean @ pair.weight.mT).square() + q.variance @ (
        pair.weight.mT.square()
    )
    distortion = float((residual / noise + (2 * math.pi * noise).log()).sum(-1).mean().detach() / 2)
    for name, truth in (("rate", rate), ("distortion", distortion)):
        assert abs(mean(found, name) - truth) < ERRORS * error(found, name)
    assert abs(found["mutual_information"] + found["marginal_kl"] - found["rate"]).max() < 1e-10
    assert abs(found["elbo"] + found["distortion"] + found["rate"]).max() < 1e-10
    activity = q.mean.detach().var(0)
    noise_of_mean = q.variance.detach()[0] / 400
    slack = 6 * (4 * activity * noise_of_mean / 5).sqrt() + 6 * noise_of_mean
    assert (abs(torch.tensor(found["activity"].values) - activity) < slack).all()
    assert int(found["active_units"]) == int((activity > 1e-2).sum())


def test_information_against_quadrature() -> None:
    pair = LinearGaussian.from_parameters(torch.randn(4, 1), torch.randn(4), torch.tensor(0.5))
    x = pair.sample(5)
    found = elbo_surgery(pair.model, pair.exact_guide, x, num_particles=2000)
    q = pair.posterior(x)
    z = torch.linspace(-9.0, 9.0, 6001)
    each = dist.Normal(q.mean[:, 0, None], q.stddev[:, 0, None]).log_prob(z).detach()
    mixture = each.logsumexp(0) - math.log(5)
    truth = float(torch.trapezoid(each.exp() * (each - mixture), z).mean())
    prior = dist.Normal(0.0, 1.0).log_prob(z)
    marginal = float(torch.trapezoid(mixture.exp() * (mixture - prior), z))
    for name, value in (("mutual_information", truth), ("marginal_kl", marginal)):
        assert abs(mean(found, name) - value) < ERRORS * error(found, name)
    assert 0.1 < truth < math.log(5)
    # The leave-one-out mixture leaves the datum's own density out: q_n / mean of the others.
    others = torch.stack([torch.cat([each[:n], each[n + 1 :]]).logsumexp(0) for n in range(5)])
    upper = float(torch.trapezoid(each.exp() * (each - others + math.log(4)), z).mean())
    away = mean(found, "mutual_information_upper") - upper
    assert abs(away) < ERRORS * error(found, "mutual_information_upper")
    assert upper > truth + 0.1
    assert list(found["unit"].values) == ["z"]


def test_surgery_takes_a_latent_that_is_one_number() -> None:
    x = torch.linspace(-2.0, 2.0, 5)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.5))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    found = elbo_surgery(model, guide, x, num_particles=4000)
    rate = (x.square() + 0.25 - 1) / 2 - math.log(0.5)
    away = torch.tensor(found["rate"].values) - rate
    assert (away.abs() < ERRORS * torch.tensor(found["rate_se"].values)).all()
    noise = (4 * 2.5 / 4 / 4000 * 0.25) ** 0.5  # of the variance of x, 2.5, seen through the draws
    assert abs(float(found["activity"][0]) - 2.5) < ERRORS * noise
    assert list(found["unit"].values) == ["z"]


def test_activity_is_not_raised_by_the_noise_of_few_draws() -> None:
    """Posterior means all alike, two draws of each of 300 data: variance 0, not 1/2."""
    x = torch.zeros(300)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    found = elbo_surgery(model, guide, x, num_particles=2)
    # Both parts are 1/2 with errors 1/2 sqrt(2 / 299) and 1/2 sqrt(2 / 300).
    assert abs(float(found["activity"][0])) < ERRORS * 0.06


def test_a_collapsed_posterior_tells_nothing(pair: LinearGaussian) -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    found = elbo_surgery(pair.model, guide, pair.sample(50), num_particles=100)
    for name in ("rate", "mutual_information", "mutual_information_upper", "marginal_kl"):
        assert abs(found[name]).max() < 1e-10
    assert int(found["active_units"]) == 0


def test_surgery_with_inner_plates_and_a_data_dim_of_its_own() -> None:
    x = torch.randn(4)

    def model(x: Tensor) -> None:
        with pyro.plate("data", 4, dim=-2):
            with pyro.plate("inner", 3, dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum((-1, -2))[..., None], 0.5), obs=x[:, None])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 4, dim=-2), pyro.plate("inner", 3, dim=-1):
            pyro.sample("z", dist.Normal(x[:, None, None].expand(4, 1, 2), 0.4).to_event(1))

    found = elbo_surgery(model, guide, x, num_particles=300)
    per_unit = (x.square() + 0.16 - 1) / 2 - math.log(0.4)
    assert abs(mean(found, "rate") - 6 * float(per_unit.mean())) < ERRORS * error(found, "rate")
    assert abs(found["activity"] - float(x.var())).max() < 0.2
    assert found.sizes["unit"] == 6


@pytest.mark.parametrize("options", [{"num_particles": 1}, {"num_particles": True}])
def test_surgery_refuses_bad_numbers(pair: LinearGaussian, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="num_particles"):
        elbo_surgery(pair.model, pair.guide, pair.sample(3), **options)


def test_surgery_refuses_what_has_no_aggregated_posterior(pair: LinearGaussian) -> None:
    with pytest.raises(ValueError, match="at least 2 data"):
        elbo_surgery(pair.model, pair.guide, pair.sample(1))
    model, x = pair.model, pair.sample(3)
    auto = pyro.infer.autoguide.AutoNormal(model)
    auto(x)
    with pytest.raises(ProgramError, match="'z' is known at its own draws alone"):
        elbo_surgery(model, auto, x)


def test_a_flow_needs_no_full_normal_before_it():
    model = LinearGaussian(4, 2)
    x = torch.randn(3, 4)
    options = {"max_steps": 40, "num_particles": 50, "progress": False}
    alone = elbo_gap(model.model, model.guide, x, richer=("flow",), **options)
    assert "elbo_full" not in alone
    assert bool((alone.elbo_flow > alone.elbo_refitted - 5 * alone.elbo_flow_se).all())
