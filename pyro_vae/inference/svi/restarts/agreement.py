"""How far several trainings of one pair agree, and what their guides are worth together."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from pyro_vae.inference.draws import PosteriorDraws, draws_of, flat_latents
from pyro_vae.inference.log_weights import mean_error
from pyro_vae.inference.mcmc import split_rhat
from pyro_vae.inference.programs import Pair, Program, ProgramError, program_scope
from pyro_vae.inference.svi.history import best_row
from pyro_vae.inference.svi.restarts.mixture import MixtureGuide
from pyro_vae.results import Result, label, make_result

__all__ = ["Restarts", "compare_runs", "restarts_table"]

_LIMIT = 1.1  # of R-hat, as for the phases of a training
_DRAWS, _JOINT_DRAWS, _ONE_BY_ONE = 200, 1000, 100
_NATS, _NATS_PER_DATUM = 0.05, 0.01  # by which bounds may differ and agree all the same
_MEMORY = 0.5  # GiB


@dataclass(frozen=True, repr=False)
class Restarts:
    """Trainings of one pair from several starts.

    Attributes:
        table: Each run's bound, which is kept, and how far they agree; see `restarts_table`.
        kept: The place of the run that is kept.
        runs: Of `fit`: all of them, with programs that carry their own values, also of modules.
        mixed: The mixture of their guides, where there is one.
        refusal: Why there is none.
    """

    table: Result
    kept: int
    runs: tuple[Any, ...] = ()
    mixed: MixtureGuide | None = field(default=None, repr=False)
    refusal: str = "EM's guides are exact posteriors, so it makes no mixture of them"

    @property
    def mixture(self) -> MixtureGuide:
        """The mixture of the runs' guides, in equal parts: a guide for the model that is kept.

        Raises:
            ProgramError: If there is none; says why.
        """
        if self.mixed is None:
            raise ProgramError(self.refusal)
        return self.mixed

    def __repr__(self) -> str:
        return repr(self.table)


@dataclass(frozen=True)
class _Draws:
    """What was drawn from one run; nats per datum, or total if joint."""

    bounds: Float[Tensor, " draws"]
    weights: Float[Tensor, "draws data"]
    latents: Float[Tensor, "draws entries"]

    @classmethod
    def of(cls, pair: Pair, seed: int) -> "_Draws":
        seed %= 2**32  # what NumPy takes
        count = _JOINT_DRAWS if pair.joint else _DRAWS
        count = count if pair.structure.vectorizable else _ONE_BY_ONE
        with program_scope(seed):
            found: PosteriorDraws = draws_of(pair, num_draws=count, seed=seed, max_memory=_MEMORY)
        weights = found.log_weights.double()
        entries = weights.new_zeros(count, 0)
        if found.latents:
            entries = flat_latents(found.latents, joint=pair.joint).flatten(1).double()
        return cls(weights.mean(1), weights, entries)


def compare_runs(
    pairs: Sequence[Pair],
    *,
    config: Mapping[str, Any],
    seed: int,
    data_sha256: str | None,
) -> Restarts:
    """Draws from each of several fitted pairs, and from the mixture of their guides.

    Args:
        pairs: The runs, of one structure and on the same data; two or more.
        config: For the table's provenance.
        seed: Of the draws.
        data_sha256: Of the data.
    """
    drawn = [_Draws.of(pair, seed + 1 + place) for place, pair in enumerate(pairs)]
    means = [float(run.bounds.mean()) for run in drawn]
    kept = best_row(means)
    refusal, gain, mixture = "", None, None
    try:
        mixture, gain = _mixture([pair.guide for pair in pairs], pairs[kept], kept, seed)
    except ProgramError as error:
        refusal = str(error)
    table = restarts_table(
        means,
        [float(mean_error(run.bounds)) for run in drawn],
        kept=kept,
        rhats=_rhats(drawn, pairs[0].joint),
        gain=gain,
        joint=pairs[0].joint,
        measure=pairs[0].structure.measure,
        config=config,
        seed=seed,
        data_sha256=data_sha256,
        notes=[f"there is no mixture of the guides: {refusal}"] * bool(refusal),
    )
    return Restarts(table, kept, mixed=mixture, refusal=refusal)


def _rhats(drawn: Sequence[_Draws], joint: bool) -> dict[str, Float64[Tensor, " entries"]]:
    """R-hat over runs, by quantity; 1 where runs differ by fewer nats than count.

    Where a guide is exact, its log weights do not vary at all, and R-hat makes much of rounding.
    """
    found = {}
    for name, part, counts in (
        ("bound", "bounds", _NATS if joint else _NATS_PER_DATUM),
        ("log weights", "weights", _NATS),
        ("latents", "latents", 0.0),
    ):
        draws = torch.stack([getattr(run, part) for run in drawn])
        if not draws.numel():
            continue
        means = draws.mean(1)
        near = means.amax(0) - means.amin(0) < counts
        found[name] = torch.where(near, 1.0, split_rhat(draws)).flatten()
    return found


def _mixture(
    guides: list[Program], best: Pair, kept: int, seed: int
) -> tuple[MixtureGuide, tuple[float, float]]:
    """The mixture, and what it gains over the guide that is kept, by fresh draws of both."""
    first = [guides[kept], *guides[:kept], *guides[kept + 1 :]]
    mixture = MixtureGuide(best.guide, first, best.structure.batch_dim)
    with program_scope(seed):
        pair = Pair.inspect(best.model, mixture, best.x, joint=best.joint)
    if not pair.structure.latents:
        raise ProgramError("the guides draw no latents: all are summed out")
    both = [_Draws.of(one, seed + 101 + place).bounds for place, one in enumerate((pair, best))]
    error = math.hypot(*(float(mean_error(bounds)) for bounds in both))
    return mixture, (float(both[0].mean() - both[1].mean()), error)


def restarts_table(
    bounds: Sequence[float],
    errors: Sequence[float] | None = None,
    *,
    kept: int,
    rhats: Mapping[str, Tensor] | None = None,
    gain: tuple[float, float] | None = None,
    joint: bool = False,
    measure: str | None = None,
    config: Mapping[str, Any],
    seed: int,
    data_sha256: str | None,
    notes: Sequence[str] = (),
) -> Result:
    r"""What several runs reached, as a labelled result.

    Args:
        bounds: Of each run, in nats.
        errors: Their standard errors over draws; None where bounds are sums without draws.
        kept: The place of the run that is kept.
        rhats: By quantity, R-hat of its entries over runs.
        gain: Of the mixture of guides, with its standard error.
        joint: Whether nats are those of all data together.
        measure: That of the data.
        config: How it was trained.
        seed: Of the draws.
        data_sha256: Of the data.
        notes: Further sentences.

    Returns:
        Nats are per datum, or total where latents are global:

        ===================  =====  =============================================================
        name                 bound  meaning
        ===================  =====  =============================================================
        `bound`              lower  the ELBO of each `run`, on the same data
        `kept`               -      which run is kept
        `rhat`               none   by `quantity` (bound, log weights, latents): the largest
                                    rank-normalised split R-hat over runs, each run a chain of
                                    independent draws from its guide; it is sensitive to location
                                    and to scale. 1 for bounds and log weights whose means differ by
                                    less than 0.05 nats (bounds per datum: 0.01)
        `disagreeing`        none   the share of the quantity's entries with R-hat above 1.1
        `mixture_gain`       none   ELBO of the mixture of the guides less that of the kept one
        ===================  =====  =============================================================

        `bound_se` and `mixture_gain_se` are the Monte-Carlo errors for these data.

    References:
        Vehtari et al. (2021), Rank-normalization, folding, and localization; Kviman et al. (2022),
        Multiple importance sampling ELBO and deep ensembles of variational approximations.
    """
    reduction = "total" if joint else "per datum"
    nats: dict[str, Any] = {"reduction": reduction, "measure": measure, "seed": seed}
    plain: dict[str, Any] = {"unit": "none", "reduction": "none", "bound": "none"}
    variables: dict[str, Any] = {
        "bound": ("run", list(bounds), label(bound="lower", description="ELBO of the run", **nats)),
        "kept": ("run", [place == kept for place in range(len(bounds))], {}),
    }
    if errors is not None:
        variables["bound_se"] = ("run", list(errors), {})
    if rhats:
        largest = [float(rhat.max()) for rhat in rhats.values()]
        above = [float((rhat > _LIMIT).double().mean()) for rhat in rhats.values()]
        text = "largest R-hat over runs"
        variables["rhat"] = ("quantity", largest, label(description=text, **plain))
        text = f"share of entries with R-hat above {_LIMIT}"
        variables["disagreeing"] = ("quantity", above, label(description=text, **plain))
    if gain is not None:
        text = "ELBO of the mixture of guides less that of the kept guide"
        variables["mixture_gain"] = ((), gain[0], label(bound="none", description=text, **nats))
        variables["mixture_gain_se"] = ((), gain[1], {})
    return make_result(
        variables,
        function="restarts_table",
        config=config,
        seed=seed,
        data_sha256=data_sha256,
        coords={"run": list(range(len(bounds)))} | ({"quantity": list(rhats)} if rhats else {}),
        verdict=[_verdict(bounds, kept, rhats or {})],
        notes=[*_notes(bounds, errors, rhats or {}), *notes],
    )


def _verdict(bounds: Sequence[float], kept: int, rhats: Mapping[str, Tensor]) -> str:
    said = f"of {len(bounds)} runs run {kept} is kept, with the highest bound, {bounds[kept]:.6g}"
    apart = [name for name, rhat in rhats.items() if not float(rhat.max()) <= _LIMIT]
    if not rhats:
        return f"{said}; the lowest is {min(bounds):.6g} nats"
    if apart:
        return f"{said} nats; the runs do not agree on {', '.join(apart)}"
    return f"{said} nats; all runs agree (R-hat at most {_LIMIT})"


def _notes(
    bounds: Sequence[float], errors: Sequence[float] | None, rhats: Mapping[str, Tensor]
) -> list[str]:
    wide = {name: float(r.max()) for name, r in rhats.items() if not float(r.max()) <= _LIMIT}
    if not wide:
        return []
    worst = max(wide.values())
    if "bound" in wide:
        return [
            f"R-hat over runs is up to {worst:.3g}: the runs end at different bounds, from "
            f"{min(bounds):.6g} to {max(bounds):.6g} nats, so training finds local optima or was "
            "not finished; the best is kept, and more restarts may find a better one"
        ]
    return [
        f"R-hat over runs is up to {worst:.3g} although bounds agree: the runs found different "
        "modes of the posterior, or latents that differ by labels, signs or rotations; what one "
        "guide says of the latents is not all that there is to say"
    ]
