r"""Does the model reproduce its data? Prior and posterior predictive checks."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.checks import check_count, check_max_memory
from pyro_vae.data import Seed, as_seed
from pyro_vae.diagnostics.replicates import (
    Replicates,
    log_likelihood,
    observed_data,
    other_data,
    replicate,
    replicate_held_out,
)
from pyro_vae.inference.programs import (
    Pair,
    Program,
    ProgramStructure,
    SubsampleError,
    inspected_guide,
    particles_at_once,
    program_scope,
    site_values,
    tensors_of,
    tool,
)
from pyro_vae.results import Result, label, make_result, sha256_of

__all__ = ["DEFAULT_STATISTICS", "predictive_check"]

Statistic = Callable[[Any], Any]
Kind = Literal["posterior", "prior", "both"]

_LEVEL = 0.01  # at which a statistic is flagged
_LEAST_DRAWS = 20
_SHOWN = 8  # statistics that a note names
_SAID = {"posterior": "posterior", "prior": "prior", "held_out": "held-out"}


def _sd_of_datum_means(x: Float[Tensor, "batch ..."]) -> Tensor:
    return x.double().flatten(1).mean(1).std(correction=0)


DEFAULT_STATISTICS: dict[str, Statistic] = {
    "mean": lambda x: x.double().mean(),
    "sd": lambda x: x.double().std(correction=0),
    "min": torch.min,
    "max": torch.max,
    "fraction zero": lambda x: (x == 0).double().mean(),
    "sd of datum means": _sd_of_datum_means,
}
"""What is compared of each observed site; the last where a datum has several numbers."""


class _Compared(NamedTuple):
    """What is kept of the replicated data: no draw of theirs stays in memory.

    Attributes:
        values: `[statistics, draws]`.
        as_likely: How many of the draws gave a datum no more likely than the observed one; None
            where latents are summed out, or the log-likelihoods of different data differ in shape.
    """

    values: np.ndarray
    as_likely: np.ndarray | None


@tool
def predictive_check(
    model: Program,
    guide: Program | None,
    x: Any,
    *,
    statistics: Mapping[str, Statistic] | None = None,
    num_draws: int = 200,
    kind: Kind = "posterior",
    joint: bool | None = None,
    test: Any = None,
    seed: Seed = 0,
    max_memory: float = 0.5,
) -> Result:
    r"""Compares statistics of the data with those of data replicated by the model.

    Replicates have the size of x. Those of the posterior predictive draw each datum's latents from
    the guide (latents that are summed out from their posterior given these), then the data anew;
    those of the prior predictive draw the latents from the prior. With `test`, data that the guide
    has not seen are compared: global latents come from the guide, those of the new data from their
    prior.

    .. math:: p = \min\{1, 2 \min(p_{\ge}, p_{\le})\}, \qquad
              p_{\ge} = \frac{1 + \#\{T(x^{\mathrm{rep}}) \ge T(x)\}}{1 + \text{num\_draws}}

    Args:
        model: The generative program.
        guide: The program of the approximate posterior; may be None for the prior predictive.
        x: The data; a tuple for several arguments, a dict for keywords.
        statistics: Name -> function of the observed tensor, `[batch, inner plates, event]`, to one
            number. With several observed sites the function gets a dict of tensors by site. None
            for `DEFAULT_STATISTICS` of each site.
        num_draws: Replicates, at least 20; with fewer than 199 no p-value reaches the 0.01 at which
            a statistic is flagged.
        kind: `"posterior"`, `"prior"` or `"both"`.
        joint: True for all data as one; None for that where latents are global.
        test: Data held out, which then take the place of `x`, to which the guide was fitted; the
            kind is called `"held_out"`. `split_check` cuts them off, and fits.
        seed: Seeds the draws; the caller's random state is left alone.
        max_memory: Roughly the memory that the replicates drawn at once may take, in GiB.

    Returns:
        ====================  =====================  ===========  ================================
        name                  dims                   unit, bound  meaning
        ====================  =====================  ===========  ================================
        `observed`            statistic              none, exact  T of the data
        `p_value`             kind, statistic        none, none   two-sided tail area p of the
                                                                  replicates
        `discrepancy`         kind, statistic        none, none   (T of the data - mean of the
                                                                  replicates) / their sd
        `replicated`          kind, statistic, draw  none, none   T of the replicated data
        `likelihood_p_value`  kind, datum            none, none   share of replicates of a datum
                                                                  that are no more likely than it,
                                                                  given the same latents
        ====================  =====================  ===========  ================================

        `likelihood_p_value` is small for a datum that the model does not reproduce. It is left out
        where latents are summed out, or data held out. That of the prior predictive has no level:
        latents that owe nothing to the datum make it small wherever data tell much of them, in the
        right model too.
        The verdict names the statistics that are not reproduced, and counts rare data of the
        posterior predictive alone.

    Raises:
        ProgramError: If the pair has no log weights (see `log_weights`), or the model cannot be
            simulated from.
        ValueError: If an argument is out of its range, or a statistic of the data is nan or no
            number; names it.

    Note: with `test` p-values are uniform under the right model where the guide is its posterior
        (parameters that were fitted count as known, which makes them small too often).

    Note: posterior predictive p-values of the true posterior are conservative: the same data made
        it, so under the right model they crowd about 1/2 and a small one means more than it says.
        Those of a guide that is too narrow or off are not: its replicates vary too little, and the
        right model may be flagged. Judge the guide first (`posterior_quality`). A statistic that
        the model fits by itself, as a mean, can hardly fail; choose others. Masked entries of
        the data are counted by the statistics: give your own that leave them out.

    References:
        Rubin (1984); Gelman, Meng & Stern (1996), Posterior predictive assessment of model fitness
        via realized discrepancies, Statistica Sinica 6; Box (1980) for the prior.

    Example:
        >>> import torch
        >>> from pyro_vae import LinearGaussian
        >>> model = LinearGaussian(data_dim=3, latent_dim=2)
        >>> x = model.sample(40, generator=torch.Generator().manual_seed(0))
        >>> found = predictive_check(model.model, model.exact_guide, x)
        >>> bool((found.p_value > 1e-2).all())
        True
        >>> found = predictive_check(model.model, model.exact_guide, x + 100.0, kind="prior")
        >>> bool(found.p_value.sel(statistic="mean") < 1e-2)
        True
    """
    seed = as_seed(seed)
    _check(num_draws, kind, max_memory)
    kinds = ["posterior", "prior"] if kind == "both" else [str(kind)]
    if test is not None:
        if kind != "posterior":
            raise ValueError(f"test is for posterior predictive checks: leave out kind={kind!r}")
        kinds = ["held_out"]
    if guide is None and kinds != ["prior"]:
        raise ValueError("the posterior predictive draws from the guide; pass one, or kind='prior'")
    shown = inspected_guide(model, guide)
    with torch.no_grad(), program_scope(seed):
        pair = Pair.inspect(model, shown, x, joint=joint)
        structure = pair.structure
        if structure.scale != 1.0:
            raise SubsampleError(
                "the programs subsample or rescale their data, so replicates are not of their size"
            )
        new = pair if test is None else other_data(pair, test)
        observed = observed_data(new, prior=kinds != ["posterior"])
        chosen = _statistics(statistics, observed)
        values = np.array([_value(name, chosen[name], observed) for name in chosen])
        _check_observed(dict(zip(chosen, values.tolist(), strict=True)))
        most = particles_at_once(num_draws, max_memory, pair.bytes_of_particle)
        found = {}
        for which in kinds:
            pyro.set_rng_seed(seed)  # so that one kind does not depend on the other
            if test is None:
                draws = replicate(which, pair, num_draws, most)
            else:
                draws = replicate_held_out(pair, new, num_draws, most)
            found[which] = _compare(draws, chosen, new.structure)
    data = x if test is None else (*tensors_of(x), *tensors_of(test))
    return _result(found, values, list(chosen), structure, data, num_draws, pair.joint, seed)


def _check(num_draws: int, kind: str, max_memory: float) -> None:
    if kind not in ("posterior", "prior", "both"):
        raise ValueError(f"kind is 'posterior', 'prior' or 'both', not {kind!r}")
    check_count("num_draws", num_draws, _LEAST_DRAWS)
    check_max_memory(max_memory)


# --- statistics -----------------------------------------------------------------------------------


def _statistics(
    given: Mapping[str, Statistic] | None, observed: dict[str, Tensor]
) -> dict[str, Statistic]:
    """Functions of all observed sites by name."""
    single = len(observed) == 1
    if given is not None:
        if not given:
            raise ValueError("statistics is empty; name at least one, or leave it out")
        site = next(iter(observed))
        return {name: (_at(site, f) if single else f) for name, f in given.items()}
    chosen = {}
    for site, value in observed.items():
        for name, function in DEFAULT_STATISTICS.items():
            several = value.dim() > 1 and len(value) > 1 and value[0].numel() > 1
            if name != "sd of datum means" or several:
                chosen[name if single else f"{site}: {name}"] = _at(site, function)
    return chosen


def _at(site: str, function: Statistic) -> Statistic:
    return lambda values: function(values[site])


def _value(name: str, function: Statistic, data: dict[str, Tensor]) -> float:
    try:
        return float(function(data))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"statistic {name!r} does not turn the observed data into one number ({error})"
        ) from error


def _check_observed(values: Mapping[str, float]) -> None:
    missing = [name for name, value in values.items() if math.isnan(value)]
    if missing:
        raise ValueError(f"statistic {missing[0]!r} of the data is nan; choose another")


# --- comparison -----------------------------------------------------------------------------------


def _compare(
    draws: Iterator[Replicates], statistics: dict[str, Statistic], structure: ProgramStructure
) -> _Compared:
    values: list[list[float]] = []
    as_likely: np.ndarray | None = None
    for part in draws:
        data = {name: site_values(part.drawn, name, structure) for name in structure.observed}
        for k in range(part.num_draws):
            one = {name: value[k] for name, value in data.items()}
            values.append([_value(name, function, one) for name, function in statistics.items()])
        if part.given is None:
            continue
        new = log_likelihood(part.drawn, part.num_draws, structure)
        old = log_likelihood(part.given, part.num_draws, structure)
        if new is not None and old is not None:
            # Equal up to rounding is as likely: discrete data tie.
            room = 100 * torch.finfo(old.dtype).eps * (1 + old.abs())
            counts = (~(new > old + room)).sum(0).cpu().numpy()
            as_likely = counts if as_likely is None else as_likely + counts
    return _Compared(np.array(values).T, as_likely)


# --- the result -----------------------------------------------------------------------------------


def _p_values(values: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Two-sided tail areas; a replicate that is nan counts on both sides."""
    above = 1 + (~(values < observed[:, None])).sum(1)
    below = 1 + (~(values > observed[:, None])).sum(1)
    return np.minimum(1.0, 2 * np.minimum(above, below) / (1 + values.shape[1]))


def _discrepancy(values: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """(Observed - mean) / sd of the replicates; infinite where they never vary and it differs."""
    distance = observed - values.mean(1)
    sd = values.std(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = distance / np.where(sd > 1e-12 * np.abs(observed), sd, 0.0)
    return np.where(np.abs(distance) <= 1e-12 * np.abs(observed), 0.0, scaled)


def _result(
    found: dict[str, _Compared],
    observed: np.ndarray,
    names: list[str],
    structure: ProgramStructure,
    x: Any,
    num_draws: int,
    joint: bool,
    seed: int,
) -> Result:
    def about(text: str) -> dict[str, Any]:
        return label(
            unit="none", reduction="none", bound="none", num_particles=num_draws, description=text
        )

    values = np.stack([part.values for part in found.values()])
    p = np.stack([_p_values(part.values, observed) for part in found.values()])
    scaled = np.stack([_discrepancy(part.values, observed) for part in found.values()])
    variables: dict[str, Any] = {
        "observed": (
            "statistic",
            observed,
            label(unit="none", reduction="none", bound="exact", description="of the data"),
        ),
        "p_value": (("kind", "statistic"), p, about("two-sided tail area of the replicates")),
        "discrepancy": (
            ("kind", "statistic"),
            scaled,
            about("(data - mean of replicates) / their sd"),
        ),
        "replicated": (("kind", "statistic", "draw"), values, about("of replicated data")),
    }
    likely = {name: part.as_likely for name, part in found.items()}
    shares = [(1 + counts) / (1 + num_draws) for counts in likely.values() if counts is not None]
    if len(shares) == len(likely):
        variables["likelihood_p_value"] = (
            ("kind", "datum"),
            np.stack(shares),
            about("share of replicates of the datum that are no more likely than it"),
        )
    tensors = tensors_of(x)
    return make_result(
        variables,
        function="predictive_check",
        config={"kinds": list(found), "num_draws": num_draws, "joint": joint, "level": _LEVEL},
        seed=seed,
        data_sha256=sha256_of(*tensors) if tensors else None,
        coords={"statistic": names, "kind": list(found), "draw": np.arange(num_draws)},
        notes=_caveats(list(found), structure),
        verdict=_words(dict(zip(found, p, strict=True)), scaled, shares, values, names),
    )


def _words(
    p: dict[str, np.ndarray],
    scaled: np.ndarray,
    shares: list[np.ndarray],
    values: np.ndarray,
    names: list[str],
) -> list[str]:
    """Which statistics the model reproduces, and which data."""
    num_draws, notes = values.shape[2], []
    if 2 / (1 + num_draws) > _LEVEL:
        notes.append(
            f"with {num_draws} draws no p-value can be {_LEVEL:g}, so nothing is flagged: draw at "
            f"least {math.ceil(2 / _LEVEL) - 1}."
        )
    for which, (kind, own) in enumerate(p.items()):
        bad = [i for i in range(len(names)) if own[i] <= _LEVEL]
        bad.sort(key=lambda i: -abs(np.nan_to_num(scaled[which, i], posinf=1e300, neginf=-1e300)))
        if bad:
            listed = ", ".join(
                f"{names[i]} (the data are {scaled[which, i]:+.3g} sd from the replicates)"
                for i in bad[:_SHOWN]
            )
            more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
            notes.append(f"the {_SAID[kind]} predictive does not reproduce {listed}{more}.")
        elif 2 / (1 + num_draws) <= _LEVEL:
            notes.append(
                f"the {_SAID[kind]} predictive reproduces all {len(names)} statistics at level "
                f"{_LEVEL:g} each."
            )
        broken = int(np.isnan(values[which]).any(0).sum())
        if broken:
            notes.append(
                f"{broken} of {num_draws} replicates of the {kind} predictive gave a statistic "
                "that is nan; they count for the model."
            )
    if len(shares) == len(p) and 1 / (1 + num_draws) <= _LEVEL:
        for kind, share in zip(p, shares, strict=True):
            if kind == "prior":
                continue  # its share has no level: see `predictive_check`
            rare = int((share <= _LEVEL).sum())
            said = "the one datum is" if len(share) == 1 else f"{rare} of {len(share)} data are"
            if len(share) > 1 or rare:
                notes.append(
                    f"{said} less likely than 99 % of the {kind} replicates; by chance about "
                    f"{_LEVEL * len(share):.2g} or fewer are."
                )
    return notes


def _caveats(kinds: list[str], structure: ProgramStructure) -> list[str]:
    if kinds == ["held_out"]:
        return [
            "p-values of data held out are uniform under the right model if the guide is the "
            "posterior given the others; parameters without a posterior count as known."
        ]
    if "posterior" not in kinds:
        return []
    notes = [
        "posterior predictive p-values of the true posterior are conservative, for the data were "
        "used twice: a statistic that is not flagged may still be wrong. Those of a guide that is "
        "too narrow are not, and may flag a right model: they judge model and guide together."
    ]
    if structure.enumerated:
        notes.append(
            f"{', '.join(structure.enumerated)}, summed out of the model, are drawn from their "
            "posterior given the data and the guide's draws."
        )
    return notes
