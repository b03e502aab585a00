"""The commands that measure runs and tables: their numbers are those of the functions."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pyro_vae import elbo_gap, load_run, log_evidence
from pyro_vae.app import cli, measure_commands
from pyro_vae.data import read_table
from pyro_vae.results import label, load_result, make_result
from pyro_vae.runs import load_test_data


def call(line: str) -> Any:
    return CliRunner().invoke(cli.app, shlex.split(line))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured") / "run"
    done = call(
        f"fit --data digits --latent-dim 2 --hidden 6 --batch-size 700 --quiet --epochs 2 "
        f"--threads 1 --out {folder}"
    )
    assert done.exit_code == 0, done.output
    return folder


def test_evidence_is_the_function_s(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(measure_commands.webbrowser, "open", shown.append)
    done = call(f"evidence {run} --method quadrature --num-data 2 --quiet --json --open")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    loaded = load_run(run)
    x = load_test_data(loaded, 2)
    expected = log_evidence(loaded.model, loaded.guide, x, method="quadrature", progress=False)
    quantity = expected.quantity("log_evidence")
    assert told["quantities"]["log_evidence"]["value"] == quantity.value
    assert told["quantities"]["log_evidence"]["bound"] == quantity.bound
    assert load_result(run / "evidence.nc").equals(expected)
    page = (run / "evidence.html").read_text()
    assert f"pyro-vae evidence {run}" in page
    assert shown == [(run / "evidence.html").resolve().as_uri()]


def test_quality_writes_numbers_and_a_page(run: Path) -> None:
    done = call(f"quality {run} --num-data 3 --num-particles 100 --quiet")
    assert done.exit_code == 0, done.output
    assert "page" in done.stderr
    assert "<img" in (run / "quality.html").read_text()
    assert load_result(run / "quality.nc").sizes["datum"] == 3


@pytest.mark.long
def test_gap_and_estimators_write_numbers_and_pages(run: Path) -> None:
    for line in (f"gap {run} --num-data 2 --num-particles 50", f"estimators {run} --num-data 3"):
        done = call(f"{line} --quiet")
        assert done.exit_code == 0, done.output
        assert "<img" in (run / f"{line.split()[0]}.html").read_text()
    loaded = load_run(run)
    x = load_test_data(loaded, 2)
    gap = elbo_gap(loaded.model, loaded.guide, x, num_particles=50, progress=False)
    assert load_result(run / "gap.nc").equals(gap)


def test_compare_leaves_the_runs_as_they_are(run: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    page = tmp_path / "both.html"
    options = f"--num-data 5 --num-particles 30 --quiet --out {page}"
    done = call(f"compare {run} {run} {options} --json")
    told = json.loads(done.stdout)
    assert "run minus run is 0" in told["differences"][0]
    assert page.is_file()
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    refused = call(f"compare {run}")
    assert refused.exit_code == 2
    assert "two runs or more" in refused.stderr


def test_mixtures_of_a_table(tmp_path: Path) -> None:
    """Two groups ten apart: every criterion takes two components, and rows get their group."""
    torch.manual_seed(0)
    group = torch.arange(60) % 2
    x = torch.stack([10.0 * group, -5.0 * group], -1) + torch.randn(60, 2)
    table = tmp_path / "two.csv"
    rows = "\n".join(f"{a},{b},{'ab'[g]}" for (a, b), g in zip(x.tolist(), group, strict=True))
    table.write_text(f"width,height,name\n{rows}\n")
    refused = call(f"em {table}")
    assert refused.exit_code == 2
    assert "column 'name'" in refused.stderr
    done = call(f"em {table} --columns width,height --components 1..3 --json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    values = told["quantities"]["bic_evidence"]["values"]
    assert max(range(3), key=values.__getitem__) == 1
    found = [int(row) for row in (tmp_path / "two.em.csv").read_text().split()[1:]]
    assert sorted(set(found)) == [1, 2]
    assert len(set(zip(found, group.tolist(), strict=True))) == 2  # one to one
    assert "2 components" in (tmp_path / "two.em.html").read_text()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1.0,2\n3,4\n", "the first row of .* holds numbers"),
        ("a,b\n", "no rows"),
        ("a,b\n1,\n", "column 'b' of .* misses 1 numbers"),
        ("a,b\n1,x\n", "column 'b' of .* holds no numbers"),
        ("", "is no table"),
        ("a,b\n1,2\n1,2,3,4\n", "is no table"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        read_table(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_table(tmp_path / "other.csv")


@pytest.mark.parametrize("components", ["0", "3..2", "two", "1-3", ""])
def test_numbers_of_components_that_are_none(tmp_path: Path, components: str) -> None:
    done = call(f"em {tmp_path / 'x.csv'} --components {components!r}")
    assert done.exit_code == 2
    assert "such as 1..6" in done.stderr


def test_numbers_are_json_that_every_reader_takes() -> None:
    found = make_result(
        {
            "elbo": ("datum", [1.0, 2.0], label(bound="lower")),
            "khat": ("datum", [float("nan"), 1.0], label(unit="none", bound="none")),
            "curve": (("step", "datum"), [[1.0, 3.0], [float("inf"), 0.0]], label(bound="none")),
        },
        function="test",
        config={},
        seed=3,
        data_sha256=None,
        coords={"step": [0, 5]},
    )
    told = json.loads(measure_commands.json_text(found.numbers()))
    assert told["quantities"]["elbo"]["value"] == 1.5
    assert told["quantities"]["khat"]["value"] is None
    assert "nan" in told["quantities"]["khat"]["why"]
    assert told["quantities"]["curve"] == {
        "dims": ["step"],
        "coords": {"step": [0, 5]},
        "values": [2.0, None],
    }
    assert told["seed"] == 3
