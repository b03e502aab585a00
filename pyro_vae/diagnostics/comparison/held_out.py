r"""Log predictive density of data that a posterior has not seen, and K-fold cross-validation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pyro
import torch
from jaxtyping import Float64
from torch import Tensor

from pyro_vae.checks import check_count, check_max_memory
from pyro_vae.data import Seed, as_seed
from pyro_vae.diagnostics.comparison.labels import density_result
from pyro_vae.diagnostics.comparison.pointwise import GlobalModel, inspect_globals
from pyro_vae.diagnostics.comparison.refits import Refit, fit_again, refitted, some_of
from pyro_vae.diagnostics.comparison.smoothed import smoothed_density
from pyro_vae.inference.log_weights import (
    importance_bound,
    importance_bound_error,
    pareto_tail,
)
from pyro_vae.inference.programs import (
    Pair,
    Program,
    ProgramError,
    count_data,
    particles_at_once,
    program_scope,
    split_count,
    tool,
)
from pyro_vae.progress import progress_bar
from pyro_vae.results import Result

__all__ = ["NewData", "check_draws", "held_out", "kfold", "num_data_of", "predicted"]

_LEAST_DRAWS = 100


class NewData(NamedTuple):
    """Log predictive densities of new data.

    Attributes:
        log_predictive: In nats, `[datum]`.
        se: Monte-Carlo error, `[datum]`.
        khat: Of the weights behind it, `[datum]`.
        influence: See `Smoothed`, `[draws, datum]`; None where draws are of each datum by itself.
        measure: Of the data.
    """

    log_predictive: Float64[Tensor, " datum"]
    se: Float64[Tensor, " datum"]
    khat: Float64[Tensor, " datum"]
    influence: Tensor | None
    measure: str


@tool
def held_out(
    model: Program,
    guide: Program,
    x: Any,
    test: Any,
    *,
    num_draws: int = 1000,
    num_inner: int = 32,
    seed: Seed = 0,
    max_memory: float = 0.5,
) -> Result:
    r"""Log predictive density of new data, given a posterior of the global latents.

    .. math:: \log p(\tilde x_n \mid x) \approx
              \log \frac{\sum_s w_s \, p(\tilde x_n \mid \theta_s)}{\sum_s w_s}, \qquad
              w_s = \frac{p(\theta_s) \, p(x \mid \theta_s)}{q(\theta_s)}

    with the weights Pareto-smoothed, so that a guide that is not the posterior is corrected for,
    and the latents of each datum integrated out. Without global latents it is log p(x) of the new
    data.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior given `x`.
        x: The data that the guide was fitted to; a tuple for several arguments, a dict for
            keywords.
        test: New data, in the same form.
        num_draws: Draws of the global latents, at least 100.
        num_inner: Draws of each datum's latents beside each of them; where no latent is global,
            `num_draws` are made for each datum.
        seed: Seeds the draws; the caller's random state is left alone.
        max_memory: Of the draws made at once, in GiB, roughly.

    Returns:
        ========================  =====  ============  ============================================
        name                      dims   unit, bound   meaning
        ========================  =====  ============  ============================================
        `elpd`                    none   nats, none    sum of `log_predictive`
        `elpd_se`                        nats          its Monte-Carlo error, for these data
        `data_standard_error`     none   nats, none    its error as an estimate for further data
        `log_predictive`          datum  nats, none    log p of a new datum given `x`
        `log_predictive_se`       datum  nats          its Monte-Carlo error
        `khat`                    datum  none, none    Pareto k-hat of the weights
        `reliable`                datum                whether k-hat is below its threshold
        ========================  =====  ============  ============================================

    Raises:
        ProgramError: If the pair has no log weights (see `log_weights`), or the programs do not
            take the new data.
        ValueError: If an argument is out of its range.

    References:
        Vehtari, Gelman & Gabry (2017), Practical Bayesian model evaluation using leave-one-out
        cross-validation and WAIC; Magnusson et al. (2019), Bayesian leave-one-out cross-validation
        for large data (the weights of an approximate posterior).
    """
    seed = as_seed(seed)
    check_draws(num_draws, num_inner, max_memory)
    with torch.no_grad(), program_scope(seed):
        found = predicted(model, guide, x, test, (num_draws, num_inner, max_memory))
    config = {"num_draws": num_draws, "num_inner": num_inner}
    total = (
        found.se.square().sum()
        if found.influence is None
        else found.influence.sum(1) @ (found.influence.sum(1))
    )
    return density_result(
        "held_out", found.log_predictive, found.se, total.sqrt(), found.khat, num_draws,
        measure=found.measure, config=config, seed=seed, data=(x, test),
    )  # fmt: skip


def check_draws(num_draws: int, num_inner: int, max_memory: float) -> None:
    """Refuses numbers of draws out of their range."""
    check_count("num_draws", num_draws, _LEAST_DRAWS)
    check_count("num_inner", num_inner)
    check_max_memory(max_memory)


def predicted(
    model: Program,
    guide: Program,
    x: Any,
    test: Any,
    settings: tuple[int, int, float],
) -> NewData:
    """Densities of new data, inside a scope of programs; see `held_out`.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior given `x`.
        x: The data that the guide was fitted to.
        test: New data.
        settings: `num_draws`, `num_inner` and `max_memory`.
    """
    num_draws, num_inner, max_memory = settings
    pair = inspect_globals(model, guide, x)
    if pair.structure.split is None:
        return _independent(Pair.inspect(model, guide, test), num_draws, max_memory)
    globals_ = GlobalModel(pair, num_inner, max_memory)
    draws = globals_.draw(num_draws)
    new = globals_.of_new_data(draws, test)
    weights = draws.log_weights[:, None]
    found = smoothed_density(weights.expand(-1, new.shape[1]), new)
    return NewData(found.log_density, found.se, found.khat, found.influence, pair.structure.measure)


def _independent(pair: Pair, num_draws: int, max_memory: float) -> NewData:
    """Without global latents data are independent, and their evidence is what there is."""
    most = particles_at_once(num_draws, max_memory, pair.bytes_of_particle)
    with pyro.validation_enabled(False):
        weights = torch.cat([pair.log_weights(n) for n in split_count(num_draws, most)]).double()
    tail = pareto_tail(weights)
    error = importance_bound_error(weights, tail)
    return NewData(importance_bound(weights), error.se, tail.khat, None, pair.structure.measure)


@tool
def kfold(
    model: Program,
    guide: Program,
    x: Any,
    *,
    num_folds: int = 10,
    folds: Sequence[int] | Tensor | None = None,
    refit: Refit | None = None,
    num_draws: int = 1000,
    num_inner: int = 32,
    seed: Seed = 0,
    max_memory: float = 0.5,
    progress: bool = True,
) -> Result:
    r"""K-fold cross-validation: each fold predicted by a pair that was fitted to the others.

    Models whose latents are all of single data are taken too: there it is parameters that are
    fitted without the fold.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior.
        x: The data; a tuple for several arguments, a dict for keywords.
        num_folds: Folds of a random permutation, from 2 to the number of data, whose sizes differ
            by one at most.
        folds: The fold of each datum instead, counted from 0: groups that belong together.
        refit: From a part of the data to what `fit` returns, or to (model, guide). None for `fit`
            of copies of the programs.
        num_draws: Draws of the global latents for each fold, at least 100.
        num_inner: See `held_out`.
        seed: Seeds permutation and draws; the caller's random state is left alone.
        max_memory: Of the draws made at once, in GiB, roughly.
        progress: Whether to show a bar.

    Returns:
        What `held_out` gives, for all data, and `fold` (dims `datum`).

    Raises:
        ProgramError: If the pair is refused, or x cannot be cut into parts.
        ValueError: If an argument is out of its range.
        TypeError: If `refit` returns no pair.

    Note: the fits know fewer data than there are, so `elpd` is of a posterior from
        (K - 1)/K of them: too low by about the number of parameters / (2 (K - 1)).

    References:
        Vehtari, Gelman & Gabry (2017); Vehtari & Lampinen (2002), Bayesian model assessment and
        comparison using cross-validation predictive densities.
    """
    seed = as_seed(seed)
    check_draws(num_draws, num_inner, max_memory)
    settings = (num_draws, num_inner, max_memory)
    refit = fit_again(model, guide) if refit is None else refit
    with program_scope(seed):
        with torch.no_grad():
            num_data = num_data_of(model, guide, x)
        of_datum = _folds(folds, num_folds, num_data)
        columns = torch.empty(3, num_data, dtype=torch.float64)
        variance, measure = 0.0, ""
        names = of_datum.unique().tolist()
        with progress_bar(len(names), "fold", show=progress, what="kfold") as bar:
            for name in names:
                inside = (of_datum == name).nonzero()[:, 0]
                others = some_of(x, (of_datum != name).nonzero()[:, 0], num_data)
                pair = refitted(refit, others)
                test = some_of(x, inside, num_data)
                with torch.no_grad():
                    found = predicted(*pair, others, test, settings)
                columns[:, inside] = torch.stack(found[:3]).to(columns)
                together = found.se if found.influence is None else found.influence.sum(1)
                variance += float(together.square().sum())
                measure = found.measure
                bar.update(1)
    config = {"num_folds": len(names), "num_draws": num_draws, "num_inner": num_inner}
    return density_result(
        "kfold", columns[0], columns[1], torch.tensor(variance).sqrt(), columns[2], num_draws,
        measure=measure, config=config, seed=seed, data=(x,),
        more={"fold": ("datum", of_datum, {})},
    )  # fmt: skip


def num_data_of(model: Program, guide: Program, x: Any) -> int:
    """How many data the plates of a pair say there are, inside a scope of programs.

    Raises:
        ProgramError: If no plate is around all that is observed.
    """
    pair = inspect_globals(model, guide, x)
    if pair.structure.split is not None:
        return pair.structure.split.size
    counts = count_data(pair.first_run()[1])
    if not counts:
        raise ProgramError(
            "no plate is around all observed sites, so no plate says what a datum is"
        )
    return counts[0][1]


def _folds(given: Sequence[int] | Tensor | None, num_folds: int, num_data: int) -> Tensor:
    if given is None:
        check_count("num_folds", num_folds, 2)
        if num_folds > num_data:
            raise ValueError(f"num_folds is {num_folds}, but there are {num_data} data")
        return torch.arange(num_data)[torch.randperm(num_data)] % num_folds
    found = torch.as_tensor(given)
    if found.shape != (num_data,) or found.is_floating_point() or len(found.unique()) < 2:
        raise ValueError(
            f"folds must be {num_data} integers, one for each datum, of at least two folds"
        )
    return found
