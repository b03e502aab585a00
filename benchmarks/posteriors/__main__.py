"""Every way to a posterior on real ones with reference draws, and our verdict beside the truth.

    python -m benchmarks.posteriors --out docs/posteriors.md
    python -m benchmarks.posteriors --only garch,nes --ways Pathfinder,HMC
    python -m benchmarks.posteriors --only my/folder/model.py:my_posterior --kept /tmp/mine.jsonl

A posterior of yours is a `benchmarks.posteriors.RealPosterior`: a model, its data, reference draws
with their means and sds, and a function that puts draws by site in the same order. Rows are kept as
they come, and are not measured again.
"""

import argparse
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from benchmarks.posteriors.document import write_document
from benchmarks.posteriors.models import NAMES
from benchmarks.posteriors.run import Limits, find_posterior, measure, read
from benchmarks.posteriors.ways import WAYS
from pyro_vae.progress import lines_on_stderr

_KEPT = Path("results/posteriors.jsonl")


def main() -> None:
    """Measures what is not there yet, and prints or writes the document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    limits = Limits()
    parser.add_argument("--only", help="posteriors, with commas; all of posteriordb if left out")
    parser.add_argument("--ways", help=f"of {', '.join(WAYS)}, with commas; all if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for a way; 600")
    parser.add_argument("--kept", type=Path, default=_KEPT, help=f"rows as they come; {_KEPT}")
    parser.add_argument("--fresh", action="store_true", help="measure all rows again")
    parser.add_argument("--no-run", action="store_true", help="only what was kept")
    parser.add_argument("--bad-mean", type=float, default=limits.bad_mean, help="sds; 0.5")
    parser.add_argument("--bad-ratio", type=float, default=limits.bad_ratio, help="a factor; 1.65")
    parser.add_argument("--out", type=Path, help="Markdown file to write; printed if left out")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(NAMES)
    ways = options.ways.split(",") if options.ways else list(WAYS)
    if unknown := [way for way in ways if way not in WAYS]:
        parser.error(f"no way is called {unknown[0]!r}; there are {', '.join(WAYS)}")
    try:
        for name in names:
            find_posterior(name)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    if options.fresh:
        options.kept.unlink(missing_ok=True)
    with threadpool_limits(1), lines_on_stderr():
        torch.set_num_threads(1)
        settings = {"seed": options.seed, "limit": options.limit, "kept": options.kept}
        rows = read(options.kept) if options.no_run else measure(names, ways, **settings)
    limits = Limits(bad_mean=options.bad_mean, bad_ratio=options.bad_ratio)
    text = write_document(rows, limits)
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text, encoding="utf-8")
        print(f"written to {options.out}")


if __name__ == "__main__":
    main()
