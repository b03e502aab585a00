"""What the command lines of the analyses share."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pyro_vae.data import DatasetError

__all__ = ["make_parser", "run_on_one_thread"]


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
    parser.add_argument(
        "--out", type=Path, default=Path("results", name), help="where files go (%(default)s)"
    )
    if full is not None:
        parser.add_argument("--full", action="store_true", help=full)
    parser.add_argument("--tiny", action="store_true", help="a few seconds: does it run at all?")
    parser.add_argument("--seed", type=int, default=0, help="of starts and draws (%(default)s)")
    parser.add_argument("--no-progress", action="store_true", help="without bars")
    return parser


def run_on_one_thread(analysis: Callable[[], Path]) -> int:
    """Runs an analysis, prints where its page is, and returns the exit status (2: no data).

    One thread, so that times compare; on models this small a second one only waits.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        page = analysis()
    except DatasetError as error:
        print(f"{error} (Here: pyro-vae data get NAME, or --root FOLDER.)", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    print(f"\n{page}")
    return 0
