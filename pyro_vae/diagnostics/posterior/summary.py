"""The verdict on a posterior in sentences, and the data that it fits worst."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pyro_vae.diagnostics.posterior.assess import Thresholds, Verdict, Violation
from pyro_vae.diagnostics.posterior.pairs import MOST_RESAMPLES
from pyro_vae.results import Result

__all__ = ["blind_spots", "verdict_notes", "worst_data"]

_NAMED = 3  # data named in a note
_SAME = 1e-3  # total variation that rounding alone can give, also in single precision
_SAID = {
    "ksd_p_value": "the kernel Stein discrepancy",
    "energy_p_value": "the energy distance",
    "mmd_p_value": "the kernel two-sample test",
    "c2st_p_value": "the classifier",
}


def verdict_notes(
    columns: Mapping[str, Tensor],
    verdict: Verdict,
    thresholds: Thresholds,
    num_particles: int,
    *,
    joint: bool,
) -> list[str]:
    """What must be read first: how many data can be trusted, in which way, and why not the others.

    Args:
        columns: The numbers by name, `[batch]` or `[batch, latent]`.
        verdict: From `assess`.
        thresholds: What it was judged by.
        num_particles: Draws of the guide.
        joint: Whether there is one posterior for all data.
    """
    size = len(verdict.trustworthy)
    joint = joint or size == 1  # one posterior is spoken of as such
    notes = [_answer(verdict, size, joint)]
    notes += _why("the guide's draws as they are", verdict.guide, joint)
    notes += _why("importance-weighted draws", verdict.weights, joint)
    notes.append(_thresholds(verdict, thresholds, num_particles))
    notes += _worst(columns, verdict, joint)
    notes += _border(columns, verdict, joint)
    notes += _tests(columns, thresholds, joint)
    if "reference_converged" in columns:
        notes += _beside_the_reference(columns, thresholds, joint)
    return notes


def blind_spots(columns: Mapping[str, Tensor], left_out: Sequence[str]) -> list[str]:
    """What the numbers cannot see, and the checks that were not run with how to run them."""
    notes = [
        "k-hat, ESS, the divergences and the kernel Stein discrepancy are blind to a mode that the "
        "guide never visits"
        + (
            "; chains that start from the prior may see it."
            if "reference_converged" in columns
            else ", and so is this verdict: it rests on the guide's own draws."
        )
    ]
    if left_out:
        notes.append(f"Not run: {'; '.join(left_out)}.")
    return notes


def worst_data(result: Result, by: str = "khat", count: int = 10) -> Result:
    """Selects the data for which a number looks worst, the worst first.

    Args:
        result: From `posterior_quality`.
        by: A variable of it. Least is worst for `ess`, `reference_ess`, p-values and bools,
            greatest for all others, in absolute value for errors and corrections. Of several
            latents the worst counts. Unknown numbers come last, but an unknown k-hat comes first.
        count: How many data at most.

    Raises:
        ValueError: If the result has no such variable with one value per datum, or `count` is
            below 1.
    """
    if by not in result.data_vars or "datum" not in result[by].dims or by == "reason":
        known = [n for n, v in result.data_vars.items() if "datum" in v.dims and n != "reason"]
        raise ValueError(f"by is {by!r}, but must be one of {', '.join(map(str, known))}")
    if isinstance(count, bool) or count < 1:
        raise ValueError(f"count must be a whole number from 1, not {count!r}")
    variable = result[by].transpose("datum", ...)
    values = variable.values.astype(float).reshape(result.sizes["datum"], -1)
    least = by in ("ess", "reference_ess") or by.endswith("_p_value") or variable.dtype == bool
    signed = by.endswith(("_error", "_correction"))
    badness = -values if least else np.abs(values) if signed else values
    unknown = math.inf if by == "khat" else -math.inf
    badness = np.where(np.isnan(badness), unknown, badness).max(1)
    return result.isel(datum=np.argsort(-badness, kind="stable")[:count])


# --- sentences ------------------------------------------------------------------------------------


def _answer(verdict: Verdict, size: int, joint: bool) -> str:
    counts = [
        int(which.sum())
        for which in (verdict.trustworthy, verdict.trust_guide, verdict.trust_weights)
    ]
    if joint:
        guide, weights = ("may" if count else "may not" for count in counts[1:])
        start = "is trustworthy" if counts[0] else "is not trustworthy as a whole"
        return (
            f"this posterior {start}: the guide's draws {guide} be used as they are, and "
            f"importance-weighted draws {weights} be used."
        )
    return (
        f"the posteriors of {counts[0]} of {size} data are trustworthy. The guide's draws may be "
        f"used as they are for {counts[1]}, importance-weighted draws for {counts[2]}."
    )


def _why(title: str, violations: Sequence[Violation], joint: bool) -> list[str]:
    """Counts of each reason; a datum may have several."""
    merged: dict[str, Tensor] = {}
    for violation in violations:
        merged[violation.kind] = merged.get(violation.kind, violation.which) | violation.which
    found = [(kind, int(which.sum())) for kind, which in merged.items() if bool(which.any())]
    if not found:
        return []
    listed = "; ".join(kind if joint else f"{kind} ({count})" for kind, count in found)
    where = "" if joint else ", with how many data each is true of"
    return [f"against {title}{where}: {listed}."]


def _thresholds(verdict: Verdict, thresholds: Thresholds, num_particles: int) -> str:
    limits_said = (
        f"the limits: k-hat at most min(1 - 1/log10 S, 0.7) = {verdict.threshold:.2f} at S = "
        f"{num_particles} draws ({thresholds.khat_moments:g} for weight x squared deviation), "
        f"{thresholds.ess:g} effective draws, at most {thresholds.widening:.2f} times as wide as "
        f"the guide's; means within {thresholds.mean:g} sd, sds within a factor of "
        f"{math.exp(thresholds.scale):.2f}, total variation at most {thresholds.total_variation:g}."
    )
    if not verdict.num_comparisons:
        return f"{limits_said} No error could be checked."
    return (
        f"{limits_said} Each of the {verdict.num_comparisons} errors checked must be within its "
        f"limit, and {verdict.standard_errors:.1f} standard errors too. So, if all posteriors were "
        f"exact, any would be called wrong in at most {100 * thresholds.level:.3g} % of such "
        "results; and what passes is within twice the limits."
    )


def _worst(columns: Mapping[str, Tensor], verdict: Verdict, joint: bool) -> list[str]:
    """The data that cannot be trusted and have the highest k-hat, by name."""
    bad = torch.nonzero(~verdict.trustworthy)[:, 0].tolist()
    if not bad:
        return []
    reasons = verdict.reasons()
    if joint:
        return [f"{reasons[0]}."]
    khat = columns["khat"].nan_to_num(nan=math.inf)
    bad.sort(key=lambda n: -float(khat[n]))
    notes = [
        f"number {rank} by k-hat of those not trusted is datum {n} ({_khat_text(columns, n)}). "
        f"{reasons[n]}."
        for rank, n in enumerate(bad[:_NAMED], start=1)
    ]
    return [*notes, "the variable `reason` says why of every datum; worst_data(result) lists them."]


def _khat_text(columns: Mapping[str, Tensor], n: int) -> str:
    khat, se = float(columns["khat"][n]), float(columns["khat_se"][n])
    if khat == -math.inf:
        return "no k-hat, the largest weights are equal"
    return f"k-hat {khat:.2f} +- {se:.2f}" if math.isfinite(khat) else "no k-hat"


def _border(columns: Mapping[str, Tensor], verdict: Verdict, joint: bool) -> list[str]:
    khat, se = columns["khat"], columns["khat_se"]
    near = int(((khat - verdict.threshold).abs() <= se).sum())
    same = columns["total_variation"] < _SAME
    equal = int(((khat == -math.inf) & same).sum())
    tied = int(((khat == -math.inf) & ~same).sum())
    notes = []
    if near:
        where = "" if joint else f" for {near} of {len(khat)} data"
        notes.append(
            f"k-hat is within one standard error of its threshold{where}: on which side it falls "
            "is a matter of the seed; more draws settle it."
        )
    if equal:
        where = "" if joint else f" for {equal} of {len(khat)} data"
        notes.append(
            f"all weights are equal{where}: k-hat is -inf there, and the guide is the posterior "
            "wherever it draws."
        )
    if tied:
        where = "" if joint else f" for {tied} of {len(khat)} data"
        notes.append(
            f"the largest weights are equal{where}, as those of discrete latents are: k-hat is "
            "-inf there, for they have no tail."
        )
    return notes


def _tests(columns: Mapping[str, Tensor], thresholds: Thresholds, joint: bool) -> list[str]:
    """How often tests that find any difference found one."""
    from scipy.stats import false_discovery_control

    found = []
    for name, title in _SAID.items():
        if name not in columns or bool(columns[name].isnan().all()):
            continue
        p = columns[name][~columns[name].isnan()].numpy()
        rejected = int((false_discovery_control(p) <= thresholds.level).sum())
        found.append(
            f"{title} (p = {p[0]:.2g})" if joint else f"{title} for {rejected} of {len(p)} data"
        )
    if not found:
        return []
    how = "" if joint else f" at a false discovery rate of {thresholds.level:g}"
    fewest = math.ceil(
        len(next(iter(columns.values()))) / (thresholds.level * (1 + MOST_RESAMPLES))
    )
    if fewest > 1:
        how += f" ({MOST_RESAMPLES:,} permutations cannot find fewer than {fewest} data)"
    return [
        f"tests of whether the guide is exact find a difference{how}: {', '.join(found)}."
        if not joint
        else f"tests of whether the guide is exact: {', '.join(found)}.",
        "with enough draws such tests find any difference, however small, so a small p-value alone "
        "counts against no posterior.",
    ]


def _beside_the_reference(
    columns: Mapping[str, Tensor], thresholds: Thresholds, joint: bool
) -> list[str]:
    converged = columns["reference_converged"]
    good, size = int(converged.sum()), len(converged)
    rule = (
        f"R-hat at most {thresholds.rhat:g} and " if "rhat" in columns else ""
    ) + f"at least {thresholds.reference_ess:g} effective draws"
    notes = []
    if good < size and joint:
        notes.append(
            f"the reference did not converge ({rule}), so what compares with it is nan and nothing "
            "is trusted; run it longer (num_samples, num_warmup), for chains that disagree may be "
            "in different modes."
        )
    elif good < size:
        notes.append(
            f"the reference converged for {good} of {size} data ({rule}). What compares with it is "
            "nan for the others, and they are not trusted, for chains that disagree may be in "
            "different modes; result.isel(datum=result.reference_converged.values) leaves them "
            "out. Longer chains help (num_samples, num_warmup)."
        )
    if good:
        said = [
            f"{text} {float(columns[name][converged].abs().nanmean()):.2g}"
            for name, text in (
                ("mean_error", "error of a mean (in sds)"),
                ("scale_error", "error of a log sd"),
                ("c2st_accuracy", "accuracy of the classifier (0.5 is best)"),
            )
            if name in columns
        ]
        where = "" if joint else f" where the reference converged, mean over {good} data"
        notes.append(f"beside the reference{where}: {', '.join(said)}.")
    return notes
