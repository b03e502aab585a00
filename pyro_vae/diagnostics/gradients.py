r"""Which estimator to train with: bias, variance, signal-to-noise and cost of gradients, measured.

All gradients are of the *bound* (higher is better), the mean over data, with respect to the
unconstrained parameters that the optimizer moves. Their statistics are taken over independent
repeats. For a group of parameters with true gradient g of the bound that the estimator reports,
gradient draws g_1 ... g_R, their mean and the coordinates' variances s_i^2:

=========== ====================================================================================
variance    sum of s_i^2 over the group
bias        norm of E g_r - g, with the share of the noise taken out of its square
bias_z      cross-fitted score: one half of the repeats says in which direction the bias would
            be, the other half tests it; about N(0, 1) or smaller if there is none
snr         mean over coordinates of abs(mean_i) / s_i, as Rainforth et al. (2018) have it
efficiency  variance x seconds: the noise that is left after one second of averaging
=========== ====================================================================================
"""

import copy
import fnmatch
import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np
import pyro
import torch
from jaxtyping import Float
from pyro.infer import (
    ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
)
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae.inference import estimators as table
from pyro_vae.inference.estimators import Estimator, estimator_names
from pyro_vae.inference.inspection import check_module_names, check_parameters, inspect_programs
from pyro_vae.inference.programs import (
    Arguments,
    Program,
    ProgramError,
    ProgramStructure,
    as_arguments,
    batch_length,
    keep_random_state,
    program_scope,
    trace_programs,
    unwrap_programs,
    weighted_sites,
)
from pyro_vae.results import Result, label, make_result, sha256_of

__all__ = ["compare_estimators", "estimator_rows", "recommend_estimators", "snr_slopes"]

Reference = Mapping[str, Tensor] | Callable[[str, int], Mapping[str, Tensor] | Tensor | None] | str
Gradients = Float[Tensor, "repeats entries"]
References = Float[Tensor, "references entries"]  # one row if exact, else independent means

_DEFAULT = (
    "PathwiseELBO",
    "AnalyticELBO",
    "StickingTheLanding",
    "ScoreFunction",
    "LeaveOneOut",
    "ImportanceWeighted",
    "DReG",
    "VIMCO",
    "ReweightedWakeSleep",
    "WakeDReG",
    "StraightThrough",
)
# What a pooled reference is drawn with: the first that takes the guide.
_TRUSTED: dict[str, tuple[type[Estimator], ...]] = {
    "ELBO": (table.PathwiseELBO, table.LeaveOneOut, table.ScoreFunction),
    "IWAE": (table.ImportanceWeighted, table.VIMCO),
    "Renyi": (table.Renyi,),
    "MIWAE": (table.MIWAE,),
    "CIWAE": (table.CIWAE,),
}
_REFERENCE_FACTOR = 5  # a pooled reference has so many times the repeats
_REFERENCE_BLOCKS = 100
_TIMING_ROUNDS = 30
_MAX_ENTRIES = 50_000  # of a group, so that all repeats fit in memory
_FALSE_ALARMS = 1e-3  # of a whole result
_ROUNDING = 1e3  # machine epsilons, relative to the largest gradients: less is no bias
_CLEAR_OF_NOISE = 2.0  # noise floors that an SNR must reach to count for a slope


def compare_estimators(
    model: Program,
    guide: Program,
    x: Any,
    estimators: Sequence[Any] | Mapping[str, Any] | None = None,
    num_particles: Sequence[int] = (1, 8, 64),
    *,
    repeats: int = 200,
    parameters: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    reference: Reference | None = None,
    joint: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    r"""Measures bias, noise and cost of gradient estimators on any model and guide.

    Whether an estimator is biased means: is its gradient, in expectation, that of the bound whose
    value it reports? The reference is yours (closed form, `enumerated_bound`), else pooled: five
    times as many draws of an estimator known to be unbiased for the same bound and the same number
    of particles, with other random numbers. Reweighted wake-sleep and PIWAE are biased in this
    sense by design.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior.
        x: The data; a tuple for several arguments, a dict for keywords.
        estimators: Names (see `estimator_names`), `Estimator` classes or instances, and Pyro's own
            ELBOs; of instances a copy gets each number of particles. A mapping gives names of your
            choice. None tries a common set, and says which of them the guide's latents rule out.
        num_particles: The numbers of particles, K.
        repeats: Independent gradients of each estimator, R, at least 8.
        parameters: Names or patterns (`"encoder.*"`), each a group of its own, or a mapping from
            the group's name to patterns. None groups by who uses a parameter: "model", "guide", or
            "both".
        reference: Gradients of the ELBO by parameter name; or a function of the bound's name
            ("ELBO", "IWAE", "Renyi(alpha=0.5)") and K that returns such gradients, or a
            differentiable tensor with the exact bound of each datum (or their mean), or None where
            it has none; or "none", which leaves the bias out and saves the time of the references.
        joint: True for models with global latents: numbers are then totals over the data.
        seed: Every estimator starts from it; the caller's random state is left alone.
        progress: Shows a bar on stderr where that is a terminal.

    Returns:
        Over `estimator` and `num_particles`: `value` (the bound, nats per datum), `seconds` (the
        processor time of the calling thread, on a GPU the elapsed time; median of 30, taken in
        turns with the other estimators) and `bytes` (peak of what is kept for the backward pass).
        Over these and `parameter`: `variance`,
        `gradient_norm` (of the mean), `bias`, `bias_z`, `verdict` (text), `snr` with the attribute
        `noise_floor` (a value below it is noise; so `snr_is_noise`), `efficiency` (lower is
        better). Standard errors are `*_se`. `bound` and `bound_kind` say what the value is,
        `claims_unbiased` whether the estimator's author says that its gradient is the value's.
        What could not be had is nan, and a note says why.

    Raises:
        ProgramError: If an estimator that was asked for refuses the pair for every K, or a
            parameter was never registered with Pyro.
        ValueError: If an argument is out of its range, or a name or pattern matches nothing.

    Note: Groups of more than 50,000 entries are represented by as many drawn at random.

    References:
        Rainforth et al. (2018), Tighter variational bounds are not necessarily better, section 3;
        Geffner & Domke (2020), A rule for gradient estimator selection (variance x time).

    Example:
        >>> import torch
        >>> from pyro_vae import LinearGaussian
        >>> linear = LinearGaussian(data_dim=3, latent_dim=2)
        >>> x = torch.zeros(4, 3)
        >>> found = compare_estimators(
        ...     linear.model, linear.guide, x, ["PathwiseELBO", "DReG"], [2], repeats=8
        ... )
        >>> found.variance.dims, found.parameter.values.tolist()
        (('estimator', 'num_particles', 'parameter'), ['guide', 'model'])
    """
    particles = _check_particles(num_particles)
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 8:
        raise ValueError(f"repeats must be a whole number from 8, not {repeats!r}")
    if isinstance(reference, str) and reference != "none":
        raise ValueError(
            f"reference is {reference!r}, but must be gradients by name, a function, 'none' or None"
        )
    candidates = _candidates(estimators, joint)
    start, model, guide = unwrap_programs(model, guide)
    arguments = as_arguments(x)
    with program_scope(seed), torch.enable_grad():
        _own_parameters(start)
        bench = _Bench.of(model, guide, arguments, parameters, joint, seed, candidates)
        with bench.keep_gradients():
            found = bench.measure(candidates, particles, repeats, reference, progress)
    args, kwargs = arguments
    return _as_result(
        found,
        bench,
        config={
            "estimators": [candidate.name for candidate in candidates],
            "num_particles": list(particles),
            "repeats": repeats,
            "parameters": {name: list(group) for name, group in bench.groups.items()},
            "reference": reference
            if isinstance(reference, str)
            else "pooled"
            if reference is None
            else "given",
            "joint": joint,
            "num_data": batch_length(x),
        },
        seed=seed,
        data_sha256=sha256_of(*[a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]),
    )


def _check_particles(num_particles: Sequence[int]) -> tuple[int, ...]:
    given = tuple(num_particles) if not isinstance(num_particles, int) else (num_particles,)
    whole = [k for k in given if isinstance(k, int | np.integer) and not isinstance(k, bool)]
    if not given or len(whole) < len(given) or min(given) < 1 or len(set(given)) < len(given):
        raise ValueError(
            f"num_particles must be different whole numbers from 1, not {num_particles!r}"
        )
    return tuple(sorted(int(k) for k in given))


# --- what can be compared -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Candidate:
    """A row of the comparison: how to make it for K particles, and what its value is."""

    name: str
    make: Callable[[int], ELBO]
    family: str  # of its bound: ELBO, IWAE, Renyi, ...
    bound_kind: str
    claims_unbiased: bool = True  # that its gradient is, in expectation, that of its value
    options: Mapping[str, Any] = field(default_factory=dict)
    asked_for: bool = True
    enumerates: bool = False

    @property
    def bound(self) -> str:
        return self.family + (_text(self.options) if self.options else "")

    def bound_at(self, num_particles: int) -> tuple[str, Mapping[str, Any]]:
        """Family and options of the bound; with one particle the importance bound is the ELBO."""
        if num_particles == 1 and self.family == "IWAE":
            return "ELBO", {}
        return self.family, self.options


def _candidates(given: Sequence[Any] | Mapping[str, Any] | None, joint: bool) -> list[_Candidate]:
    if isinstance(given, str):
        given = [given]
    if given is None:
        named: list[tuple[str | None, Any]] = [(None, name) for name in _DEFAULT]
    elif isinstance(given, Mapping):
        named = list(given.items())
    else:
        named = [(None, one) for one in given]
    if not named:
        raise ValueError("there is no estimator to compare; name some, or pass None for a set")
    found = [_candidate(name, one, joint, given is not None) for name, one in named]
    names = [candidate.name for candidate in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(
            f"two estimators are called '{twice[0]}'; pass a mapping with names of your choice"
        )
    return found


def _candidate(name: str | None, one: Any, joint: bool, asked_for: bool) -> _Candidate:
    if isinstance(one, str):
        if one not in estimator_names():
            raise ValueError(
                f"there is no estimator {one!r}; there are {', '.join(estimator_names())}"
            )
        one = getattr(table, one)
    if isinstance(one, type) and issubclass(one, ELBO) and not issubclass(one, Estimator):
        one = one()
    if isinstance(one, ELBO) and not isinstance(one, Estimator):
        return _pyro_candidate(name, one)
    kind = one if isinstance(one, type) else type(one)
    if not issubclass(kind, Estimator):
        raise ValueError(
            f"{one!r} is no estimator; pass names, Estimator classes or instances, or Pyro's ELBOs"
        )
    if not isinstance(one, type) and one.joint != joint:
        raise ValueError(
            f"{kind.__name__} was made with joint={one.joint}, the comparison with joint={joint}; "
            "make them agree"
        )
    options = _options(kind, one)
    changed = {k: v for k, v in options.items() if v != _defaults(kind)[k]}
    of_bound = {} if kind.value_name in ("ELBO", "IWAE", "sleep") else options
    return _Candidate(
        name=name or kind.__name__ + (_text(changed) if changed else ""),
        make=partial(kind, joint=joint, **options),
        family=kind.value_name,
        bound_kind=kind.bound_kind,
        claims_unbiased=kind.unbiased,
        options=of_bound,
        asked_for=asked_for,
    )


def _defaults(kind: type) -> dict[str, Any]:
    """Keyword options of a class besides `joint`, with their defaults."""
    return {
        name: p.default
        for name, p in inspect.signature(kind).parameters.items()
        if p.kind is p.KEYWORD_ONLY and name != "joint"
    }


def _options(kind: type, one: Any) -> dict[str, Any]:
    """The options an instance was made with: they are attributes of the same names."""
    return {
        name: default if isinstance(one, type) else getattr(one, name, default)
        for name, default in _defaults(kind).items()
    }


def _text(options: Mapping[str, Any]) -> str:
    return "(" + ", ".join(f"{name}={value!r}" for name, value in options.items()) + ")"


def _pyro_candidate(name: str | None, one: ELBO) -> _Candidate:
    family = type(one).__name__
    options: dict[str, Any] = {}
    if isinstance(one, RenyiELBO):
        family, options = ("Renyi", {"alpha": one.alpha}) if one.alpha else ("IWAE", {})
    elif isinstance(one, Trace_ELBO | TraceGraph_ELBO | TraceEnum_ELBO):
        family = "ELBO"
    known = family in _TRUSTED
    shown = f"(alpha={one.alpha:g})" if isinstance(one, RenyiELBO) else ""
    return _Candidate(
        name=name or f"Pyro {type(one).__name__}{shown}",
        make=partial(_with_particles, one),
        family=family,
        bound_kind="lower" if known else "none",
        options=options,
        enumerates=isinstance(one, TraceEnum_ELBO),
    )


def _with_particles(one: ELBO, num_particles: int) -> ELBO:
    changed = copy.copy(one)
    if not math.isinf(one.max_plate_nesting):  # the particles' plate is counted in it
        own = int(one.vectorize_particles and one.num_particles > 1)
        now = int(one.vectorize_particles and num_particles > 1)
        changed.max_plate_nesting = one.max_plate_nesting - own + now
    changed.num_particles = num_particles
    return changed


# --- the bench ------------------------------------------------------------------------------------


@dataclass
class _Draws:
    """Repeated gradients of one estimator."""

    values: Float[Tensor, " repeats"]
    gradients: dict[str, Gradients]


@dataclass
class _Row:
    """What one estimator came to with one number of particles."""

    candidate: _Candidate
    num_particles: int
    numbers: dict[str, float]
    groups: dict[str, dict[str, float]]


@dataclass
class _Found:
    candidates: list[_Candidate]
    particles: tuple[int, ...]
    repeats: int
    rows: list[_Row]
    scales: dict[str, float]  # the size of single gradients, against which rounding is judged
    notes: list[str]


@dataclass
class _Bench:
    """A pair of programs, its parameters and how to draw gradients from it."""

    model: Program
    guide: Program
    arguments: Arguments
    structure: ProgramStructure | None
    leaves: dict[str, Tensor]
    groups: dict[str, tuple[str, ...]]
    per: float
    joint: bool
    seed: int
    entries: dict[str, Tensor | None]
    notes: list[str]

    @classmethod
    def of(
        cls,
        model: Program,
        guide: Program,
        arguments: Arguments,
        parameters: Sequence[str] | Mapping[str, Sequence[str]] | None,
        joint: bool,
        seed: int,
        candidates: list[_Candidate],
    ) -> "_Bench":
        check_module_names(model, guide)
        structure = None
        ours = any(not candidate.name.startswith("Pyro ") for candidate in candidates)
        try:
            structure = inspect_programs(model, guide, arguments, joint=joint, num_particles=2)
        except ProgramError:
            if ours:
                raise
        enumerates = all(candidate.enumerates for candidate in candidates)
        check_parameters(model, guide, arguments, enumerates)
        leaves, users = _leaves_of(model, guide, arguments)
        groups = _group(users, parameters)
        length = batch_length(_first(arguments))
        per = structure.batch_size * structure.scale if structure is not None else float(length)
        notes: list[str] = []
        return cls(
            model=model,
            guide=guide,
            arguments=arguments,
            structure=structure,
            leaves=leaves,
            groups=groups,
            per=1.0 if joint else per,
            joint=joint,
            seed=seed,
            entries={name: _entries(name, g, leaves, seed, notes) for name, g in groups.items()},
            notes=notes,
        )

    @contextmanager
    def keep_gradients(self) -> Iterator[None]:
        """Takes the `.grad` of every leaf that a backward pass could reach, and puts it back."""
        args, kwargs = self.arguments
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.requires_grad]
        tensors = [*self.leaves.values(), *given]
        kept = [tensor.grad for tensor in tensors]
        for tensor in tensors:
            tensor.grad = None
        try:
            yield
        finally:
            for tensor, grad in zip(tensors, kept, strict=True):
                tensor.grad = grad

    def step(self, elbo: ELBO) -> float:
        """One gradient into `.grad`; returns the bound."""
        for leaf in self.leaves.values():
            leaf.grad = None
        args, kwargs = self.arguments
        loss = elbo.loss_and_grads(self.model, self.guide, *args, **kwargs)
        return -float(loss[0] if isinstance(loss, tuple) else loss) / self.per

    def gradient(self, group: str) -> Tensor:
        """The gradient of the bound, flat, from `.grad`."""
        leaves = [self.leaves[name] for name in self.groups[group]]
        parts = [
            (torch.zeros_like(leaf) if leaf.grad is None else -leaf.grad / self.per).reshape(-1)
            for leaf in leaves
        ]
        return self.select(group, torch.cat(parts))

    def select(self, group: str, flat: Tensor) -> Tensor:
        chosen = self.entries[group]
        return flat if chosen is None else flat[chosen]

    def share(self, group: str) -> float:
        """The share of a group's entries that stands for all."""
        chosen = self.entries[group]
        total = sum(self.leaves[name].numel() for name in self.groups[group])
        return 1.0 if chosen is None else len(chosen) / total

    def draw(self, elbo: ELBO, repeats: int, seed: int, advance: Callable[[], Any]) -> _Draws:
        pyro.set_rng_seed(seed)
        values = torch.empty(repeats, dtype=torch.float64)
        rows: dict[str, list[Tensor]] = {group: [] for group in self.groups}
        for r in range(repeats):
            values[r] = self.step(elbo)
            for group in self.groups:
                rows[group].append(self.gradient(group).cpu())
            advance()
        gradients = {group: torch.stack(drawn).double() for group, drawn in rows.items()}
        return _Draws(values, gradients)

    def time(self, elbos: Sequence[ELBO], rounds: int) -> np.ndarray:
        """Seconds of a gradient, [rounds, elbos]; in turns, so that a busy moment hits all."""
        on_gpu = any(leaf.is_cuda for leaf in self.leaves.values())
        clock = time.perf_counter if on_gpu else time.thread_time
        seconds = np.empty((rounds, len(elbos)))
        for r in range(rounds):
            for i, elbo in enumerate(elbos):
                started = clock()
                self.step(elbo)
                if on_gpu:
                    torch.cuda.synchronize()
                seconds[r, i] = clock() - started
        return seconds

    def make(self, candidate: _Candidate, num_particles: int) -> ELBO:
        try:
            elbo = candidate.make(num_particles)
        except ValueError as error:  # too few particles, or groups that do not divide them
            raise _CannotMakeError(str(error)) from error
        if (
            not isinstance(elbo, Estimator)
            and math.isinf(elbo.max_plate_nesting)
            and self.structure is not None
        ):  # Pyro's own guess would draw random numbers
            own = int(elbo.vectorize_particles and num_particles > 1)
            elbo.max_plate_nesting = self.structure.max_plate_nesting + own
        return elbo

    def measure(
        self,
        candidates: list[_Candidate],
        particles: tuple[int, ...],
        repeats: int,
        reference: Reference | None,
        progress: bool,
    ) -> _Found:
        rows: list[_Row] = []
        scales = dict.fromkeys(self.groups, 0.0)
        references = _References(self, reference, particles, repeats)
        pairs = self._admit(candidates, particles)
        times = self.time([elbo for _, _, elbo in pairs], min(repeats, _TIMING_ROUNDS))
        bar = tqdm(
            total=len(pairs) * repeats,
            unit="gradient",
            leave=False,
            disable=None if progress else True,
        )
        with bar:
            for (candidate, k, elbo), timed in zip(pairs, times.T, strict=True):
                bar.set_description(f"{candidate.name}, K={k}")
                self._note_sampled(candidate, elbo)
                size = peak_bytes(partial(self.step, elbo))
                drawn = self.draw(elbo, repeats, self.seed, bar.update)
                centre = references.get(candidate, k)
                groups = {}
                for name, gradients in drawn.gradients.items():
                    given = None if centre is None else centre[name]
                    groups[name] = _of_all(_statistics(gradients, given), self.share(name))
                    scales[name] = max(scales[name], float(gradients.square().sum(1).mean()) ** 0.5)
                    self._look_at(candidate, k, name, gradients)
                seconds = float(np.median(timed))
                spread = 1.4826 * float(np.median(np.abs(timed - seconds)))
                numbers = {
                    "value": float(drawn.values.mean()),
                    "value_se": float(drawn.values.std()) / math.sqrt(repeats),
                    "seconds": seconds,
                    "seconds_se": 1.2533 * spread / math.sqrt(len(timed)),  # of a median
                    "bytes": float(size),
                }
                rows.append(_Row(candidate, k, numbers, groups))
        kept = [c for c in candidates if any(row.candidate is c for row in rows)]
        return _Found(kept, particles, repeats, rows, scales, [*references.notes, *self.notes])

    def _admit(
        self, candidates: list[_Candidate], particles: tuple[int, ...]
    ) -> list[tuple[_Candidate, int, ELBO]]:
        """Which estimators take the pair with how many particles; notes about the others."""
        pairs: list[tuple[_Candidate, int, ELBO]] = []
        relaxes = self._has_unreparameterised()
        for candidate in candidates:
            if candidate.name == "StraightThrough" and not candidate.asked_for and not relaxes:
                continue  # with nothing to relax it is PathwiseELBO
            refusals: dict[int, Exception] = {}
            for k in particles:
                try:
                    elbo = self.make(candidate, k)
                    self.step(elbo)  # refusals and first-time costs come now
                except (ProgramError, NotImplementedError, _CannotMakeError) as error:
                    refusals[k] = error
                else:
                    pairs.append((candidate, k, elbo))
            if len(refusals) == len(particles) and candidate.asked_for:
                raise next(iter(refusals.values()))
            for text in dict.fromkeys(str(error) for error in refusals.values()):
                which = [str(k) for k, error in refusals.items() if str(error) == text]
                at = "" if len(which) == len(particles) else f" with K = {', '.join(which)}"
                self.notes.append(f"{candidate.name} is left out{at}: {text}.")
        if not pairs:
            raise ProgramError("no estimator takes this model and guide: " + " ".join(self.notes))
        return pairs

    def _has_unreparameterised(self) -> bool:
        with keep_random_state(), torch.no_grad():
            guide_trace, _ = trace_programs(self.model, self.guide, self.arguments)
        sites = weighted_sites(guide_trace).values()
        return any(not site["is_observed"] and not site["fn"].has_rsample for site in sites)

    def _note_sampled(self, candidate: _Candidate, elbo: ELBO) -> None:
        sampled = getattr(elbo, "sampled_sites", ())
        note = f"{candidate.name} draws the KL of {', '.join(sampled)}: no closed form is known."
        if sampled and note not in self.notes:
            self.notes.append(note)

    def _look_at(self, candidate: _Candidate, k: int, group: str, gradients: Gradients) -> None:
        bad = int((~gradients.isfinite().all(1)).sum())
        if bad:
            self.notes.append(
                f"{candidate.name} with K = {k}: {bad} of {len(gradients)} gradients of '{group}' "
                "are not finite, so their statistics are nan."
            )
        elif not gradients.any():
            self.notes.append(f"{candidate.name} with K = {k} gives '{group}' no gradient at all.")


class _CannotMakeError(ValueError):
    """An estimator refuses this number of particles."""


def _first(arguments: Arguments) -> Any:
    args, kwargs = arguments
    return args or kwargs


def _own_parameters(start: dict[str, Any]) -> None:
    """Copies the store's parameters, so that gradients do not reach the caller's tensors."""
    store = pyro.get_param_store()
    state = store.get_state()
    own = {name: value.detach().clone().requires_grad_() for name, value in state["params"].items()}
    store.set_state({"params": own, "constraints": state["constraints"]})
    store.set_state(start)


def _leaves_of(
    model: Program, guide: Program, arguments: Arguments
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors an optimizer would move, by name, and who uses each: model, guide or both."""
    with keep_random_state():
        guide_trace, model_trace = trace_programs(model, guide, arguments)
    leaves: dict[str, Tensor] = {}
    users: dict[int, set[str]] = {}
    names: dict[int, str] = {}
    for user, trace in (("guide", guide_trace), ("model", model_trace)):
        for name, site in trace.nodes.items():
            if site["type"] != "param":
                continue
            leaf = site["value"].unconstrained()
            if not leaf.requires_grad:
                continue
            shown = names.setdefault(id(leaf), name.replace("$$$", "."))
            leaves[shown] = leaf
            users.setdefault(id(leaf), set()).add(user)
    if not leaves:
        raise ProgramError("neither model nor guide has a parameter that requires a gradient")
    return leaves, {
        name: "both" if len(users[id(leaf)]) > 1 else next(iter(users[id(leaf)]))
        for name, leaf in leaves.items()
    }


def _group(
    users: Mapping[str, str], parameters: Sequence[str] | Mapping[str, Sequence[str]] | None
) -> dict[str, tuple[str, ...]]:
    if parameters is None:
        kinds = [kind for kind in ("guide", "model", "both") if kind in users.values()]
        return {k: tuple(name for name, user in users.items() if user == k) for k in kinds}
    if isinstance(parameters, str):
        parameters = [parameters]
    if not isinstance(parameters, Mapping):
        parameters = {pattern: [pattern] for pattern in parameters}
    groups = {}
    for group, patterns in parameters.items():
        patterns = [patterns] if isinstance(patterns, str) else patterns
        chosen = tuple(n for n in users if any(fnmatch.fnmatchcase(n, p) for p in patterns))
        if not chosen:
            raise ValueError(f"no parameter matches {group!r}; there are {', '.join(users)}")
        groups[group] = chosen
    if not groups:
        raise ValueError("parameters is empty; name some, or pass None for model and guide")
    return groups


def _entries(
    group: str, names: tuple[str, ...], leaves: Mapping[str, Tensor], seed: int, notes: list[str]
) -> Tensor | None:
    total = sum(leaves[name].numel() for name in names)
    if total <= _MAX_ENTRIES:
        return None
    notes.append(
        f"{_MAX_ENTRIES:,} of the {total:,} entries of '{group}', drawn at random, stand for all."
    )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(total, generator=generator)[:_MAX_ENTRIES].sort().values
    return chosen.to(leaves[names[0]].device)


# --- references -----------------------------------------------------------------------------------


class _References:
    """True gradients of bounds, made when first asked for: exact ones, or means of blocks."""

    def __init__(
        self,
        bench: _Bench,
        given: Reference | None,
        particles: tuple[int, ...],
        repeats: int,
    ) -> None:
        self.bench, self.given, self.repeats = bench, given, repeats
        self.most = max(particles)
        self.known: dict[tuple[str, int], dict[str, References] | None] = {}
        self.notes: list[str] = []
        if given == "none":
            self.notes.append("Bias was not measured: reference='none'.")

    def get(self, candidate: _Candidate, num_particles: int) -> dict[str, References] | None:
        """For each group the reference: one row if exact, else independent rows to average."""
        if isinstance(self.given, str):
            return None
        family, options = candidate.bound_at(num_particles)
        # The gradient of the ELBO does not depend on K.
        k = max(self.most, 2) if family == "ELBO" else num_particles
        bound = family + (_text(options) if options else "")
        key = (bound, k)
        if key not in self.known:
            exact = self._exact(bound, k)
            self.known[key] = exact or self._pooled(candidate, family, options, bound, k)
        return self.known[key]

    def _exact(self, bound: str, k: int) -> dict[str, References] | None:
        bench = self.bench
        if self.given is None or isinstance(self.given, str):
            return None
        if isinstance(self.given, Mapping):
            found: Any = self.given if bound == "ELBO" else None
        else:
            found = self.given(bound, k)
        if found is None:
            return None
        of = bound if bound == "ELBO" else f"{bound} with K = {k}"
        self.notes.append(f"Bias of estimators of the {of}: against the exact gradient given.")
        if isinstance(found, Tensor):
            leaves = list(bench.leaves.values())
            total = found.sum() if bench.joint else found.mean()
            grads = torch.autograd.grad(total, leaves, allow_unused=True)
            found = {
                name: torch.zeros_like(leaf) if grad is None else grad
                for (name, leaf), grad in zip(bench.leaves.items(), grads, strict=True)
            }
        return {group: self._flat(group, found)[None] for group in bench.groups}

    def _flat(self, group: str, found: Mapping[str, Tensor]) -> Tensor:
        given = {name.replace("$$$", "."): value for name, value in found.items()}
        parts = []
        for name in self.bench.groups[group]:
            shape = self.bench.leaves[name].shape
            if name not in given:
                raise ValueError(f"the reference lacks the gradient of parameter '{name}'; add it")
            if given[name].shape != shape:
                raise ValueError(
                    f"the reference of '{name}' has shape {tuple(given[name].shape)}, but the "
                    f"unconstrained parameter {tuple(shape)}; give it that shape"
                )
            parts.append(given[name].detach().reshape(-1))
        return self.bench.select(group, torch.cat(parts)).cpu().double()

    def _pooled(
        self,
        candidate: _Candidate,
        family: str,
        options: Mapping[str, Any],
        bound: str,
        k: int,
    ) -> dict[str, References] | None:
        bench = self.bench
        for kind in _TRUSTED.get(family, ()) if bench.structure is not None else ():
            trusted = _Candidate(
                kind.__name__,
                partial(kind, joint=bench.joint, **options),
                family,
                kind.bound_kind,
            )
            try:
                elbo = bench.make(trusted, k)
                bench.step(elbo)
            except (ProgramError, _CannotMakeError):
                continue
            stream = int(np.random.SeedSequence((bench.seed, 1)).generate_state(1)[0])
            blocks = min(_REFERENCE_BLOCKS, self.repeats)
            size = math.ceil(_REFERENCE_FACTOR * self.repeats / blocks)
            means: dict[str, list[Tensor]] = {group: [] for group in bench.groups}
            for block in range(blocks):
                drawn = bench.draw(elbo, size, stream + block, lambda: None)
                for group, gradients in drawn.gradients.items():
                    means[group].append(gradients.mean(0))
            text = f"{bound} with K = {k}" if family != "ELBO" else "ELBO"
            self.notes.append(
                f"Bias of estimators of the {text}: against a pooled reference, {blocks * size:,} "
                f"further draws of {kind.__name__} with K = {k}; its standard error is in bias_se."
            )
            return {group: torch.stack(rows) for group, rows in means.items()}
        self.notes.append(
            f"{candidate.name} has no reference for the bound '{bound}' with K = {k}, so its bias "
            "is unknown; pass reference=."
        )
        return None


# --- statistics -----------------------------------------------------------------------------------


def _statistics(gradients: Gradients, reference: References | None) -> dict[str, float]:
    """Every number of one group of parameters; see the module's table."""
    repeats = len(gradients)
    mean = gradients.mean(0)
    centred = gradients - mean
    variances = centred.square().sum(0) / (repeats - 1)
    root = math.sqrt(repeats)
    norm = mean.norm()
    along = centred @ (mean / norm) if norm > 0 else torch.zeros(repeats)
    numbers = {
        "variance": float(variances.sum()),
        "variance_se": float((centred.square().sum(1) * repeats / (repeats - 1)).std()) / root,
        "gradient_norm": float(norm),
        "gradient_norm_se": float(along.std()) / root,
    }
    numbers |= _signal_to_noise(mean, centred, variances)
    if reference is None:
        return numbers | dict.fromkeys(("bias", "bias_se", "bias_z"), math.nan)
    return numbers | _bias(gradients, reference)


def _of_all(numbers: dict[str, float], share: float) -> dict[str, float]:
    """Scales what was summed over a share of a group's entries to all of them."""
    powers = {"variance": 1.0, "gradient_norm": 0.5, "bias": 0.5}
    return {
        name: number * share ** -powers.get(name.removesuffix("_se"), 0.0)
        for name, number in numbers.items()
    }


def _signal_to_noise(mean: Tensor, centred: Gradients, variances: Tensor) -> dict[str, float]:
    """Mean of |mean| / sd over the coordinates that get a gradient, with its delta-method error."""
    active = (variances > 0) | (mean != 0)
    if not active.any():
        return {"snr": math.nan, "snr_se": math.nan}
    sd = variances[active].sqrt()
    ratio = mean[active].abs() / sd
    unit = centred[:, active] / sd
    influence = (mean[active].sign() * unit - ratio / 2 * (unit.square() - 1)).mean(1)
    return {"snr": float(ratio.mean()), "snr_se": float(influence.std()) / math.sqrt(len(centred))}


def _bias(gradients: Gradients, reference: References) -> dict[str, float]:
    r"""The norm of the bias, how surely it is known, and a score for whether there is any.

    The squared norm of the difference of means has its noise, the trace of the covariance of that
    difference, taken out; `bias_se` says how much larger the norm is where the squared norm is one
    standard error larger.
    """
    difference = gradients.mean(0) - reference.mean(0)
    trace, square, along = 0.0, 0.0, 0.0
    for sample in (gradients, reference):
        n = len(sample)
        if n == 1:  # exact
            continue
        centred = (sample - sample.mean(0)) / math.sqrt(n * (n - 1))
        trace += float(centred.square().sum())
        gram = (centred @ centred.mT).square()
        square += max(float(gram.sum() - gram.diagonal().sum()), 0.0) ** 0.5
        along += float((centred @ difference).square().sum())
    noise = square**2  # trace of the squared covariance
    squared = max(float(difference.square().sum()) - trace, 0.0)
    error = math.sqrt(4 * max(along - noise, 0.0) + 2 * noise)
    bias = math.sqrt(squared)
    return {
        "bias": bias,
        "bias_se": math.sqrt(squared + error) - bias,
        "bias_z": _cross_fitted(gradients, reference),
    }


def _cross_fitted(gradients: Gradients, reference: References) -> float:
    """Each half of the draws tests the direction in which the other half sees a bias."""
    halves = [
        (gradients[i::2], reference[i::2] if len(reference) > 1 else reference) for i in (0, 1)
    ]
    score = 0.0
    for (sample, centre), (other, others_centre) in (halves, halves[::-1]):
        direction = other.mean(0) - others_centre.mean(0)
        a, b = sample @ direction, centre @ direction
        error = a.var() / len(a) + (b.var() / len(b) if len(b) > 1 else 0.0)
        shift = float(a.mean() - b.mean())
        if shift:
            score += shift / float(error) ** 0.5 if error > 0 else math.copysign(math.inf, shift)
    return score / math.sqrt(2)


def _threshold(comparisons: int, repeats: int) -> float:
    """The score that one comparison of all exceeds by chance at the rate `_FALSE_ALARMS`."""
    z = NormalDist().inv_cdf(1 - _FALSE_ALARMS / (2 * comparisons))
    freedom = repeats / 2 - 1
    # Fisher & Cornish's expansion of Student's t quantile.
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


# --- memory ---------------------------------------------------------------------------------------


class _Held:
    """A tensor that is kept for the backward pass, counted for as long as it is."""

    def __init__(self, tensor: Tensor, ledger: "_Ledger") -> None:
        self.tensor, self.ledger = tensor, ledger
        ledger.take(tensor)

    def __del__(self) -> None:
        self.ledger.give(self.tensor)


class _Ledger:
    """Bytes of the storages that are held, each counted once, and their peak."""

    def __init__(self) -> None:
        self.holders: dict[int, int] = {}
        self.now = self.peak = 0

    def take(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        count = self.holders.get(storage.data_ptr(), 0)
        self.holders[storage.data_ptr()] = count + 1
        if not count:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def give(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.holders[storage.data_ptr()] -= 1
        if not self.holders[storage.data_ptr()]:
            self.now -= storage.nbytes()


def peak_bytes(run: Callable[[], Any]) -> int:
    """Peak of the bytes that autograd keeps for backward passes while `run` runs.

    Parameters and data that it keeps are counted as well, each storage once.
    """
    ledger = _Ledger()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: _Held(tensor, ledger), lambda held: held.tensor
    ):
        run()
    return ledger.peak


# --- the result -----------------------------------------------------------------------------------

_OVER_GROUPS = {
    "variance": ("nats squared", "total variance of the gradient over the group"),
    "gradient_norm": ("nats", "norm of the mean gradient"),
    "bias": ("nats", "norm of mean gradient - gradient of the bound, noise taken out"),
    "bias_z": ("none", "cross-fitted score of the bias, at most about N(0, 1) where there is none"),
    "snr": ("none", "mean over coordinates of |mean| / sd of one gradient"),
    "efficiency": ("none", "variance x seconds (nats squared x s): lower is better"),
}


def _as_result(
    found: _Found,
    bench: _Bench,
    *,
    config: Mapping[str, Any],
    seed: int,
    data_sha256: str,
) -> Result:
    names = [candidate.name for candidate in found.candidates]
    shape = (len(names), len(found.particles))
    groups = list(bench.groups)
    flat: dict[str, np.ndarray] = {
        name: np.full(shape, math.nan)
        for name in ("value", "value_se", "seconds", "seconds_se", "bytes")
    }
    deep: dict[str, np.ndarray] = {
        name: np.full((*shape, len(groups)), math.nan)
        for main in _OVER_GROUPS
        for name in ((main,) if main == "bias_z" else (main, f"{main}_se"))
    }
    for row in found.rows:
        place = names.index(row.candidate.name), found.particles.index(row.num_particles)
        for name, number in row.numbers.items():
            flat[name][place] = number
        for g, group in enumerate(groups):
            for name, number in row.groups[group].items():
                deep[name][(*place, g)] = number
    seconds = flat["seconds"][..., None]
    deep["efficiency"] = deep["variance"] * seconds
    relative = np.hypot(
        deep["variance_se"] / np.where(deep["variance"] > 0, deep["variance"], 1.0),
        flat["seconds_se"][..., None] / np.where(seconds > 0, seconds, 1.0),
    )
    deep["efficiency_se"] = deep["efficiency"] * relative
    floor = 1 / math.sqrt(found.repeats)
    threshold = _threshold(int(np.isfinite(deep["bias"]).sum()) or 1, found.repeats)
    kinds = {candidate.bound_kind for candidate in found.candidates}
    measure = bench.structure.measure if bench.structure is not None else None
    reduction = "total" if bench.joint else "per datum"
    over = ("estimator", "num_particles")
    variables: dict[str, Any] = {}
    for name, numbers in flat.items():
        attrs: dict[str, Any] = {
            "value": label(
                bound=next(iter(kinds)) if len(kinds) == 1 else "none",
                reduction=reduction,
                measure=measure,
                description="the bound that the estimator reports; which one: see 'bound'",
            ),
            "bytes": label(
                unit="none",
                reduction="none",
                bound="none",
                description="peak bytes kept for the backward pass of one gradient",
            ),
            "seconds": label(
                unit="seconds",
                reduction="none",
                bound="none",
                description="time of one gradient, median",
            ),
        }.get(name.removesuffix("_se"), {})
        variables[name] = (over, numbers, attrs)
    for name, numbers in deep.items():
        unit, description = _OVER_GROUPS[name.removesuffix("_se")]
        attrs = label(
            unit=unit,
            reduction=reduction if unit.startswith("nats") else "none",
            bound="none",
            description=description,
        )
        if name == "snr":
            attrs |= {"noise_floor": floor}  # type: ignore[dict-item]
        if name == "bias_z":
            attrs |= {"threshold": threshold}  # type: ignore[dict-item]
        variables[name] = ((*over, "parameter"), numbers, attrs)
    dims = (*over, "parameter")
    variables["snr_is_noise"] = (dims, deep["snr"] < floor, {})
    scales = np.array([found.scales[group] for group in groups])
    variables["verdict"] = (dims, _verdicts(deep, scales, bench, threshold), {})
    notes = [*found.notes]
    if len(kinds) > 1:
        notes.append("Values bound different things: see the coordinate bound_kind.")
    notes.append(
        f"'biased' means a score above {threshold:.2f}: by chance at most once in "
        f"{1 / _FALSE_ALARMS:,.0f} such results. An SNR below {floor:.3f} is noise."
    )
    return make_result(
        variables,
        function="compare_estimators",
        config=config,
        seed=seed,
        data_sha256=data_sha256,
        coords={
            "estimator": names,
            "num_particles": np.array(found.particles),
            "parameter": groups,
            "bound": ("estimator", [c.bound for c in found.candidates]),
            "bound_kind": ("estimator", [c.bound_kind for c in found.candidates]),
            "claims_unbiased": ("estimator", [c.claims_unbiased for c in found.candidates]),
        },
        notes=notes,
    )


def _verdicts(
    deep: Mapping[str, np.ndarray], scales: np.ndarray, bench: _Bench, threshold: float
) -> np.ndarray:
    epsilon = max(torch.finfo(leaf.dtype).eps for leaf in bench.leaves.values())
    visible = deep["bias"] > _ROUNDING * epsilon * scales
    biased = visible & (deep["bias_z"] > threshold)
    words = np.where(biased, "biased", "no bias seen").astype("U16")
    words[np.isnan(deep["bias"])] = "no reference"
    words[np.isnan(deep["variance"])] = "not measured"
    return words


# --- what follows from it -------------------------------------------------------------------------


def snr_slopes(result: Result) -> Result:
    r"""Fits the slope of log SNR against log K, by weighted least squares.

    Points below twice the noise floor are left out: there the SNR is that of noise. The standard
    error is that of the weights, widened where the points scatter more than their own errors say.

    Args:
        result: From `compare_estimators`.

    Returns:
        Over `estimator` and `parameter`: `slope` and `slope_se`, `intercept` (log SNR at K = 1)
        and `num_points`. With fewer than two points the slope is nan.

    References:
        Rainforth et al. (2018), theorem 1: 1/2 for the model, -1/2 for the guide under IWAE.
    """
    snr = result["snr"].transpose("estimator", "parameter", "num_particles")
    errors = result["snr_se"].transpose(*snr.dims).values
    floor = _CLEAR_OF_NOISE * float(result["snr"].attrs["noise_floor"])
    log_k = np.log(result["num_particles"].values.astype(float))
    shape = snr.shape[:2]
    slope, slope_se, intercept = (np.full(shape, math.nan) for _ in range(3))
    count = np.zeros(shape, dtype=int)
    for place in np.ndindex(*shape):
        y, e = snr.values[place], errors[place]
        use = np.isfinite(y) & (y > floor) & (e > 0)
        count[place] = use.sum()
        if use.sum() < 2:
            continue
        slope[place], slope_se[place], intercept[place] = _line(
            log_k[use], np.log(y[use]), e[use] / y[use]
        )
    dims = ("estimator", "parameter")

    def pure(text: str) -> dict[str, Any]:
        return label(unit="none", reduction="none", bound="none", description=text)

    left_out = int((np.isfinite(snr.values).sum(-1) - count).sum())
    return make_result(
        {
            "slope": (dims, slope, pure("of log SNR against log K")),
            "slope_se": (dims, slope_se, {}),
            "intercept": (dims, intercept, pure("log SNR at K = 1, from the fit")),
            "num_points": (dims, count, {}),
        },
        function="snr_slopes",
        config={"noise_floor": floor / _CLEAR_OF_NOISE},
        seed=result.provenance.get("seed"),
        data_sha256=result.provenance.get("data_sha256"),
        coords={name: result[name].values for name in dims},
        notes=[f"{left_out} points below twice the noise floor are left out."] if left_out else (),
    )


def _line(x: np.ndarray, y: np.ndarray, errors: np.ndarray) -> tuple[float, float, float]:
    """Slope, its standard error and intercept of a weighted least-squares line."""
    weights = errors**-2
    centre = (weights * x).sum() / weights.sum()
    spread = (weights * (x - centre) ** 2).sum()
    slope = (weights * (x - centre) * y).sum() / spread
    intercept = (weights * y).sum() / weights.sum() - slope * centre
    freedom = len(x) - 2
    residual = (weights * (y - intercept - slope * x) ** 2).sum()
    widen = max(1.0, residual / freedom) if freedom else 1.0
    return float(slope), float(math.sqrt(widen / spread)), float(intercept)


def estimator_rows(result: Result, parameter: str) -> list[dict[str, str]]:
    """The comparison as text, a row for each estimator and K that was measured.

    Args:
        result: From `compare_estimators`.
        parameter: The group of parameters, such as "guide".

    Returns:
        Rows with the same keys, in the order in which a table shows them.
    """
    rows = []
    for name in result["estimator"].values:
        for k in result["num_particles"].values:
            row = result.sel(estimator=name, num_particles=k, parameter=parameter)
            if math.isnan(float(row.value)):
                continue
            below = " (noise)" if bool(row.snr_is_noise) else ""
            rows.append(
                {
                    "estimator": str(name),
                    "K": str(k),
                    "bound": str(row.bound.values),
                    "value": f"{float(row.value):.3f} ± {float(row.value_se):.1g}",
                    "bias": _with_error(row, "bias"),
                    "verdict": str(row.verdict.values),
                    "variance": _with_error(row, "variance"),
                    "SNR": f"{float(row.snr):.3g}{below}",
                    "ms": f"{1e3 * float(row.seconds):.2f}",
                    "kB": f"{float(row.bytes) / 1e3:.0f}",
                    "variance x s": f"{float(row.efficiency):.2e}",
                }
            )
    return rows


def _with_error(row: Result, name: str) -> str:
    value, error = float(row[name]), float(row[f"{name}_se"])
    return "unknown" if math.isnan(value) else f"{value:.2g} ± {error:.1g}"


def recommend_estimators(result: Result, parameter: str = "guide") -> list[dict[str, str]]:
    """For each bound and K the unbiased estimator with the least variance x time, by measurement.

    Estimators of different bounds climb different functions, so they are not ranked against each
    other. One whose bias is unknown, or that is biased by design, is not recommended.

    Args:
        result: From `compare_estimators`.
        parameter: The group of parameters that the ranking looks at.

    Returns:
        Rows with `bound`, `K`, `recommended`, `next` (with how many times as much variance x time,
        and its standard error) and `biased` (in brackets: by design, but too little to be seen).
    """
    rows = []
    for k in result["num_particles"].values:
        at = result.sel(num_particles=k, parameter=parameter)
        for bound in dict.fromkeys(at["bound"].values.tolist()):
            here = at.isel(estimator=np.flatnonzero(at["bound"].values == bound))
            claims = here["claims_unbiased"].values
            sound = here.isel(
                estimator=np.flatnonzero((here["verdict"].values == "no bias seen") & claims)
            )
            seen = here["verdict"].values == "biased"
            biased = [
                str(name) if s else f"({name})"
                for name, s, c in zip(here["estimator"].values, seen, claims, strict=True)
                if s or not c
            ]
            if not sound.sizes["estimator"]:
                continue
            order = np.argsort(sound["efficiency"].values)
            rows.append(
                {
                    "bound": str(bound),
                    "K": str(k),
                    "recommended": str(sound["estimator"].values[order[0]]),
                    "next": _runner_up(sound, order),
                    "biased": ", ".join(biased) or "-",
                }
            )
    return rows


def _runner_up(sound: Result, order: np.ndarray) -> str:
    if len(order) < 2:
        return "-"
    cost, error = sound["efficiency"].values[order], sound["efficiency_se"].values[order]
    name = sound["estimator"].values[order[1]]
    if not cost[0] > 0:
        return f"{name} (the first has no variance)"
    ratio = cost[1] / cost[0]
    spread = ratio * math.hypot(error[0] / cost[0], error[1] / cost[1])
    return f"{name} ({ratio:.2f} ± {spread:.2f} times)"
