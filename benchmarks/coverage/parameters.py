"""Parameters of mixtures: what `standard_errors` says of a maximum."""

import numpy as np

from benchmarks.coverage.kinds import Checked, Row, Study, interval, watched
from benchmarks.coverage.planted import tensor
from pyro_vae.inference.em import fit_em, standard_errors
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
]
