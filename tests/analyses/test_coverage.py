"""Every plus-minus beside a planted truth, in short; `make coverage` is the long form.

A right row fails here at most once in 10^5 choices of its seed. Rows of a hundred replications see
an error that is half of what it should be; those of a few, where each is a training, only that the
function gives no number of which the registry does not know.
"""

from pathlib import Path

import numpy as np
import pytest

import pyro_vae
from benchmarks import coverage
from benchmarks.coverage import Checked, Row, alarm, interval
from pyro_vae.results import label, make_result

FALSE_ALARMS = 1e-5
NAMED = list(coverage.named_in_source(Path(pyro_vae.__file__).parent))
STUDIES = [study for group in coverage.GROUPS.values() for study in group]
ROWS = {row.quantity for study in STUDIES for row in study.rows}


@pytest.mark.parametrize("study", [s for s in STUDIES if s.quick], ids=lambda study: study.name)
def test_stated_errors_hold_as_often_as_they_say(study: coverage.Study) -> None:
    coverage.SEEN.clear()
    found = study.run(study.quick, 1)
    said = [alarm(row, found[row.quantity], FALSE_ALARMS) for row in study.rows]
    assert not [text for text in said if text]
    assert not [pair for pair in coverage.SEEN if coverage.unlisted(*pair)], "give each a row"


# --- the test must reject -------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "wrong"), [(1.0, False), (0.5, True)])
def test_an_error_half_as_large_as_it_should_be_is_seen(factor: float, wrong: bool) -> None:
    """Misses of halved errors are binomial with 0.33: 150 give no alarm with probability 1e-8."""
    values = np.random.default_rng(3).normal(2.0, 0.3, 150)
    found = interval(values, np.full(150, factor * 0.3), 2.0)
    assert bool(alarm(Row("half_se"), found, FALSE_ALARMS)) == wrong


def test_halving_the_errors_of_the_package_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same through a study: its interval is made from half the error that was stated."""
    study = next(s for s in STUDIES if s.name == "importance, gamma-Poisson")
    module = study.run.func.__globals__
    monkeypatch.setitem(module, "interval", lambda v, e, t, f=False: interval(v, e / 2, t, f))
    found = study.run(study.quick, 1)
    assert all(alarm(row, found[row.quantity], FALSE_ALARMS) for row in study.rows)


def test_a_guard_that_no_longer_speaks_is_seen() -> None:
    row = Row("x_se", most=None, speaks=0.8)
    missed = np.ones(60)
    assert alarm(row, Checked(missed, np.zeros(60, dtype=bool)), FALSE_ALARMS)
    assert not alarm(row, Checked(missed, np.arange(60) % 6 > 0), FALSE_ALARMS)
    assert alarm(row, Checked(np.full(60, np.nan), np.ones(60, dtype=bool)), FALSE_ALARMS)


def test_p_values_below_their_level_too_often_are_seen() -> None:
    p = np.random.default_rng(0).uniform(size=400) ** 2  # below 0.05 for 22 %
    found = coverage.p_value(p)
    assert alarm(Row("p_value", most=0.055), found, FALSE_ALARMS)
    assert not alarm(Row("p_value", most=0.055), coverage.p_value(np.sqrt(p)), FALSE_ALARMS)


def test_the_band_is_clopper_s_and_pearson_s() -> None:
    # Clopper & Pearson: 8 of 10 gives [0.4439, 0.9748]; 0 of n ends at 1 - 0.025^(1/n).
    assert coverage.clopper_pearson(8, 10) == pytest.approx((0.4439045, 0.9747893), abs=1e-7)
    assert coverage.clopper_pearson(0, 5) == pytest.approx((0.0, 1 - 0.025**0.2))
    assert coverage.clopper_pearson(5, 5) == pytest.approx((0.025**0.2, 1.0))


# --- nothing is left out --------------------------------------------------------------------------


def test_every_error_in_the_source_has_a_row_or_a_reason() -> None:
    errors = {name for kind, name, _ in NAMED if kind == "error"}
    assert len(errors) > 30
    assert errors - ROWS - set(coverage.EXCEPTIONS) == set(), "add a row to benchmarks/coverage"
    makers = {name for kind, name, _ in NAMED if kind == "function"}
    assert makers - coverage.functions() - set(coverage.SILENT) == set(), "give each a study"


def test_reasons_are_of_names_that_are_there() -> None:
    makers = {name for kind, name, _ in NAMED if kind == "function"}
    assert set(coverage.SILENT) <= makers
    quick = [s for s in STUDIES if s.quick]
    assert {s.function for s in quick} == {s.function for s in STUDIES}
    assert all(coverage.EXCEPTIONS.values())
    names = [study.name for study in STUDIES]
    assert len(set(names)) == len(names)


def test_a_new_error_without_a_row_is_found(tmp_path: Path) -> None:
    source = 'class Found:\n    width_se: float\n__all__ = ["old_se"]\n'
    source += 'make_result({"depth_p_value": 1, "depth": 2}, function="measure_depth")\n'
    (tmp_path / "new.py").write_text(source)
    assert set(coverage.named_in_source(tmp_path)) == {
        ("error", "width_se", "new.py"),
        ("error", "depth_p_value", "new.py"),
        ("function", "measure_depth", "new.py"),
    }
    about = label(unit="none", reduction="none", bound="none")
    made = {"depth": ((), 1.0, about), f"{'depth'}_se": ((), 0.1, {})}
    coverage.SEEN.clear()
    coverage.watched(
        make_result(made, function="log_evidence", config={}, seed=0, data_sha256=None)
    )
    assert [pair for pair in coverage.SEEN if coverage.unlisted(*pair)] == [
        ("log_evidence", "depth_se")
    ]
