r"""A guide's draws beside those of a reference that is trusted more: HMC, or draws of one's own."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from pyro_vae.diagnostics.posterior.c2st import classifier_two_sample
from pyro_vae.diagnostics.posterior.two_sample import (
    energy_distance,
    moment_errors,
    permutation_p_values,
    squared_mmd,
    standardised,
    wasserstein,
)
from pyro_vae.inference.draws import flat_latents
from pyro_vae.inference.mcmc import Chains, PosteriorSample, bulk_ess, mean_ess, run_chains
from pyro_vae.inference.programs import Pair, UnconstrainedModel, unconstrained_model
from pyro_vae.intervals import student_factor
from pyro_vae.results import ShortRepr

__all__ = ["HmcReference", "Reference", "given_reference", "hmc_reference", "reference_columns"]

Columns = dict[str, Tensor]

_FOLDS = 5  # of the classifier's cross-validation


@dataclass(frozen=True)
class HmcReference:
    """Settings of the Hamiltonian Monte Carlo that a guide is compared with.

    Attributes:
        num_chains: Chains of each datum, at least 2: a single one cannot disagree. Of two equal
            modes far apart, n chains miss one, and agree, with probability 2^(1 - n).
        num_warmup: Steps that only adapt.
        num_samples: Draws kept of each chain.
        num_leapfrog: Gradients of each step, on average; adapted if None.
        target_accept: Mean acceptance probability to adapt to.
        start: `"prior"` or `"guide"`. Chains that start from the guide may never leave the modes
            that it knows.
    """

    num_chains: int = 8
    num_warmup: int = 300
    num_samples: int = 800
    num_leapfrog: int | None = None
    target_accept: float = 0.8
    start: str = "prior"

    def __post_init__(self) -> None:
        if self.start not in ("prior", "guide"):
            raise ValueError(f"start is {self.start!r}, but must be 'prior' or 'guide'")
        if isinstance(self.num_chains, bool) or not self.num_chains >= 2:
            raise ValueError(_one_chain(self.num_chains))


def _one_chain(found: Any) -> str:
    return (
        f"the reference has {found} chain, which cannot show whether it has found the whole "
        "posterior; give it at least 2, better 4 (num_chains)"
    )


@dataclass(frozen=True, repr=False)
class Reference(ShortRepr):
    """Draws that a guide is compared with.

    Attributes:
        draws: All latents of a datum in the order of the guide's, `[draws, batch, dim]`.
        ess: Effective sample size of each latent: the smaller of those of its mean and of its
            distance from the median.
        rhat: The largest split R-hat of each datum's latents; None for independent draws.
        num_chains: Chains that the draws come from, one after another; 1 for independent draws.
        notes: What must not be parted from the draws.
    """

    draws: Float64[Tensor, "draws batch dim"]
    ess: Float64[Tensor, "batch dim"]
    rhat: Float64[Tensor, " batch"] | None
    num_chains: int
    notes: tuple[str, ...] = ()

    def part(self, start: int, length: int) -> "Reference":
        """The reference of some of the data."""
        keep = slice(start, start + length)
        return Reference(
            self.draws[:, keep],
            self.ess[keep],
            None if self.rhat is None else self.rhat[keep],
            self.num_chains,
            self.notes,
        )


def hmc_reference(
    pair: Pair, names: Sequence[str], settings: HmcReference, *, seed: int, progress: bool
) -> Reference:
    """Runs Hamiltonian Monte Carlo for each datum; see `sample_posterior` for what it refuses."""
    options = asdict(settings)
    chains = Chains(**{name: value for name, value in options.items() if name != "start"})
    if settings.start == "guide":
        latent_model = UnconstrainedModel(pair)
    else:
        latent_model = unconstrained_model(pair.model, None, pair.x, joint=pair.joint)
    found = run_chains(latent_model, chains, seed=seed, progress=progress)
    return _of_chains(found, names, joint=pair.joint)


def given_reference(
    reference: Any, names: Sequence[str], shape: tuple[int, int], *, joint: bool, data_sha256: str
) -> Reference:
    """Takes draws that the caller has.

    Args:
        reference: What `sample_posterior` returned, or a tensor `[draws, batch, dim]` of
            independent draws (batch 1 if joint), constrained and in the order of `flat_latents`.
        names: The latent sites, in the guide's order.
        shape: Batch and dim of the guide's draws.
        joint: As in `posterior_quality`.
        data_sha256: Of the data that the guide is judged on.

    Raises:
        ValueError: If the reference is of other data or latents than the guide, or holds too few
            draws or chains, or draws that are not finite.
    """
    if isinstance(reference, PosteriorSample):
        if reference.data_sha256 != data_sha256:
            raise ValueError("the reference is of other data than x; pass the reference of x")
        found = _of_chains(reference, names, joint=joint)
    elif isinstance(reference, Tensor):
        if reference.dim() != 3 or len(reference) < 2:
            raise ValueError(
                f"the reference has shape {tuple(reference.shape)}, but must hold at least 2 draws "
                "as [draws, batch, dim]"
            )
        draws = reference.detach().cpu().double()
        broken = torch.nonzero(~draws.isfinite().all(0).all(1))[:, 0].tolist()
        if broken:
            raise ValueError(
                f"the reference has draws of datum {broken[0]} that are not finite; leave them out"
            )
        ess = torch.full(draws.shape[1:], float(len(draws)), dtype=torch.float64)
        found = Reference(draws, ess, None, 1)
    else:
        raise ValueError(
            "reference is None, 'hmc', what sample_posterior returns, or a tensor of draws, not "
            f"of type {type(reference).__name__}"
        )
    if found.draws.shape[1:] != shape:
        raise ValueError(
            f"the reference has {found.draws.shape[1]} data of {found.draws.shape[2]} latents and "
            f"the guide {shape[0]} of {shape[1]}; pass the reference of this guide and these data"
        )
    return found


def _of_chains(sample: PosteriorSample, names: Sequence[str], *, joint: bool) -> Reference:
    missing = [name for name in names if name not in sample.draws]
    if missing:
        raise ValueError(
            f"the reference has no draws of the latent '{missing[0]}', which the guide draws; it "
            f"has {', '.join(sample.draws)}"
        )
    chains, length = sample.unconstrained.shape[:2]
    if chains < 2:
        raise ValueError(_one_chain(chains))
    latents = {name: sample.draws[name].flatten(0, 1) for name in names}
    draws = flat_latents(latents, joint=joint).cpu().double()
    by_chain = draws.unflatten(0, (chains, length))
    # Chains locate a mean more surely than a spread where they swing from side to side.
    spread = (by_chain - draws.median(0).values).abs()
    ess = torch.minimum(bulk_ess(by_chain), bulk_ess(spread)).clamp_max(chains * length)
    # A latent that a mask switches off stays where it is, and has no posterior to compare with.
    still = (by_chain == by_chain[:, :1]).all(1).all(0)
    return Reference(
        draws.masked_fill(still, math.nan),
        ess.masked_fill(still, math.inf),
        sample.rhat.cpu().double(),
        chains,
        tuple(note for note in sample.notes() if "R-hat" not in note),  # the verdict says it
    )


def reference_columns(
    draws: Float[Tensor, "draws batch dim"],
    moments: Mapping[str, Tensor],
    reference: Reference,
    *,
    max_rhat: float,
    min_ess: float,
    checks: Sequence[str],
    num_test_draws: int,
    num_permutations: int,
    resolve: float | None,
    seed: int,
) -> Columns:
    """Every number that compares a guide with its reference; nan where that has not converged.

    A latent that the reference never moves (a mask switches it off) is left out: its own columns
    are nan, and the columns over all latents go without it.

    Args:
        draws: Of the guide.
        moments: From `weighted_columns` of the same draws.
        reference: Of the same data.
        max_rhat: The largest R-hat that counts as converged.
        min_ess: The smallest effective sample size that does.
        checks: `"energy"`, `"mmd"` and `"classifier"`, those to run.
        num_test_draws: Draws of each side for these, at most: they compare all pairs.
        num_permutations: Behind their p-values.
        resolve: Where more of them are needed, see `permutation_p_values`.
        seed: Of permutations and folds.
    """
    draws = draws.detach().cpu().double()
    ess = reference.ess.amin(1)
    ess = ess.masked_fill(ess == math.inf, math.nan)  # nothing to sample at all
    converged = ess >= min_ess
    columns: Columns = {"reference_ess": ess}
    if reference.rhat is not None:
        columns["rhat"] = reference.rhat
        converged &= reference.rhat <= max_rhat
    columns["reference_converged"] = converged
    columns |= _moment_columns(draws, moments, reference)
    theirs = reference.draws.nan_to_num(nan=0.0)
    ours = draws.masked_fill(reference.draws[0].isnan(), 0.0)
    columns["covariance_error"] = moment_errors(ours, theirs).covariance
    for order in (1, 2):
        distance = wasserstein(draws, reference.draws, order)
        columns[f"wasserstein_{order}"] = distance
    columns |= {name: torch.full_like(ess, math.nan) for name in _names_of(checks)}
    if checks and bool(converged.any()):
        thinned = _thinned(theirs, reference, ess[converged].min(), num_test_draws)
        sample = ours[:num_test_draws, converged]
        found = _tests(sample, thinned[:, converged], checks, num_permutations, resolve, seed)
        for name, value in found.items():
            columns[name][converged] = value
    unmarked = ("rhat", "reference_ess", "reference_converged")
    return {
        name: value if name in unmarked else _marked(value, converged)
        for name, value in columns.items()
    }


def _marked(value: Tensor, converged: Bool[Tensor, " batch"]) -> Tensor:
    shape = (-1, *[1] * (value.dim() - 1))
    return value.masked_fill(~converged.reshape(shape), math.nan)


def _moment_columns(
    draws: Float64[Tensor, "draws batch dim"], moments: Mapping[str, Tensor], reference: Reference
) -> Columns:
    """Moments of the reference, and how far those of q and of the weighted draws are from them."""
    theirs = reference.draws
    mean, sd = theirs.mean(0), theirs.std(0)
    unit = torch.where(sd > 0, sd, 1.0)
    mean_se = sd / reference.ess.sqrt()
    log_sd_se = _log_sd_error(((theirs - mean) / unit).square() / 2, reference)
    columns: Columns = {
        "reference_mean": mean,
        "reference_mean_se": mean_se,
        "reference_sd": sd,
        "reference_sd_se": sd * log_sd_se,
    }
    for ours, errors in (("", ""), ("corrected_", "corrected_")):
        shift, own = moments[f"{ours}mean"].cpu() - mean, moments[f"{ours}sd"].cpu()
        error = torch.where(shift == 0, 0.0, shift / sd)
        in_mean = torch.hypot(moments[f"{ours}mean_se"].cpu(), mean_se)
        columns[f"{errors}mean_error"] = error
        columns[f"{errors}mean_error_se"] = torch.hypot(
            torch.where(in_mean == 0, 0.0, in_mean / sd), error * log_sd_se
        )
        columns[f"{errors}scale_error"] = torch.where(own == sd, 0.0, own.log() - sd.log())
        in_sd = moments[f"{ours}sd_se"].cpu()
        columns[f"{errors}scale_error_se"] = torch.hypot(
            torch.where(in_sd == 0, 0.0, in_sd / own), log_sd_se
        )
    return columns


def _log_sd_error(
    scores: Float64[Tensor, "draws batch dim"], reference: Reference
) -> Float64[Tensor, "batch dim"]:
    """Error of the log of the reference's sd, whose influence of each draw are the scores.

    Squares of chains are more dependent than ranks are, and their effective size is itself known
    poorly: so the error is the larger of that by the least effective size, of ranks or squares, and
    of that by the spread between half chains; times the factor of Student's t with a quarter as
    many degrees of freedom as effective draws. Of 4 chains of 100 draws two errors then hold 95 %.
    """
    by_chain = scores.unflatten(0, (reference.num_chains, -1))
    ess, between = reference.ess, torch.zeros_like(reference.ess)
    if reference.rhat is not None:
        ess = torch.minimum(ess, mean_ess(by_chain).nan_to_num(nan=math.inf))
        half = by_chain.shape[1] // 2
        means = torch.cat([by_chain[:, :half].mean(1), by_chain[:, -half:].mean(1)])
        between = means.std(0) / math.sqrt(len(means))
    by_size = scores.std(0) / ess.sqrt()
    return torch.maximum(by_size, between) * torch.from_numpy(student_factor(1 + ess.numpy() / 4))


def _thinned(
    draws: Float64[Tensor, "draws batch dim"], reference: Reference, ess: Tensor, most: int
) -> Float64[Tensor, "kept batch dim"]:
    """About half as many draws as are effective, evenly spaced: they hardly depend on another."""
    if reference.rhat is None:
        return draws[:most]
    by_chain = draws.unflatten(0, (reference.num_chains, -1))
    length = by_chain.shape[1]
    kept = min(float(ess) / 2, most, float(len(draws)))
    each = max(int(kept) // reference.num_chains, 1)
    index = torch.arange(each) * length // each
    return by_chain[:, index].flatten(0, 1)


_VALUES = {
    "energy": ("energy", "energy_p_value"),
    "mmd": ("mmd", "mmd_p_value"),
    "classifier": ("c2st_accuracy", "c2st_accuracy_se", "c2st_p_value"),
}


def _names_of(checks: Sequence[str]) -> list[str]:
    return [name for check in checks for name in _VALUES[check]]


def _tests(
    sample: Float64[Tensor, "draws batch dim"],
    reference: Float64[Tensor, "others batch dim"],
    checks: Sequence[str],
    num_permutations: int,
    resolve: float | None,
    seed: int,
) -> Columns:
    columns: Columns = {}
    ours, theirs = standardised(sample, reference)
    distances = {"energy": energy_distance, "mmd": squared_mmd}
    for name in ("energy", "mmd"):
        if name in checks:
            columns[name] = distances[name](ours, theirs)
            columns[f"{name}_p_value"] = permutation_p_values(
                ours, theirs, name, num_permutations, seed, resolve=resolve
            )
    if "classifier" in checks:
        found = classifier_two_sample(ours, theirs, folds=_FOLDS, seed=seed)
        columns["c2st_accuracy"] = found.accuracy
        columns["c2st_accuracy_se"] = found.accuracy_se
        columns["c2st_p_value"] = found.p_value
    return columns
