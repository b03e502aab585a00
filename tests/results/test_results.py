"""The vocabulary of labelled numbers: every rule, and a case that each must reject."""

import copy
import json
import math
import os
import pickle
import re
import subprocess
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from pyro_vae.results import (
    BOUNDS,
    MEASURES,
    REDUCTIONS,
    UNITS,
    IncomparableError,
    Quantity,
    Result,
    ShortRepr,
    difference_text,
    files,
    label,
    load_result,
    make_result,
    paired_difference,
    provenance,
    sha256_of,
)

HASH = "ab" * 32
VALUES = np.array([-3.0, -5.0, -10.0, -2.0])
ERRORS = np.array([0.3, 0.4, 1.2, 0.0])


def build(variables, **kwargs):
    settings: dict[str, Any] = {
        "function": "log_evidence",
        "config": {},
        "seed": 0,
        "data_sha256": HASH,
    }
    return make_result(variables, **settings | kwargs)


def bound(values=VALUES, errors=ERRORS, name="elbo", **kwargs):
    settings: dict[str, Any] = {"bound": "lower", "measure": "binary", "num_particles": 7}
    labels = label(**settings | kwargs)
    variables = {name: ("datum", values, labels)}
    if errors is not None:
        variables[f"{name}_se"] = ("datum", errors, {})
    return build(variables)


def quantity(**changes):
    base = Quantity(
        name="log_evidence",
        value=-98.314159,
        standard_error=0.021,
        data_standard_error=0.71,
        unit="nats",
        reduction="per datum",
        bound="lower",
        measure="binary",
        num_particles=1000,
        num_data=500,
        seed=0,
        data_sha256=HASH,
    )
    return replace(base, **changes)


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("what", "words"),
    [("unit", UNITS), ("reduction", REDUCTIONS), ("bound", BOUNDS), ("measure", MEASURES)],
)
def test_label_takes_its_words_and_lists_them_for_any_other(what, words):
    for word in words:
        assert label(**({"bound": "exact"} | {what: word}))[what] == word
    with pytest.raises(ValueError, match=f"{what} is 'bits'") as error:
        label(**({"bound": "exact"} | {what: "bits"}))
    assert all(repr(word) in str(error.value) for word in words)


def test_label_leaves_out_what_is_none_and_keeps_a_seed_of_zero():
    assert label(bound="exact") == {"unit": "nats", "reduction": "per datum", "bound": "exact"}
    assert label(bound="exact", seed=0)["seed"] == 0


@pytest.mark.parametrize("number", [0, -1, True])
def test_label_refuses_a_number_of_particles_that_is_none(number):
    with pytest.raises(ValueError, match="num_particles"):
        label(bound="lower", num_particles=number)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"elbo": ("datum", VALUES, {})}, "elbo has no label"),
        ({"elbo": ("datum", VALUES, {"unit": "nats"})}, "elbo has no label"),
        ({"elbo": ("datum", VALUES, label(bound="lower") | {"bound": "low"})}, "bound is 'low'"),
        ({"elbo": ("datum", VALUES, label(bound="lower", reduction="total"))}, "'per datum', not"),
        ({"elbo": ("datum", np.array(["a"]), label(bound="lower"))}, "labelled as a number"),
        ({"elbo_se": ("datum", ERRORS, {})}, "standard error of elbo, which is missing"),
        (
            {"elbo": ("datum", VALUES, label(bound="lower")), "elbo_se": ((), 0.1, {})},
            r"elbo_se has dims \(\), but elbo",
        ),
        (
            {"elbo": ("datum", VALUES, label(bound="lower")), "elbo_se": ("datum", -ERRORS, {})},
            "cannot be negative",
        ),
    ],
)
def test_make_result_refuses_a_wrong_label(variables, message):
    with pytest.raises(ValueError, match=message):
        build(variables)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"config": {"loss": torch.nn.ReLU()}}, r"config\['loss'\] is of type ReLU"),
        ({"config": {"a": [{"b": object()}]}}, r"config\['a'\]\[0\]\['b'\]"),
        ({"config": {"a": {1: "b"}}}, "not text"),
        ({"notes": "one sentence"}, "notes is one string"),
    ],
)
def test_make_result_refuses_what_cannot_be_recorded(kwargs, message):
    with pytest.raises(TypeError, match=message):
        build({}, **kwargs)


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, 2**64, 1j, np.arange(2)])
def test_make_result_refuses_attributes_that_netcdf_would_change(value):
    with pytest.raises(TypeError, match="attribute 'alpha' of elbo"):
        build({"elbo": ("datum", VALUES, label(bound="lower") | {"alpha": value})})


def test_make_result_refuses_masked_arrays_and_objects():
    masked = np.ma.masked_array(VALUES, VALUES < -4)
    with pytest.raises(TypeError, match="masked"):
        build({"elbo": ("datum", masked, label(bound="lower"))})
    with pytest.raises(TypeError, match="Python objects"):
        build({"word": ("datum", np.array(["a", None], dtype=object), {})})


def test_make_result_copies_arrays_takes_tensors_and_numbers_the_data():
    values = torch.tensor([-3.0, -5.0], dtype=torch.float32, requires_grad=True)
    result = build({"elbo": ("datum", values, label(bound="lower") | {"none": None})})
    with torch.no_grad():
        values.zero_()
    assert result.elbo.dtype == np.float32
    assert result.elbo.values.tolist() == [-3.0, -5.0]
    assert result.datum.values.tolist() == [0, 1]
    assert "none" not in result.elbo.attrs


# ---------------------------------------------------------------- provenance


def test_provenance_names_version_commit_seed_config_and_data():
    config = {"lr": 1e-3, "beta": None, "hidden": (400, 20), "flag": True, "n": np.int64(3)}
    result = build({}, config=config, seed=2**63 + 1, notes=["k-hat is bad."])
    recorded = result.provenance
    assert recorded["config"] == {
        "lr": 1e-3,
        "beta": None,
        "hidden": [400, 20],
        "flag": True,
        "n": 3,
    }
    assert recorded["config"]["flag"] is True
    assert recorded["seed"] == 2**63 + 1
    assert recorded["data_sha256"] == HASH
    assert recorded["notes"] == ["k-hat is bad."]
    assert recorded["torch"] == torch.__version__
    assert recorded["num_threads"] == torch.get_num_threads()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", recorded["created"])
    assert {"version", "commit", "dirty", "python", "pyro", "function"} <= recorded.keys()
    assert f"BLAS_INFO={recorded['blas']}" in torch.__config__.show()
    able = torch.cpu.get_capabilities()
    assert recorded["processor"] == able["cpu_name"]
    assert set(recorded["processor_flags"]) <= {name for name, has in able.items() if has is True}
    assert ("avx2" in recorded["processor_flags"]) == bool(able.get("avx2"))
    assert isinstance(result.attrs["provenance"], str)
    assert result.attrs["provenance"].isascii()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of its own, with the module in it, whose git state the tests may change."""
    package = tmp_path / "pyro_vae"
    module = package / "results" / "provenance.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(module))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as in a hook: must not mislead
    provenance.git_state.cache_clear()
    yield tmp_path
    provenance.git_state.cache_clear()


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    done = subprocess.run(
        ["git", *identity, *arguments],
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def test_commit_is_none_outside_a_checkout_and_before_the_first_commit(checkout):
    assert provenance.git_state() == (None, None)
    git(checkout, "init", "-q")
    provenance.git_state.cache_clear()
    assert provenance.git_state() == (None, None)


def test_commit_and_dirt_of_a_checkout(checkout):
    git(checkout, "init", "-q")
    git(checkout, "add", "pyro_vae")
    git(checkout, "commit", "-q", "-m", "first")
    commit = git(checkout, "rev-parse", "HEAD")
    (checkout / "note.txt").write_text("outside the package")
    assert provenance.git_state() == (commit, False)
    (checkout / "pyro_vae" / "new.py").write_text("")
    assert provenance.git_state() == (commit, False)  # asked once
    provenance.git_state.cache_clear()
    assert provenance.git_state() == (commit, True)


# ---------------------------------------------------------------- an xarray.Dataset everywhere


SELECTIONS: dict[str, Any] = {
    "sel": lambda r: r.sel(datum=1),
    "isel": lambda r: r.isel(datum=slice(2)),
    "columns": lambda r: r[["elbo", "elbo_se"]],
    "copy": lambda r: r.copy(deep=True),
    "deepcopy": copy.deepcopy,
    "pickle": lambda r: pickle.loads(pickle.dumps(r)),
    "assign_coords": lambda r: r.assign_coords(datum=[5, 6, 7, 8]),
    "sortby": lambda r: r.sortby("elbo"),
}
COMPUTATIONS: dict[str, Any] = {
    "add": lambda r: r + 1,
    "radd": lambda r: 1 - r,
    "both": lambda r: r - r,
    "array": lambda r: r.elbo - r,
    "compare": lambda r: r > 0,
    "negate": lambda r: -r,
    "round": lambda r: r.round(1),
    "ufunc": np.exp,
    "mean": lambda r: r.mean("datum"),
    "sum": lambda r: r.sum("datum"),
    "std": lambda r: r.std("datum"),
    "quantile": lambda r: r.quantile(0.5, "datum"),
    "map": lambda r: r.map(np.exp),
    "groupby": lambda r: r.groupby("datum").mean(),
    "weighted": lambda r: r.weighted(r.elbo_se).mean("datum"),
    "cumsum": lambda r: r.cumsum("datum"),
    "diff": lambda r: r.diff("datum"),
    "interp": lambda r: r.interp(datum=[0.5, 1.5]),
    "where": lambda r: r.where(r.elbo < -3),
    "fillna": lambda r: r.fillna(0.0),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_selection_keeps_the_type_and_the_labels(name):
    selected = SELECTIONS[name](bound())
    assert isinstance(selected, Result)
    assert isinstance(selected, xr.Dataset)
    assert selected.quantity("elbo").bound == "lower"
    assert selected.provenance["function"] == "log_evidence"


@pytest.mark.parametrize("name", COMPUTATIONS)
def test_computation_gives_a_plain_dataset_of_the_right_numbers(name):
    result = bound()
    plain = xr.Dataset(result.data_vars, result.coords)
    computed = COMPUTATIONS[name](result)
    assert type(computed) is xr.Dataset
    xr.testing.assert_equal(computed, COMPUTATIONS[name](plain))
    with pytest.raises(AttributeError, match="quantity"):
        computed.quantity("elbo")


def test_labels_do_not_survive_arithmetic_unless_asked_for():
    assert (bound() * 1000).elbo.attrs == {}
    assert bound().std("datum").elbo.attrs == {}
    assert bound().mean("datum", keep_attrs=True).elbo.attrs["unit"] == "nats"


def test_arithmetic_in_place_leaves_the_result_as_it_was():
    result = bound()
    changed = result
    changed *= 1000
    assert type(changed) is xr.Dataset
    assert changed.elbo.values.tolist() == [-3000.0, -5000.0, -10000.0, -2000.0]
    assert result.elbo.values.tolist() == VALUES.tolist()


# ---------------------------------------------------------------- quantities


def test_quantity_is_the_mean_over_data_with_both_errors():
    q = bound().quantity("elbo")
    assert q.value == pytest.approx(-5.0, rel=1e-15)
    assert q.standard_error == pytest.approx(1.3 / 4, rel=1e-15)  # .09 + .16 + 1.44 = 1.3^2
    # Deviations 2, 0, -5 and 3; Student's 97.5 % quantile of 3 degrees of freedom is 3.1824.
    skewness = (8 - 125 + 27) / 4 / (38 / 4) ** 1.5 * math.sqrt(12) / 2
    z = 1.959964
    factor = 3.182446 / z + skewness**2 / 4 * (z**4 + 2 * z**2 - 3) / 18
    assert q.data_standard_error == pytest.approx(factor * math.sqrt(38 / 3 / 4), rel=1e-6)
    assert not q.data_error_reliable
    assert (q.unit, q.reduction, q.bound, q.measure) == ("nats", "per datum", "lower", "binary")
    assert (q.num_particles, q.num_data, q.seed, q.data_sha256) == (7, 4, 0, HASH)


def test_quantity_of_a_scalar_keeps_its_error_and_its_own_seed():
    result = build(
        {
            "total": ((), -20.0, label(bound="exact", reduction="total", seed=5)),
            "total_se": ((), 0.5, {}),
        }
    )
    q = result.quantity("total")
    assert (q.value, q.standard_error, q.data_standard_error, q.seed) == (-20.0, 0.5, None, 5)


def rated(**changes):
    """Errors 0.5 of four data of which 0.3 is bias, and what says that one does not hold."""
    variables: dict[str, Any] = {
        "elbo": ("datum", VALUES, label(bound="lower", reliable_by="error_reliable")),
        "elbo_se": ("datum", np.full(4, 0.5), {}),
        "elbo_bias": ("datum", np.full(4, -0.3), {}),
        "error_reliable": ("datum", np.array([True, False, True, True]), {}),
    }
    return build(variables | changes)


def test_noise_averages_out_over_the_data_and_bias_does_not():
    q = rated().quantity("elbo")
    assert q.standard_error == pytest.approx(math.hypot(0.4 / 2, 0.3))  # noise of 0.4 each
    one = rated().isel(datum=0).quantity("elbo")
    assert one.standard_error == pytest.approx(0.5)
    signs = ("datum", np.array([-0.3, 0.3, -0.3, 0.3]), {})
    assert rated(elbo_bias=signs).quantity("elbo").standard_error == pytest.approx(0.2)
    assert "elbo_bias" not in rated().table()
    with pytest.raises(ValueError, match="bias of elbo, which is missing"):
        build({"elbo_bias": ("datum", ERRORS, {})})


def test_an_error_that_does_not_hold_says_so_itself():
    result = rated()
    assert re.search(r"elbo +-5.00 +0.36\? ", result.table())
    q = result.quantity("elbo")
    assert q.num_unreliable == 1
    assert "error unreliable for 1 of 4 data" in str(q)
    good = result.isel(datum=result.error_reliable.values)
    assert "?" not in good.table()
    assert "unreliable" not in str(good.quantity("elbo"))
    alone = result.isel(datum=1).quantity("elbo")
    assert "error unreliable," in str(alone)
    difference = q.difference(q)
    assert difference.num_unreliable == 1


def test_mean_of_float32_is_taken_in_float64():
    values = np.full(100_003, 0.1, dtype=np.float32)
    value = bound(values, None).quantity("elbo").value
    assert value == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_quantity_takes_the_particles_from_the_coordinate():
    values = np.arange(6.0).reshape(2, 3)
    result = build(
        {"value": (("datum", "num_particles"), values, label(bound="lower"))},
        coords={"num_particles": [1, 16, 64]},
    )
    q = result.sel(num_particles=16).quantity("value")
    assert (q.value, q.num_particles, q.num_data) == (2.5, 16, 2)
    with pytest.raises(ValueError, match=r"varies over num_particles: select one"):
        result.quantity("value")


def test_quantity_names_what_there_is():
    with pytest.raises(KeyError, match="no variable 'loss'; there are elbo"):
        bound().quantity("loss")
    with pytest.raises(ValueError, match="has no label"):
        build({"flag": ("datum", np.array([True, False]), {})}).quantity("flag")


def test_nan_never_becomes_a_mean():
    values = np.array([np.nan, 1.0, 2.0, np.nan, 3.0])
    result = bound(values, None)
    with pytest.raises(ValueError, match=r"elbo is nan \(2 of 5 data\)"):
        result.quantity("elbo")
    assert "nan (2 of 5 data)" in result.table()
    assert "Unknown (nan), so without a mean: elbo (2 of 5)" in result.summary()
    assert result.isel(datum=[1, 2, 4]).quantity("elbo").value == 2.0


def test_infinite_means_are_shown_and_their_errors_unknown():
    result = bound(np.array([-np.inf, 1.0, 2.0]), np.array([0.1, 0.1, 0.1]))
    q = result.quantity("elbo")
    assert (q.value, q.standard_error, q.data_standard_error) == (-math.inf, None, None)
    assert "-inf nats" in str(q)
    assert "-inf (1 of 3 data)" in result.table()
    with pytest.raises(ValueError, match="inf for some data and -inf for others"):
        bound(np.array([-np.inf, np.inf]), None).quantity("elbo")


def test_no_data_have_no_mean():
    result = bound(np.zeros(0), None)
    with pytest.raises(ValueError, match="no data"):
        result.quantity("elbo")
    assert "no data" in result.table()


def test_one_datum_has_no_spread_and_an_unknown_error_is_not_zero():
    q = bound(np.array([-3.0]), np.array([np.nan])).quantity("elbo")
    assert q.data_standard_error is None
    assert q.standard_error is None
    assert "Monte-Carlo error unknown" in str(q)


def test_quantity_reads_as_a_sentence():
    assert str(quantity()) == (
        "log evidence = -98.314 +- 0.021 nats per datum (lower bound in expectation, "
        "1000 particles, mean over 500 data, their spread alone gives +- 0.71, "
        "probability of binary pixels, seed 0)"
    )
    exact = quantity(
        bound="exact",
        reduction="total",
        measure="grey",
        standard_error=None,
        data_standard_error=None,
        num_particles=None,
        seed=None,
    )
    assert str(exact) == (
        "log evidence = -98.3142 nats in total (exact, 500 data, density of grey pixels)"
    )
    assert "bounds nothing" in str(quantity(bound="objective"))
    assert "1 particle," in str(quantity(num_particles=1))
    assert str(quantity(num_particles=None, standard_error=0.0)).count("in expectation") == 0


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (-98.314159, 0.0214, "-98.314 +- 0.021"),
        (-98.314159, 12.3, "-98 +- 12"),
        (123456.7, 234.5, "123457 +- 234"),
        (1.0, 0.0, "1 +- 0"),
        (1.25, 1e-15, "1.25 +- 1e-15"),
        (1e300, 1.0, "1e+300 +- 1.0"),
        (-1.0, math.inf, "-1 +- inf"),
    ],
)
def test_values_are_written_to_the_digits_their_error_supports(value, error, text):
    assert f"= {text} nats" in str(quantity(value=value, standard_error=error))


# ---------------------------------------------------------------- comparison


@pytest.mark.parametrize(
    ("changes", "label_that_differs", "advice"),
    [
        ({"unit": "bits per dimension"}, "unit: nats against bits per dim", "convert"),
        ({"reduction": "total"}, "reduction: per datum against total", "divide"),
        ({"measure": "grey"}, "measure: binary against grey", "same kind"),
        ({"measure": None}, "measure: binary against unknown", "same kind"),
        ({"data_sha256": "cd" * 32}, "data_sha256: abababababab... against cdcd", "same data"),
        ({"data_sha256": None}, "data_sha256: abababababab... against unknown", "same data"),
        ({"num_data": 499}, "num_data: 500 against 499", "same data"),
        ({"bound": "objective"}, "bound: lower against objective", "estimate a bound"),
    ],
)
def test_unlike_quantities_do_not_compare(changes, label_that_differs, advice):
    a, b = quantity(), quantity(name="elbo", **changes)
    for compare in (a.difference, a.__lt__, a.__gt__):
        with pytest.raises(IncomparableError, match="log_evidence and elbo") as error:
            compare(b)
        assert label_that_differs in str(error.value)
        assert advice in str(error.value)


def test_every_label_that_differs_is_named():
    b = quantity(unit="seconds", reduction="total", measure="real", data_sha256=None)
    with pytest.raises(IncomparableError) as error:
        quantity() < b  # noqa: B015
    assert all(f"{n}:" in str(error.value) for n in ("unit", "reduction", "measure", "data_sha256"))


def test_like_quantities_compare_by_value():
    low, high = quantity(value=-2.0, seed=1, num_particles=3), quantity(value=-1.0)
    assert low < high
    assert high > low
    assert not low > high
    with pytest.raises(TypeError):
        low < 3.0  # noqa: B015


BOUND_OF_DIFFERENCE = {
    ("exact", "exact"): "exact",
    ("exact", "lower"): "upper",
    ("exact", "upper"): "lower",
    ("lower", "exact"): "lower",
    ("upper", "exact"): "upper",
    ("lower", "upper"): "lower",
    ("upper", "lower"): "upper",
    ("lower", "lower"): "none",
    ("upper", "upper"): "none",
    ("unbiased", "exact"): "unbiased",
    ("exact", "unbiased"): "unbiased",
    ("unbiased", "unbiased"): "unbiased",
    ("unbiased", "lower"): "upper",
    ("upper", "unbiased"): "upper",
    ("objective", "objective"): "objective",
    ("none", "lower"): "none",
    ("exact", "none"): "none",
}


@pytest.mark.parametrize(("bounds", "expected"), BOUND_OF_DIFFERENCE.items())
def test_bound_of_a_difference(bounds, expected):
    a, b = (quantity(bound=bound) for bound in bounds)
    assert a.difference(b).bound == expected


SIDES = {"exact": (0.0,), "lower": (-1.0, -0.5, 0.0), "upper": (0.0, 0.5, 1.0)}


@pytest.mark.parametrize("first", SIDES)
@pytest.mark.parametrize("second", SIDES)
def test_bound_of_a_difference_by_enumeration(first, second):
    """Whatever a bound's slack, a - b lies on the side of A - B that the label says."""
    errors = {a - b for a in SIDES[first] for b in SIDES[second]}
    sides = {
        "exact": errors == {0.0},
        "lower": max(errors) <= 0.0 and min(errors) < 0.0,
        "upper": min(errors) >= 0.0 and max(errors) > 0.0,
        "none": min(errors) < 0.0 < max(errors),
    }
    difference = quantity(bound=first).difference(quantity(bound=second))
    assert sides.pop(difference.bound)
    assert not any(sides.values())


def test_difference_adds_errors_as_independent():
    a = quantity(value=-1.0, standard_error=0.3, num_particles=5)
    b = quantity(value=-3.0, standard_error=0.4, seed=1, name="elbo")
    d = a.difference(b)
    assert (d.value, d.standard_error) == (2.0, pytest.approx(0.5, rel=1e-15))
    assert (d.num_particles, d.seed, d.data_standard_error) == (None, None, None)
    assert d.name == "log_evidence - elbo"
    assert "error of the draws alone, not over data" in str(d)
    assert "draws alone" not in str(a)


def test_difference_knows_when_an_error_is_unknown():
    known, unknown = quantity(standard_error=0.3), quantity(standard_error=None)
    exact = quantity(standard_error=None, bound="exact")
    assert known.difference(unknown).standard_error is None
    assert exact.difference(known).standard_error == 0.3
    assert exact.difference(exact).standard_error is None
    infinite = quantity(value=-math.inf, standard_error=None)
    assert known.difference(infinite).value == math.inf
    with pytest.raises(ValueError, match="both -inf"):
        infinite.difference(infinite)


def test_a_paired_difference_has_the_error_over_data():
    rng = np.random.default_rng(0)
    shared = 5 * rng.normal(size=400)  # what makes data hard for either model
    first, second = shared + 0.5 + 0.3 * rng.normal(size=400), shared
    se = np.full(400, 0.02)
    d = paired_difference(bound(first, se), bound(second, se), "elbo")
    assert d.value == pytest.approx((first - second).mean(), rel=1e-12)
    assert d.data_standard_error == pytest.approx((first - second).std(ddof=1) / 20, rel=5e-3)
    assert d.data_error_reliable
    assert d.standard_error == pytest.approx(0.02 * 2**0.5 / 20, rel=1e-12)
    # Unpaired, the spread of the data would hide the difference; the draws alone make it too sure.
    assert d.data_standard_error < first.std() / 20 / 5
    assert d.data_standard_error > 10 * d.standard_error
    text = difference_text(d)
    assert text == (
        f"{d.value:.3f} ± {d.data_standard_error:.3f} nats per datum (standard error over the 400 "
        f"data, paired; that of the draws alone is {d.standard_error:.4f})"
    )
    one = bound(np.array([-1.0]), np.array([0.1]))
    assert difference_text(paired_difference(one, one, "elbo")) == (
        "0.00 ± 0.14 nats per datum (standard error of the draws alone, for the one datum)"
    )
    with pytest.raises(IncomparableError):
        paired_difference(bound(), bound(VALUES[:2], ERRORS[:2]), "elbo")
    total = build({"elbo": ((), -3.0, label(bound="lower", reduction="total"))})
    with pytest.raises(ValueError, match="no value for each datum"):
        paired_difference(total, total, "elbo")


def test_selected_data_are_not_the_whole_data():
    result = bound()
    whole = result.quantity("elbo")
    first, second = (result.isel(datum=s).quantity("elbo") for s in ([0, 1], [2, 3]))
    again = result.isel(datum=[1, 0]).quantity("elbo")
    one = result.sel(datum=2).quantity("elbo")
    assert one.num_data == 1
    for a, b in [(whole, first), (first, second), (first, one), (second, one)]:
        with pytest.raises(IncomparableError, match="data_sha256"):
            a.difference(b)
    assert first.difference(again).value == 0.0
    assert result.isel(datum=[3, 1, 0, 2]).quantity("elbo").data_sha256 == HASH
    twice = result.isel(datum=[0, 0, 1, 2]).quantity("elbo")  # as many, but not the same
    with pytest.raises(IncomparableError, match="data_sha256"):
        whole.difference(twice)
    assert result.drop_vars("datum").quantity("elbo").data_sha256 is None


# ---------------------------------------------------------------- bits per dimension


def test_bits_per_dimension_and_back():
    q = quantity(value=-784 * math.log(2), standard_error=78.4 * math.log(2))
    bits = q.to_bits_per_dimension(784)
    assert bits.value == pytest.approx(-1.0, rel=1e-14)  # the sign stays
    assert bits.standard_error == pytest.approx(0.1, rel=1e-14)
    assert (bits.unit, bits.num_dimensions, bits.bound) == ("bits per dimension", 784, "lower")
    assert "= -1.00 +- 0.10 bits per dimension (" in str(bits)
    back = bits.to_nats()
    assert back.value == pytest.approx(q.value, rel=1e-14)
    assert replace(back, value=0.0, standard_error=0.0, data_standard_error=0.0) == replace(
        q, value=0.0, standard_error=0.0, data_standard_error=0.0
    )


def test_bits_per_dimension_refuse_other_units_and_other_dimensions():
    bits = quantity().to_bits_per_dimension(784)
    with pytest.raises(ValueError, match="only nats per datum"):
        bits.to_bits_per_dimension(784)
    with pytest.raises(ValueError, match="only nats per datum"):
        quantity(reduction="total").to_bits_per_dimension(784)
    with pytest.raises(ValueError, match="num_dimensions is 0"):
        quantity().to_bits_per_dimension(0)
    with pytest.raises(ValueError, match="converted with 784 dimensions, not 64"):
        bits.to_nats(64)
    with pytest.raises(ValueError, match="pass num_dimensions"):
        quantity(unit="bits per dimension").to_nats()
    with pytest.raises(ValueError, match="only bits per dimension"):
        quantity().to_nats(784)
    with pytest.raises(IncomparableError, match="num_dimensions: 784 against 64"):
        bits.difference(quantity().to_bits_per_dimension(64))


# ---------------------------------------------------------------- text and HTML


def test_table_states_value_error_unit_kind_particles_and_data():
    lines = bound().table().splitlines()
    assert lines[0].split("  ")[0] == "quantity"
    assert all(w in lines[0] for w in ("value", "std. error", "unit", "kind", "particles", "data"))
    assert lines[2].split() == "elbo -5.00 0.33 nats/datum lower bound 7 4 binary".split()
    assert len(lines) == 3  # the standard error has no row of its own


@pytest.mark.parametrize("size", [3, 100_000])
def test_table_is_aligned_and_fits_100_columns(size):
    long, other = "a" * 80 + "_first", "a" * 80 + "_second"
    values = np.full(size, np.nan)
    result = build(
        {
            long: ("datum", values, label(bound="lower", measure="binary", num_particles=10**6)),
            other: ((), 1.0, label(bound="upper", reduction="total", unit="nats squared")),
        }
    )
    lines = result.table().splitlines()
    assert max(len(line) for line in lines) <= 100
    assert f"nan ({size} of {size} data)" in lines[2]
    rule = lines[1]
    for gap in (m.start() for m in re.finditer("  ", rule)):
        assert all(line[gap : gap + 2].strip() == "" for line in lines)
    names = [line.split()[0] for line in lines[2:]]
    assert names[0] != names[1]  # shortened in the middle, still told apart


def test_table_lists_further_dimensions_up_to_a_limit():
    values = np.arange(15.0).reshape(5, 3)
    result = build(
        {"value": (("estimator", "num_particles"), values, label(bound="lower"))},
        coords={"estimator": list("abcde"), "num_particles": [1, 16, 64]},
    )
    assert re.search(r"value \(b, 16\) +4 .* 16 ", result.table())
    assert "more" not in result.table()
    history = build(
        {"bound": ("epoch", np.arange(15.0), label(bound="lower"))}, coords={"epoch": np.arange(15)}
    )
    assert "... 11 more" in history.table()
    assert len(history.table().splitlines()) == 2 + 2 + 1 + 2
    assert "(estimator, num_particles)" in result.summary()


def test_typing_the_name_shows_the_table_the_dimensions_and_the_notes():
    result = build({"elbo": ("datum", VALUES, label(bound="lower"))}, notes=["k-hat is bad. " * 20])
    assert str(result) == repr(result)
    assert repr(result).startswith(result.table() + "\ndimensions: datum 4\nnote: k-hat is bad.")
    assert max(len(line) for line in repr(result).splitlines()) <= 100
    assert "xarray" in repr(Result({"a": 1}))  # without labels it is xarray's own


def test_summary_says_each_mean_and_each_note():
    result = build({"elbo": ("datum", VALUES, label(bound="lower"))}, notes=["k-hat is bad."])
    first, note = result.summary().splitlines()
    assert first == f"{result.quantity('elbo')}."
    assert note == "Note: k-hat is bad."


def test_many_rows_are_shown_by_their_ends_when_the_name_is_typed():
    values = np.arange(30.0).reshape(10, 3)
    result = build(
        {name: (("a", "b"), values, label(bound="lower")) for name in ("first", "second")},
        coords={"a": np.arange(10), "b": np.arange(3)},
    )
    assert len(result.table().splitlines()) == 2 + 60
    lines = repr(result).splitlines()
    assert len(lines) == 2 + 2 * 3 + 1
    assert lines[-1].endswith("all 60 rows in table()")
    assert sum("... 28 more" in line for line in lines) == 2


def test_a_quantity_and_dataclasses_of_tensors_print_short():
    q = bound().quantity("elbo")
    assert repr(q) == f"<{q}>"

    @dataclass(frozen=True, repr=False)
    class Part(ShortRepr):
        tensor: torch.Tensor
        by_name: dict
        words: str
        unseen: int = field(repr=False, default=1)

    part = Part(torch.zeros(3, 2), {"z": torch.zeros(4)}, "w" * 200)
    assert repr(part) == f"Part(tensor=[3, 2], by_name={{z: [4]}}, words='{'w' * 58}…)"


def test_html_shows_the_table_and_escapes_everything():
    nasty = "<script>alert('x')</script>"
    values = np.arange(2.0)
    result = build(
        {f"elbo{nasty}": ("kind", values, label(bound="lower", description=nasty))},
        coords={"kind": [nasty, "b"]},
        notes=[nasty],
        config={"a": nasty},
        function=nasty,
    )
    page = result._repr_html_()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 3
    assert "<th>std. error</th>" in page
    assert "xarray" in page


# ---------------------------------------------------------------- files


NASTY_WORDS = ["", " ", "a b", "nan", "NaN", "1", "true", "é", "a\nb\t'\"\\", "x" * 70_000, "{}"]


def nasty_result():
    """Everything that a NetCDF file is known to bend: types, text, extremes, empty dimensions."""
    rng = np.random.default_rng(0)
    types = ["int8", "uint8", "int16", "uint32", "int64", "uint64", "float32", "float64", "bool"]
    lab = label(bound="lower", measure="binary", num_particles=3, seed=2**64 - 1)
    variables: dict[str, Any] = {
        f"of {kind}": ("datum", rng.integers(0, 2, 3).astype(kind), lab if kind != "bool" else {})
        for kind in types
    }
    variables |= {
        "extremes": ("five", [np.nan, np.inf, -np.inf, -0.0, 5e-324], lab),
        "words": ("datum", ["", "é\n<b>", "longer words "], {}),
        "object words": ("datum", np.array(["a", "bb", "c"], dtype=object), {}),
        "empty": (("datum", "none"), np.zeros((3, 0)), lab),
        "empty words": ("none", np.array([], dtype=str), {}),
        "scalar": ((), np.float32(1.5), lab),
        "flag": ((), True, {}),
        "z.last": (("two", "datum"), rng.normal(size=(2, 3)), lab),
        "a first": ("datum", rng.normal(size=3), lab),
        "a first_se": ("datum", rng.random(3), {}),
    }
    odd: dict[str, Any] = {
        "t": True,
        "f": False,
        "one": 1,
        "unity": 1.0,
        "big": -(2**63),
        "nan": math.nan,
    }
    odd |= {f"word {i}": word for i, word in enumerate(NASTY_WORDS)}
    odd |= {"é <": "a", "np": np.float32(0.1), "npb": np.True_, "minus": -0.0}
    variables["attrs"] = ((), 1, odd)
    coords = {
        "datum": ["a", "bb", ""],
        "two": [True, False],
        "side": ("datum", np.array([1, 2, 3], dtype=np.int16), {"why": "x"}),
        "where": "here",
    }
    config = {"nan": math.nan, "none": None, "w": NASTY_WORDS, "nul": "a\0b", "lone": "\ud800"}
    return build(variables, coords=coords, config=config, notes=["<b> é \0"])


def exactly(result):
    """All that a result holds, to the bit, in comparable Python values."""
    return {
        name: (
            v.dims,
            v.shape,
            "text" if v.dtype.kind == "U" else v.dtype.str,
            v.values.tolist() if v.dtype.kind == "U" else v.values.tobytes(),
            {key: (type(value), repr(value)) for key, value in v.attrs.items()},
        )
        for name, v in result.variables.items()
    }


def test_what_is_read_back_is_what_was_written(tmp_path):
    result = nasty_result()
    assert result.save(tmp_path / "r.nc") == tmp_path / "r.nc"
    back = load_result(tmp_path / "r.nc")
    assert isinstance(back, Result)
    assert exactly(back) == exactly(result)
    assert list(back.data_vars) == list(result.data_vars)
    assert set(back.coords) == set(result.coords)
    assert dict(back.sizes) == dict(result.sizes)
    assert back.attrs == result.attrs
    assert json.dumps(back.provenance) == json.dumps(result.provenance)
    assert all(v.encoding == {} for v in back.variables.values())
    assert str(back.quantity("a first")) == str(result.quantity("a first"))
    assert back.quantity("a first").seed == 2**64 - 1


def test_a_selection_and_a_second_generation_round_trip_too(tmp_path):
    part = nasty_result().isel(datum=[1])
    part.save(tmp_path / "1.nc")
    load_result(tmp_path / "1.nc").save(tmp_path / "2.nc")
    back = load_result(tmp_path / "2.nc")
    assert exactly(back) == exactly(part)
    assert back.quantity("a first") == part.quantity("a first")


def test_the_comparison_of_files_would_notice():
    """The oracle above tells apart what `==` does not."""
    one = build({"attrs": ((), 1, {"a": 1})})
    for other in (1.0, True, "1"):
        assert exactly(one) != exactly(build({"attrs": ((), 1, {"a": other})}))
    zero = build({"elbo": ((), 0.0, label(bound="lower"))})
    assert exactly(zero) != exactly(build({"elbo": ((), -0.0, label(bound="lower"))}))


@pytest.mark.parametrize(
    "attrs",
    [
        {"units": "days since 2000-01-01"},
        {"dtype": "bool"},
        {"scale_factor": 2.0},
        {"_FillValue": 0.0},
        {"missing_value": -3.0},
        {"CLASS": "x"},
        {"_Netcdf4Dimid": 1},
        {"": "x"},
        {"nul": "a\0b"},
    ],
)
def test_save_refuses_what_netcdf_would_bend(tmp_path, attrs):
    result = build({"elbo": ("datum", VALUES, label(bound="lower") | attrs)})
    with pytest.raises(ValueError, match="NetCDF"):
        result.save(tmp_path / "r.nc")
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_names_and_attributes_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="slashes"):
        build({"a/b": ((), 1, {})}).save(tmp_path / "r.nc")
    values: list[Any] = [None, [1], {}]
    for value in values:
        result = bound()
        result.elbo.attrs["later"] = value
        with pytest.raises(TypeError, match="attribute 'later' of elbo"):
            result.save(tmp_path / "r.nc")
    assert list(tmp_path.iterdir()) == []


def test_save_names_what_is_wrong_with_the_path(tmp_path):
    for name in ("r.h5", "r", "r.nc.gz"):
        with pytest.raises(ValueError, match=r"name the file r.*\.nc"):
            bound().save(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"folder .* does not exist"):
        bound().save(tmp_path / "missing" / "r.nc")
    (tmp_path / "d.nc").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        bound().save(tmp_path / "d.nc")


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, call, error):
    path = tmp_path / "r.nc"
    bound().save(path)
    before = path.read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(type(error)):
        bound(VALUES - 1).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    bound(VALUES - 1).save(path)
    assert load_result(path).quantity("elbo").value == -6.0
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_within_the_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "r.nc"
    bound().save(path)
    before = path.read_bytes()

    def half(self, target, **_):
        target.write_bytes(b"\x89HDF")
        raise KeyboardInterrupt

    monkeypatch.setattr(xr.Dataset, "to_netcdf", half)
    with pytest.raises(KeyboardInterrupt):
        bound().save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_file_and_folder_are_fsynced_around_the_rename(tmp_path, monkeypatch):
    calls = []

    def spy(name, real):
        def call(*arguments):
            calls.append(name)
            real(*arguments)

        return call

    monkeypatch.setattr(files.os, "fsync", spy("fsync", os.fsync))
    monkeypatch.setattr(files.os, "replace", spy("rename", os.replace))
    bound().save(tmp_path / "r.nc")
    assert calls == ["fsync", "rename", "fsync"]


def test_saved_files_have_ordinary_permissions_and_links_stay_links(tmp_path):
    (tmp_path / "plain").write_text("")
    (tmp_path / "link.nc").symlink_to(tmp_path / "r.nc")
    bound().save(tmp_path / "link.nc")
    assert (tmp_path / "link.nc").is_symlink()
    assert (tmp_path / "r.nc").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_load_says_what_is_wrong_with_a_file(tmp_path):
    path = tmp_path / "r.nc"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_result(path)
    bound().save(path)
    whole = path.read_bytes()
    for content in (b"", b"not a file", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a NetCDF file or is damaged"):
            load_result(path)
    for attrs in ({}, {"provenance": "text"}, {"provenance": "[]"}, {"provenance": '"function"'}):
        xr.Dataset({"a": 1}, attrs=attrs).to_netcdf(path, engine="h5netcdf")
        with pytest.raises(ValueError, match=r"not written by Result\.save"):
            load_result(path)


# ---------------------------------------------------------------- hashes


def test_hash_sees_dtype_shape_bytes_and_order():
    x = np.arange(6, dtype=np.float32)
    others = [
        sha256_of(x.reshape(2, 3)),
        sha256_of(x.reshape(3, 2)),
        sha256_of(x.astype(np.float64)),
        sha256_of(x.view(np.int32)),
        sha256_of(np.where(x == 5, 5.0000005, x).astype(np.float32)),
        sha256_of(x[:3], x[3:]),
        sha256_of(x[3:], x[:3]),
        sha256_of(x, np.zeros(0, dtype=np.float32)),
        sha256_of(np.float32(0.0)),
    ]
    assert len({sha256_of(x), *others}) == 10
    assert sha256_of(x) == sha256_of(x.copy())


def test_hash_is_of_the_values_not_of_their_storage():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    same = [np.asfortranarray(x), x.astype(">f4"), torch.tensor(x), torch.tensor(x.T.copy()).T]
    same.append(torch.tensor(x, requires_grad=True))
    assert {sha256_of(y) for y in same} == {sha256_of(x)}
    z = torch.tensor([1 + 2j], dtype=torch.complex64)
    assert sha256_of(z.conj()) == sha256_of(np.array([1 - 2j], dtype=np.complex64)) != sha256_of(z)
    assert sha256_of(torch.zeros(2, dtype=torch.bfloat16)) != sha256_of(torch.zeros(2).half())
    assert sha256_of(torch.tensor(3)) == sha256_of(np.int64(3))
    assert sha256_of(torch.tensor([True])) == sha256_of(np.array([True]))
    assert sha256_of(torch.zeros(0, 3, dtype=torch.float32)) == sha256_of(
        np.zeros((0, 3), dtype=np.float32)
    )


def test_hash_of_a_known_array():
    """The bytes are the standard's: '["float32", [1]]' and then 1.0 in little-endian order."""
    import hashlib

    expected = hashlib.sha256(b'["float32", [1]]' + b"\x00\x00\x80\x3f").hexdigest()
    assert sha256_of(np.ones(1, dtype=np.float32)) == expected


def test_hash_refuses_nothing_and_objects():
    with pytest.raises(ValueError, match="at least one"):
        sha256_of()
    with pytest.raises(TypeError, match="Python objects"):
        sha256_of(np.array([None]))


def test_a_verdict_is_read_before_the_numbers_and_the_notes_after_them(tmp_path):
    result = make_result(
        {"elbo": ("datum", np.zeros(3), label(bound="lower", measure="binary"))},
        function="f",
        config={},
        seed=0,
        data_sha256=None,
        notes=["the note"],
        verdict=["all is well"],
    )
    for text in (result.summary(), repr(result)):
        assert text.startswith("All is well")
        assert text.index("elbo") < text.lower().index("the note")
    html = result._repr_html_()
    assert html.index("All is well") < html.index("elbo")
    assert load_result(result.save(tmp_path / "r.nc")).summary() == result.summary()
    assert "verdict" not in bound().provenance
    with pytest.raises(TypeError, match="verdict is one string"):
        make_result({}, function="f", config={}, seed=0, data_sha256=None, verdict="one")


def test_a_number_that_is_about_no_data_does_not_count_them():
    about_data = label(bound="lower", measure="binary")
    about_none = label(bound="none", unit="none", reduction="none")
    result = make_result(
        {"elbo": ("datum", np.zeros(3), about_data), "p_value": ((), 0.3, about_none)},
        function="f",
        config={},
        seed=0,
        data_sha256=None,
    )
    assert result.quantity("elbo").num_data == 3
    assert result.quantity("p_value").num_data is None
