"""What all figures share: colours, signs, titles.

Every function of the room takes what it shows and, if wanted, the `Axes` to draw on, and returns
the `Axes`, as ArviZ's functions do. Without one it makes a figure of its own, which belongs to no
pyplot session and so needs no closing: ``plot_bound(fit.history).figure.savefig("bound.png")``.
Nothing here changes rcParams. The colours are Okabe and Ito's and Paul Tol's, which colour-blind
readers can tell apart; what matters is told by a second sign as well (a line style, a marker, a
word).
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_vae.inference.estimators import estimator_names

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#595959"
_CLASSES = (  # Paul Tol's "muted" scheme, ordered so that neighbouring classes differ in lightness
    "#332288",
    "#CC6677",
    "#117733",
    "#88CCEE",
    "#882255",
    "#DDCC77",
    "#44AA99",
    "#AA4499",
    "#999933",
    "#7F7F7F",
)
_MARKERS = "os^vDP*X<>"
_COMMON = (  # estimators with a colour of their own
    *("PathwiseELBO", "AnalyticELBO", "StickingTheLanding", "ScoreFunction", "LeaveOneOut"),
    *("ImportanceWeighted", "DReG", "VIMCO", "ReweightedWakeSleep", "WakeDReG"),
)
_PYROS = ("Pyro Trace_ELBO", "Pyro TraceGraph_ELBO", "Pyro RenyiELBO")
_ESTIMATORS = {  # the place of each in `_CLASSES`, so that it looks the same in every figure
    name: place for place, name in enumerate(dict.fromkeys((*_COMMON, *estimator_names(), *_PYROS)))
}
_SQUARE, _WIDE = (5.2, 5.2), (6.4, 4.6)


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    return Figure(figsize=size, layout="constrained").add_subplot() if ax is None else ax


def _thousands(number: int) -> str:
    return f"{number:,}"


def _name_band(ax: Axes, x: np.ndarray, below: np.ndarray, above: np.ndarray, name: str) -> None:
    at = int(
        np.searchsorted(x, math.sqrt(float(x[0]) * float(x[-1]))) if len(x) > 20 else len(x) // 2
    )
    ax.text(float(x[at]), float(below[at] + above[at]) / 2, name, ha="center", va="center")


def _title(what: str, data: str, about: str) -> str:
    return f"{what}\n{data}, {about}" if data else f"{what}\n{about}"


def _signs(names: Iterable[Any]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each name: for estimators always theirs, whatever stands beside.

    Other names get, in their order, the first signs that no estimator among them has.
    """
    own = {str(name): _ESTIMATORS.get(str(name).split("(")[0]) for name in names}
    free: Iterator[int] = (
        i for i in itertools.count() if i % len(_CLASSES) not in _places(own.values())
    )
    if len(_places(own.values())) == len(_CLASSES):
        free = itertools.count(len(_ESTIMATORS))
    return {name: _sign(next(free) if place is None else place) for name, place in own.items()}


def _places(given: Iterable[int | None]) -> set[int]:
    """The colours that are taken."""
    return {place % len(_CLASSES) for place in given if place is not None}


def _sign(i: int) -> tuple[str, str]:
    """A colour and a marker; pairs repeat after a hundred."""
    rounds, place = divmod(i, len(_CLASSES))
    return _CLASSES[place], _MARKERS[(place + rounds) % len(_MARKERS)]


def _legend_below(ax: Axes, title: str | None = None) -> None:
    ax.legend(
        fontsize="small",
        title=title,
        title_fontsize="small",
        ncols=2,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        frameon=False,
    )
