"""The analysis of ELBO estimators runs from its command line and writes what it says."""

import pytest
import torch

from analyses.elbo_estimators import RainforthToy, Settings, as_text, main, training_rows
from pyro_vae.results import label, load_result, make_result


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.float32
def test_main_writes_results_figures_and_a_page(tmp_path, capsys):
    out = tmp_path / "estimators"
    assert main(["--tiny", "--no-progress", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "## Recommendations" in said
    assert str(out / "report.html") in said
    names = {path.name for path in out.iterdir()}
    assert names == {
        *(f"{name}.nc" for name in ("linear", "discrete", "toy", "vae", "training")),
        *(f"{name}.png" for name in ("training", "snr_toy", "snr_vae", "cost")),
        "report.html",
    }
    for name in ("linear", "discrete", "toy", "vae"):
        found = load_result(out / f"{name}.nc")
        assert {"value", "bias", "variance", "snr", "seconds"} <= set(found.data_vars)
    assert "RenyiELBO" in said
    page = (out / "report.html").read_text()
    assert "Tighter bounds are not necessarily better" in page
    assert page.count("<img") == 4


def test_help_says_what_it_is_for(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "--data {digits,mnist}" in capsys.readouterr().out


def test_training_rows_rank_by_evidence_with_an_error_over_seeds():
    dims = ("estimator", "training_seed")
    pure = label(unit="none", reduction="none", bound="none")
    trained = make_result(
        {
            "log_evidence": (dims, [[-3.0, -3.2], [-2.0, -2.4]], label(bound="lower")),
            "log_evidence_se": (dims, [[0.1, 0.1], [0.1, 0.1]], {}),
            "elbo": (dims, [[-4.0, -4.0], [-3.0, -3.0]], label(bound="lower")),
            "epochs": (dims, [[1.0, 1.0], [2.0, 2.0]], pure),
            "seconds": (dims, [[1.0, 1.0], [1.0, 1.0]], pure),
        },
        function="made up",
        config={},
        seed=0,
        data_sha256=None,
        coords={"estimator": ["a", "b"]},
    )
    rows = training_rows(trained)
    assert [row["trained with"] for row in rows] == ["b", "a"]
    # Variances 0.02 and 0.08 over seeds: pooled 0.05, of a mean of two 0.025.
    assert rows[0]["test log evidence"] == "-2.20 ± 0.16"
    assert rows[1]["behind the best"] == "0.90 ± 0.22"
    assert as_text(rows).count("\n") == 2


def test_the_toy_starts_near_its_optimum():
    x = torch.randn(1, 20)
    toy = RainforthToy(x, distance=0.01)
    assert (toy.mu - x[0]).abs().max() < 0.06
    assert (toy.matrix @ x[0] + toy.shift - x[0]).abs().max() < 0.3
    assert not torch.equal(toy.mu.detach(), x[0])


def test_defaults_are_those_of_the_summary():
    assert Settings().particles == (2, 8, 32)
