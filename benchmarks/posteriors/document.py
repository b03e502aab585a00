"""What was measured, in Markdown."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from benchmarks.posteriors.run import Limits, Measured, rates
from benchmarks.posteriors.ways import WAYS

__all__ = ["summary", "write_document"]


def write_document(rows: Sequence[Measured], limits: Limits) -> str:
    """The document.

    Args:
        rows: From `measure`.
        limits: What is good and what is bad.
    """
    order = list(WAYS)
    rows = sorted(rows, key=lambda row: order.index(row.way.partition(",")[0]))  # stable
    failed = [row for row in rows if row.failed]
    return TEXT.format(
        **vars(limits),
        summary=summary(rows, limits),
        table="\n".join(table(rows, limits)),
        means="\n".join(details(rows, limits, lambda row: f"{row.mean_error:.2f}")),
        ratios="\n".join(details(rows, limits, lambda row: f"{row.sd_ratio:.2f}")),
        khats="\n".join(details(rows, limits, lambda row: f"{row.khat:.2f}")),
        seconds="\n".join(details(rows, limits, lambda row: f"{row.seconds:.1f}")),
        failures="\n".join(f"- {row.way} on {row.posterior}: {row.said}" for row in failed)
        or "None failed.",
    )


def summary(rows: Sequence[Measured], limits: Limits) -> str:
    """Hit and false-alarm rate of the verdict, in a sentence."""
    found = rates(rows, limits)
    (hits, bad), (alarms, good), (refused, between) = (
        found[name] for name in ("bad", "good", "between")
    )
    return (
        f"The verdict refused {hits} of {bad} that are bad (hit rate {_rate(hits, bad)}) and "
        f"{alarms} of {good} that are good (false-alarm rate {_rate(alarms, good)}); of the "
        f"{between} between the two it refused {refused}."
    )


def _rate(count: int, total: int) -> str:
    return f"{count / total:.0%}" if total else "unknown"


def table(rows: Sequence[Measured], limits: Limits) -> Iterator[str]:
    """A Markdown table by way: how far off, how often good, what it cost, what the verdict said."""
    yield (
        "| way | posteriors | failed | good | bad | median error of means (sds) | median factor "
        "of sds | median k-hat | median seconds | bad refused | good refused |"
    )
    yield "|---|" + "---:|" * 10
    for way in dict.fromkeys(row.way for row in rows):
        own = [row for row in rows if row.way == way]
        had = [row for row in own if not row.failed]
        qualities = [row.quality(limits) for row in had]
        seen = rates(own, limits)
        cells = [
            way,
            str(len(own)),
            str(len(own) - len(had)),
            str(qualities.count("good")),
            str(qualities.count("bad")),
            _median([row.mean_error for row in had], ".2f"),
            _median([_factor(row.sd_ratio) for row in had], ".2f"),
            _median([row.khat for row in had], ".2f"),
            _median([row.seconds for row in own], ".1f"),
            *(_share(*seen[quality]) for quality in ("bad", "good")),
        ]
        yield f"| {' | '.join(cells)} |"


def details(
    rows: Sequence[Measured], limits: Limits, cell: Callable[[Measured], str]
) -> Iterator[str]:
    """A Markdown table of posteriors by ways."""
    ways = list(dict.fromkeys(row.way for row in rows))
    yield f"| posterior | {' | '.join(ways)} |"
    yield "|---|" + "---:|" * len(ways)
    by: Mapping[tuple[str, str], Measured] = {(row.posterior, row.way): row for row in rows}
    for name in dict.fromkeys(row.posterior for row in rows):
        cells = [_cell(by.get((name, way)), limits, cell) for way in ways]
        yield f"| {name} | {' | '.join(cells)} |"


def _cell(row: Measured | None, limits: Limits, cell: Callable[[Measured], str]) -> str:
    if row is None or row.failed:
        return "" if row is None else "failed"
    mark = {True: "", False: " ✗", None: ""}[row.trusted]
    text = cell(row)
    return (f"**{text}**" if row.quality(limits) == "bad" else text) + mark


def _factor(ratio: float) -> float:
    return math.exp(abs(math.log(ratio))) if ratio > 0 else math.inf


def _median(values: Sequence[float], digits: str) -> str:
    known = sorted(value for value in values if not math.isnan(value))
    return format(known[len(known) // 2], digits) if known else "--"


def _share(count: int, total: int) -> str:
    return f"{count} of {total}" if total else "--"


TEXT = """# Every way to a posterior, on real ones

Posteriors of [posteriordb](https://github.com/stan-dev/posteriordb) (Magnusson et al. 2024) with
10,000 thinned NUTS draws as the truth. Errors are the largest over a posterior's parameters: of
means in reference sds, of sds as a ratio. A posterior is **bad** where a mean is off by more than
{bad_mean:g} sd or an sd by more than a factor {bad_ratio:g}, good within {good_mean:g} sd and
{good_ratio:g}, the limits of `posterior_quality`; what that lets pass is to lie within twice its
limits, where bad begins. The verdict is `trust_guide` for draws of a guide, `trust_weights`
for the same draws resampled by their weights, R-hat <= 1.01 with 400 effective draws for HMC, and
whether a rung of `resolve` passed.

{summary}

{table}

"Weighted" rows share the seconds of the row above. Linear response has means and sds and no draws,
so no verdict; Pathfinder's own draws are those of its paths, weighted by the paths' mixture and
resampled, where its other rows are the normal that was written into the guide.

In the tables below bad ones are **bold**, ✗ is a verdict that refused, and an empty cell was not
measured (a way that the table above counts on fewer posteriors is not comparable with the others).

## Largest error of a mean, in reference sds

{means}

## Ratio of sds, the one furthest from one

{ratios}

## k-hat

{khats}

## Seconds

{seconds}

## What failed

{failures}

## How to reproduce

    python -m benchmarks.posteriors --out docs/posteriors.md

`--only` names posteriors, also others (`my/folder/model.py:my_posterior`), `--ways` ways;
rows are kept in `results/posteriors.jsonl` as they come, and what is there is not measured again.
"""
