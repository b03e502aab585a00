r"""The log evidence log p(x) of each datum, with what each number bounds and how surely."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyro_vae.checks import check_max_memory
from pyro_vae.data import Seed, as_seed
from pyro_vae.diagnostics.evidence.annealing import (
    FEWEST_SIMULATIONS,
    Annealing,
    annealed_weights,
    reduce_forward,
    reduce_reverse,
    with_shared_draws,
)
from pyro_vae.diagnostics.evidence.bridge import Bridging, bridge_columns
from pyro_vae.diagnostics.evidence.chunks import (
    ChunkPlan,
    Columns,
    identity_of,
    plan_chunks,
    run_chunks,
)
from pyro_vae.diagnostics.evidence.importance import (
    Importance,
    importance_columns,
    importance_notes,
    two_sided_columns,
)
from pyro_vae.diagnostics.evidence.labels import labelled_evidence
from pyro_vae.diagnostics.evidence.proper import check_proper
from pyro_vae.diagnostics.evidence.quadrature import Quadrature, quadrature_columns
from pyro_vae.inference.programs import (
    Pair,
    Program,
    ProgramError,
    UnconstrainedModel,
    inspected_guide,
    program_scope,
    simulate,
    tool,
    unconstrained_model,
)
from pyro_vae.results import Result, data_text, label, make_result, sha256_of

__all__ = ["METHODS", "log_evidence"]

_CHUNK = 100  # data at once in the methods that run chains


@tool
def log_evidence(
    model: Program,
    guide: Program | None,
    x: Any,
    *,
    method: str = "importance",
    joint: bool | None = None,
    seed: Seed = 0,
    max_memory: float = 0.5,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Result:
    r"""Estimates log p(x) of each datum, and says what each number bounds and how surely.

    ==================  ===================  =====================================================
    method              log_evidence is      settings (defaults in the class named)
    ==================  ===================  =====================================================
    `"importance"`      lower, in expect.    `num_particles`: 1000 draws from the guide
    `"two_sided"`       lower, in expect.    the same; what both directions say of simulated data
    `"annealed"`        lower, in expect.    `annealing.Annealing`: `num_chains`, `schedule`, ...
    `"bidirectional"`   lower, in expect.    the same; an interval for its error besides
    `"bridge"`          consistent           `bridge.Bridging`: `proposal`, `num_samples`, ...
    `"quadrature"`      exact                `quadrature.Quadrature`: `tolerance`, `max_points`
    `"exact"`           exact                none; where the model has a method `log_evidence(x)`
    ==================  ===================  =====================================================

    Importance sampling gives the ELBO and the gap from the same draws:

    .. math:: \log \hat p(x_n) = \log \frac1K \sum_k w_{kn}, \qquad
              w_{kn} = \frac{p(x_n, z_{kn})}{q(z_{kn} \mid x_n)}

    In expectation this is below log p(x) and rises to it with K; the mean of w itself is unbiased.
    Annealing carries K chains along a path to the posterior, and its weights obey the same. The
    standard error takes in the bias and the weights beyond the largest seen (see
    `importance_bound_error`); where it is unreliable all the same, the number says so with a
    question mark, and the result for how many data.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior; None where the method can do without one
            (the prior then takes its place; bridge sampling fits a normal).
        x: The data; a tuple for several arguments, a dict for keywords.
        method: One of those above.
        joint: True for one number for the full data, a total; None for that where latents are
            global.
        seed: Seeds the draws; the caller's random state is left alone.
        max_memory: Roughly the memory that one chunk of data and particles may take, in GiB.
        checkpoint: A file that keeps the finished chunks of data; a second call with it goes on
            where the first stopped, and gives what one call gives.
        progress: Shows a bar on stderr where that is a terminal.
        **settings: Of the method.

    Returns:
        Nats are per datum; with `joint` they are totals, and there is no dimension `datum`.

        ==================  ==========  ==================  =======================================
        name                dims        unit, bound         meaning
        ==================  ==========  ==================  =======================================
        `log_evidence`      datum       nats, the method's  log p(x); the table above says what it
                                                            bounds
        `error_reliable`    datum       bool                whether the error of a mean of weights
                                                            can be relied upon
        `elbo`              datum       nats, lower         `"importance"`, `"two_sided"`: evidence
                                                            lower bound of the guide
        `gap`               datum       nats, lower         the same: log evidence - ELBO, in
                                                            expectation at most the true gap
        `ess`               datum       particles, none     effective sample size; not of
                                                            `"quadrature"` and `"exact"`
        `khat`              datum       none, none          `"importance"`, `"two_sided"`: Pareto
                                                            k-hat of the weights
        `acceptance`        datum       none, none          mean acceptance probability of the
                                                            chains: annealing and `"bridge"`
        `rhat`              datum       none, none          `"bridge"`: largest split R-hat of the
                                                            posterior chains
        `quadrature_error`  datum       nats, none          `"quadrature"`: its estimated error
        `simulated_lower`   simulation  nats, lower         log p(x) of data drawn from the model
        `simulated_upper`   simulation  nats, upper         the same, from above
        `simulated_elbo`    simulation  nats, lower         `"two_sided"`: the ELBO of these data
        `error_bound`       none        nats, upper         mean of `simulated_upper` -
                                                            `simulated_lower`
        `symmetric_kl`      none        nats, none          `"two_sided"`: mean of EUBO - ELBO =
                                                            KL(q || p) + KL(p || q)
        `forward_ess`       none        none, none          `"two_sided"`: 1 / E_p[p(z | x) / q(z |
                                                            x)]
        ==================  ==========  ==================  =======================================

        Standard errors are `*_se`, where numbers have them. Means of weights have `*_bias` too, the
        part of the error that is bias: result.isel(datum=result.error_reliable.values) leaves out
        the data whose error is unreliable. Quadrature that has not converged is not labelled exact.
        `"bidirectional"` and `"two_sided"` draw as many data from the model (dimension
        `simulation`) as there are; their log evidence lies between the lower and the upper number
        in expectation. The upper one of `"two_sided"` is one log weight of an exact posterior draw
        (EUBO). `forward_ess` is the effective share of the guide's draws as draws of the posterior
        see it: what the guide never visits, they do.

    Raises:
        ProgramError: If the pair has no log weights (see `log_weights`), a latent's prior is
            improper (names it), or the method cannot do with this pair; says which can.
        CheckpointError: If `checkpoint` belongs to another run.
        ValueError: If an argument is out of its range, or the model offers no exact evidence.

    Note: the interval of `"bidirectional"` holds for data from the model; real data may be harder.
        All chains behind a `simulated_upper` start from one exact draw. From 10 simulations its
        error takes the spread between them in (see `annealing.with_shared_draws`); that of fewer,
        or of a single one with `joint`, leaves out what another exact draw would have given, and is
        too small: the bound holds in expectation over simulations.

    References:
        Burda, Grosse & Salakhutdinov (2016), Importance weighted autoencoders; Wu, Burda,
        Salakhutdinov & Grosse (2017), On the quantitative analysis of decoder-based generative
        models; Grosse, Ghahramani & Adams (2015), Sandwiching the marginal likelihood using
        bidirectional Monte Carlo, arXiv:1511.02543; Meng & Wong (1996), Simulating ratios of
        normalizing constants; Blessing, Jia, Esslinger, Vargas & Neumann (2024), Beyond ELBOs: a
        large-scale evaluation of variational methods for sampling (EUBO, forward ESS).

    Example:
        >>> import torch
        >>> from pyro_vae import LinearGaussian
        >>> model = LinearGaussian(data_dim=3, latent_dim=2)
        >>> x = torch.zeros(2, 3)
        >>> found = log_evidence(model.model, model.exact_guide, x, num_particles=10)
        >>> exact = log_evidence(model.model, None, x, method="exact")
        >>> bool(abs(found.log_evidence - exact.log_evidence).max() < 1e-4)
        True
        >>> by_grid = log_evidence(model.model, None, x, method="quadrature")
        >>> bool(abs(by_grid.log_evidence - exact.log_evidence).max() < 1e-4)
        True
    """
    seed = as_seed(seed)
    if method == "exact":
        return _exact(model, x)
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, but must be one of {', '.join(_NAMES)}")
    chosen = METHODS[method]
    own = _settings_of(chosen.settings, method, settings)
    if guide is None and chosen.settings is Importance:
        raise ValueError(f"method {method!r} draws from the guide; pass one")
    if guide is None and method == "bridge" and own.proposal == "guide":
        own = Bridging(**{**asdict(own), "proposal": "normal"})
    check_max_memory(max_memory)
    shown = inspected_guide(model, guide)
    with torch.no_grad(), program_scope(seed):
        pair = Pair.inspect(model, shown, x, joint=joint)
        check_proper(pair)  # a point mass has its own sentence, first
        if method == "annealed" and pair.joint and guide is not None and "start" not in settings:
            # The prior of global latents may lie hundreds of nats away.
            own = replace(
                own, start="guide" if UnconstrainedModel(pair).knows_guide_density else "prior"
            )
        config = {"method": method, **asdict(own), "joint": pair.joint}
        plan = plan_chunks(
            pair,
            num_particles=chosen.at_once(own),
            max_memory=max_memory,
            max_data=None if chosen.settings is Importance else _CHUNK,
        )
        found = run_chunks(
            plan,
            lambda part: chosen.columns(_Task(part, guide is not None, plan), own),
            seed=seed,
            identity=identity_of(model, shown, x, config, seed) if checkpoint is not None else {},
            checkpoint=checkpoint,
            progress=progress,
        )
    config["subsample_factor"] = plan.structure.scale
    count = chosen.at_once(own) if chosen.counts else None
    if method == "bidirectional":
        found = with_shared_draws(found, own.num_chains)
    notes = plan.structure.notes + chosen.notes(found, own)
    return labelled_evidence(found, plan.structure, x, config, count, seed, notes)


def _settings_of(kind: type, method: str, given: Mapping[str, Any]) -> Any:
    known = [field.name for field in fields(kind)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(
            f"method {method!r} has no setting {unknown[0]!r}; it has {', '.join(known)}"
        )
    return kind(**given)


# --- methods --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """One chunk of data and what is needed to work on it."""

    pair: Pair
    has_guide: bool
    plan: ChunkPlan

    def latent_model(self) -> UnconstrainedModel:
        """The log joint over unconstrained latents."""
        return UnconstrainedModel(self.pair, has_guide=self.has_guide)


@dataclass(frozen=True)
class _Method:
    """A way to the evidence."""

    settings: type
    columns: Callable[[_Task, Any], Columns]
    notes: Callable[[Columns, Any], list[str]]
    at_once: Callable[[Any], int]  # draws of a datum that are in memory together
    counts: bool  # whether that is also the number of particles behind a value


def _importance_columns(task: _Task, settings: Importance) -> Columns:
    return importance_columns(task.pair, task.plan, settings.num_particles)


def _annealed_columns(task: _Task, settings: Annealing) -> Columns:
    found = annealed_weights(task.latent_model(), settings)
    return {**reduce_forward(found["forward"]), "acceptance": found["acceptance"].double()}


def _two_sided_columns(task: _Task, settings: Importance) -> Columns:
    columns = _importance_columns(task, settings)
    latent_model, exact = _at_simulated(
        task, "use method='bidirectional', which starts at the prior"
    )
    return columns | two_sided_columns(latent_model, exact, settings.num_particles)


def _bidirectional_columns(task: _Task, settings: Annealing) -> Columns:
    columns = _annealed_columns(task, settings)
    instead = "use start='prior'" if settings.start == "guide" else None
    latent_model, exact = _at_simulated(task, instead)
    found = annealed_weights(latent_model, settings, exact)
    lower, upper = reduce_forward(found["forward"]), reduce_reverse(found["reverse"])
    columns["simulated_lower"] = lower["log_evidence"]
    columns["simulated_lower_se"] = lower["log_evidence_se"]
    columns["simulated_lower_bias"] = lower["log_evidence_bias"]
    columns["simulated_upper"] = upper["log_evidence"]
    columns["simulated_upper_se"] = upper["log_evidence_se"]
    columns["simulated_upper_bias"] = upper["log_evidence_bias"]
    return columns


def _at_simulated(task: _Task, instead: str | None) -> tuple[UnconstrainedModel, Tensor]:
    """The log joint at data drawn from the model, and the exact posterior draws behind them.

    Args:
        task: The chunk of data whose shapes the simulated ones have.
        instead: What to do where the guide cannot be run on them; None where it is not.
    """
    pair = task.pair
    drawn = simulate(pair.model, pair.x)
    if instead is not None and not drawn.replaced:
        raise ProgramError(
            "the model's observed data are not among its arguments as they are, so the guide "
            f"cannot be run on simulated data; {instead}"
        )
    args, kwargs = drawn.arguments
    data = kwargs if kwargs and not args else args
    guide = pair.guide if task.has_guide else None
    latent_model = unconstrained_model(drawn.model, guide, data, joint=pair.joint)
    return latent_model, latent_model.unconstrain(drawn.latents)


def _bridge_columns(task: _Task, settings: Bridging) -> Columns:
    return bridge_columns(task.latent_model(), settings, seed=int(torch.randint(2**31, ())))


def _quadrature_columns(task: _Task, settings: Quadrature) -> Columns:
    return quadrature_columns(task.latent_model(), settings)


def _exact(model: Program, x: Any) -> Result:
    owner = getattr(model, "__self__", None)
    if not isinstance(owner, nn.Module) or not hasattr(owner, "log_evidence"):
        raise ValueError(
            "this model offers no exact log evidence (a method log_evidence(x)); use "
            "method='importance'"
        )
    with torch.no_grad():
        values: Tensor = cast(Any, owner).log_evidence(x)
    attrs = label(bound="exact", measure="real", description="log p(x) in closed form")
    return make_result(
        {"log_evidence": ("datum", values, attrs)},
        function="log_evidence",
        config={"method": "exact"},
        seed=None,
        data_sha256=sha256_of(x),
    )


# --- what must not be parted from the numbers -----------------------------------------------------


def _annealed_notes(found: Columns, settings: Annealing) -> list[str]:
    bad = int((~found["error_reliable"]).sum())
    notes = []
    if bad:
        notes.append(
            f"the error is above 0.5 nats (or unknown) for {data_text(bad, len(found['ess']))}: "
            "there it rests on the weights of the chains being log-normal, and the log evidence is "
            "a lower bound whose error is unreliable. Use more temperatures."
        )
    slow = int((found["acceptance"] < 0.1).sum())
    if slow:
        notes.append(
            "fewer than a tenth of the moves were accepted for "
            f"{data_text(slow, len(found['ess']))}: there the chains hardly moved. Use a smaller "
            "step_size."
        )
    if settings.start == "guide":
        notes.append("Chains that start from the guide may never reach a mode that it misses.")
    return notes


def _two_sided_notes(found: Columns, settings: Importance) -> list[str]:
    return [
        "symmetric_kl and forward_ess are of data simulated from the model, on which an exact "
        "posterior draw is known; they see a mode that the guide never visits if the prior does, "
        "and say nothing of data unlike the model's.",
        *importance_notes(found, settings),
    ]


def _bidirectional_notes(found: Columns, settings: Annealing) -> list[str]:
    return [
        *_annealed_notes(found, settings),
        "error_bound is the mean distance of upper and lower bound on data simulated from the "
        "model; annealing on real data may err by more.",
        *_few_simulations(len(found["simulated_upper"])),
    ]


def _few_simulations(count: int) -> list[str]:
    if count >= FEWEST_SIMULATIONS:
        return []
    return [
        f"the error of simulated_upper leaves out what another exact draw would have given: from "
        f"{FEWEST_SIMULATIONS} data on it is known from their spread, and these are {count}."
    ]


def _bridge_notes(found: Columns, settings: Bridging) -> list[str]:
    rhat = found["rhat"]
    bad = int((~(rhat <= 1.05)).sum())
    notes = [
        "bridge sampling is consistent and no bound; chains and proposal may both miss a mode."
    ]
    if bad:
        notes.insert(
            0,
            f"R-hat is above 1.05 for {data_text(bad, len(rhat))} (largest "
            f"{float(rhat.max()):.3g}): there the estimate and its error are unreliable. Longer "
            "chains help.",
        )
    return notes


def _quadrature_notes(found: Columns, settings: Quadrature) -> list[str]:
    error, nothing = found["quadrature_error"], found["log_evidence"] == -math.inf
    bad = (error > settings.tolerance) & ~nothing
    notes = []
    if bool(bad.any()):
        notes.append(
            f"the quadrature error is above {settings.tolerance:g} nats for "
            f"{data_text(int(bad.sum()), len(error))} (largest {float(error[bad].max()):.2g}); "
            "raise max_points, or compare with method='annealed'."
        )
    if bool(nothing.any()):
        notes.append(
            "no point with a positive density was found for "
            f"{data_text(int(nothing.sum()), len(error))}, so log p(x) is minus infinity there as "
            "far as the search went."
        )
    return notes


def _no_particles(_settings: Any) -> int:
    return 500  # grid points or draws that are evaluated together


METHODS = {
    "importance": _Method(
        Importance, _importance_columns, importance_notes, lambda s: s.num_particles, True
    ),
    "two_sided": _Method(
        Importance, _two_sided_columns, _two_sided_notes, lambda s: s.num_particles, True
    ),
    "annealed": _Method(
        Annealing, _annealed_columns, _annealed_notes, lambda s: s.num_chains, True
    ),
    "bidirectional": _Method(
        Annealing, _bidirectional_columns, _bidirectional_notes, lambda s: s.num_chains, True
    ),
    "bridge": _Method(Bridging, _bridge_columns, _bridge_notes, _no_particles, False),
    "quadrature": _Method(Quadrature, _quadrature_columns, _quadrature_notes, _no_particles, False),
}
"""The sampled and computed methods of `log_evidence`, beside `"exact"`."""

_NAMES = [*(repr(name) for name in METHODS), "'exact'"]
