"""What the command lines of the analyses share."""

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pyro_vae.data import DatasetError
from pyro_vae.progress import lines_on_stderr

__all__ = ["make_parser", "out_folder", "run_on_one_thread"]


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


def run_on_one_thread(analysis: Callable[[Path], Path], out: Path) -> int:
    """Runs an analysis, prints where its page is, and returns the exit status.

    One thread, so that times compare; on models this small a second one only waits. What is written
    takes its place when all is done, so what an earlier run left there is never half replaced.

    Args:
        analysis: Writes its files to a folder that it makes, and returns the path of its page.
        out: Where they go in the end.

    Returns:
        0; 2 without data; 130 after Ctrl-C.
    """
    threads, unfinished = torch.get_num_threads(), out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    torch.set_num_threads(1)
    try:
        with lines_on_stderr():
            page = analysis(unfinished)
    except DatasetError as error:
        print(f"{error} (Here: pyro-vae data get NAME, or --root FOLDER.)", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"interrupted ({stopped})" if str(stopped) else "interrupted", file=sys.stderr)
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
