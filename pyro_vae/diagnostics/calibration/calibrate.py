r"""Calibration of an amortised guide under the model itself.

Where z and x are drawn from the model, z is a draw from the posterior of its x. So it ranks
anywhere among draws of an exact guide with the same probability, and a guide that is wrong shows.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from scipy import stats

from pyro_vae.checks import check_count
from pyro_vae.data import Seed, as_seed
from pyro_vae.diagnostics.calibration.ecdf import ecdf, ecdf_band, ecdf_p_value
from pyro_vae.diagnostics.calibration.notes import LEVEL, SCOPE, calibration_words
from pyro_vae.diagnostics.calibration.ranks import (
    chi_square_p_value,
    coverage,
    mean_bias,
    rank_shape,
    sbc_ranks,
    tarp,
    vsbc_p_values,
)
from pyro_vae.diagnostics.calibration.simulations import (
    GuideDraws,
    Pairs,
    draw_guide,
    fit_references,
    simulate_pairs,
)
from pyro_vae.diagnostics.evidence import ChunkPlan, plan_chunks
from pyro_vae.inference.programs import (
    Pair,
    Program,
    ProgramError,
    SubsampleError,
    program_scope,
    tensors_of,
    tool,
)
from pyro_vae.progress import progress_bar
from pyro_vae.results import Result, label, make_result, sha256_of

__all__ = ["calibrate"]

_LEAST_SIMULATIONS = 50
_LEAST_DRAWS = 9
_Ranks = dict[str, np.ndarray]


@tool
def calibrate(
    model: Program,
    guide: Program,
    x: Any,
    *,
    num_simulations: int = 500,
    num_draws: int = 99,
    levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
    joint: bool | None = None,
    refit: Callable[[Program, Any], Program] | None = None,
    seed: Seed = 0,
    max_memory: float = 0.5,
    progress: bool = True,
) -> Result:
    r"""Simulation-based calibration: is the guide right, on average over the model's own data?

    Latents and data are drawn from the model, the guide is run on the data, and the latents are
    ranked among its draws. Uniform ranks are tested by their ECDF, exactly, for three things:

    - each latent by itself;
    - log p(x, z), a function of latents **and** data: it sees wrong correlations, and a guide that
      returns the prior, whose latents rank uniformly;
    - the distance to a random point that depends on the data (TARP): the joint distribution. The
      points lie about a linear prediction of the latents by the data, and distances are taken where
      its residual has unit covariance; both come from as many further simulations.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior, which must look at the data it is given.
        x: Data; their shapes are used, and what of them the model does not observe (covariates).
            Simulation goes over them again until there are enough.
        num_simulations: Data to simulate, at least 50; with `joint` whole data sets.
        num_draws: Draws L from the guide for each, at least 9. L + 1 that many bins divide (100)
            makes ranks easy to draw.
        levels: Of the central intervals whose coverage is measured.
        joint: True for a full data set in each simulation; None for that where latents are global.
        refit: For guides that are fitted to one data set, such as `AutoNormal`: a function of the
            model and simulated data that returns the guide fitted to them. One fit a simulation;
            only with `joint`.
        seed: Seeds everything; the caller's random state is left alone.
        max_memory: Roughly the memory that one chunk of data and draws may take, in GiB.
        progress: Shows a bar on stderr where that is a terminal.

    Returns:
        What has no bound below is a whole number and bears no label.

        ====================  ==================  ==============  ==================================
        name                  dims                unit, bound     meaning
        ====================  ==================  ==============  ==================================
        `ranks`               simulation, latent  none            ranks of the latents among the
                                                                  guide's draws
        `log_joint_ranks`     simulation          none            ranks of log p(x, z)
        `tarp_ranks`          simulation          none            ranks of the distances (TARP)
        `ecdf_p_value`        latent              none, exact     p-value of uniform ranks, by their
                                                                  ECDF
        `chi_square_p_value`  latent              none, exact     the same by chi-square
        `symmetry_p_value`    latent              none, exact     p-value of symmetry (VSBC)
        `slope`               latent              none, exact     of the ranks, in standard errors
                                                                  (see `ranks.rank_shape`)
        `spread`              latent              none, exact     the same; positive for a U
        `bias`                latent              none, unbiased  guide's mean less the truth, in
                                                                  units of the latent
        `bias_direction`      latent              none            -1 where the bias shows the guide
                                                                  too low, 1 too high, 0 neither
        `coverage`            level, latent       none, unbiased  of central intervals
        `ecdf`                latent, rank        none, exact     share of ranks up to a rank
        `log_joint_ecdf`      rank                none, exact     the same of log p(x, z)
        `tarp_ecdf`           rank                none, exact     the same of the distances:
                                                                  coverage curve
        `ecdf_lower`          rank                none, exact     lower edge of the band
                                                                  (simultaneous, 95 %)
        `ecdf_upper`          rank                none, exact     upper edge
        `log_joint_p_value`   none                none, exact     p-value of uniform ranks of log
                                                                  p(x, z)
        `tarp_p_value`        none                none, exact     the same of the distances
        `overall_p_value`     none                none, exact     Bonferroni over all ECDF tests
        ====================  ==================  ==============  ==================================

        `bias` and `coverage` have standard errors `*_se`. VSBC alone cannot tell a bias from a
        guide of another shape than the posterior; `bias_direction` can. Notes say which latents are
        miscalibrated and how.

    Raises:
        ProgramError: If the pair has no log weights (see `log_weights`), the model cannot be
            simulated from, or the guide cannot be run on simulated data.
        ValueError: If there are too few simulations or draws, or an argument is out of its range.

    Note: this is about data from the model and on average over them; it says nothing of real data
        that the model does not produce, nor of one datum.

    References:
        Talts et al. (2018), arXiv:1804.06788; Säilynoja, Bürkner & Vehtari (2022) (band); Modrák
        et al. (2023), Simulation-based calibration checking for Bayesian computation (the log joint
        as test quantity); Lemos et al. (2023) (TARP); Yao et al. (2018) (VSBC).

    Example:
        >>> import torch
        >>> from pyro_vae import LinearGaussian
        >>> model = LinearGaussian(data_dim=3, latent_dim=2)
        >>> found = calibrate(model.model, model.exact_guide, torch.zeros(50, 3), progress=False)
        >>> bool(found.overall_p_value > 1e-4)
        True
        >>> found.ranks.dims
        ('simulation', 'latent')
    """
    seed = as_seed(seed)
    _check(num_simulations, num_draws, levels)
    with torch.no_grad(), program_scope(seed):
        pair = Pair.inspect(model, guide, x, joint=joint, num_particles=num_draws)
        if refit is not None and not pair.joint:
            raise ValueError("refit is for joint=True; without it one guide serves all data")
        plan = plan_chunks(
            pair,
            num_particles=num_draws,
            max_memory=max_memory,
            max_data=num_simulations,
        )
        _check_plan(plan)
        pyro.set_rng_seed(seed)  # whatever inspection took
        ranks, names, blind = _run(plan, num_simulations, num_draws, refit, seed, progress)
    errors = ranks.pop("errors")
    return _result(ranks, errors, names, blind, x, num_draws, tuple(levels), pair.joint, seed)


def _check(
    num_simulations: int,
    num_draws: int,
    levels: Sequence[float],
) -> None:
    for name, value, least in (
        ("num_simulations", num_simulations, _LEAST_SIMULATIONS),
        ("num_draws", num_draws, _LEAST_DRAWS),
    ):
        check_count(name, value, least, because="; with fewer, no fault of a guide shows")
    if not len(levels) or not all(0 < level < 1 for level in levels):
        raise ValueError(f"levels are probabilities between 0 and 1, not {tuple(levels)!r}")


def _check_plan(plan: ChunkPlan) -> None:
    structure = plan.structure
    if structure.scale != 1.0:
        raise SubsampleError(
            "the programs subsample or rescale their data, so their draws are not from the model"
        )
    if not structure.latents:
        raise ProgramError("the guide draws no latent site, so there is nothing to calibrate")


def _run(
    plan: ChunkPlan,
    num_simulations: int,
    num_draws: int,
    refit: Callable[[Program, Any], Program] | None,
    seed: int,
    progress: bool,
) -> tuple[_Ranks, list[str], bool]:
    """Ranks by what is ranked, with the guide's `errors`; names; whether it ignores its data."""
    model, guide = plan.pair.model, plan.pair.guide
    pairs = simulate_pairs(plan)
    first = next(pairs)
    if not first.simulation.replaced:
        raise ProgramError(
            "the model's observed data are not among its arguments as they are, so the guide "
            "cannot be run on simulated data; pass them as an argument and observe that argument"
        )
    rest = num_simulations - len(first.latents)
    references = fit_references([first, *_take(pairs, rest)])  # simulations of their own
    rng = np.random.default_rng(seed)
    found: list[_Ranks] = []
    shown = progress_bar(num_simulations, "simulation", show=progress, what="calibrating")
    with shown:
        for drawn in _take(pairs, num_simulations):
            own = guide if refit is None else _refitted(refit, model, drawn)
            draws = draw_guide(drawn, own, plan, num_draws)
            points = references.points(drawn.data, rng)
            found.append(_rank(drawn, draws, points, references.axes, rng))
            shown.update(min(len(drawn.latents), num_simulations - shown.n))
    blind = refit is None and _ignores_data(first, next(simulate_pairs(plan)), guide, plan, seed)
    ranks = {
        name: np.concatenate([part[name] for part in found])[:num_simulations] for name in found[0]
    }
    return ranks, first.names, blind


def _take(pairs: Iterator[Pairs], num_simulations: int) -> Iterator[Pairs]:
    """As many pairs as are needed, the last chunk in full."""
    taken = 0
    while taken < num_simulations:
        drawn = next(pairs)
        taken += len(drawn.latents)
        yield drawn


def _refitted(refit: Callable[[Program, Any], Program], model: Program, drawn: Pairs) -> Program:
    with torch.enable_grad():
        return refit(model, drawn.x)


def _rank(
    pairs: Pairs,
    draws: GuideDraws,
    points: np.ndarray,
    axes: np.ndarray,
    rng: np.random.Generator,
) -> _Ranks:
    return {
        "ranks": sbc_ranks(pairs.latents, draws.latents, seed=rng),
        "errors": mean_bias(pairs.latents, draws.latents),
        # The two log joints come from differently batched runs: where they should be equal, as
        # with discrete latents, the last bits must not decide.
        "log_joint": sbc_ranks(
            pairs.log_joint[:, None],
            draws.log_joint[..., None],
            tolerance=100 * pairs.precision,
            seed=rng,
        ),
        "tarp": tarp(
            pairs.latents @ axes,
            draws.latents @ axes,
            references=points,
            scale=np.ones(len(axes)),
            seed=rng,
        ),
    }


def _ignores_data(first: Pairs, second: Pairs, guide: Program, plan: ChunkPlan, seed: int) -> bool:
    """Whether one random stream makes the same draws from different data."""
    drawn = []
    for pairs in (first, second):
        pyro.set_rng_seed(seed)
        drawn.append(draw_guide(pairs, guide, plan, 2).latents)
    return not np.array_equal(first.data, second.data) and np.array_equal(drawn[0], drawn[1])


# --- the result -----------------------------------------------------------------------------------


def _biases(errors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bias of each latent's mean, its standard error, and its sign where it is sure."""
    bias, se = errors.mean(0), errors.std(0, ddof=1) / len(errors) ** 0.5
    bar = stats.norm.isf(LEVEL / (2 * errors.shape[1]))
    return bias, se, (np.sign(bias) * (np.abs(bias) > bar * se)).astype(np.int64)


def _about(text: str, bound: str = "exact") -> dict[str, Any]:
    return label(unit="none", reduction="none", bound=bound, description=text)


_UNIFORM = "p-value of uniform ranks, ECDF test, exact"


def _of_latents(
    own: np.ndarray, errors: np.ndarray, num_draws: int, levels: tuple[float, ...]
) -> dict[str, Any]:
    """Variables over the latents: uniformity of their ranks, and how it fails."""
    bias, bias_se, direction = _biases(errors)
    shape = rank_shape(own, num_draws)
    covered, covered_se = coverage(own, num_draws, levels)
    return {
        "chi_square_p_value": ("latent", chi_square_p_value(own, num_draws), _about("chi-square")),
        "bias": ("latent", bias, _about("guide's mean - truth, in the latent's units", "unbiased")),
        "bias_se": ("latent", bias_se, {}),
        "bias_direction": ("latent", direction, {}),
        "slope": ("latent", shape.slope, _about("of the ranks, in standard errors")),
        "spread": ("latent", shape.spread, _about("of the ranks, in standard errors; U positive")),
        "coverage": (("level", "latent"), covered, _about("of central intervals", "unbiased")),
        "coverage_se": (("level", "latent"), covered_se, {}),
    }


def _of_ranks(ranks: _Ranks, num_draws: int) -> dict[str, Any]:
    """Ranks themselves, their ECDFs and the band of uniform ones."""
    band = ecdf_band(len(ranks["ranks"]), num_draws)
    shares = {name: ecdf(value, num_draws) for name, value in ranks.items()}
    return {
        "ecdf": (("latent", "rank"), shares["ranks"], _about("share of ranks <= rank")),
        "log_joint_ecdf": ("rank", shares["log_joint"][0], _about("the same")),
        "tarp_ecdf": ("rank", shares["tarp"][0], _about("the same: coverage curve")),
        "ecdf_lower": ("rank", band.lower, _about("simultaneous 95 % band")),
        "ecdf_upper": ("rank", band.upper, _about("simultaneous 95 % band")),
        "ranks": (("simulation", "latent"), ranks["ranks"], {}),
        "log_joint_ranks": ("simulation", ranks["log_joint"][:, 0], {}),
        "tarp_ranks": ("simulation", ranks["tarp"][:, 0], {}),
    }


def _result(
    ranks: _Ranks,
    errors: np.ndarray,
    names: list[str],
    blind: bool,
    x: Any,
    num_draws: int,
    levels: tuple[float, ...],
    joint: bool,
    seed: int,
) -> Result:
    own = ranks["ranks"]
    count = len(own)
    p = {name: ecdf_p_value(value, num_draws) for name, value in ranks.items()}
    tests = len(names) + 2
    overall = min(1.0, tests * min(float(value.min()) for value in p.values()))
    symmetry = vsbc_p_values(own, num_draws, seed=seed).p_value
    of_latents = _of_latents(own, errors, num_draws, levels)
    variables: dict[str, Any] = {
        "ecdf_p_value": ("latent", p["ranks"], _about(_UNIFORM)),
        "symmetry_p_value": ("latent", symmetry, _about("VSBC: p-value of symmetry")),
        **of_latents,
        "log_joint_p_value": ((), p["log_joint"][0], _about(f"{_UNIFORM} of log p(x, z)")),
        "tarp_p_value": ((), p["tarp"][0], _about(f"{_UNIFORM} of distances (TARP)")),
        "overall_p_value": ((), overall, _about(f"smallest of {tests}, times {tests}")),
        **_of_ranks(ranks, num_draws),
    }
    tensors = tensors_of(x)
    return make_result(
        variables,
        function="calibrate",
        config={
            "num_simulations": count,
            "num_draws": num_draws,
            "levels": levels,
            "joint": joint,
            "level": LEVEL,
        },
        seed=seed,
        data_sha256=sha256_of(*tensors) if tensors else None,
        coords={
            "latent": names,
            "level": list(levels),
            "rank": np.arange(num_draws + 1),
            "simulation": np.arange(count),
        },
        notes=[SCOPE],
        verdict=calibration_words(
            ranks,
            names,
            p,
            of_latents["bias_direction"][1],
            symmetry <= LEVEL / len(names),
            num_draws,
            blind=blind,
        ),
    )
