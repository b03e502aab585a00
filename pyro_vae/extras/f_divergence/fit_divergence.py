r"""Training a generator by another divergence than maximum likelihood: `fit_divergence`.

A critic V maximises the lower bound of `divergence_bound` on :math:`D_f(P \,\|\, Q_\theta)`, the
generator descends it:

.. math:: \min_\theta \max_V \; \mathbb E_P\, g_f(V(x)) - \mathbb E_{Q_\theta} f^*(g_f(V(y)))

The generator is any Pyro model, run without its data: no likelihood is evaluated and no guide is
needed, so the same program can be trained by `fit` and by this.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyro
import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.checks import check_count, check_positive
from pyro_vae.data import Seed, as_seed
from pyro_vae.extras.f_divergence.divergences import divergence_bound, get_divergence
from pyro_vae.extras.f_divergence.generation import prior_predictive_draw
from pyro_vae.inference.programs import (
    FittedProgram,
    Program,
    ProgramError,
    describe_programs,
    evaluation_mode,
    ieee_precision,
    keep_random_state,
    leaves,
    own_parameters,
    program_scope,
    remember_fitted,
    store_state,
    unwrap_programs,
)
from pyro_vae.inference.svi import (
    Interruptible,
    TrainingData,
    TrainingError,
    deferred_interrupt,
)
from pyro_vae.models.parts import mlp
from pyro_vae.progress import progress_bar
from pyro_vae.results import Result, float32_precision, label, make_result, summary_html

__all__ = ["DivergenceFit", "fit_divergence"]

_EVALUATION_DATA = 1000  # data of either part on which the bound is measured after an epoch
_CRITIC_HIDDEN = (128, 128)


@dataclass(frozen=True, repr=False)
class DivergenceFit(Interruptible):
    """What `fit_divergence` reached.

    Attributes:
        generator: The model with the fitted parameters in place, ready for every tool.
        critic: The critic, from rows of data to one real number each.
        history: A row an evaluation, dimension `epoch`; see `fit_divergence`.
        config: How it was trained, as JSON can hold it.
        parameters: Fitted values of the generator by name (constrained), detached.
        status: "finished" or "interrupted".
    """

    generator: FittedProgram
    critic: nn.Module
    history: Result
    config: dict[str, Any]
    parameters: dict[str, Tensor]
    status: Literal["finished", "interrupted"]

    def summary(self) -> str:
        """One sentence: how long it trained, what the critic finds, and of which divergence."""
        if not self.history.sizes.get("epoch"):
            return f"fit_divergence {self.status} before its first epoch ended"
        last = self.history.isel(epoch=-1)
        text = f"fit_divergence {self.status} after {int(last.epoch)} epochs"
        text += (
            f", {float(last.seconds):.1f} s; {get_divergence(self.config['divergence']).formula}"
        )
        text += f": {float(last.bound):.3f} +- {float(last.bound_se):.3f} where the critic trained"
        if "validation_bound" in last:
            bound, error = float(last.validation_bound), float(last.validation_bound_se)
            text += f", at least {bound:.3f} +- {error:.3f} by held-out data"
        return text

    def __repr__(self) -> str:
        return f"<{self.summary()}>"

    def _repr_html_(self) -> str:
        return summary_html(self.summary(), self.history)


def fit_divergence(
    generator: Program,
    x: Float[Tensor, "batch *event"],
    *,
    divergence: str = "jensen_shannon",
    critic: nn.Module | None = None,
    mean: bool | None = None,
    epochs: int = 100,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    critic_learning_rate: float = 5e-3,
    critic_steps: int = 1,
    noise: float = 0.0,
    seed: Seed = 0,
    validation: Float[Tensor, "held_out *event"] | None = None,
    evaluate_every: int = 1,
    progress: bool = True,
) -> DivergenceFit:
    r"""Trains a generator by variational divergence minimisation, with P the data and Q the model.

    For each mini-batch the critic makes a step up the bound, and after every `critic_steps` of them
    the generator one down the same bound, both with Adam (beta1 = 0.5). The generator sees its
    divergence only through the critic: what falls is the bound, and the divergence follows as far
    as the critic keeps up.

    Each row of the history has `bound`, the bound as the critic at hand estimates it on up to 1000
    training data and as many samples (an objective: the critic has seen these data, so it bounds
    nothing), and `validation_bound`, the same on held-out data, a lower bound in expectation on the
    divergence of the data's law from the generator's. Both have standard errors; both are small
    where the critic is weak, so they do not compare generators whose critics differ.

    Args:
        generator: The generative program, called as `model(x)` and run as by `prior_predictive`.
        x: The data.
        divergence: A key of `f_divergences.F_DIVERGENCES`.
        critic: A module from rows (batch, features) to (batch, 1) real numbers; a perceptron with
            two hidden layers of 128 units if None. One that is passed in is trained in place.
        mean: Whether means of the observed site stand in place of draws; see
            `prior_predictive`. With means the divergence is that of the law of means: say so
            when it is compared.
        epochs: Passes over the data.
        batch_size: Data in a mini-batch, and samples; what is left over of an epoch is not used.
        learning_rate: Of the generator.
        critic_learning_rate: Of the critic, which has to keep up.
        critic_steps: Steps of the critic for each of the generator.
        noise: Standard deviation of normal noise added to data and samples alike ("instance
            noise"), in the data's units. The bound is then on the divergence of the two laws so
            blurred, which is at most that of the laws themselves. Without it the laws of pictures
            may share no support, and a critic that sees this gives no gradient.
        seed: Seeds the critic's weights, shuffling and draws; the caller's random state is left
            alone.
        validation: Held-out data.
        evaluate_every: Epochs between rows of the history.
        progress: Shows a bar where stderr is a terminal.

    Returns:
        The fitted generator, the critic and the history: over `epoch` `bound` (an objective) and
        `validation_bound` (lower), with `*_se`, in nats for divergences that are, else without
        unit, and `seconds` of training so far. Modules that were passed in have their weights
        updated as well. Ctrl-C ends training after the epoch at hand (`status` "interrupted").

    Raises:
        ProgramError: As `prior_predictive`; or if a parameter was never registered, none moves
            the samples, or the samples depend on the data.
        TrainingError: If the bound or a gradient is not finite.
        ValueError: If an argument is out of its range.

    Note: a game, not a descent: it may circle or lose modes, and no number of the history says so.
        Where the critic enters by an exponential ("kl", "squared_hellinger") it can run away:
        lower its learning rate and add noise ("kl" on pictures needs much of it). With
        "pearson_chi2" a generator may stay far off for long, even a linear one.

    References:
        Nowozin, Cseke & Tomioka (2016), arXiv:1606.00709 (here the two steps are taken one
        after the other, and the generator's is the bound's own gradient, not their heuristic).
        Roth, Lucchi, Nowozin & Hofmann (2017), Stabilizing training
        of generative adversarial networks through regularization, arXiv:1705.09367, for
        the noise. Heusel et al. (2017), arXiv:1706.08500, for two learning rates.

    Example:
        >>> from pyro_vae import VAE
        >>> vae = VAE(data_dim=6, latent_dim=2, hidden=(5,), likelihood="gaussian")
        >>> found = fit_divergence(vae.model, torch.rand(50, 6), epochs=2, progress=False)
        >>> found.history.bound.attrs["bound"]
        'objective'
    """
    seed = as_seed(seed)
    settings = _Settings(
        divergence=divergence,
        mean=mean,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        critic_learning_rate=critic_learning_rate,
        critic_steps=critic_steps,
        noise=noise,
        seed=seed,
        evaluate_every=evaluate_every,
    )
    _check_data(x, validation)
    start, generator, _ = unwrap_programs(generator, generator)
    with program_scope(seed, training=True), torch.enable_grad():
        own_parameters(start)
        run = _Run(generator, TrainingData(x, None, seed), validation, critic, settings)
        begun = {name: v.detach().clone() for name, v in run.used.items()}
        run.train(progress)
        found = run.result()
    remember_fitted(generator, begun, found.generator.state["params"])
    return found


@dataclass(frozen=True)
class _Settings:
    """The arguments of `fit_divergence` that are neither programs nor data, checked."""

    divergence: str
    mean: bool | None
    epochs: int
    batch_size: int
    learning_rate: float
    critic_learning_rate: float
    critic_steps: int
    noise: float
    seed: int
    evaluate_every: int

    def __post_init__(self) -> None:
        get_divergence(self.divergence)
        for name in ("epochs", "batch_size", "critic_steps", "evaluate_every"):
            value = getattr(self, name)
            check_count(name, value)
        for name in ("learning_rate", "critic_learning_rate"):
            check_positive(name, getattr(self, name))
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must be 0 or a positive number, not {self.noise!r}")
        if isinstance(self.seed, bool) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be an integer from 0 to 2**32 - 1, not {self.seed!r}")


def _check_data(x: Tensor, validation: Tensor | None) -> None:
    for name, data in (("x", x), ("validation", validation)):
        if data is None:
            continue
        if not (data.is_floating_point() and len(data) > 1 and data.isfinite().all()):
            raise ValueError(f"{name} must hold at least two rows of finite floating-point numbers")
        if data.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"a held-out datum has shape {tuple(data.shape[1:])} where one of x has "
                f"{tuple(x.shape[1:])}"
            )


class _Run:
    """One call of `fit_divergence`: set up, train, hand over."""

    def __init__(
        self,
        generator: Program,
        data: TrainingData,
        validation: Tensor | None,
        critic: nn.Module | None,
        settings: _Settings,
    ) -> None:
        self.generator, self.data, self.validation = generator, data, validation
        self.settings, self.divergence = settings, get_divergence(settings.divergence)
        self.batch_size = min(settings.batch_size, data.length)
        rows = data.x[: self.batch_size]
        self.used, self.takes_mean = _inspect(generator, rows, settings.mean)
        if critic is None:
            critic = mlp(math.prod(data.x.shape[1:]), _CRITIC_HIDDEN, 1, "elu").to(data.x)
        self.critic = critic
        if self._judge(rows).shape != (self.batch_size,):
            raise ValueError("the critic must map rows (batch, features) to (batch, 1) numbers")
        self.critic_player = _Player("critic", critic.parameters(), settings.critic_learning_rate)
        self.generator_player = _Player("generator", self.used.values(), settings.learning_rate)
        self.rows: list[dict[str, float]] = []
        self.epoch, self.seconds = 0, 0.0

    def train(self, progress: bool) -> None:
        asked = self.settings
        bar = progress_bar(asked.epochs, "epoch", show=progress, what="training")
        with bar, deferred_interrupt() as interrupted:
            while self.epoch < asked.epochs and not interrupted():
                self._epoch()
                if self.epoch % asked.evaluate_every == 0 or self.epoch == asked.epochs:
                    self._evaluate()
                    bar.set_postfix(bound=f"{self.rows[-1]['bound']:.3f}")
                bar.update()

    def _epoch(self) -> None:
        started = time.perf_counter()
        order = torch.randperm(self.data.length, generator=self.data.shuffler)
        for place, index in enumerate(order.split(self.batch_size)):
            if len(index) < self.batch_size:
                break
            batch = self.data.batch(index)
            with torch.no_grad():
                samples = self._samples(batch)
            bound = divergence_bound(
                self.settings.divergence, self._judge(batch), self._judge(samples)
            )
            self.critic_player.step(-bound)
            if (place + 1) % self.settings.critic_steps == 0:
                # All of the bound that depends on the generator.
                self.generator_player.step(
                    -self.divergence.penalty(self._judge(self._samples(batch))).mean()
                )
        self.epoch += 1
        self.seconds += time.perf_counter() - started

    def _samples(self, x: Tensor) -> Tensor:
        return prior_predictive_draw(self.generator, x, self.settings.mean)[0]

    def _judge(self, x: Tensor) -> Float[Tensor, " batch"]:
        if self.settings.noise:
            x = x + self.settings.noise * torch.randn_like(x)
        return self.critic(x.reshape(len(x), -1)).squeeze(-1)

    @torch.no_grad()
    def _evaluate(self) -> None:
        row: dict[str, float] = {"epoch": self.epoch, "seconds": self.seconds}
        for prefix, x in (("", self.data.x), ("validation_", self.validation)):
            if x is None:
                continue
            x = x[:_EVALUATION_DATA]
            evaluation = evaluation_mode(self.generator, self.critic)
            with keep_random_state(), evaluation, ieee_precision():
                pyro.set_rng_seed(self.settings.seed)  # the same draws after every epoch
                on_data, on_samples = self._judge(x), self._judge(self._samples(x))
            row[prefix + "bound"] = float(
                divergence_bound(self.settings.divergence, on_data, on_samples)
            )
            parts = self.divergence.activation(on_data), self.divergence.penalty(on_samples)
            row[prefix + "bound_se"] = math.sqrt(sum(float(p.var()) / len(p) for p in parts))
        self.rows.append(row)

    def result(self) -> DivergenceFit:
        store = pyro.get_param_store()
        state = store_state(self.used.__contains__)
        config = {
            "generator": describe_programs(self.generator, self.generator),
            "critic": type(self.critic).__name__,
            "samples": "means" if self.takes_mean else "draws",
            "optimizer": "Adam, beta1 = 0.5",
            **asdict(self.settings),
            "batch_size": self.batch_size,
            "num_data": self.data.length,
            "float32_precision": float32_precision(),
        }
        return DivergenceFit(
            generator=FittedProgram(self.generator, state),
            critic=self.critic,
            history=self._history(config),
            config=config,
            parameters={n: store[n].detach().clone() for n in self.used},
            status="finished" if self.epoch == self.settings.epochs else "interrupted",
        )

    def _history(self, config: dict[str, Any]) -> Result:
        formula = self.divergence.formula
        described = {
            "bound": (
                "objective",
                f"what the critic finds of {formula}, on data it was trained on",
            ),
            "validation_bound": ("lower", f"of {formula}, by held-out data"),
        }
        unit = "nats" if self.divergence.in_nats else "none"
        variables: dict[str, Any] = {}
        for name in self.rows[0] if self.rows else ():
            kind, text = described.get(name.removesuffix("_se"), ("none", "training time so far"))
            own = unit if kind != "none" else "seconds"
            attrs = label(unit=own, reduction="none", bound=kind, description=text)
            if name != "epoch":
                variables[name] = ("epoch", [row[name] for row in self.rows], attrs)
        return make_result(
            variables,
            function="fit_divergence",
            config=config,
            seed=self.settings.seed,
            data_sha256=self.data.sha256(),
            coords={"epoch": [int(row["epoch"]) for row in self.rows]},
            notes=list(self._notes()),
        )

    def _notes(self) -> Iterator[str]:
        yield (
            "the critic was trained on the training data, so on them its number bounds nothing; on "
            "held-out data it is a lower bound, however weak the critic."
        )
        if self.takes_mean:
            yield (
                "the samples are the means of x given the latents, not draws of x: the divergence "
                "is that of the law of these means."
            )
        if self.settings.noise:
            yield (
                f"normal noise of standard deviation {self.settings.noise:g} was added to data and "
                "samples: the divergence is that of the two laws so blurred, which is at most that "
                "of the laws themselves."
            )


class _Player:
    """One side of the game: parameters, and an optimizer that moves nothing to where is no number.

    Raises:
        ValueError: If there is no parameter to move.
    """

    def __init__(self, role: str, parameters: Iterable[Tensor], rate: float) -> None:
        self.role = role
        self.parameters = [p for p in parameters if p.requires_grad]
        if not self.parameters:
            raise ValueError(f"the {role} has no parameter that requires a gradient")
        self.optimizer = torch.optim.Adam(self.parameters, lr=rate, betas=(0.5, 0.999))

    def step(self, loss: Float[Tensor, ""]) -> None:
        """Descends, through these parameters alone."""
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        known = [g for g in gradients if g is not None]
        norm = torch.nn.utils.get_total_norm(known)
        if not (loss.isfinite() and norm.isfinite()):
            raise TrainingError(
                f"the {self.role}'s part of the bound is {float(loss.detach()):g} and its gradient "
                f"has norm {float(norm):g}; the parameters are those of the last good step. Lower "
                "the learning rates, add noise, or take a divergence that is bounded, such as "
                "'jensen_shannon'"
            )
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None


def _inspect(generator: Program, x: Tensor, mean: bool | None) -> tuple[dict[str, Tensor], bool]:
    """The parameters that the generator registers, unconstrained, and whether it gives means."""
    values = []
    for rows in (x, x.flip(0)):
        with keep_random_state(), poutine.trace(param_only=True) as params:
            pyro.set_rng_seed(0)
            value, takes_mean = prior_predictive_draw(generator, rows, mean)
        values.append(value)
    if not torch.equal(*values):
        raise ProgramError(
            "the samples change with the data that the model is given, so they are no draws from "
            "it; use x for its shape and as obs= alone"
        )
    used = {name: site["value"].unconstrained() for name, site in params.trace.nodes.items()}
    known = {id(p) for p in used.values()}
    moving = leaves(value)
    missing = [leaf for leaf in moving if id(leaf) not in known]
    if missing:
        raise ProgramError(
            f"{len(missing)} parameter tensors move the samples but were never registered, the "
            f"first of shape {tuple(missing[0].shape)}; call pyro.module('name', module) in the "
            "generator, or freeze them with requires_grad_(False)"
        )
    if not moving:
        raise ProgramError(
            "no parameter of the generator moves its samples, so there is nothing to train; "
            "register modules with pyro.module('name', module)"
        )
    return used, takes_mean
