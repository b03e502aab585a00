"""Every likelihood with every prior, posterior and network; every part with every tool.

`test_vae.py` walks priors with posteriors, and likelihoods with networks, through run folders and
the evidence. Here is the whole product, and what the tools say of each part.
"""

import functools
import itertools
import json
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import every, pairs
from pyro.distributions import transforms
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal

from pyro_vae import compare_estimators, elbo_gap, fit, load_run, log_evidence, log_weights
from pyro_vae.diagnostics.posterior import posterior_quality
from pyro_vae.inference.estimators import bounds_nothing, make_objective, objective_names
from pyro_vae.inference.estimators.not_bounds import BetaELBO, InfoVAE
from pyro_vae.inference.programs import ProgramError, inspect_programs
from pyro_vae.inference.svi import load_tensors, save_tensors
from pyro_vae.models import AUTOENCODERS, VAE, Autoencoder, TwoLayerVAE
from pyro_vae.models.autoencoder import make_kind
from pyro_vae.models.parts import make_checked, make_likelihood, name_of, parse_part, part_text
from pyro_vae.results import IncomparableError, load_result

DIM, LATENT, NUM = 9, 2, 6
PRIORS: dict[str, Any] = {
    "normal": "normal",
    "mixture": {"name": "mixture", "num_components": 2},
    "vamp": {"name": "vamp", "num_pseudo_inputs": 3},
    "coupling": {"name": "flow", "num_steps": 2, "hidden": [4]},
    "autoregressive": {"name": "flow", "kind": "autoregressive", "num_steps": 1, "hidden": [4]},
}
POSTERIORS: dict[str, Any] = {
    "diagonal": "diagonal",
    "full": "full",
    "low_rank": {"name": "low_rank", "rank": 1},
    "iaf": {"name": "iaf", "num_steps": 2, "hidden": [4], "context_dim": 3},
}
NETWORKS: dict[str, Any] = {
    "mlp": "mlp",
    "conv": {"name": "conv", "channels": [2], "image_shape": [3, 3]},
    "residual": "residual",
}
LIKELIHOODS: dict[str, Any] = {
    "bernoulli": "bernoulli",
    "continuous_bernoulli": "continuous_bernoulli",
    "gaussian": "gaussian",
    "gaussian_pixel": {"name": "gaussian", "scale": "pixel"},
    "categorical": {"name": "categorical", "levels": 3},
    "logistic": {"name": "discretized_logistic", "levels": 3},
    "logistic_mixture": {
        "name": "discretized_logistic",
        "levels": 3,
        "components": 2,
        "scale": "shared",
    },
}


def build(likelihood="bernoulli", prior="normal", posterior="diagonal", network="mlp"):
    return VAE(
        DIM,
        LATENT,
        (4,),
        LIKELIHOODS[likelihood],
        prior=PRIORS[prior],
        posterior=POSTERIORS[posterior],
        network=NETWORKS[network],
    )


def measure_of(likelihood):
    return make_likelihood(LIKELIHOODS[likelihood]).measure


def data(likelihood="bernoulli", num=NUM):
    top = 1 if likelihood == "bernoulli" else 2
    return torch.randint(top + 1, (num, DIM)).double() / top


# --- the product ----------------------------------------------------------------------------------


def step(pair, x, optimizer):
    optimizer.zero_grad()
    with pyro.get_param_store().scope():
        loss = Trace_ELBO(max_plate_nesting=1).differentiable_loss(pair.model, pair.guide, x)
    loss.backward()
    optimizer.step()


def evaluated(pair, x):
    """The ELBO by one draw, and a draw of data: both from the same random numbers each time."""
    with torch.no_grad(), pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(1)
        elbo = -Trace_ELBO(max_plate_nesting=1).loss(pair.model, pair.guide, x)
    drawn = pair.sample(3, mean=False, generator=torch.Generator().manual_seed(2))
    pair.likelihood.check(drawn)
    return elbo, drawn


@pytest.mark.parametrize(("prior", "posterior"), pairs(list(PRIORS), list(POSTERIORS)))
def test_the_whole_product_trains_evaluates_is_kept_loaded_and_sampled(prior, posterior, tmp_path):
    for likelihood, network in itertools.product(LIKELIHOODS, NETWORKS):
        vae, x = build(likelihood, prior, posterior, network), data(likelihood)
        before = {name: p.detach().clone() for name, p in vae.named_parameters()}
        optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
        for _ in range(2):
            step(vae, x, optimizer)
        same = [name for name, p in vae.named_parameters() if torch.equal(p, before[name])]
        assert not same, (likelihood, network, same)
        elbo, drawn = evaluated(vae, x)
        assert math.isfinite(elbo)
        save_tensors(tmp_path / "weights", vae.state_dict())
        config = json.loads(json.dumps(vae.config))
        with torch.device("meta"):
            again = VAE(**config)
        again.load_state_dict(load_tensors(tmp_path / "weights")[0], assign=True)
        assert again.config == config
        assert evaluated(again, x)[0] == elbo
        assert torch.equal(evaluated(again, x)[1], drawn)


@pytest.mark.parametrize("likelihood", every(3, LIKELIHOODS))
def test_run_folders_keep_every_likelihood_with_every_other_part(likelihood, tmp_path):
    place = list(LIKELIHOODS).index(likelihood)
    for turn, prior in enumerate(PRIORS):
        posterior = list(POSTERIORS)[(place + turn) % len(POSTERIORS)]
        network = list(NETWORKS)[(place + turn) % len(NETWORKS)]
        vae, x = build(likelihood, prior, posterior, network), data(likelihood)
        run = {"epochs": 1, "batch_size": 3, "checkpoint": tmp_path / prior, "progress": False}
        bound = fit(vae.model, vae.guide, x, **run).history.bound
        assert (bound.attrs["bound"], bound.attrs["measure"]) == ("lower", measure_of(likelihood))
        again = load_run(tmp_path / prior)
        assert evaluated(again.module, x)[0] == evaluated(vae, x)[0]
        weights = [log_weights(m.model, m.guide, x, 2, seed=1) for m in (again, vae)]
        assert torch.equal(*weights)
        assert bool(weights[0].isfinite().all())


# --- every part with every tool -------------------------------------------------------------------


def two_layers(posterior="diagonal", prior="normal"):
    return TwoLayerVAE(
        DIM, (3, 2), ((4,), (4,)), prior=PRIORS[prior], posterior=POSTERIORS[posterior]
    )


PARTS: dict[str, Any] = {
    **{f"prior {name}": functools.partial(build, prior=name) for name in PRIORS},
    **{f"posterior {name}": functools.partial(build, posterior=name) for name in POSTERIORS},
    **{f"likelihood {name}": functools.partial(build, name) for name in LIKELIHOODS},
    **{f"network {name}": functools.partial(build, network=name) for name in NETWORKS},
    "vamp of iaf": functools.partial(build, prior="vamp", posterior="iaf"),
    "two layers": two_layers,
    "two layers, iaf and flow": functools.partial(two_layers, "iaf", "coupling"),
}
# A tool that takes any pair of programs, and the variables of its result that must be finite.
TOOLS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "log_evidence": (
        functools.partial(log_evidence, num_particles=30),
        ("log_evidence", "log_evidence_se", "elbo", "gap", "ess", "khat"),
    ),
    "elbo_gap": (
        functools.partial(elbo_gap, num_particles=30, max_steps=2, richer=()),
        ("log_evidence", "elbo", "gap", "approximation_gap", "amortization_gap", "khat"),
    ),
    "posterior_quality": (
        functools.partial(posterior_quality, num_particles=30, checks=()),
        ("khat", "ess"),
    ),
}


def likelihood_of(part):
    kind, _, name = part.partition(" ")
    return name if kind == "likelihood" else "bernoulli"


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("part", PARTS)
def test_every_part_works_with_every_tool(part, tool):
    likelihood = likelihood_of(part)
    pair, x = PARTS[part](), data(likelihood, 4)
    call, variables = TOOLS[tool]
    found = call(pair.model, pair.guide, x, progress=False)
    for name in variables:
        assert found[name].dims == ("datum",)
        assert bool(np.isfinite(found[name]).all()), name
        if found[name].attrs["unit"] == "nats":
            assert found[name].attrs["measure"] == measure_of(likelihood)
    assert bool(((found["ess"] >= 1) & (found["ess"] <= 30.001)).all())


@pytest.mark.parametrize("part", PARTS)
def test_particles_of_every_part_run_together_and_have_a_density_at_given_latents(part):
    """Which `inspect_programs` finds by comparing with a second run, particle by particle."""
    pair, x = PARTS[part](), data(likelihood_of(part), 4)
    structure = inspect_programs(pair.model, pair.guide, ((x,), {}))
    assert structure.vectorizable
    assert structure.replayable


def test_what_a_tool_refuses_it_says_clearly():
    vae, x = build(), data()
    joint = AutoMultivariateNormal(vae.model)
    with pytest.raises(ProgramError, match=r"outside the batch plate.*need latents per datum"):
        elbo_gap(vae.model, joint, x, progress=False)
    planar = transforms.planar(LATENT)

    def guide(x):
        pyro.module("encoder", vae.encoder)
        pyro.module("planar", planar)
        with pyro.plate("data", len(x)):
            start: Any = vae.encode(x)
            pyro.sample("z", dist.TransformedDistribution(start, [planar]))

    with pytest.raises(
        ProgramError, match=r"DReG needs log q at given latents.*without an inverse"
    ):
        compare_estimators(vae.model, guide, x, ["DReG"], [2], repeats=8, progress=False)
    found = elbo_gap(vae.model, guide, x, num_particles=9, max_steps=2, richer=(), progress=False)
    assert bool(np.isfinite(found.gap).all())  # which needs draws alone


# --- every objective, and what compares with what -------------------------------------------------


@pytest.mark.parametrize("name", objective_names())
def test_every_objective_trains_and_is_labelled_as_what_it_is(name, tmp_path):
    vae, x = build(prior="coupling"), data(num=8)
    groups = {"groups": "site"} if name == "FreeBits" else {}  # a flow's dimensions depend
    loss = make_objective({"name": name, **groups})
    found = fit(
        vae.model, vae.guide, x, loss=loss, epochs=2, batch_size=4, checkpoint=tmp_path / "run"
    )
    last = found.history.isel(epoch=-1)
    assert last.quantity("bound").bound == "lower"  # the ELBO, whatever was maximised
    assert last.quantity("loss").bound == "objective"
    assert str(last.quantity("loss").objective).startswith(name)
    with pytest.raises(IncomparableError, match="objective against lower"):
        last.quantity("loss").difference(last.quantity("bound"))
    run = load_run(tmp_path / "run")
    assert run.config["fit"]["loss"] == name
    again = run.history.isel(epoch=-1).quantity("loss")
    assert again.objective == last.quantity("loss").objective
    again.difference(last.quantity("loss"))  # the same objective compares
    assert bounds_nothing(name) == (loss.bound_kind == "objective")


def losses(loss, pair, x):
    found = fit(pair.model, pair.guide, x, loss=loss, epochs=1, progress=False)
    return found.history.isel(epoch=-1)


def test_different_objectives_do_not_compare():
    x = data(num=8)
    one, two, other, plain = (
        losses(loss, build(), x)
        for loss in (BetaELBO(beta=2.0), BetaELBO(beta=4.0), InfoVAE(), Trace_ELBO())
    )
    for a, b in itertools.permutations([one, two, other, plain], 2):
        with pytest.raises(IncomparableError, match="an objective compares only with the same"):
            a.quantity("loss") < b.quantity("loss")  # noqa: B015
        with pytest.raises(IncomparableError, match="an objective compares only with the same"):
            a.quantity("loss").difference(b.quantity("bound"))
        a.quantity("bound").difference(b.quantity("bound"))  # all are ELBOs
    with pytest.raises(IncomparableError, match="objective"):
        one.quantity("kl").difference(one.quantity("reconstruction"))


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_a_map_objective_compares_with_no_elbo(kind):
    x = data(num=8)
    point = losses(None, Autoencoder(DIM, 2, (4,), kind), x).quantity("bound")
    assert point.bound == "objective"
    assert "bounds nothing" in str(point)
    with pytest.raises(IncomparableError, match="objective against lower"):
        point.difference(losses(None, build(), x).quantity("bound"))
    same = losses(None, Autoencoder(DIM, 3, (5,), kind), x).quantity("bound")
    point.difference(same)
    other = Autoencoder(DIM, 2, (4,), {"name": "sparse", "strength": 2.0})
    with pytest.raises(IncomparableError, match="same objective"):
        point.difference(losses(None, other, x).quantity("bound"))
    found = log_evidence(build().model, build().guide, x, num_particles=3, progress=False)
    for name in ("elbo", "log_evidence"):
        with pytest.raises(IncomparableError):
            point > found.quantity(name)  # noqa: B015


def test_estimators_of_a_bound_and_of_none_do_not_compare(tmp_path):
    vae, x = build(), data(num=8)
    kinds = ["PathwiseELBO", "ImportanceWeighted", BetaELBO(beta=2.0), BetaELBO()]
    run: dict[str, Any] = {"repeats": 8, "reference": "none", "progress": False}
    found = compare_estimators(vae.model, vae.guide, x, kinds, [2], **run)
    found.save(tmp_path / "kept.nc")
    for result in (found, load_result(tmp_path / "kept.nc")):
        values = [
            result.sel(estimator=name, num_particles=2).quantity("value")
            for name in result.estimator.values
        ]
        assert [v.bound for v in values] == ["lower", "lower", "objective", "objective"]
        values[1].difference(values[0])
        for a, b in itertools.permutations(values, 2):
            if "objective" in (a.bound, b.bound):
                with pytest.raises(IncomparableError, match="same objective"):
                    a.difference(b)
        values[2].difference(values[2])
    kinds_shown = [line for line in found.table().splitlines() if line.startswith("value (")]
    assert ["lower bound" in line for line in kinds_shown] == [True, True, False, False]
    assert ["objective" in line for line in kinds_shown] == [False, False, True, True]
    alone = compare_estimators(vae.model, vae.guide, x, [BetaELBO(beta=2.0)], [2], **run)
    value = alone.sel(estimator=alone.estimator.values[0], num_particles=2).quantity("value")
    value.difference(values[2])
    with pytest.raises(IncomparableError):
        value.difference(values[0])


# --- a part in one word ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("iaf", "iaf"),
        ("low-rank", "low_rank"),
        (" mixture : num-components = 20 ", {"name": "mixture", "num_components": 20}),
        (
            "gaussian:scale=0.5,min_scale=1e-3",
            {"name": "gaussian", "scale": 0.5, "min_scale": 1e-3},
        ),
        ("gaussian:scale=pixel", {"name": "gaussian", "scale": "pixel"}),
        ("flow:hidden=64", {"name": "flow", "hidden": [64]}),
        ("flow:hidden=", {"name": "flow", "hidden": []}),
        ("conv:channels=16-32", {"name": "conv", "channels": [16, 32]}),
        ("vamp:bounded=false", {"name": "vamp", "bounded": False}),
    ],
)
def test_a_part_is_one_word(text, part):
    assert parse_part(text) == part
    assert parse_part(part_text(part)) == part
    assert name_of(part) == (part if isinstance(part, str) else part["name"])


@pytest.mark.parametrize(
    "text",
    ["", ":", "flow:", "flow:hidden", "flow:hidden=a-b", "flow:=3", "a:b=1,b=2", "a:b=", "a:b=1,"],
)
def test_what_is_no_part_says_what_is(text):
    with pytest.raises(ValueError, match="is not NAME or NAME:KEY=VALUE"):
        parse_part(text)


def test_every_config_survives_its_word():
    """As a report writes it and the command line reads it."""
    pairs = [build(*choice) for choice in zip(LIKELIHOODS, itertools.cycle(PRIORS), strict=False)]
    pairs += [build(posterior=name) for name in POSTERIORS]
    pairs += [build(network=name) for name in NETWORKS]
    for pair in pairs:
        for name in ("likelihood", "prior", "posterior", "network"):
            part = parse_part(part_text(pair.config[name]))
            assert VAE(**{**pair.config, name: part}).config == pair.config
    for kind in AUTOENCODERS:
        config = make_kind(kind).config
        assert make_kind(parse_part(part_text(config))).config == config


def test_arguments_that_a_part_lacks_are_named():
    with pytest.raises(ValueError, match="kind 'sparse' has no argument 'level': it has strength"):
        make_checked("kind", make_kind, {"name": "sparse", "level": 1.0})
    with pytest.raises(ValueError, match="has no argument 'level': it has none"):
        make_checked("kind", make_kind, {"name": "undercomplete", "level": 1.0})
    assert make_checked("kind", make_kind, {"name": "sparse", "strength": 2.0}).strength == 2.0
    assert make_checked("kind", make_kind, "sparse").strength == 1.0
