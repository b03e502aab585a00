"""The table of autoguides and handlers: what it says of some rows is what the tools say."""

from pathlib import Path

import pytest

from benchmarks import autoguides as bench

DOCUMENT = Path(__file__).parents[2] / "docs" / "autoguides.md"


def documented():
    """The cells of each row, with the refusals in full."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    notes = dict(line.split(". ", 1) for line in lines if line[:1].isdigit())
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {
        name: [notes[cell.strip("[]")] if cell.startswith("[") else cell for cell in cells]
        for name, *cells in rows[1:]
    }


def test_every_row_is_there_and_none_is_wrong():
    table = documented()
    assert list(table) == list(bench.cases())
    assert all(len(cells) == len(bench.TOOLS) for cells in table.values())
    assert not any("wrong" in cells for cells in table.values())


@pytest.mark.parametrize(
    ("row", "tools"),
    [
        ("AutoDelta", ("log_weights", "elbo_gap", "draw_posterior")),
        pytest.param("AutoNormalMessenger", ("log_weights", "resolve"), marks=pytest.mark.long),
        pytest.param("AutoNormal, LocScaleReparam", ("log_weights",), marks=pytest.mark.long),
    ],
)
def test_the_table_is_what_the_tools_say(row, tools):
    found = bench.measure([row], tools)[row]
    expected = dict(zip(bench.TOOLS, documented()[row], strict=True))
    assert found == {tool: expected[tool] for tool in tools}
