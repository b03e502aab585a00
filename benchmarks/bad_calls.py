"""Calls every public function with one argument after another replaced by a bad one.

    python -m benchmarks.bad_calls --only fit_em
    python -m benchmarks.bad_calls --processes 2

Each call runs in a forked process of its own, so none can hurt the next. What happened is one of

- **sentence**: an error that the package raised in words, whatever its type;
- **answered**: a result, or None; `nan` where a number in it is;
- **foreign**: an error that something else raised, torch or the interpreter: a fault;
- **changed**: a sentence or an answer, but a global random stream, the parameter store, the default
  type or a gradient of the caller's parameters is not what it was: a fault;
- **hung**: nothing within the time limit: a fault.
"""

import argparse
import inspect
import itertools
import math
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyro
import torch

import pyro_vae
from pyro_vae.checks import raised_in_words
from pyro_vae.inference.svi import fit as fit_programs

__all__ = ["BAD", "RECIPES", "Outcome", "call_once", "calls", "main"]

_HERE = str(Path(pyro_vae.__file__).parent)
_SECONDS = 60
_SLOW = ("posterior_quality", "resolve", "compare_estimators", "loo", "calibrate")
FAULTS = ("foreign", "changed", "hung")


class _Strange:
    """An object of no known kind."""

    def __repr__(self) -> str:
        return "<strange>"


def _program(x: Any) -> None:
    raise KeyError("raised by the user's program")


BAD: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "-1": lambda: -1,
    "0": lambda: 0,
    "1.5": lambda: 1.5,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "10**30": lambda: 10**30,
    "text": lambda: "abc",
    "empty text": lambda: "",
    "bytes": lambda: b"abc",
    "empty list": list,
    "list of text": lambda: ["a", None],
    "ragged lists": lambda: [[1.0], [1.0, 2.0]],
    "empty dict": dict,
    "dict": lambda: {"a": 1},
    "set": lambda: {1, 2},
    "strange": _Strange,
    "type": lambda: dict,
    "function": lambda: _program,
    "empty tensor": lambda: torch.empty(0),
    "number tensor": lambda: torch.tensor(1.0),
    "nan tensor": lambda: torch.full((5, 4), math.nan),
    "infinite tensor": lambda: torch.full((5, 4), math.inf),
    "complex tensor": lambda: torch.ones(5, 4, dtype=torch.complex64),
    "integer tensor": lambda: torch.ones(5, 4, dtype=torch.int64),
    "narrow tensor": lambda: torch.ones(5, 3),
    "wide tensor": lambda: torch.ones(5, 4, 2),
    "object array": lambda: np.array([None, "a"], dtype=object),
    "path": lambda: Path("there/is/no/such/file"),
    "distribution": lambda: torch.distributions.Normal(0.0, 1.0),
    "range": lambda: range(3),
}
"""By what they are called."""


def _pair() -> dict[str, Any]:
    torch.manual_seed(0)
    vae = pyro_vae.VAE(4, 2, hidden=(3,))
    return {"model": vae.model, "guide": vae.guide, "x": torch.bernoulli(torch.full((5, 4), 0.5))}


def _beside(**options: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {**_pair(), **options}


def _table() -> torch.Tensor:
    return torch.randn(12, 2, generator=torch.Generator().manual_seed(1))


def _global_pair() -> dict[str, Any]:
    import pyro.distributions as dist

    def model(x: torch.Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.sample("loc", dist.Normal(0.1, 0.4))

    return {"model": model, "guide": guide, "x": torch.linspace(-1.0, 1.0, 6)}


_QUIET: dict[str, Any] = {"progress": False, "seed": 0}
_FEW: dict[str, Any] = {**_QUIET, "num_particles": 5}
RECIPES: dict[str, Callable[[], dict[str, Any]]] = {
    "VAE": lambda: {"data_dim": 4, "latent_dim": 2, "hidden": (3,)},
    "Autoencoder": lambda: {"data_dim": 4, "code_dim": 2, "hidden": (3,)},
    "TwoLayerVAE": lambda: {"data_dim": 4, "latent_dims": (2, 1), "hidden": ((3,), (3,))},
    "GaussianMixture": lambda: {"num_components": 2, "dim": 2},
    "LinearGaussian": lambda: {"data_dim": 4, "latent_dim": 2},
    "log_weights": _beside(num_particles=5),
    "log_evidence": _beside(**_FEW),
    "elbo_gap": _beside(**_FEW, max_steps=3, richer=()),
    "posterior_quality": _beside(**_QUIET, num_particles=50, num_permutations=20),
    "compare_estimators": _beside(
        **_QUIET, estimators=("PathwiseELBO",), num_particles=(1,), repeats=8
    ),
    "resolve": _beside(**_QUIET, num_draws=200),
    "draw_posterior": _beside(num_draws=5, seed=0),
    "sample_posterior": lambda: {
        **{name: value for name, value in _pair().items() if name != "guide"},
        **_QUIET,
        "num_chains": 2,
        "num_warmup": 5,
        "num_samples": 5,
    },
    "predictive_check": _beside(num_draws=20, seed=0),
    "calibrate": _beside(**_QUIET, num_simulations=60, num_draws=9),
    "fit": _beside(epochs=1, batch_size=5, progress=False, seed=0),
    "fit_em": lambda: {
        "model": pyro_vae.GaussianMixture(2, 2),
        "x": _table(),
        "max_iterations": 3,
        **_QUIET,
    },
    "loo": lambda: {**_global_pair(), **_QUIET, "num_draws": 100},
    "load_dataset": lambda: {"name": "digits"},
    "load_result": lambda: {"path": "none.nc"},
    "load_run": lambda: {"path": "none"},
}
"""Of each function arguments that it takes."""


@dataclass(frozen=True)
class Outcome:
    """What a call came to: one of the words above, and where and how an error arose."""

    word: str
    what: str = ""


def calls(only: str = "") -> Iterator[tuple[str, str, str]]:
    """Function, parameter and bad value of every call."""
    for name in RECIPES:
        if only in ("", name):
            parameters = inspect.signature(getattr(pyro_vae, name)).parameters.values()
            named = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
            extra = [given for given in RECIPES[name]() if given not in named]
            every = itertools.product([name], named + extra, BAD)
            # Of what takes seconds a quarter, for each parameter other values.
            yield from itertools.islice(every, 0, None, 4 if name in _SLOW else 1)


def call_once(name: str, parameter: str | None, bad: str | None) -> Outcome:
    """Calls a function; with no parameter as it should be called."""
    given = RECIPES[name]()
    if parameter is not None and bad is not None:
        given[parameter] = BAD[bad]()
    before = _globals(given)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = getattr(pyro_vae, name)(**given)
    except Exception as error:
        word, what = _of_error(error)
        found = None
    else:
        word, what = ("nan" if _has_nan(found) else "answered"), type(found).__name__
    after = _globals(given)
    if given.get("seed") is None:  # then the global stream is what draws
        after["torch's random stream"] = before["torch's random stream"]
    if name == "fit":  # it trains
        after["the parameter store"] = before["the parameter store"]
    if word != "foreign" and (changed := _changed(before, after)):
        return Outcome("changed", f"{changed} (after {what})")
    return Outcome(word, what)


def _of_error(error: Exception) -> tuple[str, str]:
    """What the package or the user's own program raised is a sentence; all else is foreign."""
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    assert last is not None
    place = last.tb_frame.f_code.co_filename
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:140]}"
    if raised_in_words(error) or place == __file__:
        return "sentence", text
    return "foreign", f"{text} [{place.removeprefix(_HERE)}:{last.tb_lineno}]"


def _globals(given: dict[str, Any]) -> dict[str, Any]:
    model = getattr(given.get("model"), "__self__", None)
    grads = (
        [p.grad is not None for p in model.parameters()]
        if isinstance(model, torch.nn.Module)
        else []
    )
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 -- the stream that others draw from
    return {
        "torch's random stream": torch.get_rng_state().tolist(),
        "NumPy's random stream": numpy_state[1].tolist(),
        "random's stream": random.getstate(),
        "the parameter store": sorted(pyro.get_param_store().keys()),
        "the default type": str(torch.get_default_dtype()),
        "gradients": grads,
        "validation": torch.distributions.Distribution._validate_args,
    }


def _changed(before: dict[str, Any], after: dict[str, Any]) -> str:
    return ", ".join(name for name in before if before[name] != after[name])


def _has_nan(found: Any) -> bool:
    values = getattr(found, "data_vars", None)
    if values is not None:
        return any(
            bool(np.isnan(values[n].values).any()) for n in ("elbo", "log_evidence") if n in values
        )
    return isinstance(found, torch.Tensor) and bool(found.isnan().any())


def _in_a_process(call: tuple[str, str, str]) -> Outcome:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.chdir(tempfile.mkdtemp())  # for what is written under a bad name
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        try:
            found = call_once(*call)
        except BaseException as error:
            found = Outcome("foreign", f"{type(error).__name__}: {error} (not an Exception)")
        os.write(writing, pickle.dumps(found)[:60_000])
        os._exit(0)
    os.close(writing)
    limit, parts = time.monotonic() + _SECONDS, []
    os.set_blocking(reading, False)
    while time.monotonic() < limit:
        try:
            part = os.read(reading, 1 << 16)
        except BlockingIOError:
            time.sleep(0.002)
            continue
        if not part:
            break
        parts.append(part)
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    os.waitpid(child, 0)
    if not parts:
        return Outcome("hung", f"no answer within {_SECONDS} s, or the process died")
    return pickle.loads(b"".join(parts))


def main() -> int:
    """Makes the calls and prints counts and faults; the exit status is 1 if there are faults."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", choices=["", *RECIPES], metavar="FUNCTION")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    assert fit_programs is not None  # imported before the first fork
    for name in RECIPES:
        if options.only in ("", name) and name not in ("load_result", "load_run"):
            right = call_once(name, None, None)
            if right.word != "answered":
                raise SystemExit(f"{name} does not take its own arguments: {right}")
    every = list(calls(options.only))
    with ThreadPoolExecutor(options.processes) as pool:
        found = dict(zip(every, pool.map(_in_a_process, every), strict=True))
    counts = Counter((call[0], outcome.word) for call, outcome in found.items())
    words = ("sentence", "answered", "nan", *FAULTS)
    print("| function | calls | " + " | ".join(words) + " |")
    print("| --- |" + " ---: |" * (1 + len(words)))
    for name in [n for n in RECIPES if options.only in ("", n)]:
        numbers = [counts[name, word] for word in words]
        print(f"| `{name}` | {sum(numbers)} | " + " | ".join(map(str, numbers)) + " |")
    totals = [sum(counts[name, word] for name in RECIPES) for word in words]
    print(f"| all | {sum(totals)} | " + " | ".join(map(str, totals)) + " |\n")
    for call, outcome in found.items():
        if outcome.word in (*FAULTS, "nan"):
            print(f"{call[0]}({call[1]}={call[2]}): {outcome.word}: {outcome.what}")
    return int(any(outcome.word in FAULTS for outcome in found.values()))


if __name__ == "__main__":
    sys.exit(main())
