"""Which check sees which fault: the controls and the sentences of the document."""

import math
from pathlib import Path

import pytest
import torch
from scipy.stats import binom

from benchmarks import posterior_checks as bench

DOCUMENT = Path(__file__).parents[2] / "docs" / "posterior_checks.md"
CONTROLS = {"linear": "exact", "near": "exact, modes near", "far": "exact, modes far"}
HARMLESS = "Student t"
# Tests at a stated level that do not depend on whether chains cross between modes.
LEVELLED = ["kernel Stein discrepancy", *bench.CALIBRATION]
OF_DRAWS = ["means", "standard deviations", "energy distance", "MMD", "classifier"]
FAILURE_RATE = 1e-3  # of the documented false alarms, each: they were drawn once, and are read here


@pytest.fixture(scope="module")
def quick():
    """A quick run for the guides of one model; the others cost as much again."""
    outside = torch.get_default_dtype()
    table = bench.measure(bench.QUICK, models=("linear",), progress=False)
    assert torch.get_default_dtype() == outside
    return table


@pytest.fixture(scope="module")
def document():
    """The document's table: rates by check and fault, nan where there is none."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    rows = [
        [cell.strip(" *") for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]
    return {
        name: {
            fault: math.nan if cell == "--" else float(cell)
            for fault, cell in zip(rows[0][1:], cells, strict=True)
        }
        for name, *cells in rows[2:]
        if cells[0]
    }


@pytest.mark.parametrize("name", CONTROLS)
def test_weights_are_constant_for_the_posterior_and_not_for_a_wrong_guide(name):
    # log p(x | z) + log p(z) - log q(z) is log p(x), the same for every z, where q is exact.
    model, (exact, wrong, *_) = bench.subjects()[name]
    x = model.sample(5, generator=torch.Generator().manual_seed(3))
    spread = []
    for subject in (exact, wrong):
        trace = bench.pyro.poutine.trace(subject.guide).get_trace(x.repeat(20, 1))
        z = trace.nodes["z"]["value"]
        joint = bench.pyro.poutine.condition(subject.model, {"z": z})
        joint = bench.pyro.poutine.trace(joint).get_trace(x.repeat(20, 1))
        for site in (trace, joint):
            site.compute_log_prob()
        log_p = joint.nodes["z"]["log_prob"] + joint.nodes["x"]["log_prob"]
        weights = (log_p - trace.nodes["z"]["log_prob"]).view(20, 5)
        spread.append(float((weights - weights[0]).detach().abs().max()))
    assert spread[0] < 1e-10
    if name != "far":  # there the wrong guide never comes near the mode that it misses
        assert spread[1] > 0.1


def test_the_quick_run_passes_the_exact_guide_and_sees_each_fault(quick):
    for name in ("k-hat above its threshold", "ESS < 100", "KL(q, p) > 1.64 se"):
        assert quick[name]["exact"].value == 0
    for name in LEVELLED:
        rate = quick[name]["exact"]  # at most as many as one in 10^4 runs would have
        assert rate.value <= binom.isf(1e-4, rate.cases, bench.LEVEL) / rate.cases
    for fault in set(quick["means"]) - {"exact", HARMLESS}:
        assert quick["`overall_p_value`"][fault].value == 1
        assert quick["HMC: `trust_guide` is False"][fault].value > 0.8


def test_calibration_sees_a_missing_mode_and_passes_both_modes():
    model = bench.TwoModes(6.0)
    x = model.sample(1, generator=torch.Generator().manual_seed(0))
    rates = []
    for subject in bench.bimodal_subjects(model, "modes far"):
        seen = {}
        bench._calibrate(subject, x, bench.QUICK, 0, seen)
        rates.append(sum(seen["`overall_p_value`"]) / len(seen["`overall_p_value`"]))
    assert rates[0] <= 0.5  # of four runs at level 0.05, more reject with probability 5e-4
    assert rates[1] == 1


def test_the_document_has_every_check_and_fault(document):
    faults = [s.fault for _, guides in bench.subjects().values() for s in guides]
    assert list(document) == [name for group in bench.GROUPS.values() for name in group]
    assert all(list(row) == faults for row in document.values())


def test_documented_false_alarms_are_at_the_stated_level(document):
    design = bench.Design()
    for control in CONTROLS.values():
        for name in LEVELLED + (OF_DRAWS if "far" not in control else []):
            runs = name in bench.CALIBRATION
            cases = bench.EXACT_RUNS * design.calibrations if runs else design.num_data
            most = binom.isf(FAILURE_RATE, cases, bench.LEVEL) / cases
            assert document[name][control] <= most + 0.005, (name, control)
        for name in ("k-hat above its threshold", "ESS < 100", "`trust_guide` is False"):
            assert document[name][control] == 0
    assert document["HMC: `trust_guide` is False"]["exact"] <= 0.01
    assert document["HMC: `trust_guide` is False"][HARMLESS] < 0.2


def test_each_fault_is_documented_as_seen_by_some_check_of_each_kind(document):
    faults = [s.fault for _, g in bench.subjects().values() for s in g if not s.exact]
    for fault in set(faults) - {HARMLESS}:
        for group in (bench.BESIDE_HMC, bench.CALIBRATION):
            assert max(document[name][fault] for name in group) >= bench.CLEAR, fault


@pytest.mark.parametrize(
    ("name", "faults", "seen"),
    [
        ("k-hat above its threshold", ["mean +0.5 sd", "sd x 2", "mode missing, modes far"], False),
        ("`trust_weights` is False", ["mean +0.5 sd", "sd x 2"], False),
        ("`trust_weights` is False", ["sd x 0.5", "prior"], True),
        ("HMC: `trust_weights` is False", ["sd x 0.5"], True),
        ("`trust_guide` is False", ["mean +0.5 sd", "sd x 2", "prior"], True),
        ("`trust_guide` is False", ["mode missing, modes far"], False),
        ("`trust_guide` is False", ["mode missing, modes near"], True),
        ("KL(q, p) > 1.64 se", ["mode missing, modes far"], False),
        ("kernel Stein discrepancy", ["mode missing, modes far"], False),
        ("HMC did not converge", ["exact, modes far", "mode missing, modes far"], True),
        ("ECDF of ranks", ["no correlation", "prior"], False),
        ("coverage", ["no correlation", "prior"], False),
        ("rank of log p(x, z)", ["no correlation", "prior", "mode missing, modes far"], True),
        ("TARP", ["no correlation", "prior", "mode missing, modes far"], True),
        ("VSBC", ["sd x 0.5", "sd x 2", "mode missing, modes far"], False),
        ("VSBC", ["mean +0.5 sd"], True),
    ],
)
def test_the_sentences_say_what_the_table_says(document, name, faults, seen):
    for fault in faults:
        rate = document[name][fault]
        assert rate >= bench.CLEAR if seen else rate <= 0.2, (fault, rate)


def test_the_script_writes_what_it_measured(monkeypatch, tmp_path, quick):
    monkeypatch.setattr(bench, "measure", lambda design, seed: quick)
    out = tmp_path / "checks.md"
    monkeypatch.setattr("sys.argv", ["x", "--quick", "--repeats", "2", "--out", str(out)])
    bench.main()
    text = out.read_text(encoding="utf-8")
    assert "20 data from the model (2 x 10)" in text
    assert f"| {bench._cell(quick['MMD']['prior'])} |" in text
    monkeypatch.setattr("sys.argv", ["x", "--repeats", "0"])
    with pytest.raises(SystemExit):
        bench.main()
