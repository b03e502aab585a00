"""Which check sees which fault: the controls and the sentences of the document, on few data."""

import math
from pathlib import Path

import pytest
import torch
from benchmarks import posterior_checks as bench
from scipy.stats import binom

DOCUMENT = Path(__file__).parents[1] / "docs" / "posterior_checks.md"
EXACT = ("exact", "exact, modes near", "exact, modes far")
FAILURE_RATE = 1e-4  # of each bound on a rate, below


@pytest.fixture(scope="module")
def table():
    return bench.measure(bench.QUICK, progress=False)


def documented():
    """The table of the document: rates by check and fault, nan where there is none."""
    rows = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    cells = [[cell.strip(" *") for cell in row.strip("|").split("|")] for row in rows]
    faults = cells[0][1:]
    return {
        row[0]: dict(
            zip(faults, (math.nan if c == "--" else float(c) for c in row[1:]), strict=True)
        )
        for row in cells[2:]
        if row[1]
    }
