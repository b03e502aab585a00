"""Spoils one formula after another and asks whether a test notices: tests/mutants.toml.

    python -m benchmarks.mutants --only estimators

A server process imports torch, Pyro and pytest once. For each mutant it forks a child, which reads
the spoilt source in place of the file's before the package is imported, and runs the tests named.
First the tests are run on the source as it is: what fails there could not tell a mutant.
"""

import argparse
import contextlib
import importlib
import os
import shlex
import sys
import time
import tomllib
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from benchmarks.random_programs import write_section

__all__ = ["Mutant", "main", "read_mutants", "spoil"]

_LIST = Path("tests/mutants.toml")
_IMPORTED = (
    *("pytest", "_pytest.doctest", "torch", "torch.optim", "torchvision", "torch._dynamo", "pyro"),
    *("pyro.infer.autoguide", "pyro.optim", "pyro.nn", "scipy.stats"),
    *("sklearn.mixture", "sklearn.cluster", "xarray", "arviz", "matplotlib.pyplot", "beartype"),
    *(
        "jaxtyping",
        "h5netcdf",
        "safetensors.torch",
        "tqdm.auto",
        "pyro.distributions.testing.fakes",
    ),
)
_FAILED = 1  # pytest's exit code where a test failed
_OPTIONS: tuple[str, ...] = (
    "-x",
    "-q",
    "-n0",
    "-p",
    "no:cacheprovider",
    "-m",
    "not slow",
    "-o",
    "addopts=",
)
_OPTIONS = (*_OPTIONS, "-W", "ignore::pytest.PytestAssertRewriteWarning")
_TEXT = """Formulas of log weights, estimators, evidence, EM and mixtures, each spoilt in one
place (a sign, a factor, an index, N/B, a log-mean-exp's constant): `tests/mutants.toml` names the
tests that should notice. `make mutants` runs them again."""


@dataclass(frozen=True)
class Mutant:
    """One spoilt formula.

    Attributes:
        path: The file, from the repository's root.
        old: Text that stands in it once.
        new: What it becomes.
        tests: Arguments of pytest.
        survives: Why no test needs to fail; empty where one must.
    """

    path: str
    old: str
    new: str
    tests: str
    survives: str = ""


def read_mutants(path: Path = _LIST) -> list[Mutant]:
    """The list, with each file's tests where a mutant names none."""
    with path.open("rb") as file:
        listed = tomllib.load(file)["file"]
    return [
        Mutant(**{"path": part["path"], "tests": part["tests"], **mutant})
        for part in listed
        for mutant in part["mutant"]
    ]


def spoil(mutant: Mutant, source: str) -> str:
    """The file's text with the mutant in it.

    Raises:
        ValueError: If the old text does not stand there exactly once, or is the new one.
    """
    if source.count(mutant.old) != 1 or mutant.old == mutant.new:
        raise ValueError(
            f"{mutant.path} holds {source.count(mutant.old)} times: {mutant.old!r}; write the "
            "mutant anew in tests/mutants.toml"
        )
    return source.replace(mutant.old, mutant.new)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the mutants; returns 1 if one survived without a reason."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a part of the file's path, or of the old text")
    parser.add_argument("--no-document", action="store_true", help="only print")
    options = parser.parse_args(arguments)
    chosen = [m for m in read_mutants() if options.only in m.path or options.only in m.old]
    start = time.perf_counter()
    for name in _IMPORTED:
        importlib.import_module(name)
    if not _tests_pass(chosen):
        return 1
    survivors = []
    for number, mutant in enumerate(chosen, 1):
        began = time.perf_counter()
        code = _in_child(mutant.tests, mutant)
        killed = code == _FAILED
        if not killed:
            survivors.append(mutant)
        verdict = "killed" if killed else f"SURVIVED (pytest {code}) {mutant.survives}"
        where = f"{number}/{len(chosen)} {time.perf_counter() - began:.1f} s {mutant.path}"
        print(f"{where}: {mutant.new.splitlines()[0].strip()[:90]}: {verdict}", flush=True)
    minutes = (time.perf_counter() - start) / 60
    text = _summary(chosen, survivors, minutes)
    print(text)
    if not options.no_document and not options.only:
        write_section("Mutants", f"{_TEXT}\n\n{text}")
    return int(any(not m.survives for m in survivors))


def _tests_pass(mutants: Sequence[Mutant]) -> bool:
    """Runs every set of tests that is named on the source as it is."""
    bad = [tests for tests in sorted({m.tests for m in mutants}) if _in_child(tests, None) != 0]
    for tests in bad:
        print(f"these fail, or are none, without any mutant: {tests}")
    return not bad


def _in_child(tests: str, mutant: Mutant | None) -> int:
    """Forks, spoils the source if asked, runs the tests; returns pytest's exit code."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    code = 70
    try:
        # What the tests print is of interest only where they fail without a mutant.
        shown = sys.stderr if mutant is None else open(os.devnull, "w")
        with contextlib.redirect_stdout(shown):
            if mutant is not None:
                _read_spoilt(mutant)
            sys.path[:0] = ["."]
            code = int(sys.modules["pytest"].main([*_OPTIONS, *shlex.split(tests)]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _read_spoilt(mutant: Mutant) -> None:
    """Has the import system read the spoilt text in place of the file's, and no compiled one."""
    target = Path(mutant.path).resolve()
    spoilt = spoil(mutant, target.read_text()).encode()
    sys.dont_write_bytecode = True
    plain = SourceFileLoader.get_data

    def get_data(self: Any, path: Any) -> bytes:
        if Path(path) == target:
            return spoilt
        compiled = Path(path)
        if compiled.parent == target.parent / "__pycache__" and compiled.name.startswith(
            f"{target.stem}."
        ):
            raise FileNotFoundError(path)
        return plain(self, path)

    SourceFileLoader.get_data = get_data  # type: ignore[method-assign]


def _summary(mutants: Sequence[Mutant], survivors: Sequence[Mutant], minutes: float) -> str:
    """How many of each file were killed, and which survived."""
    lines = [
        f"{len(mutants)} mutants, {len(mutants) - len(survivors)} killed; {minutes:.0f} minutes."
    ]
    lines += ["", "| file | mutants | killed |", "| --- | ---: | ---: |"]
    for path, own in _by_file(mutants):
        alive = sum(m.path == path for m in survivors)
        lines.append(f"| {path.removeprefix('pyro_vae/')} | {own} | {own - alive} |")
    for mutant in survivors:
        old, new = (" ".join(text.split()) for text in (mutant.old, mutant.new))
        reason = mutant.survives or "no reason is known"
        lines += ["", f"Survives: `{old}` as `{new}` ({mutant.path}): {reason}."]
    return "\n".join(lines)


def _by_file(mutants: Sequence[Mutant]) -> Iterator[tuple[str, int]]:
    for path in dict.fromkeys(m.path for m in mutants):
        yield path, sum(m.path == path for m in mutants)


if __name__ == "__main__":
    sys.exit(main())
