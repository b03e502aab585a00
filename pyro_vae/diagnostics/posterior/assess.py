r"""Whether a posterior can be trusted, per datum: two questions, each with its reasons.

May the guide's draws be used as they are? May importance-weighted draws be used? A guide may be too
narrow and its weights good; it may be right to the eye and its weights useless. So the answers are
kept apart.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from pyro_vae.inference.log_weights import khat_threshold
from pyro_vae.results import ShortRepr

__all__ = ["Thresholds", "Verdict", "Violation", "assess"]


@dataclass(frozen=True)
class Thresholds:
    """What counts as good enough.

    A datum passes where every error is within its limit, and known to within it: z standard errors
    are no more than the limit. Here z is so large that, with probability 1 - `level`, no error of
    the whole result is misjudged by more. Then an exact posterior is called wrong in at most that
    share of results, and the true errors of data that pass are within twice their limits.

    Attributes:
        level: The share of results in which any error is misjudged, by normal theory.
        mean: Error of a latent's mean, in posterior standard deviations.
        scale: Error of the log of a latent's standard deviation, in nats; 0.25 is a factor of 1.28.
        total_variation: Largest difference of the probabilities that guide and posterior give to
            an event. A classifier then tells their draws apart with probability (1 + it) / 2.
        ess: Effective draws that weighted draws must keep.
        khat_moments: Largest k-hat of weight x squared deviation, whose mean exists below 1.
        widening: How many times as wide as the guide the weighted draws may be, in any direction.
            A normal guide narrower than this of a normal posterior has weights without a variance,
            which k-hat is slow to see where few latents are narrow. See the note.
        rhat: Largest R-hat of a reference that has converged.
        reference_ess: Effective draws that it must have.

    Note: of normal posteriors with a guide half as wide in 1, 2 or 3 of 3 latents, at 1000 draws,
        19, 25 and 18 % pass by the weights alone with a corrected standard deviation beyond
        `scale`; 16, 10 and 2 % if `khat_moments` is asked as well, and less than 1 % if `widening`
        is too (each is known to 1 %). Of mean-field guides of two latents correlated by 0.8 it is
        35, 20 and 1 %. Where the posterior has much heavier tails than the guide (Student t with 3
        degrees of freedom, a guide half as wide) none of them helps, for no draw is in its tails.
    """

    level: float = 0.01
    mean: float = 0.25
    scale: float = 0.25
    total_variation: float = 0.3
    ess: float = 100.0
    khat_moments: float = 1.0
    widening: float = 2**0.5
    rhat: float = 1.01
    reference_ess: float = 400.0

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ValueError(f"level is a probability between 0 and 1, not {self.level!r}")
        for name in (field.name for field in fields(self)):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)!r}")


@dataclass(frozen=True, repr=False)
class Violation(ShortRepr):
    """One reason against some of the data.

    Attributes:
        kind: The reason in few words, the same for all data.
        which: The data, `[batch]`.
        say: The reason in the case of one datum.
    """

    kind: str
    which: Bool[Tensor, " batch"]
    say: Callable[[int], str]


@dataclass(frozen=True)
class Verdict:
    """The answers for each datum.

    Attributes:
        guide: What speaks against the guide's draws as they are.
        weights: What speaks against importance-weighted draws.
        threshold: The largest k-hat that passes.
        standard_errors: How many of them must be within the limit.
        num_comparisons: How many errors were looked at.
    """

    guide: tuple[Violation, ...]
    weights: tuple[Violation, ...]
    threshold: float
    standard_errors: float
    num_comparisons: int

    @property
    def trust_guide(self) -> Bool[Tensor, " batch"]:
        """Whether the guide's draws may be used as they are."""
        return ~torch.stack([violation.which for violation in self.guide]).any(0)

    @property
    def trust_weights(self) -> Bool[Tensor, " batch"]:
        """Whether importance-weighted draws may be used."""
        return ~torch.stack([violation.which for violation in self.weights]).any(0)

    @property
    def trustworthy(self) -> Bool[Tensor, " batch"]:
        """Whether nothing speaks against either."""
        return self.trust_guide & self.trust_weights

    def reasons(self) -> list[str]:
        """What speaks against each datum, in words."""
        return [self._reason(datum) for datum in range(len(self.guide[0].which))]

    def _reason(self, datum: int) -> str:
        guide, weights = (
            list(dict.fromkeys(f.say(datum) for f in violations if bool(f.which[datum])))
            for violations in (self.guide, self.weights)
        )
        if not guide and not weights:
            return "It passes every check that was made"
        if guide == weights:
            return f"Either way: {'; '.join(guide)}"
        said = [
            f"{title}: {'; '.join(found)}"
            for title, found in (("Draws as they are", guide), ("Weighted draws", weights))
            if found
        ]
        return ". ".join(said)


def assess(
    columns: Mapping[str, Tensor],
    latents: Sequence[str],
    num_particles: int,
    thresholds: Thresholds,
) -> Verdict:
    """Answers both questions for each datum.

    Args:
        columns: From `weighted_columns`, and from `reference_columns` where there is a reference.
        latents: Names of the latents.
        num_particles: Draws behind the weights.
        thresholds: What counts as good enough.
    """
    threshold = khat_threshold(num_particles)
    tail = list(_tail_violations(columns, threshold, thresholds))
    usable = ~torch.stack([violation.which for violation in tail]).any(0)
    # Errors that say something about a datum, with the words for them.
    errors = list(_errors(columns, latents, thresholds, usable))
    count = sum(int(error.known.sum()) for error in errors)
    bound = _standard_errors(thresholds.level, count)
    found = [error.violations(bound) for error in errors]
    guide = [sure for error, (sure, _) in zip(errors, found, strict=True) if error.of_guide]
    # Doubts count where nothing is sure. Weights have diagnostics of their own, which a reference
    # may contradict; that it is too coarse to is not held against them.
    open_ = ~torch.stack([violation.which for violation in guide]).any(0)
    for error, (_, doubt) in zip(errors, found, strict=True):
        if error.of_guide and error.decides:
            guide.append(replace(doubt, which=doubt.which & open_))
    weights = [
        *tail,
        _heavy_squares(columns, thresholds.khat_moments, usable),
        _too_narrow(columns, thresholds.widening, usable),
    ]
    weights += [s for error, (s, _) in zip(errors, found, strict=True) if not error.of_guide]
    if "reference_converged" in columns:
        astray = _not_converged(columns)
        guide, weights = [astray, *guide], [astray, *weights]
        usable = usable | columns["reference_converged"] | astray.which
    guide.append(
        Violation(
            "nothing to compare them with, for the weights are unusable",
            ~usable,
            lambda _: "they cannot be checked, for the weights are unusable",
        )
    )
    return Verdict(tuple(guide), tuple(weights), threshold, bound, count)


# --- the weights' own diagnostics -----------------------------------------------------------------


def _tail_violations(
    columns: Mapping[str, Tensor], threshold: float, thresholds: Thresholds
) -> Iterator[Violation]:
    khat, ess = columns["khat"], columns["ess"]

    def high(n: int) -> str:
        return f"k-hat {float(khat[n]):.2f} is above {threshold:.2f}"

    yield Violation(
        "k-hat is unknown (too few draws, or weights that are not finite)",
        khat.isnan() | (khat == torch.inf),
        lambda n: "k-hat cannot be fitted (too few draws, or weights that are not finite)",
    )
    yield Violation(f"k-hat is above {threshold:.2f}", khat.isfinite() & (khat > threshold), high)
    yield Violation(
        f"fewer than {thresholds.ess:g} draws are effective",
        ~(ess >= thresholds.ess),
        lambda n: f"only {float(ess[n]):.3g} draws are effective, fewer than {thresholds.ess:g}",
    )


def _heavy_squares(columns: Mapping[str, Tensor], limit: float, usable: Tensor) -> Violation:
    """Weights may be light where the squares that standard deviations sum up are heavy."""
    khat = columns["khat_moments"]
    kind = f"k-hat of weight x squared deviation is above {limit:g}"

    def say(n: int) -> str:
        return f"k-hat {float(khat[n]):.2f} of weight x squared deviation is above {limit:g}"

    return Violation(kind, usable & ~(khat <= limit), say)


def _too_narrow(columns: Mapping[str, Tensor], limit: float, usable: Tensor) -> Violation:
    """Weights can look light because the guide never draws where they are heavy."""
    widening = columns["widening"]

    def say(n: int) -> str:
        return (
            f"weighted draws are {float(widening[n]):.2f} times as wide as the guide's in some "
            f"direction, above {limit:.2f}"
        )

    kind = f"weighted draws are more than {limit:.2f} times as wide as the guide's"
    return Violation(kind, usable & (widening > limit), say)


def _not_converged(columns: Mapping[str, Tensor]) -> Violation:
    rhat, ess = columns.get("rhat"), columns["reference_ess"]

    def say(n: int) -> str:
        r = "" if rhat is None else f"R-hat {float(rhat[n]):.3f}, "
        return f"the reference did not converge ({r}{float(ess[n]):.0f} effective draws)"

    return Violation("the reference did not converge", ~columns["reference_converged"], say)


# --- errors ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Error:
    """Numbers that should be small, with their noise and limit."""

    kind: str
    value: Tensor  # [batch, latent], or [batch, 1]
    se: Tensor
    limit: float
    of_guide: bool
    words: Callable[[int, int], str]  # of a datum and a latent
    decides: bool = True  # whether not knowing it is held against a datum

    @property
    def known(self) -> Tensor:
        return ~self.value.isnan()

    def violations(self, bound: float) -> tuple[Violation, Violation]:
        """Where the error is beyond its limit, and where it is not known to within it."""
        excess = self.value.abs() - self.limit
        noise = bound * self.se
        # An error can be so large that it is beyond doubt although it is not known well.
        sure = (noise <= self.limit) | (self.value.abs() > noise) & (excess > 0)
        beyond = torch.where(sure, excess, -torch.inf).nan_to_num(nan=-torch.inf)
        doubt = f"too few draws to tell whether {self.kind}"

        def say(datum: int) -> str:
            return self.words(datum, int(beyond[datum].argmax()))

        return (
            Violation(self.kind, (beyond > 0).any(1), say),
            Violation(doubt, (self.known & ~sure).any(1), lambda _: doubt),
        )


@dataclass(frozen=True)
class _Compared:
    """A column that should be small: where its words and its limit are."""

    column: str
    kind: str
    words: str
    limit: str  # a field of `Thresholds`
    of_guide: bool = True
    by_weights: bool = False  # left out where these are unusable, which needs no further reason


_COMPARED = (
    _Compared(
        "mean_correction",
        "the mean is off",
        "the mean of {latent} is {value:+.2f} sd off the weighted one",
        "mean",
        by_weights=True,
    ),
    _Compared(
        "scale_correction",
        "the spread is off",
        "the sd of {latent} is {value:.2f} times the weighted one",
        "scale",
        by_weights=True,
    ),
    _Compared(
        "total_variation",
        "draws are told from the posterior's",
        "total variation {value:.2f} from the posterior",
        "total_variation",
        by_weights=True,
    ),
    _Compared(
        "mean_error",
        "the mean is off",
        "the mean of {latent} is {value:+.2f} sd off the reference",
        "mean",
    ),
    _Compared(
        "scale_error",
        "the spread is off",
        "the sd of {latent} is {value:.2f} times the reference's",
        "scale",
    ),
    _Compared(
        "corrected_mean_error",
        "the reference has another mean",
        "the weighted mean of {latent} is {value:+.2f} sd off the reference",
        "mean",
        of_guide=False,
        by_weights=True,
    ),
    _Compared(
        "corrected_scale_error",
        "the reference has another spread",
        "the weighted sd of {latent} is {value:.2f} times the reference's",
        "scale",
        of_guide=False,
        by_weights=True,
    ),
)


def _errors(
    columns: Mapping[str, Tensor], latents: Sequence[str], thresholds: Thresholds, usable: Tensor
) -> Iterator[_Error]:
    for row in _COMPARED:
        if row.column in columns:  # some are beside a reference only
            yield _error(row, columns, latents, thresholds, usable if row.by_weights else None)
    if "c2st_accuracy" in columns:
        accuracy = columns["c2st_accuracy"]
        yield _Error(
            "draws are told from the posterior's",
            # A classifier that is wrong more often than not has seen nothing.
            (2 * accuracy - 1).clamp_min(0.0)[:, None],
            2 * columns["c2st_accuracy_se"][:, None],
            thresholds.total_variation,
            True,
            lambda n, i: f"a classifier tells {float(accuracy[n]):.0%} of the draws apart",
            decides=False,  # the other errors say it more precisely
        )


def _error(
    row: _Compared,
    columns: Mapping[str, Tensor],
    latents: Sequence[str],
    thresholds: Thresholds,
    keep: Tensor | None,
) -> _Error:
    value, se = columns[row.column], columns[f"{row.column}_se"]
    if value.dim() == 1:
        value, se = value[:, None], se[:, None]
    if keep is not None:
        value = value.masked_fill(~keep[:, None], math.nan)

    def say(n: int, i: int) -> str:
        # Scales are compared by their logs.
        shown = math.exp(value[n, i]) if row.limit == "scale" else float(value[n, i])
        latent = latents[i] if value.shape[1] == len(latents) else ""
        return row.words.format(latent=latent, value=shown)

    return _Error(row.kind, value, se, getattr(thresholds, row.limit), row.of_guide, say)


def _standard_errors(level: float, count: int) -> float:
    from scipy.stats import norm

    return float(norm.isf(level / (2 * max(count, 1))))
