r"""The one training loop: `fit`, on `pyro.infer.SVI`, without its silent traps.

Pyro trains nothing, without a word, when a module was never registered or another program holds
its name, warns only when the guide lacks a latent, and goes on from a loss of NaN. `fit` runs SVI
in a parameter store of its own, gives each module its own names, and raises in these cases.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_vae.checks import check_count
from pyro_vae.data import Seed, as_seed
from pyro_vae.inference.programs import (
    Program,
    UnfittedWarning,
    check_module_names,
    modules_of,
    own_parameters,
    program_scope,
    remember_fitted,
    tool,
    unwrap_programs,
)
from pyro_vae.inference.svi.checkpoint import holds_run, remove_leftovers
from pyro_vae.inference.svi.history import Fit
from pyro_vae.inference.svi.loop import TrainingRun
from pyro_vae.inference.svi.methods import check_method, guide_for
from pyro_vae.inference.svi.mini_batches import TrainingData, move_data
from pyro_vae.inference.svi.restarts import fit_restarts, refuse_mixture, settings_of_runs
from pyro_vae.inference.svi.settings import DEFAULT_EPOCHS, FitSettings
from pyro_vae.progress import say

__all__ = ["fit"]


@tool
def fit(
    model: Program,
    guide: Program | None,
    x: Any,
    *,
    method: str = "svi",
    num_draws: int | None = None,
    num_paths: int | None = None,
    loss: ELBO | None = None,
    optimizer: PyroOptim | Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None,
    learning_rate: float | Callable[[int], float] | None = None,
    epochs: int | Literal["converged"] | None = None,
    batch_size: int | None = None,
    seed: Seed = 0,
    restarts: int = 1,
    validation: Any = None,
    evaluate_every: int = 1,
    patience: int | None = None,
    warmup_epochs: int = 0,
    transform: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    device: str | torch.device | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    resume: bool = False,
    threads: int | None = None,
    config: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Fit:
    r"""Trains a model and its guide by stochastic variational inference.

    Without `epochs`, and where all data make one batch, training goes on until it has converged,
    and there is no learning rate to choose (``epochs="converged"``). It goes in phases of a
    constant rate. When the two halves of a phase agree (split R-hat below 1.1, or no difference in
    the bound that counts), the parameters are averaged over it, and the next phase begins at half
    the rate. Training ends when what the last halving brought, with two standard errors, and the
    cost of the average's Monte-Carlo error are together below a threshold: 0.005 nats for every two
    parameters, at most 0.25 (what an error of 0.1 posterior standard deviations in each latent
    costs), or 0.001 nats a datum where data have weights of their own. The bound is measured with
    the same draws on both sides. Up to 100 parameters whose latents are reparameterised start with
    Newton's method on fixed draws, and follow gradients times the inverse Hessian afterwards, so
    that scales and correlations matter less; else, and where that fails, steps are those of the
    optimizer. The loss is then `StickingTheLanding(8)` where every latent of the guide is
    reparameterised: its noise vanishes where the guide can be exact. `Fit.convergence` says what
    was done, and what more training would buy. After 30,000 steps training ends all the same, with
    ``converged=False`` and a warning. The rule sees the optimum that is near: not another mode, nor
    what the guide's family cannot express.

    Three other methods make steps of their own on all data at once, and need no learning rate; what
    they say of the latents is `Fit.posterior`. For models with global latents, mostly:

    - ``method="deterministic"``: `num_draws` fixed draws and Newton's method, to rounding, so that
      neither start nor noise is left in the result but that of the draws, whose Monte-Carlo error
      is stated. Beside q's standard deviations stand those by linear response, which know of
      correlations that a mean-field guide leaves out. Takes guides that are normal distributions
      in unconstrained space.
    - ``method="pathfinder"``: normals on `num_paths` ways to the modes, whose draws are weighted
      and resampled. The guide becomes the normal of the weighted draws.
    - ``method="batch_and_match"``: a normal that has the scores of the posterior.

    The last two write a normal distribution into the parameters of an AutoMultivariateNormal,
    AutoDiagonalNormal or AutoNormal (which keep their sds), and make the first if `guide` is None.
    `fit` of what they return goes on by SVI, and `sample_posterior(..., guide=)` starts there. The
    table of methods, with what each asks for and refuses, is `pyro_vae.inference.svi.METHODS`.

    In mini-batches, ``epochs="converged"`` watches the validation bound (the training bound without
    validation data): when its mean over five evaluations is no longer above that over the five
    before by two standard errors, the rate is halved, until a halving buys nothing that counts
    (0.01 nats per datum). 1000 epochs are the limit.

    Each row of the history has: `loss` (mean over the epoch of what was minimised), `bound` (the
    ELBO of up to 1000 training data, the same data and the same draws after every epoch),
    `reconstruction` and `kl` (its two parts, E log p(x|z) and E log q(z|x) - log p(z)), `bound_se`,
    the same for the held-out data as `validation_*`, `seconds` and `data_passes`. All are nats per
    datum. Where latents are summed out of the model the parts are absent. For a guide without a
    density (a `Delta`), and where log weights cannot be had, `bound` is the negative loss, is
    labelled an objective, and the parts and `bound_se` are absent. Where data share latents or have
    parameters of their own, `bound` is that of all training data.

    `entropy_residual` is the bound less H(q) - H(p(z)) - E H(p(x | z)), which the two equal at a
    stationary point (Damm et al. 2023): near zero where training has converged, without a
    reference. `LinearGaussian` has it, and a `VAE` of normal data with one learnt scale, a standard
    normal prior, a diagonal or full posterior and the network "mlp". A VAE's encoder makes scales
    by a softplus, which no parameter multiplies by a factor: so there it ends at zero as far as the
    encoder gives every datum its best scale. Other modules say that they have such parameters by an
    attribute `bound_ends_at_entropies = True` beside methods `model` and `guide`.

    Mini-batches of such programs count what lies in the plate of the data N/B times, and a global
    latent once (Hoffman et al. 2013, Stochastic variational inference), however the plate is
    written: `plate("data", len(x))`, with a stated size, with `subsample=` or `subsample_size=`. A
    plate's index holds the rows of the mini-batch, so that `loc[rows]` are the parameters of its
    data; programs that take `x[rows]` themselves are given all of x. The optimizer moves the rows
    that it sees (each once an epoch, with a count of steps of its own) and leaves the others as
    they are to the bit. Which of these ways a pair is written in is found by running it: a
    mini-batch must weigh its data as they weighed among all.

    Args:
        model: The generative program, called as `model(x)`.
        guide: The program of the approximate posterior; None for a method that makes one.
        x: The data; a tuple for several arguments, a dict for keywords. Mini-batches are cut along
            the axis that the model's batch plate goes with: the first, or the one after time.
        method: "svi", or see above.
        num_draws: Of a method other than SVI: the fixed draws (30); the draws of all paths (1000);
            those of an update (twice the number of latents, at least 16).
        num_paths: Of Pathfinder (8); with one, its normal is not weighted.
        loss: Any Pyro ELBO, Pyro's own or ours. If None, `Trace_ELBO()`, or `TraceEnum_ELBO()`
            where the model marks latents for enumeration that the guide leaves out; but for one
            batch that is trained to convergence: see above.
        optimizer: A function from parameters to a torch optimizer
            (`functools.partial(torch.optim.SGD, lr=0.1)`), or a `PyroOptim`. If None, one fused
            Adam.
        learning_rate: For the default optimizer, or for each epoch (counted from 0) if it is a
            function. None for 1e-3, or, to convergence on one batch, for 0.1 at first (0.01 with
            more than 100 parameters).
        epochs: Passes over the data; "converged" to stop when training is done. None means
            "converged" where all data make one batch and nothing else that is asked for counts in
            epochs (`patience`, `warmup_epochs`, a learning-rate function, a `PyroOptim`), and 100
            epochs elsewhere.
        batch_size: Data in a mini-batch. None means 128 where every latent belongs to a datum and
            the guide is amortised, else all data at once.
        seed: Seeds initial draws, shuffling and particles; the caller's random state is left alone.
        restarts: Trainings, of which that with the highest bound is kept. The first begins as a
            single one does. The others have seeds of their own, and start elsewhere: modules with
            `reset_parameters` are reset (a layer of zeros stays one), and what would start where
            the first began is moved by a uniform from -2 to 2 in the unconstrained space, as Stan
            does (matrices of a module, and those with a constraint of their own, by that times
            their root mean square). `Fit.restarts` says what each reached and how far they agree,
            and has the mixture of their guides, a guide for every tool. In `checkpoint` each run
            has a folder of its own, `run_0` and so on.
        validation: Held-out data as the model takes them: `transform` is not applied.
        evaluate_every: Epochs between rows of the history; to convergence on one batch, there is
            one whenever the rule looks.
        patience: Stops when the validation bound has not risen for so many evaluations; at the end
            the best parameters are put back.
        warmup_epochs: Epochs over which the weight of the KL term rises from 0 to 1 (Bowman et al.
            2016); ELBOs only.
        transform: Applied to the first tensor of each mini-batch with a generator, such as dynamic
            binarisation.
        device: Where modules and data are moved first; None leaves them.
        checkpoint: A run folder, written before the first step, every `checkpoint_every` epochs, at
            the end and on Ctrl-C. One that holds a run already is refused unless `resume` is set.
            SIGTERM and SIGHUP then wait as well until the step at hand is made and written.
        checkpoint_every: Epochs between checkpoints; to convergence on one batch, there is one
            whenever the rule looks.
        resume: Goes on from `checkpoint`, to `epochs` in all, and finishes what a killed process
            left undone there; starts anew where it holds no run yet. Random numbers that programs
            take from NumPy or `random` are not part of it; those of torch are.
        threads: Processor threads of torch; the caller's number is restored at the end. None takes
            those a resumed run was begun with, else one, on which small steps are fastest and
            other processes do no harm, or the caller's number where a step makes over 2e9
            multiplications (parameters x mini-batch x particles). The number changes the last bits
            of a result, so `config` keeps it.
        config: Further facts for the run folder's `config.json` (such as the name of the data).
        progress: Shows a bar of steps where stderr is a terminal; elsewhere a line every 10 s, if
            the logger ``pyro_vae`` is listened to.

    Returns:
        The fitted programs and the history: measure `fit.model` and `fit.guide`. Modules that were
        passed in have their weights updated as well; values of bare `pyro.param` live in the `Fit`
        alone, as two programs may use one name, and the caller's parameter store stays as it was:
        another `fit` of the same programs starts anew, one of `fit.model` and `fit.guide` goes on.
        Measuring such a program without its fitted values is an `UnfittedWarning`.

        Ctrl-C ends training after the step at hand and returns what was reached (`status`
        "interrupted"); a second Ctrl-C ends it at once, without writing to `checkpoint`.

    References:
        Welandawe, Andersen, Vehtari & Huggins (2022), Robust, automated, and accurate black-box
        variational inference, arXiv:2203.15945, for the phases; the bound stands in for their
        symmetrised KL, so that parameters of the model count as well. Roeder, Wu & Duvenaud (2017),
        Sticking the landing. Damm et al. (2023), The ELBO of variational autoencoders converges to
        a sum of entropies.

    Raises:
        ProgramError: If a parameter that the programs use was never registered, model and guide do
            not sample the same latents (one is missing, observed, or the two are swapped), or
            mini-batches were asked for where no plate says which data they hold, or for a bound
            that they do not estimate (of Renyi, or of an importance weight on all data).
        TrainingError: If the loss or a gradient is not finite.
        ValueError: If an argument is out of its range.
        CheckpointError: If `resume` finds a damaged run, or another than this one; or if
            `checkpoint` holds a run and `resume` is not set.
    """
    seed = as_seed(seed)
    settings = FitSettings(
        loss=loss,
        optimizer=optimizer,
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        evaluate_every=evaluate_every,
        patience=patience,
        warmup_epochs=warmup_epochs,
        checkpoint=Path(checkpoint) if checkpoint is not None else None,
        checkpoint_every=checkpoint_every,
        resume=resume,
        threads=threads,
        config=config or {},
        method=method,
        num_draws=num_draws,
        num_paths=num_paths,
    )
    check_method(settings)
    if patience is not None and validation is None:
        raise ValueError("patience watches the validation bound; pass validation=held_out_data")
    stated = DEFAULT_EPOCHS if epochs is None else epochs
    if isinstance(stated, int) and warmup_epochs > stated:
        warnings.warn(
            f"KL warm-up of {warmup_epochs} epochs is longer than training ({stated}): the full "
            "bound is never optimised",
            stacklevel=3,
        )
    check_count("restarts", restarts)
    settings_each = settings_of_runs(settings, restarts)
    refuse_mixture(model, guide)
    start, model, guide = unwrap_programs(model, guide_for(method, model, guide))
    if device is not None:
        device = _known_device(device)
        for program in (model, guide):
            for module in modules_of(program):
                module.to(device)
        x, validation = move_data(x, device), move_data(validation, device)
    check_module_names(model, guide)
    train = partial(_train, (model, guide), start, (x, transform, validation), progress)
    if restarts > 1:
        run, found = fit_restarts(train, settings_each)
    else:
        run, found = train(settings)
    for program, names in run.bare:
        values = {name: found.model.state["params"][name] for name in names}
        remember_fitted(program, run.start, values)
    done = found.convergence
    if done is not None and not done.converged and found.status == "finished":
        warnings.warn(f"fit: {done.summary()}", stacklevel=3)
    return found


def _known_device(device: Any) -> torch.device:
    """The device, refused in a sentence where torch knows none such or it is not here."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except Exception as error:  # torch has an error of another type for each
        raise ValueError(
            f"device must be one that torch has here, such as 'cpu' or 'cuda:0', not {device!r} "
            f"({type(error).__name__})"
        ) from error
    return found


def _train(
    pair: tuple[Program, Program],
    start: dict[str, Any],
    data: tuple[Any, Any, Any],
    progress: bool,
    settings: FitSettings,
    begin: Callable[[TrainingRun], None] | None = None,
) -> tuple[TrainingRun, Fit]:
    """One training, from the parameters that programs have or `begin` gives them."""
    x, transform, validation = data
    with (
        program_scope(settings.seed, training=True),
        torch.enable_grad(),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Encountered (NaN|.?inf): loss")  # raised as our own
        warnings.simplefilter("ignore", UnfittedWarning)  # here they are fitted
        own_parameters(start)
        run = TrainingRun(*pair, TrainingData(x, transform, settings.seed), validation, settings)
        if begin is not None:
            begin(run)
        if settings.checkpoint is not None:
            remove_leftovers(settings.checkpoint)
            if settings.resume and holds_run(settings.checkpoint):
                run.load()
            elif settings.resume:
                say(f"{settings.checkpoint} holds no run yet: starting anew")
        run.train(progress)
        run.bare = run.bare_names()
        return run, run.result()
