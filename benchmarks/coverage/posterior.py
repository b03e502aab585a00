"""Checks of a posterior: divergences, moments, tests of draws, calibration, predictive checks."""

from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.coverage.kinds import Checked, Row, Study, interval, joined, p_value, watched
from benchmarks.coverage.planted import NormalNormal, tensor
from pyro_vae.diagnostics.calibration import calibrate
from pyro_vae.diagnostics.posterior import Thresholds, posterior_quality
from pyro_vae.diagnostics.predictive_check import predictive_check

__all__ = ["STUDIES"]

Found = dict[str, Checked]


# --- by the guide's own weights -------------------------------------------------------------------


def _weights(pair: NormalNormal, count: int, seed: int) -> Found:
    x = pair.data(count, seed)
    found = watched(
        posterior_quality(
            pair.model, pair.guide, x, num_particles=1000, checks=[], seed=seed, progress=False
        )
    )
    reverse, variation = pair.divergences()
    mean = pair.mean(x).numpy()
    truths = {
        "kl_guide_posterior": pair.kl(x),
        "kl_posterior_guide": reverse,
        "total_variation": variation,
        "mean": mean + pair.shift * pair.sd,
        "sd": pair.scale * pair.sd,
        "corrected_mean": mean,
        "corrected_sd": pair.sd,
        "mean_correction": pair.shift,
        "scale_correction": np.log(pair.scale),
    }
    guards = {name: found[name].attrs.get("reliable_by") for name in truths}
    return {
        f"{name}_se": interval(
            found[name].values.ravel(),
            found[f"{name}_se"].values.ravel(),
            truth,
            False if guards[name] is None else ~found[guards[name]].values,
        )
        for name, truth in truths.items()
    }


# --- beside a reference ---------------------------------------------------------------------------

_FEW: dict[str, Any] = {"num_particles": 200, "num_test_draws": 60, "num_permutations": 99}
_THRESHOLDS = Thresholds(reference_ess=100.0, rhat=1.1)


def _reference(exact: bool, count: int, seed: int) -> Found:
    """Independent draws of the posterior, 100 data at once: these share their permutations."""
    pair = NormalNormal(1.0, 0.0) if exact else NormalNormal(1.2, 0.3)
    parts = []
    for i in range(-(-count // 100)):
        x = pair.data(min(count, 100), seed + i)
        noise = np.random.default_rng([seed, i]).normal(size=(300, len(x), 1))
        reference = pair.mean(x)[:, None] + pair.sd * tensor(noise)
        checks = ["stein", "energy", "mmd", "classifier"] if exact else []
        found = watched(
            posterior_quality(
                pair.model,
                pair.guide,
                x,
                reference=reference,
                checks=checks,
                seed=seed + i,
                progress=False,
                thresholds=_THRESHOLDS,
                **_FEW,
            )
        )
        parts.append(_null(found) if exact else _moments(pair, x, found))
    return joined(parts)


def _null(found: Any) -> Found:
    names = ("ksd_p_value", "energy_p_value", "mmd_p_value", "c2st_p_value")
    tests = {name: p_value(found[name]) for name in names}
    error = interval(found.c2st_accuracy, found.c2st_accuracy_se, 0.5)
    return {**tests, "c2st_accuracy_se": error}


def _moments(pair: NormalNormal, x: Tensor, found: Any) -> Found:
    mean, wide = pair.mean(x).numpy(), np.log(pair.scale)
    truths = {
        "reference_mean": mean,
        "reference_sd": pair.sd,
        "mean_error": pair.shift,
        "scale_error": wide,
        "corrected_mean_error": 0.0,
        "corrected_scale_error": 0.0,
    }
    return {
        f"{name}_se": interval(
            found[name].values.ravel(),
            found[f"{name}_se"].values.ravel(),
            truth,
            ~found.reference_converged.values,
        )
        for name, truth in truths.items()
        if f"{name}_se" in found
    }


def _hmc(count: int, seed: int) -> Found:
    """Errors by the effective sample size of chains."""
    pair = NormalNormal(1.2, 0.3)
    x = pair.data(count, seed)
    options: dict[str, Any] = {
        "num_chains": 4,
        "num_warmup": 50,
        "num_samples": 100,
        "num_leapfrog": 4,
    }
    found = watched(
        posterior_quality(
            pair.model,
            pair.guide,
            x,
            num_particles=400,
            reference="hmc",
            checks=[],
            seed=seed,
            progress=False,
            thresholds=_THRESHOLDS,
            **options,
        )
    )
    return _moments(pair, x, found)


# --- calibration ----------------------------------------------------------------------------------

_LATENTS = 12


def _wide_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(_LATENTS), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.7).to_event(1), obs=x)


def _wide_guide(x: Tensor) -> None:
    pair = NormalNormal()
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pair.mean(x), pair.sd).to_event(1))


def _calibration(size: int, count: int, seed: int) -> Found:
    """Latents that have nothing to do with one another: a replication each."""
    each = {"ecdf_p_value", "chi_square_p_value", "symmetry_p_value"}
    once = {"log_joint_p_value", "tarp_p_value", "overall_p_value"}
    parts = []
    shapes = torch.zeros(size, _LATENTS, dtype=torch.float64)
    for i in range(count):
        found = watched(
            calibrate(
                _wide_model,
                _wide_guide,
                shapes,
                num_simulations=size,
                seed=seed + i,
                progress=False,
            )
        )
        columns = {name: p_value(found[name]) for name in each | once}
        columns["bias_se"] = interval(found.bias, found.bias_se, 0.0)
        level = found.sel(level=0.8)
        columns["coverage_se"] = interval(level.coverage, level.coverage_se, 0.8)
        parts.append(columns)
    return joined(parts)


# --- predictive checks ----------------------------------------------------------------------------


def _predictive(kind: str, count: int, seed: int) -> Found:
    pair = NormalNormal(1.0, 0.0)
    p, likely = [], []
    for i in range(count):
        x = pair.data(20, seed + i)
        found = watched(
            predictive_check(
                pair.model,
                pair.guide,
                x,
                kind="prior" if kind == "prior" else "posterior",
                num_draws=59,
                statistics={"mean": torch.mean, "largest": torch.max, "sd": torch.std},
                seed=seed + i,
            )
        )
        p.append(found.p_value.values.ravel())
        if "likelihood_p_value" in found:
            likely.append(found.likelihood_p_value.values.ravel())
    answers = {"p_value": p_value(np.concatenate(p))}
    if likely:
        answers["likelihood_p_value"] = p_value(np.concatenate(likely))
    return answers


def _test(name: str, **more: Any) -> Row:
    return Row(name, **{"most": 0.055, "breaks": "", "guard": "", **more})


_RELIABLE, _MOMENTS = "`error_reliable`", "`moments_reliable`"
_OF_WEIGHTS = {  # and what then speaks
    "kl_guide_posterior_se": _RELIABLE,
    "kl_posterior_guide_se": "`kl_posterior_guide_reliable`",
    "total_variation_se": _RELIABLE,
    "mean_se": "",
    "sd_se": "",
    "corrected_mean_se": _RELIABLE,
    "corrected_sd_se": _MOMENTS,
    "mean_correction_se": _RELIABLE,
    "scale_correction_se": _MOMENTS,
}
_BESIDE = (
    "reference_mean_se",
    "reference_sd_se",
    "mean_error_se",
    "scale_error_se",
    "corrected_mean_error_se",
    "corrected_scale_error_se",
)
_HEAVY = "k-hat above its threshold"
_INFINITE = "infinite variance of the weights"

STUDIES = [
    Study(
        "posterior by weights",
        "posterior_quality",
        partial(_weights, NormalNormal()),
        tuple(
            Row(name, breaks=_HEAVY if guard else "never", guard=guard)
            for name, guard in _OF_WEIGHTS.items()
        ),
    ),
    Study(
        "posterior by weights, true k-hat 0.6",
        "posterior_quality",
        partial(_weights, NormalNormal(0.4**0.5, 0.0)),
        (
            Row("mean_se", breaks="never", guard=""),
            *(
                Row(name, 0.95, None, _INFINITE, _OF_WEIGHTS[name], speaks=speaks)
                for name, speaks in (
                    ("kl_posterior_guide_se", 0.85),
                    ("total_variation_se", 0.5),
                    ("corrected_mean_se", 0.5),
                    ("corrected_sd_se", 0.75),
                    ("scale_correction_se", 0.75),
                )
            ),
        ),
    ),
    Study(
        "beside 300 exact draws",
        "posterior_quality",
        partial(_reference, False),
        tuple(
            Row(name, most=0.08, breaks="dependent draws", guard="R-hat, ESS") for name in _BESIDE
        ),
    ),
    Study(
        "exact guide beside exact draws",
        "posterior_quality",
        partial(_reference, True),
        (
            _test("ksd_p_value", most=0.08, breaks="few draws", guard="docstring"),
            _test("energy_p_value", breaks="dependent draws", guard="they are thinned"),
            _test("mmd_p_value", breaks="dependent draws", guard="they are thinned"),
            _test("c2st_p_value", breaks="dependent draws", guard="they are thinned"),
            Row("c2st_accuracy_se", breaks="samples differ", guard="then too large"),
        ),
        quick=25,
    ),
    Study(
        "beside HMC",
        "posterior_quality",
        _hmc,
        tuple(
            Row(
                name, most=0.08, breaks="100 draws a chain", guard="`reference_converged`, from 400"
            )
            for name in _BESIDE
        ),
        quick=40,
    ),
    Study(
        "calibration, 60 simulations",
        "calibrate",
        partial(_calibration, 60),
        (
            _test("ecdf_p_value", breaks="never: exact", guard=""),
            _test("chi_square_p_value", most=0.07, breaks="few simulations", guard="exact twin"),
            _test("symmetry_p_value", breaks="few simulations", guard=""),
            _test("log_joint_p_value", breaks="never: exact", guard=""),
            _test("tarp_p_value", breaks="never: exact", guard=""),
            _test("overall_p_value", breaks="never: Bonferroni", guard=""),
            Row("bias_se", breaks="few simulations", guard="at least 50 are asked for"),
            Row("coverage_se", most=0.09, breaks="levels near 1, few simulations", guard="none"),
        ),
        quick=4,
        longest=400,
    ),
    Study(
        "prior predictive",
        "predictive_check",
        partial(_predictive, "prior"),
        (_test("p_value", breaks="never: exact", guard=""),),
        quick=15,
        longest=600,
    ),
    Study(
        "posterior predictive",
        "predictive_check",
        partial(_predictive, "posterior"),
        (
            _test("p_value", breaks="a guide too narrow", guard="a note on every result"),
            _test("likelihood_p_value", breaks="a guide too narrow", guard="the same note"),
        ),
        quick=5,
        longest=600,
    ),
]
