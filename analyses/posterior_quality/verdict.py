"""What `analyses.posterior_quality` found: its tables, its figures and the verdict in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, spearmanr

from analyses.pages import mean_and_error
from pyro_vae import VAE
from pyro_vae.diagnostics.posterior import worst_data
from pyro_vae.inference.log_weights import khat_threshold
from pyro_vae.results import Result

LEVEL = 0.01  # of all comparisons together, and of the calibration of each guide


@dataclass(frozen=True)
class Case:
    """A guide: what sets it apart, and from which other one.

    Attributes:
        title: Its name.
        against: The guide that it differs from in one thing.
        change: That thing, in words.
        posterior: Its family.
        estimator: What it is trained by, with several draws; the ELBO with one draw if None.
        large: Whether it has the larger encoder.
        simulated: Whether it is trained on draws from the model in place of data.
    """

    title: str
    against: str
    change: str
    posterior: str = "diagonal"
    estimator: str | None = None
    large: bool = False
    simulated: bool = False


@dataclass(frozen=True)
class Measured:
    """A guide and what was found.

    Attributes:
        case: What it is.
        vae: The model with this guide.
        quality: From `posterior_quality`.
        seconds: Of training.
    """

    case: Case
    vae: VAE
    quality: Result
    seconds: float


# --- numbers --------------------------------------------------------------------------------------


# Name -> words, numbers per datum, whether more is better, format.
MEASURES: Mapping[str, tuple[str, bool, str]] = {
    "trust_guide": ("the share of data whose draws may be used as they are", True, ".0%"),
    "trust_weights": ("the share whose weighted draws may be used", True, ".0%"),
    "khat": ("mean k-hat", False, ".2f"),
    "kl": ("KL(q || p)", False, ".3f"),
    "mean_error": ("the error of the mean", False, ".2f"),
    "scale_error": ("the error of the log sd", False, ".2f"),
    "c2st": ("the classifier's accuracy", False, ".3f"),
}


def per_datum(quality: Result, name: str) -> np.ndarray:
    """A measure of each datum; nan where it is unknown."""
    if name.startswith("trust"):
        return quality[name].values.astype(float)
    if name == "khat":
        return np.where(np.isfinite(quality["khat"].values), quality["khat"].values, np.nan)
    if name == "kl":
        return quality["kl_guide_posterior"].values
    if name == "c2st":
        return quality["c2st_accuracy"].values
    return np.abs(quality[name].transpose("datum", "latent").values).mean(1)


def row_of(measured: Measured) -> dict[str, str]:
    """The line of one guide in the table."""
    quality = measured.quality

    def text(name: str) -> str:
        value, error = mean_and_error(per_datum(quality, name))
        digits = 3 if name in ("kl", "c2st") else 2
        return f"{value:.{digits}f} ± {error:.{digits}f}"

    def share(name: str) -> str:
        value = float(quality[name].values.mean())
        return (
            f"{100 * value:.0f} ± {100 * math.sqrt(value * (1 - value) / len(quality.datum)):.0f}"
        )

    ratio = math.exp(mean_and_error(quality["scale_error"].values.ravel())[0])
    covered = quality["coverage"].sel(level=0.9).values
    ranks = quality["ecdf_p_value"].values
    return {
        "guide": measured.case.title,
        "as is, %": share("trust_guide"),
        "weighted, %": share("trust_weights"),
        "median k-hat": f"{float(quality['khat'].median()):.2f}",
        "KL(q || p)": text("kl"),
        "mean error": text("mean_error"),
        "sd ratio": f"{ratio:.2f}",
        "C2ST": text("c2st"),
        "90 % covers": ", ".join(f"{100 * c:.0f}" for c in covered),
        "p, latents": ", ".join(p_value(p) for p in ranks),
        "p, log joint": p_value(float(quality["log_joint_p_value"])),
        "p, TARP": p_value(float(quality["tarp_p_value"])),
    }


def p_value(p: float) -> str:
    """A p-value in few digits; tiny ones are known as bounds only."""
    if p < 1e-9:
        return "<1e-9"
    return f"{p:.2f}" if p >= 0.095 else f"{p:.1g}"


def with_sign(p: float) -> str:
    """A p-value in a sentence."""
    return f"p {p_value(p)}".replace("<", "< ") if p < 1e-9 else f"p = {p_value(p)}"


# --- sentences ------------------------------------------------------------------------------------


def verdicts(found: Sequence[Measured]) -> list[str]:
    """The verdict on the base, then what each change improves; all from the numbers."""
    by_title = {m.case.title: m for m in found}
    sentences = [*of_base(found[0].quality), *of_reference(found[0].quality)]
    changed = [m for m in found[1:] if m.case.against in by_title]
    standard_errors = float(norm.isf(LEVEL / (2 * max(len(changed) * len(MEASURES), 1))))
    sentences += [of_change(m, by_title[m.case.against], standard_errors) for m in changed]
    sentences += [of_calibration(found), *of_best(found)]
    if changed:
        sentences.append(
            f"A change counts where it is beyond {standard_errors:.1f} standard errors of the "
            f"paired difference over data, so that all {len(changed) * len(MEASURES)} comparisons "
            f"together claim anything falsely with probability {LEVEL:g}. Guides were trained once "
            "each: another seed of the training may move them by more."
        )
    return sentences


def of_base(quality: Result) -> list[str]:
    """How far the first guide can be trusted, and what k-hat alone would have said."""
    guide, weights, both = (
        float(quality[name].values.mean())
        for name in ("trust_guide", "trust_weights", "trustworthy")
    )
    threshold = khat_threshold(int(quality["khat"].attrs["num_particles"]))
    passed = quality["khat"].values <= threshold
    known = passed & quality["reference_converged"].values
    wrong = known & ~quality["trust_guide"].values
    sentences = [
        f"Of {len(passed)} held-out data the base's draws may be used as they are for {guide:.0%}, "
        f"importance-weighted draws for {weights:.0%}, and both kinds for {both:.0%}."
    ]
    if known.any():
        sentences.append(
            f"k-hat is at most {threshold:.2f} for {passed.mean():.0%} of the data; of these, "
            f"where HMC converged, {wrong.sum() / known.sum():.0%} have a guide whose draws may "
            "not be used as they are: k-hat judges the weights, not the guide."
        )
    khat, kl = per_datum(quality, "khat"), per_datum(quality, "kl")
    both = ~np.isnan(khat) & ~np.isnan(kl)
    if both.sum() > 2:
        ranked = spearmanr(khat[both], kl[both])
        sentences.append(
            f"The rank correlation of k-hat and KL(q || p) over the data is "
            f"{ranked.statistic:.2f} ({with_sign(float(ranked.pvalue))})"
            + (": the two rank the data alike." if ranked.statistic > 0.5 else ".")
        )
    return sentences


def of_reference(quality: Result) -> list[str]:
    """How many data have no reference."""
    converged = quality["reference_converged"].values
    if converged.all():
        return []
    return [
        f"HMC did not converge for {(~converged).sum()} of {len(converged)} data, which are "
        "trusted under no guide: the shares below cannot be above "
        f"{converged.mean():.0%}. Errors and the classifier are over the others."
    ]


def of_change(measured: Measured, other: Measured, standard_errors: float) -> str:
    """What one change improves, worsens and leaves, by paired differences over the data."""
    better: list[str] = []
    worse: list[str] = []
    same: list[str] = []
    for name, (words, rising, form) in MEASURES.items():
        before, after = (per_datum(m.quality, name) for m in (other, measured))
        both = ~np.isnan(before) & ~np.isnan(after)
        if both.sum() < 2:
            continue
        difference, error = mean_and_error((after - before)[both])
        if not abs(difference) > standard_errors * error:
            same.append(words)
            continue
        text = f"{words} ({before[both].mean():{form}} to {after[both].mean():{form}})"
        (better if (difference > 0) == rising else worse).append(text)
    parts = [
        f"{verb} {'; '.join(names)}"
        for verb, names in (
            ("improves", better),
            ("worsens", worse),
            ("does not clearly move", same),
        )
        if names
    ]
    change = f"{measured.case.change[0].upper()}{measured.case.change[1:]}"
    return f"{change} (against {other.case.title}): {'. It '.join(parts)}."


def of_calibration(found: Sequence[Measured]) -> str:
    """Which guides are calibrated under the model's own data."""
    p = {m.case.title: float(m.quality["overall_p_value"]) for m in found}
    passed = [title for title, value in p.items() if value > LEVEL]
    failed = [f"{title} ({with_sign(value)})" for title, value in p.items() if value <= LEVEL]
    parts = []
    if failed:
        parts.append(f"miscalibrated: {', '.join(failed)}")
    if passed:
        parts.append(f"no miscalibration found: {', '.join(passed)}")
    return f"Under the model's own data, at level {LEVEL:g} for each guide, {'; '.join(parts)}."


def of_best(found: Sequence[Measured]) -> list[str]:
    """Which guide can be trusted most."""
    shares = {
        name: {m.case.title: float(m.quality[name].values.mean()) for m in found}
        for name in ("trust_guide", "trust_weights")
    }
    words = {"trust_guide": "draws as they are", "trust_weights": "weighted draws"}
    sentences = []
    for name, by in shares.items():
        top = max(by.values())
        titles = [title for title, value in by.items() if value == top]
        if "base" in titles:
            sentences.append(
                f"For {words[name]}, no change makes more data trustworthy than the base's "
                f"{top:.0%}."
            )
        else:
            sentences.append(
                f"For {words[name]}, most data can be trusted under {' and '.join(titles)} "
                f"({top:.0%}); under the base it was {by['base']:.0%}."
            )
    return sentences


def worst_rows(quality: Result, count: int = 6) -> list[dict[str, str]]:
    """The worst data by k-hat."""
    worst = worst_data(quality, "khat", count)
    return [
        {
            "datum": str(int(worst["datum"][i])),
            "k-hat": f"{float(worst['khat'][i]):.2f} ± {float(worst['khat_se'][i]):.2f}",
            "KL(q || p)": f"{float(worst['kl_guide_posterior'][i]):.2f}",
            "reason": str(worst["reason"].values[i]),
        }
        for i in range(worst.sizes["datum"])
    ]
