"""What `standard_errors` says of a maximum of a mixture, and `fit` of an optimum on fixed draws."""

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from benchmarks.coverage.kinds import Checked, Row, Study, interval, joined, watched
from benchmarks.coverage.planted import tensor
from pyro_vae.inference.em import fit_em, standard_errors
from pyro_vae.inference.svi import fit
from pyro_vae.models import PoissonMixture

__all__ = ["STUDIES"]

Found = dict[str, Checked]
_CHECKED = {"natural": "log_rates[0, 0]", "fitted": "weights[0]"}


def _mixture(rates: tuple[float, float], size: int, count: int, seed: int) -> Found:
    """Counts of two Poissons; EM starts at the truth, so that labels keep their places."""
    weight = 0.4
    truth = {"natural": np.log(rates[0]), "fitted": weight}
    numbers: dict[str, list[tuple[float, float]]] = {name: [] for name in truth}
    flagged = []
    for i in range(count):
        random = np.random.default_rng([seed, i])
        x = tensor(random.poisson(np.array(rates)[(random.random(size) > weight) * 1])[:, None])
        mixture = PoissonMixture.from_parameters(
            tensor([weight, 1 - weight]), tensor([[rates[0]], [rates[1]]])
        )
        fit_em(
            mixture, x, initialization="given", tolerance=1e-9, max_iterations=300, progress=False
        ).require_finished()
        found = watched(standard_errors(mixture, x))
        flagged.append("verdict" in found.provenance)
        for name, entry in _CHECKED.items():
            along = {"natural": "parameter", "fitted": "fitted_parameter"}[name]
            chosen = found.sel({along: entry})
            numbers[name].append((float(chosen[name]), float(chosen[f"{name}_se"])))
    return {
        f"{name}_se": interval(
            [value for value, _ in rows],
            [error for _, error in rows],
            truth[name],
            np.array(flagged),
        )
        for name, rows in numbers.items()
    }


def _apart(count: int, seed: int) -> Found:
    return _mixture((2.0, 9.0), 200, count, seed)


def _overlapping(count: int, seed: int) -> Found:
    return _mixture((3.0, 3.6), 60, count, seed)


def _log_rates(counts: Tensor) -> Callable[[Tensor], None]:
    """A log rate for each column of counts, `[data, columns]`, with a standard normal prior."""

    def model(x: Tensor) -> None:
        with pyro.plate("rates", x.shape[1]):
            z = pyro.sample("z", dist.Normal(tensor(0.0), tensor(1.0)))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Poisson(z.exp()), obs=x)

    return model


def _best_normals(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sd of the normal of the highest ELBO, in closed form but for a fixed point."""
    total, size = counts.sum(0), len(counts)
    loc, variance = np.zeros(counts.shape[1]), np.ones(counts.shape[1])
    for _ in range(500):  # both derivatives of the ELBO are zero, by damped Newton steps
        rate = size * np.exp(loc + variance / 2)
        loc = loc + 0.5 * (total - loc - rate) / (1 + rate)
        variance = 0.5 * variance + 0.5 / (1 + rate)
    return loc, np.sqrt(variance)


def _fixed_draws(count: int, seed: int) -> Found:
    """Eight log rates a replication, of which q's best normal is known."""
    parts = []
    for i in range(count):
        x = np.random.default_rng([seed, i]).poisson(1.5, (3, 8)).astype(float)
        model = _log_rates(tensor(x))
        reached = fit(
            model, AutoNormal(model), tensor(x), method="deterministic", seed=i, progress=False
        ).require_finished()
        assert reached.posterior is not None
        found = watched(reached.posterior)
        loc, sd = _best_normals(x)
        parts.append(
            {
                "mean_se": interval(found["mean"], found["mean_se"], loc),
                "sd_se": interval(found["sd"], found["sd_se"], sd),
            }
        )
    return joined(parts)


_BREAKS = "components overlap: the likelihood is no quadratic an error away"
_SAYS = "`information_fraction` and the verdict"

STUDIES = [
    Study(
        "Poisson mixture, apart",
        "standard_errors",
        _apart,
        (
            Row("natural_se", breaks=_BREAKS, guard=_SAYS),
            Row("fitted_se", breaks=_BREAKS, guard=_SAYS),
        ),
        quick=45,
        longest=1000,
    ),
    Study(
        "Poisson mixture, overlapping",
        "standard_errors",
        _overlapping,
        (Row("natural_se", most=None, breaks=_BREAKS, guard=_SAYS, speaks=0.8),),
        quick=5,
        longest=100,
    ),
    Study(
        "fixed draws, log rates",
        "fit",
        _fixed_draws,
        (
            Row("mean_se", most=0.08, breaks="draws so few that q reaches elsewhere with each set"),
            Row("sd_se", most=0.08, breaks="draws so few that q reaches elsewhere with each set"),
        ),
        quick=6,
        longest=200,
    ),
]
