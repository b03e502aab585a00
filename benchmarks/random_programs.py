"""Random programs against their truth: the long form of `tests/gauntlet`.

    PYTHONPATH=tests python -m benchmarks.random_programs --programs 1000

A thousand right pairs and half as many wrong ones, each with its seed. Failures are printed
with the source of the programs; the counts go into docs/errors.md.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import torch

__all__ = ["main", "write_section"]

_DOCUMENT = Path("docs/errors.md")
_TEXT = """Random pairs of programs (`tests/gauntlet`): plates nested and crossed, at any dim,
subsampled and masked; continuous, discrete and enumerated latents, deterministic and factor sites,
autoguides, modules. Log weights, gradients, evidence, gap and EM are compared with sums over states
and quadrature that never run the programs. A tool may refuse what it does not offer; a wrong
program must be refused by a sentence that says why. `make gauntlet` runs it again."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the programs and writes their counts; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--no-document", action="store_true", help="only print")
    options = parser.parse_args(arguments)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    from gauntlet.checks import run

    start = time.process_time()
    counts, failures = run(range(options.first, options.first + options.programs))
    for failure in failures:
        print("-" * 80, failure, sep="\n")
    table = _table(counts)
    print(table)
    if not options.no_document:
        minutes = (time.process_time() - start) / 60
        made = (
            f"{options.programs} right pairs from seed {options.first}, {minutes:.0f} core-minutes."
        )
        write_section("Programs", f"{_TEXT}\n\n{made}\n\n{table}")
    return int(bool(failures))


def _table(counts: Counter[str]) -> str:
    """A row for each check: how many were right, refused and wrong."""
    checks = list(dict.fromkeys(key.partition(": ")[0] for key in sorted(counts)))
    lines = ["| check | right | refused | failed |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {check} | "
        + " | ".join(str(counts[f"{check}: {end}"]) for end in ("right", "refused", "FAILED"))
        + " |"
        for check in checks
    ]
    return "\n".join(lines)


def write_section(title: str, text: str) -> None:
    """Puts a section into docs/errors.md in place of the one of that title."""
    old = _DOCUMENT.read_text() if _DOCUMENT.exists() else "# How errors are looked for\n"
    head, *sections = old.split("\n## ")
    kept = [s for s in sections if s.partition("\n")[0] != title]
    parts = [head.rstrip(), *(s.rstrip() for s in kept), f"{title}\n\n{text}"]
    _DOCUMENT.write_text("\n\n## ".join(parts) + "\n")


if __name__ == "__main__":
    sys.exit(main())
