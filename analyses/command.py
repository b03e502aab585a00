"""What the command lines of the analyses share."""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from analyses.pages import make_page, page_lines
from pyro_vae.app.pages import figure_png
from pyro_vae.data import DatasetError
from pyro_vae.progress import lines_on_stderr
from pyro_vae.results import Result, atomic_path

__all__ = ["Output", "file_name", "make_parser", "out_folder", "run_analysis", "unknown_case"]


def make_parser(
    name: str,
    description: str,
    *,
    data: Sequence[str],
    data_help: str = "the data set; all but digits are read from the data folder (%(default)s)",
    full: str | None = None,
    epilog: str | None = None,
) -> argparse.ArgumentParser:
    """A parser with the options that every analysis takes.

    Args:
        name: The module's name in `analyses`.
        description: What the analysis shows; its line breaks are kept.
        data: The data sets; the first is the default.
        data_help: About them.
        full: Help of the option ``--full``, where there is a long setting.
        epilog: How to read what comes out.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m analyses.{name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", choices=data, default=data[0], help=data_help)
    parser.add_argument("--root", help="the data folder; $PYRO_VAE_DATA if left out")
    where = f"results/{name}; of other data than {data[0]}, results/{name}-DATA"
    parser.add_argument("--out", type=Path, help=f"where files go ({where})")
    parser.set_defaults(analysis=name, usual_data=data[0])
    if full is not None:
        parser.add_argument("--full", action="store_true", help=full)
    parser.add_argument("--tiny", action="store_true", help="a few seconds: does it run at all?")
    parser.add_argument("--seed", type=int, default=0, help="of starts and draws (%(default)s)")
    parser.add_argument("--no-progress", action="store_true", help="without bars and their lines")
    return parser


def unknown_case(asked: Sequence[str] | None, titles: Sequence[str], what: str) -> bool:
    """Whether a case was asked for that is not there, which is then said."""
    unknown = sorted(set(asked or ()) - set(titles))
    if unknown:
        known = ", ".join(map(repr, titles))
        print(f"there is no {what} {unknown[0]!r}; choose from {known}", file=sys.stderr)
    return bool(unknown)


def file_name(title: str) -> str:
    """A title with _ in place of all but letters and digits."""
    return "".join(c if c.isalnum() else "_" for c in title)


def out_folder(given: argparse.Namespace, used: str | None = None) -> Path:
    """Where files go: the folder carries the name of data that are not the usual ones.

    Args:
        given: What a parser of `make_parser` read.
        used: The data that were taken, where they need not be those that were asked for.
    """
    used = given.data if used is None else used
    out = Path("results", given.analysis) if given.out is None else given.out
    named = used != given.data or (given.out is None and used != given.usual_data)
    return out.with_name(f"{out.name}-{used}") if named else out


@dataclass(frozen=True)
class Output:
    """Where an analysis writes and what it says on the way.

    Attributes:
        folder: Where its files go.
        progress: Whether bars are shown.
        name: Of the analysis, and of its template.
    """

    folder: Path
    progress: bool
    name: str

    def say(self, line: str) -> None:
        """Prints a line at once."""
        print(line, flush=True)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Says how many seconds something took."""
        started = time.perf_counter()
        yield
        self.say(f"{what}: {time.perf_counter() - started:.0f} s")

    def save(self, results: Mapping[str, Result]) -> None:
        """Writes each result as NetCDF under its name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, result in results.items():
            result.save(self.folder / f"{name}.nc")

    def write_page(self, *, aloud: bool = True, **told: Any) -> Path:
        """Writes the figures among what is told, and the page; returns its path.

        Args:
            aloud: Prints the text of the page, too.
            told: As for `make_page`; ``command`` is added.
        """
        command = f"python -m analyses.{self.name}"
        page = make_page(self.name, **{"command": command, **told})
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, figure in told.items():
            if isinstance(figure, Figure):
                with atomic_path(self.folder / f"{name}.png") as temporary:
                    temporary.write_bytes(figure_png(figure))
        for line in page_lines(page) if aloud else ():
            self.say(line)
        return page.save(self.folder / "report.html")


def run_analysis(
    analysis: Callable[[Output], Path], given: argparse.Namespace, out: Path | None = None
) -> int:
    """Runs an analysis on one thread, prints where its page is, and returns the exit status.

    One thread, so that times compare; on models this small a second one only waits. What is written
    takes its place when all is done, so what an earlier run left there is never half replaced.

    Args:
        analysis: Writes its files to the output's folder, and returns the path of its page.
        given: What a parser of `make_parser` read.
        out: Where the files go in the end; `out_folder` says it if left out.

    Returns:
        0; 2 without data; 130 after Ctrl-C.
    """
    out = out_folder(given) if out is None else out
    threads, unfinished = torch.get_num_threads(), out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    torch.set_num_threads(1)
    try:
        with lines_on_stderr():
            page = analysis(Output(unfinished, not given.no_progress, given.analysis))
    except DatasetError as error:
        print(f"{error} (Here: pyro-vae data get NAME, or --root FOLDER.)", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"interrupted ({stopped})" if str(stopped) else "interrupted", file=sys.stderr)
        if unfinished.is_dir():
            print(f"what was measured so far is in {unfinished}", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(unfinished.iterdir(), key=lambda path: path == page):  # the page at last
        path.replace(out / path.name)
    unfinished.rmdir()
    print(f"\n{out / page.name}")
    return 0
