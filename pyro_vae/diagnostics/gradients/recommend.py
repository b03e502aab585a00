"""What follows from a comparison of estimators: slopes, tables and which one to train with."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pyro_vae.results import Result, label, make_result

__all__ = ["estimator_rows", "recommend_estimators", "slope_rows", "snr_slopes"]

_CLEAR_OF_NOISE = 2.0  # noise floors that an SNR must reach to count for a slope


def snr_slopes(result: Result) -> Result:
    r"""Fits the slope of log SNR against log K, by weighted least squares.

    Points below twice the noise floor are left out: there the SNR is that of noise. The standard
    error is that of the weights, widened where the points scatter more than their own errors say.

    Args:
        result: From `compare_estimators`.

    Returns:
        Over `estimator` and `parameter`: `slope` and `slope_se`, `intercept` (log SNR at K = 1)
        and `num_points`. With fewer than two points the slope is nan.

    ReferenceRows:
        Rainforth et al. (2018), theorem 1: 1/2 for the model, -1/2 for the guide under IWAE.
    """
    snr = result["snr"].transpose("estimator", "parameter", "num_particles")
    errors = result["snr_se"].transpose(*snr.dims).values
    floor = _CLEAR_OF_NOISE * float(result["snr"].attrs["noise_floor"])
    log_k = np.log(result["num_particles"].values.astype(float))
    shape = snr.shape[:2]
    slope, slope_se, intercept = (np.full(shape, math.nan) for _ in range(3))
    count = np.zeros(shape, dtype=int)
    for place in np.ndindex(*shape):
        y, e = snr.values[place], errors[place]
        use = np.isfinite(y) & (y > floor) & (e > 0)
        count[place] = use.sum()
        if use.sum() < 2:
            continue
        slope[place], slope_se[place], intercept[place] = _line(
            log_k[use], np.log(y[use]), e[use] / y[use]
        )
    dims = ("estimator", "parameter")

    def pure(text: str) -> dict[str, Any]:
        return label(unit="none", reduction="none", bound="none", description=text)

    left_out = int((np.isfinite(snr.values).sum(-1) - count).sum())
    return make_result(
        {
            "slope": (dims, slope, pure("of log SNR against log K")),
            "slope_se": (dims, slope_se, {}),
            "intercept": (dims, intercept, pure("log SNR at K = 1, from the fit")),
            "num_points": (dims, count, {}),
        },
        function="snr_slopes",
        config={"noise_floor": floor / _CLEAR_OF_NOISE},
        seed=result.provenance.get("seed"),
        data_sha256=result.provenance.get("data_sha256"),
        coords={name: result[name].values for name in dims},
        notes=[f"{left_out} points below twice the noise floor are left out."] if left_out else (),
    )


def _line(x: np.ndarray, y: np.ndarray, errors: np.ndarray) -> tuple[float, float, float]:
    """Slope, its standard error and intercept of a weighted least-squares line."""
    weights = errors**-2
    centre = (weights * x).sum() / weights.sum()
    spread = (weights * (x - centre) ** 2).sum()
    slope = (weights * (x - centre) * y).sum() / spread
    intercept = (weights * y).sum() / weights.sum() - slope * centre
    freedom = len(x) - 2
    residual = (weights * (y - intercept - slope * x) ** 2).sum()
    widen = max(1.0, residual / freedom) if freedom else 1.0
    return float(slope), float(math.sqrt(widen / spread)), float(intercept)


def slope_rows(
    result: Result, theory: Mapping[tuple[str, str], str], late: int = 8
) -> list[dict[str, str]]:
    """Fitted slopes of log SNR against log K beside the theory, as text.

    Args:
        result: From `compare_estimators`.
        theory: What is known for large K, by names of the estimator and the group of parameters.
        late: Slopes are fitted once more to this and larger K.

    Returns:
        Rows with the same keys, in the order in which a table shows them.
    """
    slopes = snr_slopes(result)
    from_late = snr_slopes(result.sel(num_particles=slice(late, None)))
    return [
        {
            "estimator": str(name),
            "parameter": str(group),
            "slope": _slope_text(slopes.sel(estimator=name, parameter=group)),
            f"slope from K = {late}": _slope_text(from_late.sel(estimator=name, parameter=group)),
            "theory, large K": theory.get((str(name), str(group)), "-"),
        }
        for name in slopes["estimator"].values
        for group in slopes["parameter"].values
    ]


def _slope_text(row: Result) -> str:
    """A slope with its standard error and the number of points behind it."""
    points = int(row.num_points)
    if points < 2:
        return "-"
    return f"{float(row.slope):+.3f} ± {float(row.slope_se):.3f} ({points} points)"


def estimator_rows(result: Result, parameter: str) -> list[dict[str, str]]:
    """The comparison as text, a row for each estimator and K that was measured.

    Args:
        result: From `compare_estimators`.
        parameter: The group of parameters, such as "guide".

    Returns:
        Rows with the same keys, in the order in which a table shows them.
    """
    rows = []
    for name in result["estimator"].values:
        for k in result["num_particles"].values:
            row = result.sel(estimator=name, num_particles=k, parameter=parameter)
            if math.isnan(float(row.value)):
                continue
            below = " (noise)" if bool(row.snr_is_noise) else ""
            rows.append(
                {
                    "estimator": str(name),
                    "K": str(k),
                    "bound": str(row.bound.values),
                    "value": f"{float(row.value):.3f} ± {float(row.value_se):.1g}",
                    "bias": _with_error(row, "bias"),
                    "verdict": str(row.verdict.values),
                    "variance": _with_error(row, "variance"),
                    "SNR": f"{float(row.snr):.3g}{below}",
                    "ms": f"{1e3 * float(row.seconds):.2f}",
                    "kB": f"{float(row.bytes) / 1e3:.0f}",
                    "variance x s": f"{float(row.efficiency):.2e}",
                }
            )
    return rows


def _with_error(row: Result, name: str) -> str:
    value, error = float(row[name]), float(row[f"{name}_se"])
    return "unknown" if math.isnan(value) else f"{value:.2g} ± {error:.1g}"


def recommend_estimators(result: Result, parameter: str = "guide") -> list[dict[str, str]]:
    """For each bound and K the unbiased estimator with the least variance x time, by measurement.

    Estimators of different bounds climb different functions, so they are not ranked against each
    other. One whose bias is unknown, or that is biased by design, is not recommended.

    Args:
        result: From `compare_estimators`.
        parameter: The group of parameters that the ranking looks at.

    Returns:
        Rows with `bound`, `K`, `recommended`, `next` (with how many times as much variance x time,
        and its standard error) and `biased` (in brackets: by design, but too little to be seen).
    """
    rows = []
    for k in result["num_particles"].values:
        at = result.sel(num_particles=k, parameter=parameter)
        for bound in dict.fromkeys(at["bound"].values.tolist()):
            here = at.isel(estimator=np.flatnonzero(at["bound"].values == bound))
            claims = here["claims_unbiased"].values
            sound = here.isel(
                estimator=np.flatnonzero((here["verdict"].values == "no bias seen") & claims)
            )
            seen = here["verdict"].values == "biased"
            biased = [
                str(name) if s else f"({name})"
                for name, s, c in zip(here["estimator"].values, seen, claims, strict=True)
                if s or not c
            ]
            if not sound.sizes["estimator"]:
                continue
            order = np.argsort(sound["efficiency"].values)
            rows.append(
                {
                    "bound": str(bound),
                    "K": str(k),
                    "recommended": str(sound["estimator"].values[order[0]]),
                    "next": _runner_up(sound, order),
                    "biased": ", ".join(biased) or "-",
                }
            )
    return rows


def _runner_up(sound: Result, order: np.ndarray) -> str:
    if len(order) < 2:
        return "-"
    cost, error = sound["efficiency"].values[order], sound["efficiency_se"].values[order]
    name = sound["estimator"].values[order[1]]
    if not cost[0] > 0:
        return f"{name} (the first has no variance)"
    ratio = cost[1] / cost[0]
    spread = ratio * math.hypot(error[0] / cost[0], error[1] / cost[1])
    return f"{name} ({ratio:.2f} ± {spread:.2f} times)"
