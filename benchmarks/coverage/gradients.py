"""Gradients of estimators, whose every moment is known; each parameter is a replication."""

from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.coverage.kinds import Checked, Row, Study, Z, interval, joined, watched
from benchmarks.coverage.planted import NormalNormal
from pyro_vae.diagnostics.gradients import compare_estimators, snr_slopes
from pyro_vae.inference.svi import fit

__all__ = ["STUDIES"]

Found = dict[str, Checked]
_SD, _MOST = 0.6, 100


class _Locations:
    """A guide with a parameter of its own for the location of each datum."""

    def __init__(self, x: Tensor) -> None:
        self.start = NormalNormal().mean(x) + 0.3

    def __call__(self, x: Tensor) -> None:
        """Site "z"."""
        loc = torch.stack([pyro.param(f"loc_{i}", start) for i, start in enumerate(self.start)])
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, _SD))


def _compared(repeats: int, offset: float, count: int, seed: int) -> Found:
    """Pathwise gradients are normal: of z = loc + sd * e the log joint has -z + (x - z) / noise^2.

    Reference gradients are wrong by `offset` standard deviations, which is then the bias.
    """
    sizes = [min(count, _MOST)] * -(-count // _MOST)
    return joined([_block(repeats, offset, size, seed + i) for i, size in enumerate(sizes)])


def _block(repeats: int, offset: float, size: int, seed: int) -> Found:
    pair = NormalNormal()
    x = pair.data(size, seed)
    guide = _Locations(x)
    steep = 1 + pair.noise**-2
    mean = ((x / pair.noise**2 - steep * guide.start) / size).numpy()
    sd = steep * _SD / size
    bias = offset * sd
    with pyro.get_param_store().scope():
        guide(x)
        found: Any = watched(
            compare_estimators(
                pair.model,
                guide,
                x,
                ["PathwiseELBO"],
                (1, 4),
                repeats=repeats,
                parameters={f"loc_{i}": [f"loc_{i}"] for i in range(size)},
                reference={f"loc_{i}": torch.tensor(m - bias) for i, m in enumerate(mean)},
                seed=seed,
                progress=False,
            )
        )
    slopes = watched(snr_slopes(found)).isel(estimator=0)
    order = [f"loc_{i}" for i in range(size)]
    value = found.isel(estimator=0, num_particles=0)
    one = value.sel(parameter=order)
    truths = {
        "variance": sd**2,
        "efficiency": sd**2,
        "gradient_norm": np.abs(mean),
        "snr": np.abs(mean) / sd,
        "bias": bias,
    }
    noisy = {name: one.snr_is_noise.values for name in ("gradient_norm", "snr")}
    columns = {
        f"{name}_se": interval(one[name], one[f"{name}_se"], truth, noisy.get(name, False))
        for name, truth in truths.items()
    }
    # A score speaks of a bias where it is large; its threshold is a two-sided quantile.
    columns["bias_z"] = Checked(one.bias_z.values > Z, np.zeros(size, dtype=bool))
    columns["slope_se"] = interval(slopes.slope, slopes.slope_se, 0.5)
    columns["value_se"] = interval(value.value, value.value_se, _elbo(x, guide.start))
    return columns


def _elbo(x: Tensor, loc: Tensor) -> float:
    """The mean of the bound over the data: log evidence less the KL of two normals."""
    pair = NormalNormal()
    scale, shift = _SD / pair.sd, ((loc - pair.mean(x)) / pair.sd).numpy()
    kl = (scale**2 + shift**2 - 1) / 2 - np.log(scale)
    return float((pair.log_evidence(x) - kl).mean())


def _history(count: int, seed: int) -> Found:
    """One epoch without a step: the bound of the population."""
    pair = NormalNormal(1.2, 0.3)
    population = -0.5 * np.log(2 * np.pi * (1 + pair.noise**2)) - 0.5 - pair.kl(torch.zeros(1))[0]
    rows = []
    for i in range(count):
        x = pair.data(80, seed + i)

        def guide(x: Tensor) -> None:
            idle = pyro.param("idle", torch.zeros((), dtype=torch.float64))
            loc = pair.mean(x) + pair.shift * pair.sd + 0 * idle
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(loc, pair.scale * pair.sd))

        with pyro.get_param_store().scope():
            made = fit(
                pair.model, guide, x, epochs=1, seed=seed + i, progress=False
            ).require_finished()
        last = watched(made.history).isel(epoch=-1)
        rows.append((float(last.bound), float(last.bound_se)))
    value, error = np.array(rows).T
    return {"bound_se": interval(value, error, population)}


_NOISE = "an SNR below the noise floor", "`snr_is_noise`"
STUDIES = [
    Study(
        "pathwise gradients, 100 of each",
        "compare_estimators, snr_slopes",
        partial(_compared, 100, 0.0),
        (
            Row("variance_se", breaks="heavy-tailed gradients", guard="docstring"),
            Row("efficiency_se", breaks="heavy-tailed gradients", guard="docstring"),
            Row("gradient_norm_se", breaks=_NOISE[0], guard=_NOISE[1]),
            Row("snr_se", most=0.08, breaks=_NOISE[0], guard=_NOISE[1]),
            Row("bias_z", most=0.06, breaks="few repeats", guard="Student's threshold"),
            Row("value_se", most=0.07, breaks="few repeats", guard="at least 8 are asked for"),
            Row("slope_se", breaks="an SNR that is noise", guard="such points are left out"),
        ),
        quick=16,
        longest=1000,
    ),
    Study(
        "gradients with a planted bias",
        "compare_estimators, snr_slopes",
        partial(_compared, 100, 0.5),
        (Row("bias_se", breaks="no bias", guard="`bias_z`, `verdict`"),),
        quick=0,
        longest=1000,
    ),
    Study(
        "pathwise gradients, 8 of each",
        "compare_estimators, snr_slopes",
        partial(_compared, 8, 0.0),
        (Row("variance_se", breaks="heavy-tailed gradients", guard="docstring"),),
        quick=0,
        longest=1000,
    ),
    Study(
        "bound of an epoch",
        "fit",
        _history,
        (Row("bound_se", most=0.08, breaks="few data", guard="none"),),
        quick=2,
        longest=200,
    ),
]
