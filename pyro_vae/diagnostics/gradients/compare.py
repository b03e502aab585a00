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
efficiency  variance x passes: the noise that is left after averaging over one run of the
            programs with one particle, which is the same on every machine
=========== ====================================================================================
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from pyro_vae.checks import check_count
from pyro_vae.data import Seed, as_seed
from pyro_vae.diagnostics.gradients.measurement import Measured, measure
from pyro_vae.diagnostics.gradients.recommend import EstimatorComparison
from pyro_vae.diagnostics.gradients.references import Reference
from pyro_vae.diagnostics.gradients.sampler import CannotMakeError, GradientSampler
from pyro_vae.diagnostics.gradients.specs import specs_of
from pyro_vae.diagnostics.gradients.statistics import (
    FALSE_ALARMS,
    bias_threshold,
    variance_error,
)
from pyro_vae.inference.programs import (
    FilledGaps,
    Program,
    has_global_latents,
    own_parameters,
    program_scope,
    tensors_of,
    tool,
    unwrap_programs,
)
from pyro_vae.results import Result, label, make_result, processor_name, sha256_of

__all__ = ["compare_estimators", "gradient_draws"]

_MOST_REPEATS, _LEAST_REPEATS = 200, 16
_RUNS_ONE_BY_ONE = 1280  # of the programs, where particles cannot run together
_ROUNDING = 1e3  # machine epsilons, relative to the largest gradients: less is no bias


@tool
def compare_estimators(
    model: Program,
    guide: Program,
    x: Any,
    estimators: Sequence[Any] | Mapping[str, Any] | None = None,
    num_particles: Sequence[int] = (1, 8, 64),
    *,
    repeats: int | None = None,
    parameters: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    reference: Reference | None = None,
    joint: bool | None = None,
    seed: Seed = 0,
    progress: bool = True,
) -> EstimatorComparison:
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
        repeats: Independent gradients of each estimator, R, at least 8. None takes 200, or, where
            particles run one by one, as many as 1280 runs of the programs give, from 16 to 200.
        parameters: Names or patterns (`"encoder.*"`), each a group of its own, or a mapping from
            the group's name to patterns. None groups by who uses a parameter: "model", "guide", or
            "both".
        reference: Gradients of the ELBO by parameter name; or a function of the bound's name
            ("ELBO", "IWAE", "Renyi(alpha=0.5)") and K that returns such gradients, or a
            differentiable tensor with the exact bound of each datum (or their mean), or None where
            it has none; or "none", which leaves the bias out and saves the time of the references.
        joint: True for totals over the data; None for these where latents are global.
        seed: Every estimator starts from it; the caller's random state is left alone.
        progress: Shows a bar on stderr where that is a terminal.

    Returns:
        A `Result` whose `recommend()` says which estimator to train with: a sentence, a short table
        and a plot. E stands for the dimension `estimator`, K for `num_particles`, P for
        `parameter`; nats are per datum, with `joint` totals.

        =================  =======  ==================  ============================================
        name               dims     unit, bound         meaning
        =================  =======  ==================  ============================================
        `value`            E, K     nats, bound_kind    the bound that the estimator reports
        `passes`           E, K     none, none          runs of the programs with one particle, for
                                                        one gradient
        `seconds`          E, K     seconds, none       time of one gradient on this machine, median
        `bytes`            E, K     bytes, none         peak of what is kept for the backward pass
        `variance`         E, K, P  nats squared, none  total variance of the gradient over the
                                                        group
        `gradient_norm`    E, K, P  nats, none          norm of the mean gradient
        `bias`             E, K, P  nats, none          norm of mean gradient - gradient of the
                                                        bound, noise taken out
        `bias_z`           E, K, P  none, none          score of the bias, at most about N(0, 1)
                                                        where there is none
        `verdict`          E, K, P  text                "biased", "no bias seen", "no reference" or
                                                        "not measured"
        `snr`              E, K, P  none, none          mean of abs(mean) / sd of one gradient over
                                                        coordinates
        `snr_is_noise`     E, K, P  bool                whether `snr` is below its attribute
                                                        `noise_floor`
        `efficiency`       E, K, P  none, none          variance x passes, lower is better
        `bound`            E        text                coordinate: which bound the value is
        `bound_kind`       E        text                coordinate: from which side it bounds
        `claims_unbiased`  E        bool                coordinate: whether the estimator's author
                                                        says that its gradient is the value's
        =================  =======  ==================  ============================================

        Standard errors are `*_se`. Seconds are the processor time of the calling thread, on a GPU
        the elapsed time; median of 30, or fewer where they take long, in turns with the other
        estimators. The label of `value` has one bound where all estimators share it, else none.
        What could not be had is nan, and a note says why.

    Raises:
        ProgramError: If an estimator that was asked for refuses the pair for every K, or a
            parameter was never registered with Pyro.
        ValueError: If an argument is out of its range, or a name or pattern matches nothing.

    Note: Groups of more than 50,000 entries are represented by as many drawn at random.

    References:
        Rainforth et al. (2018), Tighter variational bounds are not necessarily better;
        Geffner & Domke (2020), A rule for gradient estimator selection (variance x
        time; here variance x passes).

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
    seed = as_seed(seed)
    particles = _check_particles(num_particles)
    if isinstance(repeats, bool) or not isinstance(repeats, int | None) or (repeats or 8) < 8:
        raise ValueError(f"repeats must be a whole number from 8, not {repeats!r}")
    if isinstance(reference, str) and reference != "none":
        raise ValueError(
            f"reference is {reference!r}, but must be gradients by name, a function, 'none' or None"
        )
    start, model, guide = unwrap_programs(model, guide)
    with program_scope(seed), FilledGaps(), torch.enable_grad():
        own_parameters(start)
        joint = has_global_latents(model, guide, x) if joint is None else joint
        specs = specs_of(estimators, joint)
        sampler = GradientSampler.of(model, guide, x, parameters, joint, seed, specs)
        count = _repeats_of(sampler, particles) if repeats is None else repeats
        with sampler.keep_gradients():
            found = measure(sampler, specs, particles, count, reference, progress)
    given = "pooled" if reference is None else "given"
    return _as_result(
        found,
        sampler,
        config={
            "estimators": [spec.name for spec in specs],
            "num_particles": list(particles),
            "repeats": count,
            "parameters": {name: list(group) for name, group in sampler.groups.items()},
            "reference": reference if isinstance(reference, str) else given,
            "joint": joint,
            "num_data": sampler.num_data,
        },
        seed=seed,
        data_sha256=sha256_of(*tensors_of(x)),
    )


@tool
def gradient_draws(
    model: Program,
    guide: Program,
    x: Any,
    estimators: Sequence[Any] | Mapping[str, Any] = ("PathwiseELBO", "ScoreFunction"),
    num_particles: Sequence[int] = (1, 4, 16, 64),
    *,
    parameter: str,
    entry: int = 0,
    num_draws: int = 1000,
    joint: bool | None = None,
    seed: Seed = 0,
) -> Result:
    r"""Draws the gradient with respect to one number again and again, under each estimator.

    What `compare_estimators` sums up over a group of parameters, draw by draw: for a picture of
    the distribution, and for a check against a gradient in closed form.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior.
        x: The data; a tuple for several arguments, a dict for keywords.
        estimators: As for `compare_estimators`.
        num_particles: The numbers of particles, K.
        parameter: The name of the parameter as Pyro has it, with "." below modules.
        entry: Which entry of it, counted flat; of the unconstrained value.
        num_draws: Independent gradients of each, at least 8.
        joint: True for totals over the data; None for these where latents are global.
        seed: Every estimator starts from it; the caller's random state is left alone.

    Returns:
        E stands for the dimension `estimator`, K for `num_particles`.

        ==========  ==========  ==================  ==============================================
        name        dims        unit, bound         meaning
        ==========  ==========  ==================  ==============================================
        `gradient`  E, K, draw  nats, none          of the bound (higher is better): the mean over
                                                    data, with `joint` the total
        `mean`      E, K        nats, none          mean over the draws
        `variance`  E, K        nats squared, none  variance over the draws
        ==========  ==========  ==================  ==============================================

        The last two have standard errors `*_se`. An estimator that does not take a K has nan there.

    Raises:
        ProgramError: If an estimator refuses the pair.
        ValueError: If no parameter, or more than one, is meant by the name, or an argument is out
            of its range.

    References:
        Kingma & Welling (2014), Auto-encoding variational Bayes, section 2.2, on the two gradients;
        Mohamed, Rosca, Figurnov & Mnih (2020), Monte Carlo gradient estimation in machine learning.
    """
    seed = as_seed(seed)
    particles = _check_particles(num_particles)
    check_count("num_draws", num_draws, 8)
    start, model, guide = unwrap_programs(model, guide)
    with program_scope(seed), FilledGaps(), torch.enable_grad():
        own_parameters(start)
        joint = has_global_latents(model, guide, x) if joint is None else joint
        specs = specs_of(estimators, joint)
        drawn = np.full((len(specs), len(particles), num_draws), math.nan)
        sampler = GradientSampler.of(model, guide, x, [parameter], joint, seed, specs)
        _check_entry(sampler, parameter, entry)
        with sampler.keep_gradients():
            for column, count in enumerate(particles):
                made = {}
                for row, spec in enumerate(specs):
                    with suppress(CannotMakeError):
                        made[row] = sampler.make(spec, count)
                found = sampler.draw(list(made.values()), num_draws, seed, lambda _: None)
                for place, draws in found:
                    row = list(made)[place]
                    drawn[row, column] = draws.gradients[parameter][:, entry].numpy()
    return make_result(
        _columns_of_draws(drawn, joint),
        function="gradient_draws",
        config={"parameter": parameter, "entry": entry, "num_draws": num_draws, "joint": joint},
        seed=seed,
        data_sha256=sha256_of(*tensors_of(x)),
        coords={"estimator": [c.name for c in specs], "num_particles": np.array(particles)},
    )


def _check_entry(sampler: GradientSampler, parameter: str, entry: int) -> None:
    names = sampler.groups[parameter]
    if len(names) > 1:
        raise ValueError(f"{parameter!r} names {len(names)} parameters; give the name of one")
    size = sampler.leaves[names[0]].numel()
    if not 0 <= entry < size:
        raise ValueError(f"entry must lie between 0 and {size - 1}, not at {entry!r}")


def _columns_of_draws(drawn: np.ndarray, joint: bool) -> dict[str, Any]:
    """The draws [estimators, num_particles, draws], their means, variances and errors."""
    size = drawn.shape[-1]
    variance = drawn.var(-1, ddof=1)
    centred = torch.from_numpy(drawn - drawn.mean(-1, keepdims=True))[..., None]
    errors = [[variance_error(draws) for draws in row] for row in centred]
    reduction = "total" if joint else "per datum"
    over = ("estimator", "num_particles")

    def named(unit: str, description: str) -> dict[str, Any]:
        return label(unit=unit, reduction=reduction, bound="none", description=description)

    return {
        "gradient": ((*over, "draw"), drawn, named("nats", "one gradient of the bound")),
        "mean": (over, drawn.mean(-1), named("nats", "mean over draws")),
        "mean_se": (over, np.sqrt(variance / size), named("nats", "of the mean")),
        "variance": (over, variance, named("nats squared", "variance over draws")),
        "variance_se": (over, np.array(errors), named("nats squared", "of the variance")),
    }


def _repeats_of(sampler: GradientSampler, particles: tuple[int, ...]) -> int:
    """How many gradients are drawn where the caller does not say."""
    if sampler.structure is None or sampler.structure.vectorizable:
        return _MOST_REPEATS
    return min(max(_RUNS_ONE_BY_ONE // max(particles), _LEAST_REPEATS), _MOST_REPEATS)


def _check_particles(num_particles: Sequence[int]) -> tuple[int, ...]:
    given = tuple(num_particles) if not isinstance(num_particles, int) else (num_particles,)
    whole = [k for k in given if isinstance(k, int | np.integer) and not isinstance(k, bool)]
    if not given or len(whole) < len(given) or min(given) < 1 or len(set(given)) < len(given):
        raise ValueError(
            f"num_particles must be different whole numbers from 1, not {num_particles!r}"
        )
    return tuple(sorted(int(k) for k in given))


_NEITHER: dict[str, Any] = {"reduction": "none", "bound": "none"}
_OF_AN_ESTIMATOR = {
    "passes": label(
        unit="none", **_NEITHER, description="runs of the programs with one particle, a gradient"
    ),
    "seconds": label(unit="seconds", **_NEITHER, description="time of one gradient, median"),
    "bytes": label(
        unit="bytes", **_NEITHER, description="peak of what a gradient keeps for its backward pass"
    ),
}
_OF_A_GROUP = {  # unit and description
    "variance": ("nats squared", "total variance of the gradient over the group"),
    "gradient_norm": ("nats", "norm of the mean gradient"),
    "bias": ("nats", "norm of mean gradient - gradient of the bound, noise taken out"),
    "bias_z": ("none", "cross-fitted score of the bias, at most about N(0, 1) where there is none"),
    "snr": ("none", "mean over coordinates of |mean| / sd of one gradient"),
    "efficiency": ("none", "variance x passes (nats squared): lower is better"),
}


def _as_result(
    found: Measured,
    sampler: GradientSampler,
    *,
    config: Mapping[str, Any],
    seed: int,
    data_sha256: str,
) -> EstimatorComparison:
    flat, deep = _numbers_of_estimators(found), _numbers_of_groups(found, list(sampler.groups))
    _add_efficiency(flat, deep)
    floor = 1 / math.sqrt(found.repeats)
    threshold = bias_threshold(int(np.isfinite(deep["bias"]).sum()) or 1, found.repeats)
    kinds = {spec.bound_kind for spec in found.specs}
    reduction = "total" if sampler.joint else "per datum"
    of_value = label(
        bound=next(iter(kinds)) if len(kinds) == 1 else "none",
        reduction=reduction,
        measure=sampler.structure.measure if sampler.structure is not None else None,
        description="the bound that the estimator reports; which one: see 'bound'",
    )
    of_value |= {"bound_by": "bound_kind", "objective_by": "bound"}
    of_estimators = {"value": of_value, **_OF_AN_ESTIMATOR}
    over = ("estimator", "num_particles")
    dims = (*over, "parameter")
    variables: dict[str, Any] = {
        name: (over, numbers, of_estimators.get(name.removesuffix("_se"), {}))
        for name, numbers in flat.items()
    }
    for name, numbers in deep.items():
        unit, description = _OF_A_GROUP[name.removesuffix("_se")]
        attrs: dict[str, Any] = label(
            unit=unit,
            reduction=reduction if unit.startswith("nats") else "none",
            bound="none",
            description=description,
        )
        variables[name] = (dims, numbers, attrs)
    variables["snr"][-1]["noise_floor"] = floor
    variables["bias_z"][-1]["threshold"] = threshold
    variables["snr_is_noise"] = (dims, deep["snr"] < floor, {})
    variables["verdict"] = (dims, _verdicts(deep, found, sampler, threshold), {})
    notes = [*found.notes, f"Seconds are those of one thread of {processor_name()}."]
    if len(kinds) > 1:
        notes.append("Values bound different things: see the coordinate bound_kind.")
    notes.append(
        f"'biased' means a score above {threshold:.2f}: by chance at most once in "
        f"{1 / FALSE_ALARMS:,.0f} such results. An SNR below {floor:.3f} is noise."
    )
    result = make_result(
        variables,
        function="compare_estimators",
        config=config,
        seed=seed,
        data_sha256=data_sha256,
        coords={
            "estimator": [c.name for c in found.specs],
            "num_particles": np.array(found.particles),
            "parameter": list(sampler.groups),
            "bound": ("estimator", [c.bound for c in found.specs]),
            "bound_kind": ("estimator", [c.bound_kind for c in found.specs]),
            "claims_unbiased": ("estimator", [c.claims_unbiased for c in found.specs]),
        },
        notes=notes,
    )
    return EstimatorComparison(result.data_vars, result.coords, result.attrs)


def _numbers_of_estimators(found: Measured) -> dict[str, np.ndarray]:
    """By name, [estimators, num_particles]; nan where nothing was measured."""
    shape = (len(found.specs), len(found.particles))
    names = ("value", "value_se", "passes", "seconds", "seconds_se", "bytes")
    flat = {name: np.full(shape, math.nan) for name in names}
    for row in found.rows:
        place = found.specs.index(row.spec), found.particles.index(row.num_particles)
        for name, number in row.numbers.items():
            flat[name][place] = number
    return flat


def _numbers_of_groups(found: Measured, groups: Sequence[str]) -> dict[str, np.ndarray]:
    """By name, [estimators, num_particles, groups]; nan where nothing was measured."""
    shape = (len(found.specs), len(found.particles), len(groups))
    names = [n for main in _OF_A_GROUP for n in (main, f"{main}_se") if n != "bias_z_se"]
    deep = {name: np.full(shape, math.nan) for name in names}
    for row in found.rows:
        place = found.specs.index(row.spec), found.particles.index(row.num_particles)
        for g, group in enumerate(groups):
            for name, number in row.groups[group].items():
                deep[name][(*place, g)] = number
    return deep


def _add_efficiency(flat: Mapping[str, np.ndarray], deep: dict[str, np.ndarray]) -> None:
    """Fills in variance x passes; passes have no error."""
    for end in ("", "_se"):
        deep[f"efficiency{end}"] = deep[f"variance{end}"] * flat["passes"][..., None]


def _verdicts(
    deep: Mapping[str, np.ndarray], found: Measured, sampler: GradientSampler, threshold: float
) -> np.ndarray:
    epsilon = max(torch.finfo(leaf.dtype).eps for leaf in sampler.leaves.values())
    scales = np.array([found.scales[group] for group in sampler.groups])
    visible = deep["bias"] > _ROUNDING * epsilon * scales
    biased = visible & (deep["bias_z"] > threshold)
    words = np.where(biased, "biased", "no bias seen").astype("U16")
    words[np.isnan(deep["bias"])] = "no reference"
    words[np.isnan(deep["variance"])] = "not measured"
    return words
