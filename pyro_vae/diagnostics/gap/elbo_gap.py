r"""The ELBO gap decomposed: what the family cannot express, and what amortisation lost.

.. math:: \underbrace{\log p(x) - \mathcal L[q]}_{\text{gap}}
          = \underbrace{\log p(x) - \mathcal L[q^*]}_{\text{approximation}}
          + \underbrace{\mathcal L[q^*] - \mathcal L[q]}_{\text{amortisation}}

for each datum, with :math:`q^*` the best member of the guide's family for that datum. A richer
family closes part of the approximation gap; a larger encoder, or more training of it, part of the
amortisation gap. `elbo_surgery` cuts the ELBO the other way: into rate and distortion, and the rate
into mutual information and the distance of the aggregated posterior from the prior.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.checks import check_count, check_max_memory
from pyro_vae.data import Seed, known_seed
from pyro_vae.diagnostics.evidence import log_evidence
from pyro_vae.diagnostics.gap.global_latents import (
    NUM_INNER,
    global_gap_columns,
    global_gap_variables,
)
from pyro_vae.inference.log_weights import (
    effective_sample_size,
    importance_bound,
    importance_bound_error,
    khat_threshold,
    mean_error,
    pareto_tail,
)
from pyro_vae.inference.programs import (
    Pair,
    Program,
    ProgramError,
    ProgramStructure,
    has_global_latents,
    program_scope,
    tensors_of,
    tool,
)
from pyro_vae.inference.refit import (
    FAMILIES,
    RefittedGuide,
    inspect_refittable,
    paired_log_weights,
    refits,
)
from pyro_vae.results import Result, data_text, label, make_result, sha256_of

__all__ = ["GAP_VARIABLES", "data_hash", "elbo_gap"]

GAP_VARIABLES = ("log_evidence", "elbo", "gap", "approximation_gap", "amortization_gap")
"""The variables that every result of a pair without global latents has."""

_OF_EVIDENCE = ("log_evidence", "gap", "approximation_gap")  # whose error is that of the evidence
_NAMES = {"same": "refitted", "full": "full", "flow": "flow"}
_SAID = {
    "same": "the guide's own family, refitted to each datum",
    "full": "a normal of full covariance in place of the guide's noise, fitted to each datum",
    "flow": "a flow in place of the guide's noise, fitted to each datum",
}
# What log p(x) - ELBO says about KL(q || p(z | x)), by what log p(x) is; the ELBO is unbiased.
_BOUND_OF_GAP = {"exact": "unbiased", "unbiased": "unbiased", "lower": "lower", "upper": "upper"}


@tool
def elbo_gap(
    model: Program,
    guide: Program,
    x: Any,
    *,
    num_particles: int = 1000,
    evidence: str | Mapping[str, Any] | Result = "importance",
    richer: Sequence[str] = ("full", "flow"),
    max_steps: int = 1000,
    step_size: float = 0.05,
    seed: Seed = 0,
    max_memory: float = 0.5,
    progress: bool = True,
) -> Result:
    r"""Splits the gap of each datum into an approximation and an amortisation part.

    The guide's family is refitted to each datum by `refit_guide`, and so are the richer families.
    Every ELBO is then taken on fresh draws, so that the search flatters none, and all on the same
    random numbers, so that their differences are surer than they are.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior; which ones can be refitted, and what
            stays fixed, says `refit_guide`.
        x: The data; a tuple for several arguments, a dict for keywords.
        num_particles: Fresh draws for each ELBO and datum, at least 2.
        evidence: Where log p(x) comes from: `"importance"`, with the best family fitted to the
            datum as proposal; another method of `log_evidence`, by its name or as a mapping of its
            arguments with the key `"method"`; or a `Result` with `log_evidence` for the same data.
        richer: Of `"full"` and `"flow"`; each family starts from the one before it.
        max_steps: The most steps of each family.
        step_size: Of the first steps, in the guide's own scales.
        seed: Seeds everything; the caller's random state is left alone.
        max_memory: Roughly the memory that one chunk of particles may take, in GiB.
        progress: Shows bars on stderr where that is a terminal.

    Returns:
        In nats per datum:

        ===================  =====  ====================  ==========================================
        name                 dims   unit, bound           meaning
        ===================  =====  ====================  ==========================================
        `log_evidence`       datum  nats, the evidence's  log p(x)
        `elbo`               datum  nats, lower           evidence lower bound of the guide
        `gap`                datum  nats, the evidence's  log evidence - ELBO: KL(q || p(z | x));
                                                          unbiased where the evidence is exact
        `approximation_gap`  datum  nats, upper or none   log evidence - ELBO of the family's best;
                                                          upper unless the evidence is a lower bound
                                                          or bounds nothing
        `amortization_gap`   datum  nats, lower           ELBO of the family's best - ELBO of the
                                                          guide
        `elbo_refitted`      datum  nats, lower           ELBO of the guide's own family, refitted
        `elbo_<family>`      datum  nats, lower           ELBO of every richer family
        `gain_<family>`      datum  nats, none            that less `elbo_refitted`
        `converged`          datum  bool                  whether all families had stopped rising
        `ess`                datum  particles, none       of the weights, with `"importance"`
        `khat`               datum  none, none            Pareto k-hat of these weights
        `error_reliable`     datum  bool                  whether the error of the evidence is
                                                          reliable, where that is known
        ===================  =====  ====================  ==========================================

        Standard errors are `*_se`; where the evidence states its bias, those of it, `gap` and
        `approximation_gap` are `*_bias`. gap = approximation_gap + amortization_gap holds for every
        datum, and approximation_gap - gain_<family> is the gap that is left with that family. `gap`
        is as sure as the evidence: with a lower bound of log p(x) it is low. `amortization_gap` is
        low and `approximation_gap` high by what the search for the best member missed.

        Of a pair with global latents theta nothing is refitted, and the chain rule cuts the totals,
        `gap` = `global_gap` + the sum of `local_gap`:

        ================  =====  ====================  =============================================
        name              dims   unit, bound           meaning
        ================  =====  ====================  =============================================
        `log_evidence`    none   nats, the evidence's  log p(x) of all data
        `elbo`            none   nats, lower           evidence lower bound of all data
        `gap`             none   nats, lower or none   log evidence - ELBO; lower where the evidence
                                                       is
        `global_gap`      none   nats, none            KL(q(theta) || p(theta | x))
        `local_gap`       datum  nats, none            E_q KL(q(z | x, theta) || p(z | x, theta))
        `ess`             none   particles, none       of the draws of theta, with `"importance"`
        `khat`            none   none, none            Pareto k-hat of their weights
        `error_reliable`  none   bool                  whether the error of the evidence is reliable
        ================  =====  ====================  =============================================

        Each of `num_particles` draws of theta has 32 of every datum's latents beside it, and log
        p(x | theta) is their importance bound, whose bias is taken out to first order; the errors
        take in as much as was taken out. Where the data have no latents but those that are summed
        out, `local_gap` is zero and log p(x | theta) exact.

    Raises:
        ProgramError: If the pair has no log weights, the data are subsampled, or the guide has a
            distribution that cannot be refitted; the sentence names the site.
        ValueError: If an argument is out of its range, or the evidence is not of these data.

    Note: An ELBO, k-hat and every importance estimate are blind to a mode that no draw visits; so
        is a search that starts from the guide.

    References:
        Cremer, Li & Duvenaud (2018), Inference suboptimality in variational autoencoders.

    Example:
        >>> import torch
        >>> from pyro_vae import LinearGaussian
        >>> pair, x = LinearGaussian(data_dim=3, latent_dim=2), torch.zeros(4, 3)
        >>> decomposition = elbo_gap(pair.model, pair.best_diagonal_guide, x, evidence="exact",
        ...                   richer=(), max_steps=60, num_particles=100, progress=False)
        >>> bool(abs(decomposition.amortization_gap).max() < 0.1)
        True
    """
    seed = known_seed(seed)
    families = _families(richer)
    check_count("num_particles", num_particles, 2)
    check_max_memory(max_memory)
    with program_scope(seed):
        if has_global_latents(model, guide, x):
            return _of_global_latents(
                model, guide, x, num_particles, evidence, seed, max_memory, progress
            )
        pair = inspect_refittable(model, guide, x)
        known = _evidence(model, guide, x, evidence, seed, progress)
        if known is not None:
            _check_evidence(known, x, pair.structure)
        fitted = list(
            refits(
                pair,
                families,
                max_steps=max_steps,
                step_size=step_size,
                max_memory=max_memory,
                progress=progress,
            )
        )
        weights = paired_log_weights(pair, [guide, *fitted], num_particles, max_memory)
    columns = _decompose(weights, fitted, known)
    columns["converged"] = torch.stack([f.converged for f in fitted]).all(0)
    return _result(
        columns,
        fitted,
        known,
        pair.structure,
        x,
        num_particles,
        seed,
        {
            "num_particles": num_particles,
            "evidence": _method(evidence, known),
            "richer": list(families[1:]),
            "max_steps": max_steps,
            "step_size": step_size,
        },
    )


def _of_global_latents(
    model: Program,
    guide: Program,
    x: Any,
    num_particles: int,
    evidence: str | Mapping[str, Any] | Result,
    seed: int,
    max_memory: float,
    progress: bool,
) -> Result:
    """The decomposition of a pair with global latents; runs in the caller's `program_scope`."""
    pair = Pair.inspect(model, guide, x, joint=True, num_particles=num_particles)
    if pair.structure.split is None:
        names = ", ".join(pair.structure.enumerated)
        raise ProgramError(
            f"the data share the state of an enumerated site ({names}) that is outside their "
            "plate, so none has a part of its own; call log_evidence(..., joint=True), whose gap "
            "is that of all latents together"
        )
    known = _evidence(model, guide, x, evidence, seed, progress)
    if known is not None and ("log_evidence" not in known or known["log_evidence"].dims):
        raise ValueError(
            "latents are global, so the evidence is one number for all data; pass what "
            "log_evidence returns with joint=True"
        )
    columns = global_gap_columns(pair, num_particles, known, max_memory)
    notes = [*pair.structure.notes]
    if known is None:
        notes.append(
            "the log evidence is a lower bound, so gap and global gap are low by what it misses"
            + ("." if columns["error_reliable"] else ", and its error is unreliable.")
        )
    return make_result(
        global_gap_variables(columns, num_particles, pair.structure.measure, known),
        function="elbo_gap",
        config={
            "num_particles": num_particles,
            "num_inner": NUM_INNER,
            "evidence": _method(evidence, known),
            "joint": True,
        },
        seed=seed,
        data_sha256=data_hash(x),
        notes=notes,
    )


def _families(richer: Sequence[str]) -> tuple[str, ...]:
    if isinstance(richer, str) or not set(richer) <= set(FAMILIES[1:]):
        raise ValueError(f"richer is {richer!r}, but must be a tuple of {FAMILIES[1:]}")
    return tuple(name for name in FAMILIES if name == "same" or name in richer)


def _evidence(
    model: Program,
    guide: Program,
    x: Any,
    evidence: str | Mapping[str, Any] | Result,
    seed: int,
    progress: bool,
) -> Result | None:
    """The given evidence or that of the given method; None where the gap draws its own."""
    if isinstance(evidence, Result):
        return evidence
    if evidence == "importance":
        return None
    options = {"method": evidence} if isinstance(evidence, str) else dict(evidence)
    if options.get("method") in (None, "importance"):
        raise ValueError(
            "a mapping of evidence names a method other than 'importance', whose proposal and "
            "particles are the gap's own; pass evidence='importance', or a Result"
        )
    return log_evidence(model, guide, x, **{"seed": seed, "progress": progress, **options})


def _method(evidence: str | Mapping[str, Any] | Result, known: Result | None) -> str:
    if known is None:
        return "importance"
    if isinstance(evidence, Result):
        return str(known.provenance.get("config", {}).get("method", "given"))
    return evidence if isinstance(evidence, str) else str(evidence["method"])


def _check_evidence(known: Result, x: Any, structure: ProgramStructure) -> None:
    if "log_evidence" not in known or known["log_evidence"].dims != ("datum",):
        raise ValueError(
            "the evidence has no log_evidence for each datum; pass what log_evidence returns "
            "without joint=True"
        )
    if known.sizes["datum"] != structure.batch_size:
        raise ValueError(
            f"the evidence is of {known.sizes['datum']} data and x of {structure.batch_size}; "
            "pass the evidence of x"
        )
    recorded = known.quantity("log_evidence").data_sha256
    if recorded is not None and recorded != data_hash(x):
        raise ValueError("the evidence is of other data than x; pass the evidence of x")
    measure = known["log_evidence"].attrs.get("measure")
    if measure not in (None, structure.measure):
        raise ValueError(
            f"the evidence is of {measure} data, but the model's are {structure.measure}; pass the "
            "evidence of this model"
        )


def data_hash(x: Any) -> str:
    """Of the data, as results carry it."""
    return sha256_of(*tensors_of(x))


def _decompose(
    weights: Sequence[Float[Tensor, "particles batch"]],
    fitted: Sequence[RefittedGuide],
    known: Result | None,
) -> dict[str, Tensor]:
    """Every number of the decomposition, with the standard errors of paired draws."""
    amortised, refitted = weights[0], weights[1]
    if known is None:
        # Which family proposes was settled by other draws, so the choice favours none.
        best = torch.stack([f.log_weight for f in fitted]).argmax(0)
        proposal = torch.stack(list(weights[1:])).gather(0, best.expand_as(refitted)[None])[0]
        found, independent = _importance(proposal)
        evidence = found["log_evidence"]
        influence = (proposal - evidence).exp() - 1  # of each draw on the importance bound
    else:
        given = ("log_evidence", "log_evidence_se", "log_evidence_bias", "error_reliable")
        found = {name: torch.as_tensor(known[name].values) for name in given if name in known}
        evidence = found["log_evidence"] = found["log_evidence"].double()
        independent = found.setdefault("log_evidence_se", torch.zeros_like(evidence)).double()
        influence = torch.zeros_like(amortised)
    columns = dict(found)
    for name in ("gap", "approximation_gap"):
        if "log_evidence_bias" in found:
            columns[f"{name}_bias"] = found["log_evidence_bias"]

    def difference(name: str, value: Tensor, draws: Tensor, other: Tensor | float = 0.0) -> None:
        columns[name] = value
        columns[f"{name}_se"] = (mean_error(draws).square() + other**2).sqrt()

    difference("elbo", amortised.mean(0), amortised)
    difference("gap", evidence - amortised.mean(0), influence - amortised, independent)
    difference("approximation_gap", evidence - refitted.mean(0), influence - refitted, independent)
    paired = refitted - amortised
    difference("amortization_gap", refitted.mean(0) - amortised.mean(0), paired)
    for family, draws in zip(fitted, weights[1:], strict=True):
        difference(f"elbo_{_NAMES[family.family]}", draws.mean(0), draws)
        if family.family != "same":
            gain = draws.mean(0) - refitted.mean(0)
            difference(f"gain_{family.family}", gain, draws - refitted)
    return columns


def _importance(
    weights: Float[Tensor, "particles batch"],
) -> tuple[dict[str, Tensor], Float[Tensor, " batch"]]:
    """The importance bound, its diagnostics, and the error that its draws do not show."""
    tail = pareto_tail(weights)
    error = importance_bound_error(weights, tail)
    found = {
        "log_evidence": importance_bound(weights),
        "log_evidence_se": error.se,
        "log_evidence_bias": error.bias,
        "error_reliable": error.reliable,
        "ess": effective_sample_size(weights),
        "khat": tail.khat,
    }
    return found, error.unseen


def _result(
    columns: Mapping[str, Tensor],
    fitted: Sequence[RefittedGuide],
    known: Result | None,
    structure: ProgramStructure,
    x: Any,
    num_particles: int,
    seed: int,
    config: Mapping[str, Any],
) -> Result:
    kind = "lower" if known is None else str(known["log_evidence"].attrs["bound"])
    texts = {
        "log_evidence": (kind, "log p(x)" if kind == "exact" else "estimate of log p(x)"),
        "elbo": ("lower", "evidence lower bound of the guide"),
        "gap": (_BOUND_OF_GAP.get(kind, "none"), "log evidence - ELBO: KL(q || p(z | x))"),
        "approximation_gap": (
            "upper" if kind in ("exact", "unbiased", "upper") else "none",
            "log evidence - ELBO of the best of the guide's family",
        ),
        "amortization_gap": ("lower", "ELBO of the best of the guide's family - ELBO of the guide"),
    }
    for family in (f.family for f in fitted):
        texts[f"elbo_{_NAMES[family]}"] = ("lower", f"evidence lower bound of {_SAID[family]}")
        texts[f"gain_{family}"] = ("none", f"what {_SAID[family]}, gains over the guide's own")
    given = {} if known is None else known["log_evidence"].attrs
    variables: dict[str, Any] = {}
    for name, values in columns.items():
        if values.dtype == torch.bool:
            variables[name] = ("datum", values, {})
            continue
        unit = {"ess": "particles", "khat": "none"}.get(name, "nats")
        own = name.removesuffix("_se").removesuffix("_bias")
        bound, description = texts.get(own, ("none", f"{name} of the weights"))
        rated = "error_reliable" in columns and name in _OF_EVIDENCE
        measure = structure.measure if unit == "nats" else None
        attrs = label(
            unit=unit,
            bound=bound,
            measure=measure,
            num_particles=given.get("num_particles")
            if name.startswith("log_evidence") and known is not None
            else num_particles,
            description=description,
            reliable_by="error_reliable" if rated else None,
        )
        variables[name] = ("datum", values, attrs)
    return make_result(
        variables,
        function="elbo_gap",
        config=config,
        seed=seed,
        data_sha256=data_hash(x),
        notes=_notes(columns, kind, known, num_particles),
    )


def _notes(
    columns: Mapping[str, Tensor], kind: str, known: Result | None, num_particles: int
) -> list[str]:
    """What must not be parted from the numbers."""
    size = len(columns["elbo"])
    notes = []
    if known is None:
        threshold = khat_threshold(num_particles)
        bad = int((~columns["error_reliable"]).sum())
        if bad:
            notes.append(
                f"the upper 90 % limit of k-hat is above {threshold:.2f} (or unknown), or the "
                f"error above 0.5 nats, for {data_text(bad, size)}: there the log evidence is a "
                "lower bound whose error is unreliable, and the gap is low by an unknown amount."
            )
    else:
        notes += [str(note) for note in known.provenance.get("notes", [])]
    stopped = int((~columns["converged"]).sum())
    if stopped:
        notes.append(
            f"the bound of {data_text(stopped, size)} was still rising, or never settled, when the "
            "steps ran out: raise max_steps. There the amortisation gap is low, the approximation "
            "gap high."
        )
    below = int((columns["gap"] < -4 * columns["gap_se"] - 1e-9).sum())
    if below:
        notes.append(
            f"for {data_text(below, size)} the log evidence is below the ELBO by more than 4 "
            "standard errors, so it is a poor bound there: use another method."
        )
    if kind == "lower":
        notes.append(
            "the log evidence is a lower bound, so the gap and the approximation gap are low by "
            "what it misses."
        )
    notes.append(
        "the best member of a family was searched for, so its ELBO is a lower bound of the best: "
        "the amortisation gap is low, and the approximation gap high, by what the search missed."
    )
    return notes
