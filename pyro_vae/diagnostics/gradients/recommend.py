"""What follows from a comparison of estimators: slopes, tables and which one to train with."""

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np

from pyro_vae.results import Result, label, make_result, rows_html
from pyro_vae.text import rows_text

__all__ = [
    "EstimatorComparison",
    "Recommendation",
    "estimator_rows",
    "recommend_estimators",
    "recommendation",
    "slope_rows",
    "snr_slopes",
]

_INK = "#0072B2"
_WIDTH = 100  # columns of text
_CLEAR_OF_NOISE = 2.0  # noise floors that an SNR must reach to count for a slope


def snr_slopes(result: Result) -> Result:
    r"""Fits the slope of log SNR against log K, by weighted least squares.

    Points below twice the noise floor are left out: there the SNR is that of noise. The standard
    error is that of the weights, widened where the points scatter more than their own errors say.

    Args:
        result: From `compare_estimators`.

    Returns:
        ============  ====================  ===========  =========================================
        name          dims                  unit, bound  meaning
        ============  ====================  ===========  =========================================
        `slope`       estimator, parameter  none, none   of log SNR against log K, with `slope_se`
        `intercept`   estimator, parameter  none, none   log SNR at K = 1
        `num_points`  estimator, parameter  none         points that count for the fit
        ============  ====================  ===========  =========================================

        With fewer than two points the slope is nan.

    References:
        Rainforth et al. (2018): 1/2 for the model, -1/2 for the guide under IWAE.
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
                    "passes": f"{float(row.passes):g}",
                    "ms": f"{1e3 * float(row.seconds):.2f}",
                    "kB": f"{float(row.bytes) / 1e3:.0f}",
                    "variance x passes": f"{float(row.efficiency):.2e}",
                }
            )
    return rows


def _with_error(row: Result, name: str) -> str:
    value, error = float(row[name]), float(row[f"{name}_se"])
    return "unknown" if math.isnan(value) else f"{value:.2g} ± {error:.1g}"


def recommend_estimators(result: Result, parameter: str = "guide") -> list[dict[str, str]]:
    """For each bound and K the unbiased estimator with the least variance x passes.

    A pass is a run of the programs with one particle, so the ranking is that of every machine.

    Estimators of different bounds maximise different functions, so they are not ranked against
    each other. One whose bias is unknown, or that is biased by design, is not recommended.

    Args:
        result: From `compare_estimators`.
        parameter: The group of parameters that the ranking looks at.

    Returns:
        Rows with `bound`, `K`, `recommended`, `next` (with how many times as much variance x
        passes, and its standard error) and `biased` (in brackets: by design, but too little to be
        seen).
    """
    return [
        {
            "bound": ranking.bound,
            "K": str(ranking.num_particles),
            "recommended": ranking.names[0],
            "next": ranking.next_text(),
            "biased": ", ".join(ranking.biased) or "-",
        }
        for ranking in _rankings(result, parameter)
        if ranking.names
    ]


@dataclass(frozen=True)
class _Ranking:
    """The estimators of one bound without a measurable bias, the least variance x time first."""

    bound: str
    num_particles: int
    names: list[str]
    costs: np.ndarray
    errors: np.ndarray
    biased: list[str]

    def ratio(self) -> tuple[float, float]:
        """The next one's variance x time over the first's, and its standard error."""
        if not self.costs[0] > 0:
            return math.inf, math.nan
        ratio = float(self.costs[1] / self.costs[0])
        first, second = self.errors[:2] / self.costs[:2]
        return ratio, ratio * math.hypot(first, second)

    def is_clear(self) -> bool:
        """Whether the first is ahead of the next by two standard errors."""
        if len(self.names) < 2:
            return True
        ratio, error = self.ratio()
        return not ratio - 2 * error < 1

    def times_text(self) -> str:
        """How many times as much the next one needs."""
        ratio, error = self.ratio()
        return "the first has no variance" if math.isinf(ratio) else f"{ratio:.2f} ± {error:.2f}"

    def next_text(self) -> str:
        """The next one, with how many times as much it needs."""
        if len(self.names) < 2:
            return "-"
        times = "" if math.isinf(self.ratio()[0]) else " times"
        return f"{self.names[1]} ({self.times_text()}{times})"


def _rankings(result: Result, parameter: str) -> list[_Ranking]:
    """For each K and bound that were measured."""
    found = []
    for k in result["num_particles"].values:
        at = result.sel(num_particles=k, parameter=parameter)
        for bound in dict.fromkeys(at["bound"].values.tolist()):
            here = at.isel(estimator=np.flatnonzero(at["bound"].values == bound))
            claims = here["claims_unbiased"].values
            seen = here["verdict"].values == "biased"
            sound = here.isel(
                estimator=np.flatnonzero((here["verdict"].values == "no bias seen") & claims)
            )
            sound = sound.isel(estimator=np.argsort(sound["efficiency"].values))
            biased = [
                str(name) if s else f"({name})"
                for name, s, c in zip(here["estimator"].values, seen, claims, strict=True)
                if s or not c
            ]
            costs, errors = sound["efficiency"].values, sound["efficiency_se"].values
            names = [str(name) for name in sound["estimator"].values]
            found.append(_Ranking(str(bound), int(k), names, costs, errors, biased))
    return found


# --- in short -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recommendation:
    """What a comparison of estimators comes to: one sentence, one short table, one picture.

    Attributes:
        sentence: Which estimator to train with, and by how much it is ahead.
        rows: For each K and bound the first and the next by variance x time, as text.
        parameter: The group of parameters whose gradients were ranked.
        result: The comparison.
    """

    sentence: str
    rows: list[dict[str, str]]
    parameter: str
    result: Result

    def __str__(self) -> str:
        parts = [textwrap.fill(_as_sentence(self.sentence), _WIDTH)]
        return "\n".join([*parts, "", rows_text(self.rows)] if self.rows else parts)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(_as_sentence(self.sentence))}</p>{rows_html(self.rows)}"

    def plot(self, ax: Any = None) -> Any:
        """Plots variance x time of every estimator, a marker for each K: further left is better.

        Full markers were measured without a bias; hollow ones are biased, or have no reference.

        Args:
            ax: The matplotlib axes to draw on; a new figure if None.

        Returns:
            The axes.
        """
        from matplotlib.figure import Figure  # late: only who draws pays for it

        at = self.result.sel(parameter=self.parameter)
        at = at.isel(estimator=np.argsort(at["bound"].values, kind="stable")[::-1])
        places = np.arange(at.sizes["estimator"])
        if ax is None:
            size = (7.0, 0.34 * len(places) + 1.8)
            ax = Figure(figsize=size, layout="constrained").add_subplot()
        for k, marker in zip(at["num_particles"].values, cycle("os^vDP"), strict=False):
            costs = at.sel(num_particles=k)
            x, error = costs["efficiency"].values, costs["efficiency_se"].values
            sound = costs["verdict"].values == "no bias seen"
            bars = np.stack([np.minimum(error, 0.9 * x), error])
            use = x > 0  # without variance there is no place on a logarithmic axis
            ax.errorbar(x[use], places[use], xerr=bars[:, use], fmt="none", ecolor=_INK, zorder=2)
            for chosen, face in ((use & sound, _INK), (use & ~sound, "white")):
                look = {"color": _INK, "markerfacecolor": face, "zorder": 3}
                ax.plot(x[chosen], places[chosen], marker, **look)
            ax.plot([], [], marker, color=_INK, label=f"K = {k}")
        bounds = zip(at["estimator"].values, at["bound"].values, strict=True)
        ax.set_yticks(places, [f"{name} ({bound})" for name, bound in bounds])
        ax.set_xscale("log")
        ax.set_xlabel("variance x time of one gradient, nats squared x s")
        ax.set_title(f"Gradient of {self.parameter!r}: further left is better")
        ax.grid(alpha=0.25, axis="x")
        ax.legend(fontsize="small", title="hollow: biased, or no reference", title_fontsize="small")
        return ax


def recommendation(result: Result, parameter: str | None = None) -> Recommendation:
    """Which estimator a comparison says to train with.

    Args:
        result: From `compare_estimators`, also one that was read from a file.
        parameter: The group of parameters that the ranking looks at; None for "guide", or the
            first where there is none of that name.

    Raises:
        KeyError: If there is no such group; lists those there are.
    """
    groups = [str(name) for name in result["parameter"].values]
    if parameter is None:
        parameter = "guide" if "guide" in groups else groups[0]
    if parameter not in groups:
        raise KeyError(f"there is no group {parameter!r}; there are {', '.join(groups)}")
    rankings = [ranking for ranking in _rankings(result, parameter) if ranking.names]
    rows = [
        {
            "bound": ranking.bound,
            "K": str(ranking.num_particles),
            "least variance x time": ranking.names[0],
            "next": ranking.names[1] if len(ranking.names) > 1 else "-",
            "times as much": ranking.times_text() if len(ranking.names) > 1 else "-",
        }
        for ranking in rankings
    ]
    return Recommendation(_sentence(rankings, parameter), rows, parameter, result)


def _sentence(rankings: Sequence[_Ranking], parameter: str) -> str:
    """For the ELBO the best of all K, for every other bound the best at the largest K."""
    if not rankings:
        return (
            "no estimator can be recommended: none was measured without a bias (was there a "
            "reference?)"
        )
    chosen: dict[str, _Ranking] = {}
    for ranking in rankings:
        known = chosen.get(ranking.bound)
        if known is None or ranking.bound != "ELBO" or ranking.costs[0] < known.costs[0]:
            chosen[ranking.bound] = ranking
    goals = {bound: f"the {bound} bound with K = {r.num_particles}" for bound, r in chosen.items()}
    goals["ELBO"] = "the ELBO"
    parts = [
        f"to maximise {goals[bound]}, train with {_choice(ranking, parameter)}"
        for bound, ranking in chosen.items()
    ]
    return "; ".join(parts) + "."


def _choice(ranking: _Ranking, parameter: str) -> str:
    """Which estimator, and how far ahead of the next it is."""
    at = f" (K = {ranking.num_particles})" if ranking.bound == "ELBO" else ""
    first, *others = ranking.names
    if not ranking.costs[0] > 0:
        return f"{first}{at}, whose gradient of {parameter!r} has no variance here"
    if not others:
        return f"{first}{at} (no other estimator of it was measured without a bias)"
    if not ranking.is_clear():
        return (
            f"{first} or {others[0]}{at}, not told apart by the variance x time of their gradients "
            f"of {parameter!r} ({ranking.times_text()} times)"
        )
    return (
        f"{first}{at}: of the {len(ranking.names)} estimators without a measurable bias its "
        f"gradient of {parameter!r} has the least variance x time "
        f"({others[0]} {ranking.times_text()} times as much)"
    )


class EstimatorComparison(Result):
    """What `compare_estimators` returns: a `Result` that prints what it comes to."""

    __slots__ = ()

    def recommend(self, parameter: str | None = None) -> Recommendation:
        """Which estimator to train with: one sentence, one short table, and `plot()`.

        Args:
            parameter: The group of parameters whose gradients are ranked; None for "guide", or the
                first where there is none of that name.

        Raises:
            KeyError: If there is no such group; lists those there are.
        """
        return recommendation(self, parameter)

    def _is_whole(self) -> bool:
        needed = {"estimator", "num_particles", "parameter"}
        return needed <= set(self.dims) and {"efficiency", "verdict"} <= set(self.data_vars)

    def _measured(self) -> str:
        """What was measured, and where the rest is."""
        config, sizes = self.provenance["config"], self.sizes
        return (
            f"Measured: {config['repeats']} gradients of each of {sizes['estimator']} estimators "
            f"with K = {', '.join(map(str, self['num_particles'].values))}, of the parameters "
            f"{', '.join(map(str, self['parameter'].values))}: bias, variance, signal-to-noise, "
            f"time, memory. {len(self._notes())} notes. More: recommend().plot(), summary(), "
            "table(), and estimator_rows of pyro_vae.diagnostics.gradients."
        )

    def __repr__(self) -> str:
        if not self._is_whole():
            return super().__repr__()
        return f"{self.recommend()}\n\n{textwrap.fill(self._measured(), _WIDTH)}"

    def _repr_html_(self) -> str:
        if not self._is_whole():
            return super()._repr_html_()
        return f"{self.recommend()._repr_html_()}<p>{html.escape(self._measured())}</p>"


def _as_sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
