"""EM on a Gaussian mixture beside scikit-learn's: time, memory and the same results, in one run.

Both start from the same parameters, make the same number of iterations and take turns; a time is
the shortest of a few turns, so that what else the machine does weighs little. The ratio of the two
is what to read. Parameters and log-likelihoods are compared in the run itself. Memory is the rise
of the peak resident size over what a process held before fitting, in a new process for each.

    python -m benchmarks.em --quick
    python -m benchmarks.em --sizes 100000 --features 16 --components 10 --threads 1
"""

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as Peer
from threadpoolctl import threadpool_limits

from pyro_vae import GaussianMixture, fit_em

GRID = {"sizes": [10_000, 100_000, 1_000_000], "features": [2, 16, 64], "components": [3, 10, 50]}
QUICK = {"sizes": [10_000, 50_000], "features": [2, 16], "components": [3, 10]}
AGREE = 1e-6  # relative: both lose digits where many components share few data


def make_data(num_data: int, dim: int, num_components: int) -> np.ndarray:
    """Overlapping clusters of unit size."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(num_components, dim)) * 2
    return centres[rng.integers(num_components, size=num_data)] + rng.normal(size=(num_data, dim))


def make_start(x: np.ndarray, num_components: int) -> dict[str, np.ndarray]:
    """Some data as means, equal weights, unit variances."""
    chosen = np.random.default_rng(1).choice(len(x), num_components, replace=False)
    dim = x.shape[1]
    return {
        "weights": np.full(num_components, 1 / num_components),
        "locs": x[chosen],
        "covariances": np.broadcast_to(np.eye(dim), (num_components, dim, dim)).copy(),
    }


def run_ours(x: np.ndarray, start: dict[str, np.ndarray], iterations: int) -> dict[str, Any]:
    """This package's fit."""
    weights, locs, covariances = (torch.from_numpy(value) for value in start.values())
    mixture = GaussianMixture.from_parameters(weights, locs, covariances, reg_covar=1e-6)
    fitted = fit_em(
        mixture,
        torch.from_numpy(x),
        initialization="given",
        tolerance=0.0,
        max_iterations=iterations,
    ).require_finished()
    values = {name: value.numpy() for name, value in fitted.parameters.items()}
    history = fitted.history
    # scikit-learn's lower bound is the log-likelihood before its last M step.
    return values | {"score": float(history.log_evidence[history.phase == "E"][-2])}


def run_peer(x: np.ndarray, start: dict[str, np.ndarray], iterations: int) -> dict[str, Any]:
    """scikit-learn's fit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        peer = Peer(
            len(start["weights"]),
            tol=0,
            max_iter=iterations,
            reg_covar=1e-6,
            weights_init=start["weights"],
            means_init=start["locs"],
            precisions_init=start["covariances"],
        ).fit(x)
    return {
        "weights": peer.weights_,
        "locs": peer.means_,
        "covariances": peer.covariances_,
        "score": peer.lower_bound_,
    }


TOOLS: dict[str, Callable[..., dict[str, Any]]] = {"ours": run_ours, "scikit-learn": run_peer}


def disagreement(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest difference of a parameter or score, relative to the largest of its kind."""
    return max(float(np.abs(a[name] - b[name]).max() / np.abs(b[name]).max()) for name in b)


def compare(shape: tuple[int, int, int], iterations: int, turns: int) -> dict[str, Any]:
    """Times of both, taking turns, and how far apart they end."""
    num_data, dim, num_components = shape
    x = make_data(num_data, dim, num_components)
    start = make_start(x, num_components)
    seconds: dict[str, float] = dict.fromkeys(TOOLS, float("inf"))
    results: dict[str, Any] = {}
    for _ in range(turns):
        for name, run in TOOLS.items():
            started = time.perf_counter()
            results[name] = run(x, start, iterations)
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return {"seconds": seconds, "apart": disagreement(results["ours"], results["scikit-learn"])}


def peak_memory(name: str, shape: tuple[int, int, int]) -> float:
    """MiB that a fit of two iterations adds to the peak of a new process."""
    command = [sys.executable, "-m", "benchmarks.em", "--child", name, *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def measure_child(name: str, shape: tuple[int, int, int]) -> None:
    """Prints the rise of the peak, after a small fit has loaded what a fit loads."""
    with threadpool_limits(1):
        torch.set_num_threads(1)
        warm_up()
        x = make_data(*shape)
        start = make_start(x, shape[2])
        # The peak of getrusage begins at the parent's; this one can be set back (Linux only).
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_of_this_process()
        TOOLS[name](x, start, 2)
        after = peak_of_this_process()
    print(json.dumps(after - before))


def warm_up() -> None:
    """A small fit of each, so that what is loaded once is not counted."""
    small = make_data(500, 2, 2)
    for run in TOOLS.values():
        run(small, make_start(small, 2), 1)


def peak_of_this_process() -> float:
    """The peak resident size in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def rows(options: argparse.Namespace) -> Iterator[list[str]]:
    """The table, a row as soon as it is measured."""
    yield [*("threads", "N", "D", "K", "ours s", "sklearn s", "ratio", "apart"), "MiB", "sklearn"]
    grid = product(options.threads, options.sizes, options.features, options.components)
    for threads, *shape in grid:
        num_data, dim, num_components = shape
        with threadpool_limits(threads):
            torch.set_num_threads(threads)
            found = compare((num_data, dim, num_components), options.iterations, options.turns)
        ours, peer = found["seconds"].values()
        memory = ["-", "-"]
        if options.memory and threads == options.threads[0]:
            memory = [f"{peak_memory(name, (num_data, dim, num_components)):.0f}" for name in TOOLS]
        flag = "" if found["apart"] < AGREE else " (!)"
        yield [
            *map(str, (threads, *shape)),
            f"{ours:.3f}",
            f"{peer:.3f}",
            f"{ours / peer:.2f}",
            f"{found['apart']:.0e}{flag}",
            *memory,
        ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small grid, under two minutes")
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--features", type=int, nargs="+")
    parser.add_argument("--components", type=int, nargs="+")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--child", nargs=4, metavar=("TOOL", "N", "D", "K"), help="for itself")
    options = parser.parse_args()
    if options.child:
        name, *shape = options.child
        measure_child(name, (int(shape[0]), int(shape[1]), int(shape[2])))
        return
    warm_up()
    for name, values in (QUICK if options.quick else GRID).items():
        if getattr(options, name) is None:
            setattr(options, name, values)
    for row in rows(options):
        print("  ".join(f"{cell:>9}" for cell in row), flush=True)


if __name__ == "__main__":
    main()
