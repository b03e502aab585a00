"""Every way on real posteriors, in short; other posteriors by name; what the verdict is held to."""

import math
import os
import re
from dataclasses import replace
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

from benchmarks.posteriors import RealPosterior
from benchmarks.posteriors.__main__ import main
from benchmarks.posteriors.document import summary, write_document
from benchmarks.posteriors.run import Limits, Measured, find_posterior, measure, rates, read
from benchmarks.posteriors.ways import WAYS

DOCUMENT = Path(__file__).parents[2] / "docs" / "posteriors.md"
DATA = Path(os.environ.get("PYRO_VAE_DATA", "data")) / "posteriordb"
SHORT = ("blr", "kidscore_momhsiq", "kilpisjarvi", "logearn_interaction", "nes")


def planted() -> RealPosterior:
    """Two regression weights with a correlation of -0.9, whose posterior is known."""
    x = torch.tensor([[1.0, 0.8], [0.5, 0.7], [-1.0, -0.9], [0.3, 0.1]]).double()
    y = torch.tensor([1.0, 0.4, -1.2, 0.3]).double()

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(w @ x.T, 0.3).to_event(1), obs=y)

    covariance = (torch.eye(2) + x.T @ x / 0.09).inverse()
    exact = torch.distributions.MultivariateNormal(covariance @ x.T @ y / 0.09, covariance)
    return RealPosterior(
        "planted",
        model,
        {"x": x, "y": y},
        ("w[0]", "w[1]"),
        exact.sample((1000,)),
        exact.mean,
        exact.stddev,
        lambda draws: draws["w"],
    )


HERE = f"{__file__}:planted"


@pytest.mark.skipif(not DATA.is_dir(), reason="PYRO_VAE_DATA has no posteriordb")
def test_five_real_posteriors_are_met_by_pathfinder():
    rows = measure(SHORT, ["Pathfinder"], progress=False)
    assert not [row.said for row in rows if row.failed]
    weighted = [row for row in rows if "weighted" in row.way]
    assert [row.posterior for row in weighted] == list(SHORT)
    assert all(row.quality(Limits()) == "good" for row in weighted)
    assert rates(rows, Limits())["bad"] == (0, 0)
    assert sum(bool(row.trusted) for row in weighted) >= 3


def test_a_posterior_of_one_s_own_by_the_cheap_ways():
    rows = {row.way: row for row in measure([HERE], _cheap(), progress=False)}
    limits = Limits()
    mean_field, response = rows["deterministic"], rows["deterministic, linear response"]
    planted_ratio = float((1 - correlation() ** 2) ** 0.5)
    assert mean_field.mean_error < 0.1
    assert mean_field.sd_ratio == pytest.approx(planted_ratio, rel=0.06)  # 4000 draws: five errors
    assert mean_field.quality(limits) == "bad"
    assert mean_field.trusted is False
    assert response.sd_ratio == pytest.approx(1.0, abs=1e-6)
    assert response.mean_error < 1e-6
    for way in ("Pathfinder, weighted", "Pathfinder, its draws", "batch and match"):
        assert rows[way].quality(limits) == "good"
    assert rows["batch and match"].trusted is True


def correlation():
    covariance = (torch.eye(2) + planted().data["x"].T @ planted().data["x"] / 0.09).inverse()
    return covariance[0, 1] / covariance.diagonal().prod().sqrt()


def _cheap():
    return [name for name, way in WAYS.items() if way.cheap]


def test_rows_are_kept_and_not_measured_again(tmp_path, monkeypatch, capsys):
    kept, out = tmp_path / "kept.jsonl", tmp_path / "out.md"
    arguments = ["posteriors", "--only", HERE, "--ways", "batch and match", "--kept", str(kept)]
    monkeypatch.setattr("sys.argv", arguments)
    main()
    first = kept.read_text()
    assert [row.way for row in read(kept)] == ["batch and match", "batch and match, weighted"]
    assert "The verdict refused 0 of 0 that are bad (hit rate unknown)" in capsys.readouterr().out
    monkeypatch.setitem(WAYS, "batch and match", replace(WAYS["batch and match"], find=None))
    monkeypatch.setattr("sys.argv", [*arguments, "--out", str(out)])
    main()
    assert kept.read_text() == first
    assert "| batch and match | 1 | 0 | 1 | 0 |" in out.read_text()


def test_what_fails_is_a_row_with_its_reason(monkeypatch):
    def stuck(_posterior, _seed):
        while True:
            math.sqrt(2.0)

    def broken(_posterior, _seed):
        raise ValueError("it has no mean\nnor anything")

    monkeypatch.setitem(WAYS, "HMC", replace(WAYS["HMC"], find=stuck))
    monkeypatch.setitem(WAYS, "IAF", replace(WAYS["IAF"], find=broken))
    late, failed = measure([HERE], ["HMC", "IAF"], limit=0.3, progress=False)
    assert late.said == "TimeoutError: given up after 0 s"
    assert failed.said == "ValueError: it has no mean"
    assert failed.quality(Limits()) == ""
    assert "- IAF on" in write_document([failed], Limits())


@pytest.mark.parametrize(
    ("mean", "ratio", "quality"),
    [
        (0.2, 1.2, "good"),
        (0.2, 1 / 1.2, "good"),
        (0.3, 1.0, "between"),
        (0.0, 1 / 1.5, "between"),
        (0.51, 1.0, "bad"),
        (0.0, 1.7, "bad"),
        (0.0, 1 / 1.7, "bad"),
        (math.inf, 1.0, "bad"),
        (0.0, 0.0, "bad"),
        (math.nan, 1.0, "bad"),
    ],
)
def test_good_and_bad_are_what_they_are_said_to_be(mean, ratio, quality):
    assert Measured("p", "w", 0, 1.0, mean, ratio).quality(Limits()) == quality


def test_hits_and_false_alarms_are_counted():
    bad = [Measured("p", "w", 0, 1.0, 2.0, 1.0, trusted=t) for t in (False, False, False, True)]
    good = [Measured("p", "w", 0, 1.0, 0.0, 1.0, trusted=t) for t in (False, True, True, None)]
    between = [Measured("p", "w", 0, 1.0, 0.4, 1.0, trusted=True)]
    rows = [*bad, *good, *between]
    assert rates(rows, Limits()) == {"bad": (3, 4), "good": (1, 3), "between": (0, 1)}
    assert "refused 3 of 4 that are bad (hit rate 75%) and 1 of 3 that are good" in summary(
        rows, Limits()
    )


def test_names_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no posterior is called 'nothing'; there are arma"):
        find_posterior("nothing")
    with pytest.raises(ValueError, match="is no file with a posterior"):
        find_posterior(f"{tmp_path}/none.py:planted")
    with pytest.raises(ValueError, match="must be a RealPosterior"):
        find_posterior("math:pi")


def test_the_document_says_what_its_own_rows_come_to():
    text = DOCUMENT.read_text(encoding="utf-8")
    said = re.search(r"refused (\d+) of (\d+) that are bad .*? and (\d+) of (\d+) that", text)
    way = next(line for line in text.splitlines() if line.startswith("| way |"))
    after = text.split(way)[1].split("\n\n")[0].splitlines()[2:]
    assert len(after) > 8
    columns = [[line.strip(" |").split(" | ")[which] for line in after] for which in (-2, -1)]
    sums = [
        sum(int(cell.split(" of ")[place]) for cell in cells if cell != "--")
        for cells in columns
        for place in (0, 1)
    ]
    assert sums == [int(number) for number in said.groups()]
