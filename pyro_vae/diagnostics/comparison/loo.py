r"""Leave-one-out cross-validation by importance sampling from the guide."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.checks import check_count
from pyro_vae.data import Seed, as_seed
from pyro_vae.diagnostics.comparison.held_out import check_draws, predicted
from pyro_vae.diagnostics.comparison.labels import density_result, error_over_data
from pyro_vae.diagnostics.comparison.moved import Mover
from pyro_vae.diagnostics.comparison.pit import check_one_number, pit_columns, pit_of
from pyro_vae.diagnostics.comparison.pointwise import GlobalDraws, GlobalModel, inspect_globals
from pyro_vae.diagnostics.comparison.refits import Refit, refitted, some_of
from pyro_vae.diagnostics.comparison.smoothed import Smoothed, smoothed_density
from pyro_vae.inference.log_weights import (
    importance_bound,
    importance_bound_error,
    khat_threshold,
    pareto_khat,
    pareto_tail,
)
from pyro_vae.inference.programs import Pair, Program, ProgramError, program_scope, tool
from pyro_vae.progress import progress_bar
from pyro_vae.results import Result, label

__all__ = ["loo"]


@tool
def loo(
    model: Program,
    guide: Program,
    x: Any,
    *,
    num_draws: int = 2000,
    num_inner: int = 32,
    moment_matching: bool = True,
    refit: Refit | None = None,
    max_refits: int = 20,
    subsample: int | None = None,
    pit: bool = False,
    seed: Seed = 0,
    max_memory: float = 0.5,
    progress: bool = True,
) -> Result:
    r"""Log predictive density of each datum given the others, for models with global latents.

    .. math:: \log p(x_n \mid x_{-n}) \approx
              \log \frac{\sum_s w_{sn} \, p(x_n \mid \theta_s)}{\sum_s w_{sn}}, \qquad
              w_{sn} = \frac{p(\theta_s)}{q(\theta_s)} \prod_{m \ne n} p(x_m \mid \theta_s), \quad
              \theta_s \sim q

    with the weights of each datum Pareto-smoothed. That the guide is not the posterior is corrected
    for by the first factor. Latents of a datum are integrated out: summed where they are discrete
    and marked so, else by `num_inner` draws from the guide given theta, whose mean of weights is
    unbiased, so that the products are right for any number of them and only spread the more.

    Where k-hat is above its threshold, first the draws of all data and then those of single data
    are moved to the moments that their weights give (`moment_matching`), and what is still above
    is fitted anew without the datum (`refit`). What is left is named.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior.
        x: The data; a tuple for several arguments, a dict for keywords.
        num_draws: Draws of the global latents, at least 100.
        num_inner: Draws of each datum's latents beside each of them.
        moment_matching: Whether draws may be moved; global latents that are discrete never are.
        refit: From a part of the data to what `fit` returns, or to (model, guide), such as
            ``lambda part: fit(model, guide, part)``; None for no refits.
        max_refits: Refits at most, those with the largest k-hat first.
        subsample: How many data to leave out, one at a time, chosen at random; None for all.
            The sum over all is then estimated by the difference to WAIC's estimate of each datum,
            which needs no weights of its own.
        pit: Whether to find where each datum lies in its predictive distribution; data must be
            single numbers.
        seed: Seeds the draws; the caller's random state is left alone.
        max_memory: Of the draws made at once, in GiB, roughly.
        progress: Whether to show a bar over the data that are moved or fitted anew.

    Returns:
        =======================  =====  ===========  ===============================================
        name                     dims   unit, bound  meaning
        =======================  =====  ===========  ===============================================
        `elpd`                   none   nats, none   sum of `log_predictive` over all data
        `elpd_se`                       nats         its Monte-Carlo error, for these data, that of
                                                     the subsampling with it
        `data_standard_error`    none   nats, none   its error as an estimate for further data, what
                                                     R and ArviZ call se
        `p_loo`                  none   none, none   effective number of parameters: sum of
                                                     log p(x_n | x) less `elpd`
        `log_predictive`         datum  nats, none   log p(x_n | the other data)
        `log_predictive_se`      datum  nats         its Monte-Carlo error
        `khat`                   datum  none, none   Pareto k-hat of the weights
        `reliable`               datum               whether k-hat is below its threshold
        `moved`, `refitted`      datum               what was done where it was not
        `pit`                    datum  none, none   share of the predictive distribution given the
                                                     others that is below the datum; nan if refitted
        `pit_ecdf`               rank   none, none   ECDF of `pit`, in hundredths
        `ecdf_lower`, `_upper`   rank   none, none   simultaneous 95 % band for uniform ones
        `pit_p_value`            none   none, none   test of uniformity by that band
        =======================  =====  ===========  ===============================================

        The last four if `pit`; `plot_loo_pit` draws them. `elpd_data` of a result is what
        `arviz.compare` takes; `plot_khat` draws k-hat.

    Raises:
        ProgramError: If no latent is global (given parameters, data are independent, and leaving
            one out changes nothing), or the pair has no log weights (see `log_weights`).
        ValueError: If an argument is out of its range.
        TypeError: If `refit` returns no pair.

    Note: the band is of independent PITs. Those of data left out are less scattered than that, the
        more so the more parameters there are, so that the right model leaves it the more rarely.

    Note: for few data, or a model that fits badly, `data_standard_error` is too small (Sivula,
        Magnusson & Vehtari 2020). Two models over the same data are compared datum by datum, with
        the smaller error: `pyro_vae.results.paired_difference(one, other, "log_predictive")`.

    References:
        Vehtari, Gelman & Gabry (2017), Practical Bayesian model evaluation using leave-one-out
        cross-validation and WAIC; Magnusson, Andersen, Jonasson & Vehtari (2019), Bayesian
        leave-one-out cross-validation for large data; Paananen, Piironen, Buerkner & Vehtari
        (2021), Implicitly adaptive importance sampling; Magnusson, Vehtari, Jonasson & Andersen
        (2020), Leave-one-out cross-validation for Bayesian model comparison in large data (the
        difference estimator).
    """
    seed = as_seed(seed)
    check_draws(num_draws, num_inner, max_memory)
    check_count("max_refits", max_refits, 0)
    with program_scope(seed):
        with torch.no_grad():
            pair = inspect_globals(model, guide, x)
            rows = _rows(pair, subsample)
            globals_ = GlobalModel(pair, num_inner, max_memory)
            draws = globals_.draw(num_draws, rows)
            observed = check_one_number(globals_) if pit else None
            left = _LeftOut(globals_, draws, rows, observed, moment_matching=moment_matching)
            left.move(progress=progress)
        if refit is not None:
            settings = (num_draws, num_inner, max_memory)
            left.fit_again(refit, x, max_refits, settings, progress=progress)
    config = {
        "num_draws": num_draws,
        "num_inner": globals_.num_inner,
        "moment_matching": moment_matching,
        "max_refits": max_refits if refit is not None else 0,
        "subsample": subsample,
    }
    return left.result(config, seed, x)


def _rows(pair: Pair, subsample: int | None) -> Tensor | None:
    split = pair.structure.split
    if split is None:
        raise ProgramError(
            "no latent is global, so given the parameters data are independent and p(x_n | the "
            "others) is p(x_n): use log_evidence on data held out, or kfold, which fits the "
            "parameters without each fold"
        )
    check_count("subsample", subsample, 2, optional=True)
    if subsample is None:
        return None
    if subsample > split.size:
        raise ValueError(f"subsample is {subsample}, but there are {split.size} data")
    return torch.randperm(split.size)[:subsample].sort().values


class _Total(NamedTuple):
    """A sum over all data with its Monte-Carlo error, and its error over data."""

    value: float
    se: float
    over_data: float


class _LeftOut:
    """The data, each left out once."""

    def __init__(
        self,
        model: GlobalModel,
        draws: GlobalDraws,
        rows: Tensor | None,
        observed: Tensor | None,
        *,
        moment_matching: bool,
    ) -> None:
        self.model, self.rows, self.observed = model, rows, observed
        self.limit = khat_threshold(len(draws.log_ratio))
        self.moves = moment_matching and draws.u is not None
        self.khat_joint = float(pareto_khat(draws.log_weights[:, None]))
        self.moved_all = self.moves and not self.khat_joint <= self.limit
        if self.moved_all:
            draws = Mover(model, draws).to_posterior(rows)
        self.draws = draws
        self.found = _without_each(draws)
        self.columns = torch.stack([self.found.log_density, self.found.se, self.found.khat])
        self.moved = torch.zeros(self.columns.shape[1], dtype=torch.bool)
        self.refitted = self.moved.clone()
        self.pit: Tensor | None = None
        if observed is not None:
            which = torch.arange(model.split.size) if rows is None else rows
            self.pit = pit_of(model, draws, self.found.log_weights, observed, which)

    @property
    def bad(self) -> list[int]:
        """Data whose k-hat is above the threshold, the largest first."""
        khat = self.columns[2].nan_to_num(nan=math.inf)
        order = khat.argsort(descending=True)
        return order[khat[order] > self.limit].tolist()

    def move(self, *, progress: bool) -> None:
        """Moves the draws for each datum that needs it."""
        bad = self.bad if self.moves else []
        if not bad:
            return
        mover = Mover(self.model, self.draws)
        whole = _evidence(self.draws.log_weights)
        with progress_bar(len(bad), "datum", show=progress, what="loo: moving draws") as bar:
            for place in bad:
                datum = place if self.rows is None else int(self.rows[place])
                found = mover.without(datum)
                part = _evidence(found.log_weights - found.pointwise[:, 0])
                khat = max(part.khat, whole.khat)
                if khat < float(self.columns[2, place].nan_to_num(nan=math.inf)):
                    self._put(place, whole.value - part.value, math.hypot(whole.se, part.se), khat)
                    self.moved[place] = True
                    self._move_pit(place, datum, found)
                bar.update(1)

    def fit_again(
        self,
        refit: Refit,
        x: Any,
        most: int,
        settings: tuple[int, int, float],
        *,
        progress: bool,
    ) -> None:
        """Fits without each datum that still needs it."""
        bad, size = self.bad[:most], self.model.split.size
        with progress_bar(len(bad), "refit", show=progress, what="loo: refits") as bar:
            for place in bad:
                datum = place if self.rows is None else int(self.rows[place])
                others = some_of(x, (torch.arange(size) != datum).nonzero()[:, 0], size)
                pair, one = refitted(refit, others), some_of(x, torch.tensor([datum]), size)
                with torch.no_grad():
                    found = predicted(*pair, others, one, settings)
                self._put(place, *(float(column) for column in found[:3]))
                self.moved[place], self.refitted[place] = False, True
                if self.pit is not None:
                    self.pit[place] = math.nan
                bar.update(1)

    def _put(self, place: int, *values: float) -> None:
        self.columns[:, place] = torch.tensor(values).to(self.columns)

    def _move_pit(self, place: int, datum: int, draws: GlobalDraws) -> None:
        if self.pit is not None and self.observed is not None:
            weights = _without_each(draws).log_weights
            one = torch.tensor([datum])
            self.pit[place] = pit_of(self.model, draws, weights, self.observed, one)[0]

    def _error(self, weight: float) -> float:
        """Monte-Carlo error of the weighted sum: most data share their draws."""
        own = self.moved | self.refitted
        shared = self.found.influence[:, ~own].sum(1).square().sum()
        return weight * math.sqrt(float(shared + self.columns[1, own].square().sum()))

    def total(self) -> _Total:
        """The sum over all data, also where only some were left out."""
        each, surrogate = self.columns[0], self.draws.surrogate
        if surrogate is None or self.rows is None:
            return _Total(float(each.sum()), self._error(1.0), error_over_data(each))
        count, some = len(surrogate), len(each)
        known = surrogate[self.rows]
        difference = each - known
        value = surrogate.sum() + count * difference.mean()
        variance = count**2 * (1 - some / count) * difference.var() / some
        # The mean of squares by the same estimator, less the unbiased square of the mean.
        squares = surrogate.square().mean() + (each.square() - known.square()).mean()
        spread = squares - (value.square() - variance) / count**2
        error = math.hypot(self._error(count / some), math.sqrt(float(variance)))
        return _Total(float(value), error, math.sqrt(count * max(float(spread), 0.0)))

    def fit_of_all(self) -> float:
        """The sum of log p(x_n | x)."""
        if self.draws.fit is not None:
            return float(self.draws.fit.sum())
        weights = self.draws.log_weights[:, None].expand(-1, self.columns.shape[1])
        return float(smoothed_density(weights, self.draws.pointwise).log_density.sum())

    def result(self, config: dict[str, Any], seed: int, x: Any) -> Result:
        """Everything with its labels."""
        total = self.total()
        names = ", ".join(self.model.split.global_latents)
        notes = [f"each datum is predicted by the posterior of {names} given the others."]
        if self.moved_all:
            notes.append(
                f"k-hat of the guide's draws of {names} was {self.khat_joint:.2f}, so they were "
                "moved to the moments that their weights gave."
            )
        parameters = label(
            unit="none", reduction="none", bound="none",
            description="effective number of parameters",
        )  # fmt: skip
        log_predictive, se, khat = self.columns
        return density_result(
            "loo", log_predictive, se, torch.tensor(total.se), khat, len(self.draws.log_ratio),
            measure=self.model.structure.measure, config=config, seed=seed, data=(x,),
            more={
                "p_loo": ((), self.fit_of_all() - total.value, parameters),
                "moved": ("datum", self.moved, {}),
                "refitted": ("datum", self.refitted, {}),
                **({} if self.pit is None else pit_columns(self.pit)),
            },
            total=torch.tensor(total.value), spread=total.over_data, rows=self.rows, notes=notes,
        )  # fmt: skip


class _Evidence(NamedTuple):
    """The log of a mean weight with its error and the k-hat of the weights."""

    value: float
    se: float
    khat: float


def _evidence(log_weights: Tensor) -> _Evidence:
    """Of draws whose density is normalised: log p(x), or log p of the data without one.

    Moved draws are where the posterior without the datum is, and the datum may be far from there,
    so the ratio of the two evidences, each from draws of its own, takes the place of the mean
    density.
    """
    weights = log_weights[:, None]
    tail = pareto_tail(weights)
    error = importance_bound_error(weights, tail)
    return _Evidence(float(importance_bound(weights)), float(error.se), float(tail.khat))


def _without_each(draws: GlobalDraws) -> Smoothed:
    ratios = draws.log_weights[:, None] - draws.pointwise
    return smoothed_density(ratios, draws.pointwise)
