"""Pairs with global latents beside closed forms, and several runs of one pair."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.coverage.kinds import Checked, Row, Study, interval, joined, watched
from benchmarks.coverage.planted import Hierarchy
from pyro_vae.diagnostics.gap import elbo_gap
from pyro_vae.inference.programs import Pair, program_scope
from pyro_vae.inference.svi import compare_runs

__all__ = ["STUDIES"]


def _global_gap(count: int, seed: int) -> dict[str, Checked]:
    pair, parts = Hierarchy(), []
    above, each = pair.kls()
    for i in range(count):
        x = pair.data(5, seed + i)
        found = watched(elbo_gap(pair.model, pair.guide, x, num_particles=200, seed=seed + i))
        log_p = pair.log_evidence(x)
        truths = {
            "log_evidence": log_p,
            "elbo": log_p - above - 5 * each,
            "gap": above + 5 * each,
            "global_gap": above,
            "local_gap": each,
        }
        parts.append(
            {f"{n}_se": interval(found[n], found[f"{n}_se"], t) for n, t in truths.items()}
        )
    return joined(parts)


def _two_runs(count: int, seed: int) -> dict[str, Checked]:
    """Guides to either side of the posterior N(0, 1) of one latent; truths by quadrature."""
    grid = torch.linspace(-9, 9, 6001, dtype=torch.float64)
    x = torch.zeros((), dtype=torch.float64)
    posterior = dist.Normal(x, 1.0)
    normals = [dist.Normal(x - 0.8, 0.8), dist.Normal(x + 0.6, 0.7)]

    def model(_x: Tensor) -> None:
        pyro.sample("z", posterior)

    def guide_of(normal: dist.Normal) -> Callable[[Tensor], None]:
        def guide(_x: Tensor) -> None:
            pyro.sample("z", normal)

        return guide

    def elbo(log_q: Tensor) -> Tensor:
        step = grid[1] - grid[0]
        return (log_q.exp() * (posterior.log_prob(grid) - log_q)).sum(-1) * step

    log_q = torch.stack([normal.log_prob(grid) for normal in normals])
    mixed = log_q.logsumexp(0) - math.log(2)
    with program_scope(0):
        pairs = [Pair.inspect(model, guide_of(q), x, joint=True) for q in normals]
    truths, parts = elbo(log_q), []
    for i in range(count):
        start = 1_000_000 * seed + 1000 * i
        found = watched(compare_runs(pairs, config={}, seed=start, data_sha256=None).table)
        gain = float(elbo(mixed) - truths[int(found.kept.values.argmax())])
        parts.append(
            {
                "bound_se": interval(found.bound, found.bound_se, truths.numpy()),
                "mixture_gain_se": interval(found.mixture_gain, found.mixture_gain_se, gain),
            }
        )
    return joined(parts)


STUDIES = [
    Study(
        "two runs of one pair",
        "restarts_table",
        _two_runs,
        (Row("bound_se"), Row("mixture_gain_se")),
        quick=60,
        longest=1000,
    ),
    Study(
        "gap of a pair with global latents",
        "elbo_gap",
        _global_gap,
        tuple(
            Row(
                f"{name}_se",
                most=0.08,
                breaks="k-hat of the datum's weights near 0.5" if name == "local_gap" else "k-hat",
                guard="`khat`, `error_reliable`",
            )
            for name in ("log_evidence", "elbo", "gap", "global_gap", "local_gap")
        ),
        quick=40,
        longest=400,
    ),
]
