"""Objectives by name: what there is, how many particles they get, what they were made with."""

import inspect

import jaxtyping
import pytest
from pyro.infer import RenyiELBO, Trace_ELBO

from pyro_vae.inference.estimators import bounds as estimators
from pyro_vae.inference.estimators import (
    bounds_nothing,
    loss_options,
    loss_text,
    make_objective,
    not_bounds,
    objective_names,
)
from pyro_vae.inference.estimators.base import Objective


def test_every_estimator_has_a_name_or_a_reason() -> None:
    """All final classes of both modules, but those that do not train a VAE alone."""
    classes = {
        name
        for module in (estimators, not_bounds)
        for name, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, Objective) and not inspect.isabstract(kind) and name[0] != "_"
    }
    assert set(objective_names()) == classes - {"SleepPhi", "StraightThrough"}


@pytest.mark.parametrize("name", objective_names())
def test_an_objective_is_made_by_its_name_whatever_the_case(name: str) -> None:
    made = make_objective(name.lower())
    assert type(made).__name__ == name
    assert make_objective(name, 12).num_particles == 12
    kept = {"name": name, **loss_options(made)}
    again = make_objective(kept, made.num_particles)
    assert loss_options(again) == loss_options(made)
    assert bounds_nothing(name) == (type(made).bound_kind == "objective")


def test_particles_where_nobody_says() -> None:
    for name in ("PathwiseELBO", "StickingTheLanding", "BetaELBO", "free_bits", "InfoVAE"):
        assert make_objective(name).num_particles == 1, name
    for name in ("LeaveOneOut", "DReG", "ImportanceWeighted", "VIMCO", "CIWAE", "MIWAE"):
        assert make_objective(name).num_particles == 8, name


def test_options_reach_the_class_and_come_back() -> None:
    made = make_objective({"name": "InfoVAE", "alpha": 0.5, "bandwidth": 2.0}, 3)
    assert loss_options(made) == {"alpha": 0.5, "weight": 10.0, "bandwidth": 2.0}
    assert loss_options(make_objective({"name": "BetaELBO", "beta": 2})) == {"beta": 2}
    assert loss_options(RenyiELBO(alpha=0.25, num_particles=2)) == {"alpha": 0.25}
    assert loss_options(Trace_ELBO()) == {}
    assert loss_text({"loss": "BetaELBO", "loss_options": {"beta": 2}}) == "BetaELBO(beta=2)"
    assert loss_text({"loss": "Trace_ELBO", "loss_options": {}}) == "Trace_ELBO"
    assert loss_text({}) == "unknown"


def test_what_is_no_objective_says_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # ours, as users meet it
    with pytest.raises(ValueError, match=r"no objective 'BetaELB'.*Did you mean 'BetaELBO'"):
        make_objective("BetaELB")
    with pytest.raises(ValueError, match="has no argument 'gamma': it has beta"):
        make_objective({"name": "BetaELBO", "gamma": 2})
    with pytest.raises(ValueError, match="it has none"):
        make_objective({"name": "DReG", "gamma": 2})
    with pytest.raises(ValueError, match="beta must be a number"):
        make_objective({"name": "BetaELBO", "beta": "two"})
    for name in objective_names():
        for option in loss_options(make_objective(name)):
            with pytest.raises(ValueError, match=option):
                make_objective({"name": name, option: "many"})
    with pytest.raises(ValueError, match="no objective 'SleepPhi'"):  # trains the guide alone
        make_objective("SleepPhi")
