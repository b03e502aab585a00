"""The analysis of blurry samples runs from its command line, and its words follow its numbers."""

from dataclasses import replace

import pytest
import torch

from analyses.blurry_samples import main
from analyses.blurry_samples.generators import BASE, CASES, SUSPECTS, Measured
from analyses.blurry_samples.verdict import PUBLISHED, row_of, verdicts
from pyro_vae import load_result
from pyro_vae.results import label, make_result


def quality(frechet, sharpness):
    about = label(unit="none", reduction="none", bound="none")
    values = {
        "frechet_distance": frechet,
        "high_frequency_ratio": sharpness,
        "high_frequency_ratio_held_out": 1.0,
    }
    variables = {}
    for name, value in values.items():
        variables[name] = ((), value, about)
        variables[f"{name}_se"] = ((), 0.5, {})
    return make_result(variables, function="sample_quality", config={}, seed=0, data_sha256="x")


def measured(case, frechet, sharpness, evidence, measure="real"):
    values = torch.full((3,), evidence)
    log_p = {"log_evidence": ("datum", values, label(bound="lower", measure=measure))}
    return Measured(
        case,
        torch.zeros(2, 4),
        quality(frechet, sharpness),
        quality(frechet, sharpness),
        make_result(log_p, function="log_evidence", config={}, seed=0, data_sha256="x"),
        1.0,
    )


def test_the_verdict_names_what_helped_and_doubts_what_did_not():
    base = measured(CASES[0], 50.0, 0.6, 30.0)
    prior = next(case for case in CASES if case.suspect == "prior")
    likelihood = next(case for case in CASES if case.suspect == "likelihood")
    starts = [base, measured(CASES[0], 54.0, 0.6, 30.0)]
    said = verdicts(
        [base, measured(prior, 20.0, 0.9, 31.0), measured(likelihood, 49.0, 0.5, 90.0)], starts
    )
    assert "standard deviation of 2.8 over 2 trainings" in said[0]
    by_suspect = {sentence.split(":")[0].lower(): sentence for sentence in said}
    assert "by -30.0" in by_suspect[SUSPECTS["prior"]]
    assert "within its error" not in by_suspect[SUSPECTS["prior"]]
    assert "within its error" in by_suspect[SUSPECTS["likelihood"]]
    assert "high frequencies are 0.90 of the data's" in by_suspect[SUSPECTS["prior"]]
    assert "the worst" not in by_suspect[SUSPECTS["prior"]]
    assert said[-1] == f"Largest improvement of the Frechet distance: {SUSPECTS['prior']}."
    assert "come from different generators" in said[-2]
    same = verdicts([base, replace(base, case=prior)], [base])
    assert "come from one generator" in same[-2]


def test_densities_of_other_measures_are_named_and_not_compared():
    base = measured(CASES[0], 50.0, 0.6, 30.0)
    prior = next(case for case in CASES if case.suspect == "prior")
    likelihood = next(case for case in CASES if case.suspect == "likelihood")
    found = [
        base,
        measured(likelihood, 60.0, 0.5, 129.0, "grey"),
        measured(prior, 40.0, 0.6, 88.5),
    ]
    (said,) = (s for s in verdicts(found, [base]) if "best held-out" in s)
    assert f"density of real values ({prior.title}, 88.5 nats)" in said
    assert f"not compared with it: {likelihood.title} (density of grey pixels)" in said
    columns = ("precision", "recall", "nearest_distance_ratio")
    more = {name: ((), 1.0, {}) for column in columns for name in (column, f"{column}_se")}
    full = found[1].quality.assign(more)
    row = row_of(replace(found[1], quality=full))
    assert (row["log p(x) at least"], row["of"]) == ("129.00", "density of grey pixels")


def test_the_verdict_credits_nothing_where_no_change_is_beyond_its_error():
    base = measured(CASES[0], 50.0, 0.6, 30.0)
    prior = next(case for case in CASES if case.suspect == "prior")
    likelihood = next(case for case in CASES if case.suspect == "likelihood")
    said = verdicts(
        [base, measured(prior, 49.0, 0.6, 30.0), measured(likelihood, 60.0, 0.5, 30.0)], [base]
    )
    assert said[-1] == "No change improves the Frechet distance beyond its error."
    assert not any("Largest improvement" in sentence for sentence in said)


def test_missing_files_are_one_line_with_the_way_out(tmp_path, capsys):
    assert main(["--data", "mnist", "--root", str(tmp_path), "--tiny"]) == 2
    assert "pyro-vae data get NAME, or --root FOLDER" in capsys.readouterr().err


def test_every_suspect_has_a_case_and_the_base_comes_first():
    assert CASES[0].title == BASE
    assert {case.suspect for case in CASES[1:]} == set(SUSPECTS)
    assert len({case.title for case in CASES}) == len(CASES)
    # As published: the scale per pixel has the best likelihood and the worst pictures.
    likelihoods = {title: float(bound) for title, bound, _ in PUBLISHED if bound != "not given"}
    distances = {title: float(fid) for title, _, fid in PUBLISHED}
    assert min(likelihoods, key=likelihoods.__getitem__) == max(
        distances, key=distances.__getitem__
    )


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.float32
def test_the_tiny_run_writes_everything(tmp_path, capsys):
    assert main(["--tiny", "--no-progress", "--out", str(tmp_path)]) == 0
    written = {path.name for path in tmp_path.iterdir()}
    figures = {"samples.png", "likelihood_and_samples.png", "power.png"}
    assert {"report.html", *figures} <= written
    assert "frechet_distance" in load_result(tmp_path / "jensen_shannon_means.nc")
    assert (
        load_result(tmp_path / "discretised_logistic_evidence.nc").quantity("log_evidence").measure
        == "counts"
    )
    page = (tmp_path / "report.html").read_text()
    assert "held-out data" in page
    assert "132.5" in page
    said = " ".join(capsys.readouterr().out.split())
    assert "The divergence that training minimises: " in said
    assert main(["--tiny", "--case", "no such", "--out", str(tmp_path)]) == 2
