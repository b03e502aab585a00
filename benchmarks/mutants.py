"""Spoils one formula after another and asks whether a test notices: tests/mutants.toml.

    python -m benchmarks.mutants --only estimators
    python -m benchmarks.mutants --resume build/mutants.json

A server process imports torch, Pyro and pytest once. For each mutant it forks a child, which reads
the spoilt source in place of the file's before the package is imported, and runs the tests named.
Before the first of a file's mutants its tests run on the source as it is: what fails there could
not tell a mutant. A file of verdicts spares a later run the mutants whose source and tests are what
they were.
"""

import argparse
import contextlib
import importlib
import json
import math
import os
import shlex
import sys
import time
import tomllib
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from hashlib import sha256
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
_TEXT = """Formulas of log weights, estimators, evidence, EM, mixtures, chains, transforms and
stated errors, and what inspection looks for, each spoilt in one place (a sign, a factor, an index,
N/B, a log-mean-exp's constant): `tests/mutants.toml` names the tests that should notice.
`make mutants` runs them again."""


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
    parser.add_argument("--resume", type=Path, help="a file of verdicts, read and added to")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin none after these")
    parser.add_argument("--no-document", action="store_true", help="only print")
    options = parser.parse_args(arguments)
    chosen = [m for m in read_mutants() if options.only in m.path or options.only in m.old]
    known = json.loads(options.resume.read_text()) if _exists(options.resume) else {}
    for name in _IMPORTED:
        importlib.import_module(name)
    start = time.perf_counter()
    named, passed = _tests_of(m for m in chosen if _key(m) not in known), set[str]()
    for number, mutant in enumerate(chosen, 1):
        key, path = _key(mutant), shlex.split(mutant.tests)[0]
        if key in known or time.perf_counter() - start > 60 * options.minutes:
            continue
        if path not in passed and _in_child(named[path], None) != 0:
            print(f"these fail, or are none, without any mutant: {named[path]}")
            return 1
        passed.add(path)
        began = time.perf_counter()
        code = _in_child(mutant.tests, mutant)
        seconds = time.perf_counter() - began
        known[key] = {"killed": code == _FAILED, "seconds": seconds}
        verdict = "killed" if code == _FAILED else f"SURVIVED (pytest {code}) {mutant.survives}"
        where = f"{number}/{len(chosen)} {seconds:.1f} s {mutant.path}"
        print(f"{where}: {mutant.new.splitlines()[0].strip()[:90]}: {verdict}", flush=True)
        if options.resume is not None:
            options.resume.write_text(json.dumps(known, indent=1))
    found = [(m, known[_key(m)]) for m in chosen if _key(m) in known]
    survivors = [m for m, verdict in found if not verdict["killed"]]
    minutes = sum(verdict["seconds"] for _, verdict in found) / 60
    text = _summary([m for m, _ in found], survivors, minutes, len(chosen))
    print(text)
    if not options.no_document and not options.only:
        write_section("Mutants", f"{_TEXT}\n\n{text}")
    return int(any(not m.survives for m in survivors))


def _exists(path: Path | None) -> bool:
    return path is not None and path.exists()


def _key(mutant: Mutant) -> str:
    """Of the mutant, of the file that it spoils and of the tests that should notice."""
    files = [mutant.path, *(part for part in shlex.split(mutant.tests) if part.endswith(".py"))]
    parts = (*astuple(mutant)[:4], *(Path(name).read_text() for name in files))
    return sha256("\0".join(parts).encode()).hexdigest()


def _tests_of(mutants: Iterable[Mutant]) -> dict[str, str]:
    """Of each file of tests all that mutants name, as arguments of one run of pytest."""
    chosen: dict[str, set[str]] = {}
    for mutant in mutants:
        path, *rest = shlex.split(mutant.tests)
        chosen.setdefault(path, set()).add(rest[1] if rest else "")
    return {
        path: path if "" in words else f"{path} -k {shlex.quote(' or '.join(sorted(words)))}"
        for path, words in chosen.items()
    }


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


def _summary(
    mutants: Sequence[Mutant], survivors: Sequence[Mutant], minutes: float, listed: int
) -> str:
    """How many of each file were killed, and which survived."""
    killed, rest = len(mutants) - len(survivors), listed - len(mutants)
    lines = [f"{len(mutants)} mutants, {killed} killed; {minutes:.0f} minutes."]
    if rest:
        lines = [f"{lines[0]} {rest} more are listed and were not run this time."]
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
