"""The table of autoguides and handlers: what it says of some rows is what the tools say."""

from pathlib import Path

import pytest

from benchmarks.autoguides import table as bench

DOCUMENT = Path(__file__).parents[2] / "docs" / "autoguides.md"
QUICK = [tool for tool in bench.TOOLS if tool != "fit"]


def documented():
    """The cells of each row, with the refusals in full."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    notes = dict(line.split(". ", 1) for line in lines if line[:1].isdigit())
    rows = [
        line.strip("| ").split(" | ")
        for line in lines
        if line.startswith("| ") and not line.startswith("| |")
    ]
    return {
        name: [notes[cell.strip("[]")] if cell.startswith("[") else cell for cell in cells]
        for name, *cells in rows
    }


def test_every_row_is_there_and_none_is_wrong():
    table = documented()
    assert list(table) == list(bench.cases())
    assert all(len(cells) == len(bench.TOOLS) for cells in table.values())
    assert not any("wrong" in cells for cells in table.values())


@pytest.mark.parametrize(
    ("row", "tools"),
    [
        ("AutoIAFNormal", QUICK),
        ("AutoNormalMessenger", ["elbo_gap"]),  # its own trace has the model's observations
        ("EasyGuide without its plate, a latent of each datum", ["fit", "log_weights"]),
        ("AutoNormal, enumerated kinds", QUICK),
    ],
)
def test_the_table_is_what_the_tools_say(row, tools):
    found = bench.measure([row], tools)[row]
    expected = dict(zip(bench.TOOLS, documented()[row], strict=True))
    assert found == {tool: expected[tool] for tool in tools}


@pytest.mark.long
@pytest.mark.parametrize("row", ["AutoIAFNormal", "AutoNormal, two observed sites"])
def test_what_is_trained_reaches_the_evidence(row):
    assert bench.measure([row], ["fit"])[row] == {"fit": "right"}


def test_a_guide_that_is_not_the_posterior_is_told_apart(monkeypatch):
    exact = bench.make_exact
    monkeypatch.setattr(
        bench,
        "make_exact",
        lambda guide, truth: exact(guide, truth._replace(mean=truth.mean + 0.2)),
    )
    tools = ["log_weights", "elbo_gap", "posterior_quality", "draw_posterior"]
    assert set(bench.measure(["AutoNormal"], tools)["AutoNormal"].values()) == {"wrong"}
