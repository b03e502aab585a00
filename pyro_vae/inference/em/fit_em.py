r"""Expectation-maximisation and its variants: `fit_em`, which maximises one bound in half steps.

.. math:: \log p(x) = \underbrace{E_q \log p(x, z) + H(q)}_{F(q, \theta)}
          + \mathrm{KL}(q \,\|\, p(z \mid x))

An E step moves q and closes the gap, an M step moves :math:`\theta` and raises F. What the methods
differ in is how far each goes. Every half step is a row of the history with all three terms.

| method | E step | M step | paper |
| --- | --- | --- | --- |
| exact | the posterior | the maximum | Dempster, Laird & Rubin 1977 |
| generalized | the posterior | gradient steps that do not lower F | the same |
| monte_carlo | `num_samples` draws from the posterior | the maximum | Wei & Tanner 1990 |
| stochastic_approximation | the same draws | the maximum, of averages | Delyon et al. 1999 |
| hard | the most probable component | the maximum | Celeux & Govaert 1992 |
| incremental | the posterior of a block of data | the maximum | Neal & Hinton 1998 |
| online | the posterior of a mini-batch | the maximum, of averages | Cappe & Moulines 2009 |
| variational_bayes | the best q(z) under q(theta) | the best q(theta) | Attias 2000 |
| stochastic_variational_bayes | that of a mini-batch | a natural gradient | Hoffman et al. 2013 |

In the last two :math:`\theta` is latent with a conjugate prior, q is :math:`q(z) q(\theta)` and F a
bound on log p(x) with the parameters integrated out, which itself is not known.

Models with sufficient statistics (`StatisticsModel`; the mixtures of this package are such) have
closed M steps: `em_methods`. "generalized" takes any Pyro program whose latents can be enumerated:
`em_generalized`. Both share the loop in `em_loop`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import torch
from torch import Tensor

from pyro_vae.data import Seed, as_seed, as_tensor
from pyro_vae.inference.em.generalized import fit_generalized
from pyro_vae.inference.em.history import HalfSteps
from pyro_vae.inference.em.loop import (
    METHODS,
    RANDOM_METHODS,
    EMSettings,
    Ending,
    Reached,
    best_of_starts,
    drive,
    random_stream,
)
from pyro_vae.inference.em.methods import ALGORITHMS
from pyro_vae.inference.em.protocol import (
    ConjugateModel,
    StatisticsModel,
    StatisticsProblem,
)
from pyro_vae.inference.programs import (
    FittedProgram,
    Program,
    describe_programs,
    ieee_precision,
    keep_random_state,
    program_scope,
    ready_data,
    store_state,
    tensors_of,
)
from pyro_vae.inference.svi import Fit, Restarts, deferred_interrupt, restarts_table
from pyro_vae.results import sha256_of

__all__ = ["METHODS", "EMFit", "StatisticsModel", "StatisticsProblem", "fit_em"]

_MEASURED_RESPONSIBILITIES = 200_000  # up to which nobody notices what measuring a KL costs
_RECORDED_DATA = 2_000  # up to which mini-batch methods record every half step


@dataclass(frozen=True, repr=False)
class EMFit(Fit):
    """What `fit_em` reached: a `Fit` whose history has a row a half step, dimension `step`.

    Attributes:
        posterior: Over the parameters, from variational Bayes: a `MixturePosterior`; else None.
    """

    posterior: Any = None

    @property
    def converged(self) -> bool:
        """Whether the last iteration gained less than `tolerance`."""
        return bool(self.config["fit_em"]["converged"])

    def summary(self) -> str:
        """One sentence: how long it ran, whether it converged and which log p(x) it reached."""
        settings = self.config["fit_em"]
        text = f"EM ({settings['method']}) {self.status}"
        if self.history.sizes["step"]:
            last = self.history.isel(step=-1)
            text += f" after {int(last.iteration)} iterations, {float(last.seconds):.1f} s"
            if settings["method"] not in RANDOM_METHODS:
                text += ", converged" if self.converged else ", not converged"
            if "objective" in self.history:
                held = ", ".join(settings["at_a_point"])
                text += f"; with {held} at a point log p(x, theta) {float(last.log_joint):.6g}, "
                text += f"objective {float(last.objective):.6g}"
            else:
                known = "log_evidence" in self.history
                text += f"; log p(x) {float(last.log_evidence):.6g}, " if known else "; "
                text += f"bound {float(last.bound):.6g}"
            text += " nats per datum"
        if (free := settings["num_parameters"]) is not None:
            return f"{text}; {free:,} free parameters"
        return f"{text}; {sum(v.numel() for v in self.parameters.values()):,} parameters"


def fit_em(
    model: StatisticsModel | Program,
    x: Any,
    *,
    method: str = "exact",
    max_iterations: int = 200,
    tolerance: float = 1e-7,
    initialization: str | Any = "k-means++",
    num_restarts: int = 1,
    seed: Seed = 0,
    sample_weights: Any = None,
    hold: Sequence[str] = (),
    on_singular: Literal["raise", "restart"] = "raise",
    batch_size: int | None = None,
    num_samples: int = 1,
    step_exponent: float = 0.6,
    step_delay: float = 0.0,
    num_held: int = 20,
    num_gradient_steps: int = 5,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None,
    record: Literal["half steps", "passes"] | None = None,
    prior: Mapping[str, Any] | None = None,
    acceleration: Literal["squarem"] | None = None,
    progress: bool = True,
) -> EMFit:
    r"""Fits a model by expectation-maximisation or one of its relatives.

    Args:
        model: A mixture of this package (or any `StatisticsModel`); for "generalized" also any
            program called as `model(x)` whose latents can all be enumerated, or are global: these
            are then held at a point, their most probable values (MAP).
        x: The data, shape (batch, features); for programs, their arguments as `fit` takes them.
        method: "exact" (EM), "generalized" or "generalised" (gradient M steps), "monte_carlo"
            (draws from the posterior), "stochastic_approximation" (SAEM: draws as well, whose
            statistics are averaged as for "online"), "hard" (its most probable component),
            "incremental" (blocks of data), "online" (mini-batches:
            :math:`s \leftarrow s + n^{-a} (\hat s - s)` for the statistics s, averaged over the
            second half), "variational_bayes" (a posterior over
            parameters) or "stochastic_variational_bayes" (the same by mini-batches).
        max_iterations: Iterations at most; passes over the data for "incremental" and "online".
        tolerance: Stops when an iteration raises the bound by less, in nats per datum. 0 makes all
            iterations. "monte_carlo" and "online" are random and make all as well.
        initialization: "k-means++", "k-means" or "random"; "given" starts at the parameters in the
            model, as "generalized" does for programs in any case. Or responsibilities to start
            from with an M step, shape (batch, components), not for "generalized".
        num_restarts: Starts; the one with the highest final log p(x) (or bound, if hard) is kept.
            `EMFit.restarts` has a table of them, as `fit` has for its `restarts`.
        seed: Of starts, draws and orders. The caller's random state is left alone.
        sample_weights: How often each datum counts, shape (batch,).
        hold: Parameters left as they are, such as `("weights", "covariances")`.
        on_singular: What to do where a component loses its data or their spread: raise, or go on
            with another start, 20 times at most.
        batch_size: For "incremental" and "online"; a tenth of the data if None, and at least 100
            if so many there are.
        num_samples: Draws for each datum, for "monte_carlo" and "stochastic_approximation".
        step_exponent: The a of the methods that average, above 0.5 and at most 1.
        step_delay: Added to n in their steps from the second on, so that early ones are shorter.
        num_held: Data that they see before their first M step.
        num_gradient_steps: In each M step of "generalized".
        optimizer: For "generalized": from parameters to a torch optimizer; L-BFGS with a line
            search if None.
        record: Whether "incremental" and "online" record every half step, at the price of a pass
            over all data each, or passes only; None decides by the size of the data.
        prior: Of variational Bayes: hyperparameters by name, such as `{"concentration": 1.0}`; see
            `prepare_conjugate` of the mixture. Defaults follow from the data, in part.
        acceleration: "squarem" lets "exact" and "variational_bayes" jump ahead after every second
            M step, unless the bound there is lower: for components that overlap, four times fewer
            passes or so. Where there are several maxima it may find another one.
        progress: Shows a bar where stderr is a terminal.

    Returns:
        The fit. The model passed in has the fitted parameters as well. Ctrl-C ends it after the
        half step at hand (`status` "interrupted"). Its `history` has the dimension `step`, half
        steps numbered from 0:

        ================  ===============  =======================================================
        name              unit, bound      meaning
        ================  ===============  =======================================================
        `phase`           text             coordinate: "E" or "M", which half step led to this row
        `iteration`       none             coordinate: of which iteration
        `log_evidence`    nats, exact      log p(x) under the parameters
        `bound`           nats, lower      the ELBO of q
        `gap`             nats, exact      KL(q || p(z | x))
        `loss`            nats, objective  minus the bound
        `reconstruction`  nats, objective  E log p(x | z), where known
        `kl`              nats, objective  E log q(z) - log p(z), where known
        `seconds`         seconds, none    time the method itself took so far, without measuring
        `data_passes`     none, none       how often it went over the data
        ================  ===============  =======================================================

        Nats are per datum; `log_evidence`, `bound` and `gap` are there summed over the data too, as
        `..._total`. `reconstruction` and `kl` are the parts of the bound, as in `fit`. The history
        starts with the E step at the starting parameters and ends with an E step, which speaks of
        the fitted ones.

        `entropy_residual` (after E steps; of mixtures whose weights and densities are free) is the
        bound less H(q) - H(p(z)) - E H(p(x | z)), per datum. At a stationary point the two are
        equal (Damm et al. 2023), so that it tells of convergence without a reference. Of densities
        with a carrier h(x) that is not constant, such as counts, H leaves E log h(x) out.

    Raises:
        ValueError: If data or arguments cannot be used; a `ProgramError` if a program cannot.
        torch.linalg.LinAlgError: `SingularComponentError` if a component of a mixture is singular
            or starved and `on_singular` is "raise"; the model then is as it was.
        TrainingError: If the bound is not finite.

    Note: EM finds a local maximum; `num_restarts` looks at several. For the KL after exact M steps
        with more than 200,000 responsibilities, log p(x) - bound stands in (`config` says so).

    Note: with global latents theta at a point (they are in no plate with data, and `fit.guide` is
        the `AutoDelta` that holds them) the history has `log_joint`, log p(x, theta), in place of
        `log_evidence` and `objective` in place of `bound`: neither bounds log p(x). Densities of
        points depend on how theta is written; of its posterior a guide tells: `fit(model, guide, x,
        loss=TraceEnum_ELBO())`.

    Note: of variational Bayes the history has no `log_evidence` and no `gap`, `kl` is that of
        components and parameters together, `posterior` the result, and the model has its means.

    References:
        Dempster, Laird & Rubin (1977), JRSS B 39, 1-38. Wei & Tanner (1990), JASA 85, 699-704.
        Celeux & Govaert (1992), A classification EM algorithm for clustering and two stochastic
        versions, CSDA 14, 315-332. Neal & Hinton (1998), A view of the EM algorithm that justifies
        incremental, sparse, and other variants. Cappe & Moulines (2009), On-line
        expectation-maximization algorithm for latent data models, JRSS B 71, 593-613. Attias
        (2000), A variational Bayesian framework for graphical models. Hoffman, Blei, Wang & Paisley
        (2013), Stochastic variational inference, JMLR 14, 1303-1347. Delyon, Lavielle & Moulines
        (1999), Convergence of a stochastic approximation version of the EM algorithm, Annals of
        Statistics 27, 94-128. Damm et al. (2023), The ELBO of variational autoencoders converges to
        a sum of entropies. Varadhan & Roland (2008),
        Simple and globally convergent methods for accelerating the convergence of any EM
        algorithm, Scandinavian Journal of Statistics 35, 335-353.
    """
    method = {"generalised": "generalized"}.get(method, method)
    seed = as_seed(seed)
    settings = EMSettings(
        method=method,
        max_iterations=max_iterations,
        tolerance=float(tolerance),
        initialization=initialization
        if isinstance(initialization, str)
        else as_tensor(initialization, torch.float64),
        num_restarts=num_restarts,
        seed=seed,
        on_singular=on_singular,
        batch_size=batch_size,
        num_samples=num_samples,
        step_exponent=float(step_exponent),
        step_delay=float(step_delay),
        num_held=num_held,
        num_gradient_steps=num_gradient_steps,
        optimizer=optimizer,
        record=record,
        progress=progress,
        prior=prior,
        acceleration=acceleration,
    )
    settings.check()
    generalized = method == "generalized"
    _check_method(model, settings, weighted=sample_weights is not None, holding=bool(tuple(hold)))
    with ieee_precision():  # a bound that never falls has no bits to lose
        if isinstance(model, StatisticsModel) and not generalized:
            x = as_tensor(x)
            sample_weights = None if sample_weights is None else as_tensor(sample_weights)
            end = _fit_on_statistics(model, x, sample_weights, hold, settings)
        else:
            x = ready_data(model, None, x)
            end = fit_generalized(model, x, settings)
    config: dict[str, Any] = {
        "format": 1,
        "model": describe_programs(end.model, end.model),  # the guide is its own, or none
        "fit_em": {
            **settings.described(),
            "data_sha256": sha256_of(*tensors_of(x) or [torch.empty(0)]),
            "num_threads": torch.get_num_threads(),
            **end.facts,
            "num_parameters": getattr(model, "num_parameters", None),  # the free ones
        },
    }
    restarts = None
    if num_restarts > 1 and len(end.facts.get("final_bounds", ())) > 1:
        kept = end.facts["kept_start"]
        about = {"seed": seed, "data_sha256": config["fit_em"]["data_sha256"]}
        table = restarts_table(
            end.facts["final_bounds"], kept=kept, measure=end.measure, config=config, **about
        )
        restarts = Restarts(table, kept)
    return EMFit(
        restarts=restarts,
        model=FittedProgram(end.model, end.state),
        guide=FittedProgram(end.guide, end.state),
        history=end.reached.record.result(config, end.measure),
        config=config,
        parameters=end.parameters,
        status=end.reached.status,
        posterior=end.posterior,
    )


def _check_method(
    model: StatisticsModel | Program, settings: EMSettings, *, weighted: bool, holding: bool
) -> None:
    """Refuses what the method cannot do with such a model."""
    generalized = settings.method == "generalized"
    if generalized and isinstance(settings.initialization, Tensor):
        raise ValueError("the generalised method starts at parameters, not at responsibilities")
    if generalized and (weighted or holding):
        raise ValueError(
            "the generalised method knows neither sample_weights nor hold; weight the model's "
            "sites with poutine.scale, and freeze parameters with requires_grad_(False)"
        )
    if not generalized and not isinstance(model, StatisticsModel):
        raise ValueError(
            f"method={settings.method!r} needs a model with sufficient statistics, such as a "
            "GaussianMixture (the mixture itself, not its .model); for any other program pass "
            "method='generalized'"
            + (
                " (global latents at a point), or fit(model, guide, x, loss=TraceEnum_ELBO()) with "
                "a guide of the global latents, as AutoNormal(poutine.block(model, expose=[...]))"
                if settings.bayesian
                else ""
            )
        )


def _fit_on_statistics(
    model: StatisticsModel,
    x: Any,
    sample_weights: Tensor | None,
    hold: Sequence[str],
    settings: EMSettings,
) -> Ending:
    """Any method but the generalised one, from any number of starts."""
    problem = _prepared(model, x, sample_weights, hold, settings)
    if settings.method == "incremental" and getattr(problem, "has_missing", False):
        raise ValueError(
            "the incremental method cannot take back what missing entries were expected to be: "
            "pass method='exact' or 'online'"
        )
    with deferred_interrupt() as interrupted:
        kept, runs, failures = best_of_starts(
            lambda attempt: _run_once(problem, settings, attempt, interrupted),
            settings,
            lambda reached: reached,
        )
    best = runs[kept]
    problem.write(best.parameters)
    facts = {
        "num_data": problem.num_data,
        "converged": best.converged,
        "final_bounds": [run.objective / problem.total_weight for run in runs],
        "kept_start": kept,
        "singular_starts": failures,
        "gap": "measured" if best.record.measures else "difference",
        "hold": list(hold),
        "weighted": sample_weights is not None,
    }
    parameters = {name: v.detach().clone() for name, v in model.fitted_values().items()}
    state = _state_of(model, x)
    ending = Ending(model.model, model.guide, state, parameters, problem.measure, best, facts)
    if settings.bayesian:
        ending.posterior = problem.described(best.parameters)
        ending.facts["prior"] = {n: v.tolist() for n, v in ending.posterior.prior.items()}
    return ending


def _prepared(
    model: StatisticsModel,
    x: Tensor,
    sample_weights: Tensor | None,
    hold: Sequence[str],
    settings: EMSettings,
) -> Any:
    """The problem on these data, with parameters or a posterior over them."""
    if not settings.bayesian:
        return model.prepare(x, sample_weights, hold=hold)
    if tuple(hold):
        raise ValueError("variational Bayes holds no parameters; a sharp prior does that")
    if not isinstance(model, ConjugateModel):
        raise ValueError(f"{type(model).__name__} has no conjugate priors; pass method='exact'")
    return model.prepare_conjugate(x, sample_weights, prior=settings.prior)


def _state_of(model: StatisticsModel, x: Tensor) -> dict[str, Any]:
    """The parameter store that the fitted programs run in."""
    like = next(iter(model.fitted_values().values()))
    with program_scope(), keep_random_state():
        store = pyro.get_param_store()
        before = set(store.keys())
        row = x[:1].to(like).nan_to_num()  # parameters are asked for, not what becomes of data
        model.model(row)
        model.guide(row)
        return store_state(lambda name: name not in before)


def _run_once(
    problem: StatisticsProblem,
    settings: EMSettings,
    attempt: int,
    interrupted: Callable[[], bool],
) -> Reached:
    """One start to its end."""
    record = HalfSteps(problem.total_weight)
    record.knows_evidence = not settings.bayesian
    few = problem.num_data * problem.num_components <= _MEASURED_RESPONSIBILITIES
    # What is kept of a posterior is that of components, not of entries that are missing.
    known = few and not getattr(problem, "has_missing", False)
    record.measures = settings.method != "variational_bayes" and (
        settings.method != "exact" or known
    )
    record.every_half_step = settings.record == "half steps" or (
        settings.record is None and problem.num_data <= _RECORDED_DATA
    )
    if isinstance(settings.initialization, Tensor):
        parameters = _m_step_at(problem, settings.initialization)
    elif settings.initialization == "given":
        parameters = problem.read()
    else:
        generator = random_stream(settings.seed, attempt)
        parameters = problem.initialize(settings.initialization, generator)
    algorithm = ALGORITHMS[settings.method](
        problem, parameters, record, settings, random_stream(settings.seed, attempt, 1)
    )
    return drive(algorithm, settings, problem.total_weight, interrupted)


def _m_step_at(problem: StatisticsProblem, q: Tensor) -> Any:
    """Parameters after an M step at these responsibilities."""
    shape = (problem.num_data, problem.num_components)
    total = q.sum(-1)
    known = ((total - 1).abs() < 1e-6) | (total == 0)
    if q.shape != shape or not bool((q >= 0).all() and known.all() and (q.sum(0) > 0).all()):
        raise ValueError(
            f"responsibilities to start from have shape {shape}, are not negative, sum to 1 for "
            "each datum (0 for one that has no say yet) and leave no component empty; not so those "
            f"of shape {tuple(q.shape)}"
        )
    return problem.m_step(problem.statistics(q), problem.read())
