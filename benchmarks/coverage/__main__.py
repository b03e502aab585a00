"""Measures every row of the registry, and writes its section of docs/errors.md.

python -m benchmarks.coverage --replications 200 --only evidence
"""

import argparse
import sys
import time

import numpy as np
import torch

from benchmarks.coverage.kinds import Checked, Row, Study, alarm, clopper_pearson, joined
from benchmarks.coverage.registry import GROUPS
from benchmarks.random_programs import write_section
from pyro_vae.progress import progress_bar

_BLOCK = 500  # replications in one call, at most
_FALSE_ALARMS = 1e-4
_TEXT = """Planted truths (closed forms, sums over states, quadrature), and how often what the
package states holds them: value +- 1.96 errors, or p > 0.05 of a right model. *Band* is the exact
binomial 95 % band of what was found (Clopper & Pearson). *Guard* is what speaks where the number is
not to be relied upon, *spoke* in what share of the replications it did, and *silent* how many hold
among the others. Rows in italics show a breakdown: there intervals may fail, and the guard is what
counts. Where one call is one replication, there are fewer. `make coverage` measures it again;
`tests/analyses/test_coverage.py` is the short form, and fails for an error without a row."""


def main(arguments: list[str] | None = None) -> int:
    """Measures, writes the table, and returns 1 if a row is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replications", type=int, default=2000)
    parser.add_argument("--only", default="", help="a group, or part of a study's name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-document", action="store_true", help="only print")
    options = parser.parse_args(arguments)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    chosen = [
        study
        for group, studies in GROUPS.items()
        for study in studies
        if options.only == group or options.only in study.name
    ]
    if not chosen:
        parser.error(f"no group or study is called {options.only!r}; groups are {list(GROUPS)}")
    start, lines, wrong = time.process_time(), [_HEAD], []
    with progress_bar(len(chosen), "study", show=True, what="coverage") as bar:
        for study in chosen:
            bar.set_description(study.name)
            found = measure(study, options.replications, options.seed)
            lines += [_line(study, row, found[row.quantity]) for row in study.rows]
            said = (alarm(row, found[row.quantity], _FALSE_ALARMS) for row in study.rows)
            wrong += [f"{study.name}: {text}" for text in said if text]
            bar.update()
    table = "\n".join(lines)
    print(table, *wrong, sep="\n")
    if not options.no_document and not options.only:
        minutes = (time.process_time() - start) / 60
        made = f"{options.replications} replications at most, {minutes:.0f} core-minutes."
        write_section("Errors", f"{_TEXT}\n\n{made}\n\n{table}")
    return int(bool(wrong))


def measure(study: Study, replications: int, seed: int) -> dict[str, Checked]:
    """Runs a study in blocks, each with a seed of its own."""
    count = min(replications, study.longest)
    sizes = [min(_BLOCK, count - done) for done in range(0, count, _BLOCK)]
    return joined([study.run(size, seed + 100_000 * i) for i, size in enumerate(sizes)])


_HEAD = "\n".join(
    (
        "| quantity | where | nominal | found | of | band | breaks down when | guard | spoke "
        "| silent |",
        "| --- | --- | ---: | ---: | ---: | --- | --- | --- | ---: | ---: |",
    )
)


def _line(study: Study, row: Row, found: Checked) -> str:
    known = ~np.isnan(found.missed)
    missed, flagged = found.missed[known].astype(bool), found.flagged[known]
    total, held = len(missed), int((~missed).sum())
    low, high = clopper_pearson(held, total)
    silent = missed[~flagged]
    share = f"{1 - silent.mean():.3f}" if len(silent) else "-"
    mark = "*" if row.most is None else ""
    cells = (
        f"{mark}`{row.quantity}`{mark}",
        f"{study.function}: {study.name}",
        f"{row.nominal:.0%}",
        f"{100 * held / total:.1f} %",
        f"{total:,}",
        f"{100 * low:.1f} to {100 * high:.1f}",
        row.breaks or "-",
        row.guard or "-",
        f"{flagged.mean():.0%}",
        share,
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
