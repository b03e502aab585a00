"""The analysis of ELBO estimators runs from its command line and writes what it says."""

import pytest

from analyses.elbo_estimators import Settings, main
from pyro_vae.results import load_result
from pyro_vae.text import rows_text


@pytest.mark.long
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
    assert page.count("<figure>") == 4


def test_help_says_what_it_is_for(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "--data {digits,mnist}" in capsys.readouterr().out


def test_rows_are_aligned():
    rows = [{"a": "1", "long": "x"}, {"a": "222", "long": "y"}]
    assert rows_text(rows) == "a    long\n1    x\n222  y"


def test_defaults_are_those_of_the_summary():
    assert Settings().particles == (2, 8, 32)
