"""What the ranks of a calibration say of the guide, in words."""

import numpy as np

from pyro_vae.diagnostics.calibration.ranks import rank_shape

__all__ = ["LEVEL", "SCOPE", "calibration_words"]

LEVEL = 0.01
"""Of all deciding tests of one calibration together."""

SCOPE = (
    "this is calibration on average over data from the model itself, and says nothing of real data "
    "that the model does not produce."
)
"""What no calibration of this kind can tell."""

_SHOWN = 6  # latents that a note names


def calibration_words(
    ranks: dict[str, np.ndarray],
    names: list[str],
    p: dict[str, np.ndarray],
    num_draws: int,
    *,
    blind: bool,
) -> list[str]:
    """The verdict of `calibration.calibrate`.

    Args:
        ranks: By `ranks`, `log_joint` and `tarp`.
        names: Of the latents.
        p: p-values of the same.
        num_draws: L.
        blind: Whether the guide's draws ignore its data.
    """
    tests = len(names) + 2
    bar = LEVEL / tests
    shape = rank_shape(ranks["ranks"], num_draws)
    notes = []
    bad = [i for i in range(len(names)) if p["ranks"][i] <= bar]
    bad.sort(key=lambda i: -max(abs(shape.slope[i]), abs(shape.spread[i])))
    if bad:
        listed = "; ".join(
            f"{names[i]}: {_fault(shape.slope[i], shape.spread[i])}" for i in bad[:_SHOWN]
        )
        more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        notes.append(
            f"{len(bad)} of {len(names)} latents are miscalibrated under the model's own data. "
            f"{listed}{more}."
        )
    if p["log_joint"][0] <= bar:
        slope = rank_shape(ranks["log_joint"], num_draws).slope[0]
        why = (
            "the truth has a higher log p(x, z) than the guide's draws: the guide is too wide or "
            "off centre, leaves out correlations, or makes too little of the data"
            if slope > 0
            else "the truth has a lower log p(x, z) than the guide's draws: the guide is too "
            "narrow, or misses a part of the posterior"
        )
        notes.append(f"the ranks of log p(x, z) are not uniform; {why}.")
    if p["tarp"][0] <= bar:
        notes.append("distances to random points (TARP) show a fault of the joint distribution.")
    failing = (
        f"an exact guide is called miscalibrated with probability at most {LEVEL:g} "
        f"({tests} ECDF tests, each at {bar:.2g})"
    )
    if notes:
        notes.append(f"{failing}.")
    else:
        notes.append(f"no check rejects at level {LEVEL:g}; {failing}.")
    if blind:
        notes.append(
            "the guide's draws do not depend on its data, so it is not amortised: fit it anew to "
            "every simulation (joint=True with refit)."
        )
    return notes


def _fault(slope: float, spread: float) -> str:
    """What the ranks of one latent say of the guide; both in standard errors."""
    words = []
    if abs(slope) > 3:
        words.append("the guide is too low" if slope > 0 else "the guide is too high")
    # A shift alone lifts the spread of the ranks a little.
    if abs(spread) > 3 and abs(spread) > abs(slope) / 2:
        words.append("too narrow (U-shaped ranks)" if spread > 0 else "too wide (humped ranks)")
    if not words:
        return "ranks are not uniform, without bias or a wrong width"
    return " and ".join(words) if len(words) > 1 or abs(slope) > 3 else f"the guide is {words[0]}"
