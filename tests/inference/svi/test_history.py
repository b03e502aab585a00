"""The rows of a training, as `fit` returns them and as a run folder keeps them."""

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate

from pyro_vae import fit
from pyro_vae.inference.svi import history_result, read_rows
from pyro_vae.inference.svi.history import best_row, is_bound

NUM_DATA, DATA_DIM, NUM_COMPONENTS = 17, 3, 2


def regression_to_a_point():
    """A program whose guide has no density, so that there is no bound of the evidence."""

    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(DATA_DIM), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x):
        at = pyro.param("at", torch.zeros(DATA_DIM))
        pyro.sample("loc", dist.Delta(at).to_event(1))

    return model, guide, None


def summed_out_mixture():
    """A mixture whose discrete latent is summed out, so that the bound has no parts."""
    start = torch.arange(NUM_COMPONENTS * DATA_DIM, dtype=torch.float64).reshape(-1, DATA_DIM)

    @config_enumerate
    def model(x):
        locs = pyro.param("locs", start)
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.4)).long()
            pyro.sample("x", dist.Normal(locs[c], 1.0).to_event(1), obs=x)

    return model, lambda x: None, TraceEnum_ELBO(max_plate_nesting=1)


@pytest.mark.parametrize(
    ("programs", "kind"), [(summed_out_mixture, "lower"), (regression_to_a_point, "objective")]
)
def test_a_kept_history_is_labelled_as_the_one_that_fit_returned(tmp_path, programs, kind):
    model, guide, loss = programs()
    x = torch.randn(NUM_DATA, DATA_DIM)
    fitted = fit(
        model, guide, x, loss=loss, epochs=2, seed=3, validation=x[:5],
        checkpoint=tmp_path / "run", progress=False,
    )  # fmt: skip
    rows = read_rows(tmp_path / "run" / "history.jsonl")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    kept = history_result(rows, config, seed=3, data_sha256=config["fit"]["data_sha256"])
    assert {name: kept[name].attrs for name in kept.data_vars} == {
        name: fitted.history[name].attrs for name in fitted.history.data_vars
    }
    assert kept.drop_attrs().identical(fitted.history.drop_attrs())
    assert kept.bound.attrs["bound"] == kept.validation_bound.attrs["bound"] == kind
    card = (tmp_path / "run" / "README.md").read_text()
    assert ("negative loss" in card) == (kind == "objective")


def test_only_bounds_come_with_parts_or_a_standard_error():
    assert is_bound({"bound": -1.0, "kl": 0.5})
    assert is_bound({"bound": -1.0, "bound_se": 0.1})
    assert not is_bound({"bound": -1.0, "loss": 1.0, "seconds": 2.0})


def test_numbers_that_a_file_cannot_hold_are_nan_and_change_no_label():
    rows = [
        {"epoch": 2, "bound": -3.0, "kl": 1.0, "measure": "real"},
        {"epoch": 4, "bound": -2.0, "measure": "real"},  # its kl was infinite
    ]
    result = history_result(rows, {}, seed=5, data_sha256=None)
    assert result.epoch.values.tolist() == [2, 4]
    assert result.kl.values[0] == 1.0
    assert math.isnan(result.kl.values[1])
    assert result.bound.attrs["bound"] == "lower"
    assert result.bound.attrs["measure"] == "real"


def test_units_are_those_of_each_column():
    row = {"epoch": 1, "seconds": 0.5, "data_passes": 1.0, "loss": 2.0, "measure": "real", "x": 9}
    result = history_result([row], {}, seed=5, data_sha256=None)
    units = {name: result[name].attrs["unit"] for name in result.data_vars}
    assert units == {"seconds": "seconds", "data_passes": "none", "loss": "nats"}
    assert "measure" not in result.seconds.attrs


def test_a_training_without_an_epoch_has_no_variables():
    result = history_result([], {}, seed=None, data_sha256=None)
    assert list(result.data_vars) == []
    assert result.sizes["epoch"] == 0


@pytest.mark.parametrize(
    ("bounds", "place"),
    [([-3.0, -1.0, -2.0], 1), ([-1.0, -1.0], 0), ([math.nan, -9.0], 1), ([math.nan], 0)],
)
def test_the_best_row_is_the_first_of_the_highest(bounds, place):
    assert best_row(bounds) == place
