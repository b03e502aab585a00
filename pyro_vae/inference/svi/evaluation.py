"""What `fit` measures while it trains: the bound of data, and what a stopping rule asks for."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from jaxtyping import Float
from pyro.infer import ELBO
from torch import Tensor

from pyro_vae.inference.estimators import (
    Objective,
    PathwiseELBO,
    StickingTheLanding,
    sites_without_path,
)
from pyro_vae.inference.programs import (
    Program,
    ProgramError,
    ProgramStructure,
    as_arguments,
    common_owner,
    evaluation_mode,
    ieee_precision,
    inspect_programs,
    keep_random_state,
    map_batch,
    run_programs,
    sum_dims,
    take,
    trace_programs,
    weighted_sites,
)
from pyro_vae.inference.svi.optimizer import FusedOptim
from pyro_vae.inference.svi.preparation import Preparation
from pyro_vae.inference.svi.step import without_validation

__all__ = ["TrainedPair", "bound_of", "check_held_out", "default_loss", "entropy_residual"]

_PARTICLES = 8  # of the default loss
_TRIAL = 128  # held-out data by which it is tried whether they fit
_ENTRIES = 2**20  # particles times data that a check may hold in memory
_MOST_DRAWS, _MOST_ONE_BY_ONE = 256, 24
_NATS = 0.005  # a latent: what an error of a tenth of its posterior standard deviation costs
_MOST_LATENTS = 50  # that count
_NATS_PER_DATUM = 0.001


def default_loss(model: Program, guide: Program, prepared: Preparation) -> ELBO | None:
    """Sticking the landing, where the pair takes it; its noise ends where the guide is exact."""
    if prepared.structure is None or prepared.structure.enumerated:
        return None
    if sites_without_path([(*_one_run(model, guide, prepared), 1)]):
        return None
    loss = StickingTheLanding(_PARTICLES, joint=prepared.joint)
    args, kwargs = as_arguments(prepared.data.first(prepared.data.length, stream=3))
    try:
        with keep_random_state(), evaluation_mode(model, guide, *prepared.modules):
            loss.differentiable_loss(model, guide, *args, **kwargs)
    except ProgramError:  # such as a latent that cannot be held fixed: `Trace_ELBO` takes it
        return None
    return loss


def _one_run(model: Program, guide: Program, prepared: Preparation) -> Any:
    arguments = as_arguments(prepared.data.first(prepared.data.length, stream=3))
    with torch.no_grad(), keep_random_state(), pyro.validation_enabled(False):
        return trace_programs(model, guide, arguments)


def bound_of(
    model: Program, guide: Program, x: Any, prepared: Preparation, loss: ELBO, seed: int
) -> dict[str, float]:
    """The ELBO per datum by one particle, its parts and its standard error over data."""
    arguments, length = as_arguments(x), prepared.length_of(x)
    structure = prepared.structure
    evaluation = evaluation_mode(model, guide, *prepared.modules)
    everything = prepared.on(None, length)
    with torch.no_grad(), keep_random_state(), evaluation, ieee_precision(), everything:
        pyro.set_rng_seed(seed)
        if structure is None:
            value = _loss(loss, model, guide, arguments)
            return {"bound": -value / prepared.num_data(length, evaluated=True)}
        log_p, log_q, parts = run_programs(model, guide, arguments, structure, 1)
        per = 1.0 if not prepared.joint else 1.0 / length
        log_weights = (log_p - log_q)[0] * per
        found = {"bound": float(log_weights.mean())}
        if parts:
            found["reconstruction"] = float(parts["likelihood"].mean()) * per
            found["kl"] = float((log_q - parts["prior"]).mean()) * per
        if len(log_weights) > 1:
            found["bound_se"] = float(log_weights.std() / math.sqrt(len(log_weights)))
        return found


def entropy_residual(
    model: Program, guide: Program, x: Any, prepared: Preparation, seed: int
) -> dict[str, float]:
    r"""The bound per datum less the sum of entropies that it equals at a stationary point.

    .. math:: F - \bigl(H(q) - H(p(z)) - E_q H(p(x \mid z))\bigr)
              = \tfrac12 \sum_h \bigl(1 - E_q z_h^2\bigr)
              + \tfrac12 \sum_d \bigl(1 - E_q (x_d - f_d(z))^2 / \sigma_d^2\bigr)

    in the mean over data, for a standard normal prior and normal data of learnt variance. The
    second sum is :math:`-\tfrac12\, \partial F / \partial \log \sigma` and the first the
    derivative by the log of a factor on q's means and standard deviations that the decoder's first
    layer divides by, which changes nothing else: both are zero where parameters are stationary.
    Which model has such parameters is its own to say (`bound_ends_at_entropies`).

    Returns:
        `entropy_residual` and its standard error over data; nothing for other models. The first sum
        is exact, the second by one draw a datum.

    References:
        Damm, Forster, Velychko, Dai, Fischer & Lücke (2023), The ELBO of variational autoencoders
        converges to a sum of entropies, AISTATS.
    """
    owner, structure = common_owner(model, guide), prepared.structure
    free = getattr(owner, "bound_ends_at_entropies", False)
    if not free or structure is None or prepared.joint or prepared.length_of(x) < 2:
        return {}
    evaluation = evaluation_mode(model, guide, *prepared.modules)
    with torch.no_grad(), keep_random_state(), evaluation, ieee_precision():
        pyro.set_rng_seed(seed)
        guide_trace, model_trace = trace_programs(model, guide, as_arguments(x))
        total = torch.zeros(())
        for name, site in weighted_sites(model_trace).items():
            mean, variance = site["value"], 0.0
            if not site["is_observed"]:
                posterior = guide_trace.nodes[name]["fn"]
                mean, variance = posterior.mean, posterior.variance
            apart = ((mean - site["fn"].mean).square() + variance) / site["fn"].variance
            half = (1 - apart).sum(-1) / 2
            total = total + sum_dims(half, structure, 1)[0]
    error = float(total.std() / math.sqrt(len(total)))
    return {"entropy_residual": float(total.mean()), "entropy_residual_se": error}


def _loss(loss: ELBO, model: Program, guide: Program, arguments: Any) -> float:
    args, kwargs = arguments
    value = loss.loss(model, guide, *args, **kwargs)
    return float(value[0] if isinstance(value, tuple) else value)


class TrainedPair:
    """A pair of programs on all its data, as a `PhaseRule` moves and measures it.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior.
        prepared: From `prepare`.
        loss: What is minimised.
        optim: Holds the parameters.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        prepared: Preparation,
        loss: ELBO,
        optim: FusedOptim,
    ) -> None:
        self.model, self.guide, self.prepared, self.optim = model, guide, prepared, optim
        self.loss = loss
        self.parameters = [p for p in optim.names if p.requires_grad]
        self.arguments = as_arguments(prepared.data.first(prepared.data.length, stream=3))
        self.structure, self.num_data = self._structure(), prepared.data.length
        self.kind = optim.name
        per_datum = self.structure is not None and not prepared.joint
        each = _NATS * min(max(self.size / 2, 1.0), _MOST_LATENTS)  # a loc and a scale a latent
        self.threshold = max(each, _NATS_PER_DATUM * self.num_data * per_datum)
        together = self.structure is not None and self.structure.vectorizable
        most = _MOST_DRAWS if together else _MOST_ONE_BY_ONE
        self.num_draws = max(8, min(most, _ENTRIES // self.num_data))

    def _structure(self) -> ProgramStructure | None:
        if self.prepared.structure is None:
            return None
        pair = (self.model, self.guide, self.arguments)
        return inspect_programs(*pair, joint=self.prepared.joint, num_particles=2)

    @property
    def size(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel() for p in self.parameters)

    def vector(self) -> Float[Tensor, " numbers"]:
        """The parameters, unconstrained, one after the other; a copy in double precision."""
        return torch.cat([p.detach().reshape(-1).double() for p in self.parameters]).cpu().clone()

    @torch.no_grad()
    def move(self, vector: Float[Tensor, " numbers"]) -> None:
        """Sets them."""
        parts = vector.split([p.numel() for p in self.parameters])
        for p, part in zip(self.parameters, parts, strict=True):
            p.copy_(part.reshape(p.shape))

    def set_rate(self, rate: float, matrix: Tensor | None) -> None:
        """Sets the rate, and what gradients are multiplied by (None: the optimizer's own step)."""
        self.optim.set_newton(rate, matrix)

    @contextmanager
    def measuring(self, seed: int) -> Iterator[None]:
        """Draws that the seed fixes; parameters far off give numbers that are not finite."""
        evaluation = evaluation_mode(self.model, self.guide, *self.prepared.modules)
        everything = self.prepared.on(None)
        with keep_random_state(), evaluation, ieee_precision(), without_validation(), everything:
            pyro.set_rng_seed(seed)
            yield

    def draws(self, seed: int) -> Float[Tensor, " draws"]:
        """The bound by single draws that the seed fixes, in nats of all data."""
        with torch.no_grad(), self.measuring(seed):
            if self.structure is None:
                pair = (self.loss, self.model, self.guide, self.arguments)
                return -torch.tensor([_loss(*pair) for _ in range(4)], dtype=torch.float64)
            run = (self.model, self.guide, self.arguments, self.structure)
            log_p, log_q, _ = run_programs(*run, self.num_draws)
            return (log_p - log_q).sum(1).double().cpu()

    def gradient(self, seed: int, *, single: bool = False) -> Float[Tensor, " numbers"]:
        """Of minus the bound, by draws that the seed fixes; `single`: by as many as a step has."""
        loss = self.loss if single else self._differentiable()
        args, kwargs = self.arguments
        with torch.enable_grad(), self.measuring(seed):
            value = loss.differentiable_loss(self.model, self.guide, *args, **kwargs)
            found = torch.autograd.grad(value, self.parameters, allow_unused=True)
        parts = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(self.parameters, found, strict=True)
        ]
        return torch.cat([g.reshape(-1).double() for g in parts]).cpu()

    def _differentiable(self) -> ELBO:
        if self.structure is None or not isinstance(self.loss, Objective):
            return self.loss
        many = PathwiseELBO(self.num_draws)
        many.assume(self.model, self.guide, self.structure)
        return many

    def is_smooth(self) -> bool:
        """Whether the gradient at fixed draws moves with the parameters as the bound's does."""
        traces = _one_run(self.model, self.guide, self.prepared)
        if sites_without_path([(*traces, 1)]):
            return False
        try:
            self.gradient(0)
        # No gradient reaches the parameters, or has no formula: steps go on without a Hessian. A
        # fault of the programs themselves ends the first of these steps with its own sentence.
        except (ProgramError, NotImplementedError, RuntimeError):
            return False
        return True


def check_held_out(prepared: Preparation, validation: Any) -> Any:
    """Refuses held-out data that the guide cannot speak of; returns as many as a trial needs.

    Raises:
        ValueError: If they are empty, or no data of the kind trained on.
        ProgramError: If the guide has values for each training datum.
    """
    try:
        length = prepared.length_of(validation)
    except (AttributeError, IndexError, ValueError) as error:
        raise ValueError(
            "validation must be data of the kind that the pair is trained on, with the same "
            f"arguments, not {type(validation).__name__}"
        ) from error
    if length == 0:
        raise ValueError("the validation data are empty; pass validation=None or some data")
    if prepared.per_datum:
        raise ProgramError(
            f"'{prepared.per_datum}' has a posterior or parameter for each training datum, so the "
            "guide says nothing of held-out data; amortise it, or pass validation=None"
        )
    if prepared.joint:
        return validation
    return map_batch(validation, take(slice(_TRIAL)), prepared.data.axes)
