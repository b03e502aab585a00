"""Measures every way on every posterior, keeps what it found as it goes, and sums it up."""

import json
import math
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.posteriors.models import NAMES, RealPosterior, load_posterior
from benchmarks.posteriors.ways import WAYS, Found
from pyro_vae.progress import progress_bar

__all__ = ["Limits", "Measured", "find_posterior", "measure", "rates", "read"]


@dataclass(frozen=True)
class Limits:
    """What is good and what is bad, beside reference draws.

    A posterior is good where every mean is within `good_mean` sds and every sd within a factor
    `good_ratio`, the limits of `posterior_quality`'s verdict; it is bad where a mean is off by more
    than `bad_mean` sds or an sd by more than `bad_ratio`, twice these (in logs): what the verdict
    lets pass is to lie within them. Between the two either answer is right.
    """

    good_mean: float = 0.25
    good_ratio: float = 1.28
    bad_mean: float = 0.5
    bad_ratio: float = 1.65


@dataclass(frozen=True)
class Measured:
    """One way on one posterior.

    Attributes:
        posterior: Its name.
        way: Its name.
        seed: Of everything.
        seconds: By the clock, with the verdict; shared by the rows that one fit gave.
        mean_error: The largest error of a mean, in reference sds.
        sd_ratio: sd over that of the reference, the one furthest from one.
        khat: Of importance weights; nan where there are none.
        trusted: Our verdict; None where there is none.
        said: What speaks against it, or why there is nothing.
        failed: Whether it gave nothing.
    """

    posterior: str
    way: str
    seed: int
    seconds: float
    mean_error: float = math.nan
    sd_ratio: float = math.nan
    khat: float = math.nan
    trusted: bool | None = None
    said: str = ""
    failed: bool = False

    def quality(self, limits: Limits) -> str:
        """One of good, bad, between; empty where the way gave nothing."""
        if self.failed or math.isnan(self.mean_error) or not self.sd_ratio > 0:
            return "" if self.failed else "bad"
        ratio = math.exp(abs(math.log(self.sd_ratio)))
        if self.mean_error > limits.bad_mean or ratio > limits.bad_ratio:
            return "bad"
        good = self.mean_error <= limits.good_mean and ratio <= limits.good_ratio
        return "good" if good else "between"


def find_posterior(name: str) -> RealPosterior:
    """One of `NAMES`, or another, named by where it stands.

    Args:
        name: ``garch``, or ``package.module:name``, or ``path/to/file.py:name`` for a
            `RealPosterior` or a function that returns one.

    Raises:
        ValueError: If there is none.
    """
    place, colon, what = name.rpartition(":")
    if not colon:
        if name not in NAMES:
            raise ValueError(
                f"no posterior is called {name!r}; there are {', '.join(NAMES)}, and others as "
                "package.module:name or path/to/file.py:name"
            )
        return load_posterior(name)
    found = getattr(_module(place), what, None)
    found = found() if callable(found) else found
    if not isinstance(found, RealPosterior):
        raise ValueError(f"{name} is {found!r}, but must be a RealPosterior, or a function of none")
    return found


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        return import_module(place)
    spec = spec_from_file_location(Path(place).stem, place)
    if spec is None or spec.loader is None or not Path(place).is_file():
        raise ValueError(f"{place} is no file with a posterior")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- measuring ------------------------------------------------------------------------------------


def measure(
    posteriors: Sequence[str],
    ways: Sequence[str],
    *,
    seed: int = 0,
    limit: float = 600.0,
    kept: Path | None = None,
    progress: bool = True,
) -> list[Measured]:
    """Runs every way on every posterior, but for what `kept` holds already.

    Args:
        posteriors: As `find_posterior` takes them.
        ways: Some of `WAYS`.
        seed: Of everything.
        limit: Seconds after which a way is given up.
        kept: A file with a line of JSON a row, which new rows are added to at once.
        progress: Shows a bar on stderr where that is a terminal.
    """
    known = read(kept) if kept is not None else []
    done = {(row.posterior, row.way.partition(",")[0], row.seed) for row in known}
    todo = [(p, w) for p in posteriors for w in ways if (p, w, seed) not in done]
    found = [row for row in known if row.posterior in posteriors and row.seed == seed]
    found = [row for row in found if row.way.partition(",")[0] in ways]
    with progress_bar(len(todo), "fit", show=progress, what="posteriors") as bar:
        for name, way in todo:
            bar.set_description(f"{way} on {name}")
            rows = _measure(name, way, seed, limit)
            found += rows
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                with kept.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
            bar.update()
    return found


def read(kept: Path) -> list[Measured]:
    """The rows of a file that `measure` keeps; none where there is no file yet."""
    if not kept.is_file():
        return []
    lines = kept.read_text(encoding="utf-8").splitlines()
    return [Measured(**json.loads(line)) for line in lines]


def _measure(name: str, way: str, seed: int, limit: float) -> list[Measured]:
    posterior, begun = find_posterior(name), time.perf_counter()
    try:
        with _double(), _at_most(limit), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what did not converge shows in its numbers
            found = WAYS[way].find(posterior, seed)
    except Exception as error:  # whatever a method cannot do is a row of the table
        seconds = time.perf_counter() - begun
        said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return [Measured(name, way, seed, seconds, said=said, failed=True)]
    seconds = time.perf_counter() - begun
    return [
        Measured(
            name,
            way + part,
            seed,
            seconds,
            *_errors(one, posterior),
            khat=one.khat,
            trusted=one.trusted,
            said=one.said,
        )
        for part, one in found.items()
    ]


def _errors(found: Found, posterior: RealPosterior) -> tuple[float, float]:
    error = ((found.mean - posterior.mean) / posterior.sd).abs()
    ratio = found.sd / posterior.sd
    furthest = ratio[ratio.clamp_min(1e-300).log().abs().argmax()]
    return _largest(error), float(furthest)


def _largest(values: Tensor) -> float:
    return float(torch.nan_to_num(values, nan=math.inf).max())


@contextmanager
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Gives up after so many seconds, and again every five, should somebody catch it."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"given up after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- what it comes to -----------------------------------------------------------------------------


def rates(rows: Sequence[Measured], limits: Limits) -> dict[str, tuple[int, int]]:
    """How often the verdict refused, of how many: the bad, the good, and those between."""
    judged = [(row.quality(limits), row.trusted) for row in rows if row.trusted is not None]
    found = {}
    for quality in ("bad", "good", "between"):
        answers = [trusted for seen, trusted in judged if seen == quality]
        found[quality] = (sum(not trusted for trusted in answers), len(answers))
    return found
