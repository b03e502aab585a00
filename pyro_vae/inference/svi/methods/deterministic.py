r"""ADVI on fixed draws, to the last digit, with the covariances that its optimum responds with.

With fixed noise :math:`z_1, \dots, z_N` the ELBO of a normal guide is a smooth function of its
parameters :math:`\eta`,

.. math:: f(\eta) = \frac{1}{N} \sum_n \log p(x, \mu + \sigma z_n) + \sum_i \log \sigma_i ,

which Newton's method maximises to rounding, whatever the start. A posterior tilted by
:math:`e^{t u_j}` moves the optimum by :math:`H^{-1} \nabla_\eta E_q[u_j]` a unit of t, so that

.. math:: \operatorname{Cov}_{LR}(u_i, u_j)
          = \nabla E_q[u_i]^T \, H^{-1} \, \nabla E_q[u_j], \qquad H = -\nabla^2 f ,

is an estimate of the posterior covariance that knows of correlations where q itself does not.

References:
    Giordano, Ingram & Broderick (2024), Black box variational inference with a deterministic
    objective: faster, more accurate, and even more black box, JMLR 25; Giordano, Broderick & Jordan
    (2018), Covariances, robustness, and variational Bayes, JMLR 19.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.inference.optimisation import trust_region_step
from pyro_vae.inference.programs import ProgramError
from pyro_vae.inference.svi.evaluation import TrainedPair
from pyro_vae.inference.svi.methods.gaussian import GuideNormal
from pyro_vae.inference.svi.methods.rule import MethodRule, constrained, posterior_result
from pyro_vae.inference.svi.optimizer import TrainingError
from pyro_vae.results import Result

__all__ = ["DeterministicRule", "balanced_noise"]

_MOST_NUMBERS = 1000  # with which a Hessian is worth its gradients
_COLUMNS = 64  # of a Hessian at once
_SHORTENINGS = 30
_REPLICATES = 40  # sets of draws that the Monte-Carlo error is taken over
_MOMENT_DRAWS = 1000  # for means and sds in constrained space


class DeterministicRule(MethodRule):
    """Newton steps within a trust region on the ELBO by fixed draws; see the module.

    Args:
        pair: What is fitted.
        limit: The most steps.
        num_draws: N.
        seed: Seeds the draws.

    Raises:
        ProgramError: If the guide is no normal distribution, or too expressive for so few draws.
    """

    def __init__(self, pair: TrainedPair, limit: int, num_draws: int, seed: int) -> None:
        super().__init__(pair, "Newton", limit, seed)
        if pair.size > _MOST_NUMBERS:
            raise ProgramError(
                f"method='deterministic' takes second derivatives by all parameters, and these are "
                f"{pair.size:,} numbers, more than {_MOST_NUMBERS:,}; pass method='svi'"
            )
        self.num_draws = num_draws
        self.normal = GuideNormal(pair)
        dim = self.normal.dim
        with torch.no_grad(), pair.measuring(seed):
            self.normal.check_fixed()
            full = self.normal.read()[1].dim() == 2
        if full and num_draws <= dim:
            raise ProgramError(
                f"a guide with a full covariance has no optimum on {num_draws} fixed draws of "
                f"{dim} latents: it can grow without bound where no draw looks (Giordano et al. "
                f"2024); "
                f"pass num_draws={2 * dim} or more, or a mean-field guide such as AutoNormal(model)"
            )
        self.noise = balanced_noise(num_draws, dim, seed).to(self.normal.latent_model.like)
        self.state.rate = math.sqrt(pair.size)  # the radius, in roots of twice a nat

    # -- the objective

    def _minus_elbo(self, noise: Tensor) -> Tensor:
        loc, root = self.normal.read()
        log_det = (root if root.dim() == 1 else root.diagonal()).log().sum()
        log_p = self.normal.latent_model.log_density(_at(loc, root, noise)[:, None])
        constant = 0.5 * self.normal.dim * (1 + math.log(2 * math.pi))
        return -log_p.mean() - log_det - constant

    def _value(self) -> float:
        with torch.no_grad():
            return float(self._minus_elbo(self.noise))

    def _gradient(self, noise: Tensor) -> Tensor:
        parameters = self.pair.parameters
        found = torch.autograd.grad(self._minus_elbo(noise), parameters, allow_unused=True)
        return _flat(found, parameters)

    def _derivatives(self) -> tuple[float, Tensor, Tensor]:
        """Minus the ELBO, its gradient and its Hessian, where the parameters are."""
        parameters = self.pair.parameters
        value = self._minus_elbo(self.noise)
        found = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
        gradient = _flat(found, parameters)
        try:
            hessian = _jacobian(gradient, parameters)
        except RuntimeError as error:
            raise ProgramError(
                f"the log joint has no second derivatives ({error}), which method='deterministic' "
                "needs; pass method='svi'"
            ) from error
        return float(value.detach()), gradient.detach().double().cpu(), (hessian + hessian.T) / 2

    # -- steps

    def advance(self, *_args: Any, **_kwargs: Any) -> float:
        """One accepted step of Newton's method; at the end, one that changes nothing more."""
        state, pair = self.state, self.pair
        with torch.enable_grad(), pair.measuring(self.seed):
            value, gradient, hessian = self._derivatives()
            if not (
                math.isfinite(value) and gradient.isfinite().all() and hessian.isfinite().all()
            ):
                raise TrainingError(
                    f"minus the ELBO by the fixed draws is {value}, or its derivatives are not "
                    "finite; start elsewhere, such as AutoNormal(model, init_loc_fn=...) or fit by "
                    "method='pathfinder' first"
                )
            if state.steps == 0:
                state.reached = -value
            here, rounding = pair.vector(), 10 * (1 + abs(value)) * self._eps()
            for _ in range(_SHORTENINGS):
                step, promised, held = trust_region_step(gradient, hessian, state.rate)
                if promised <= rounding:
                    return self._finish(value, here + step, promised)
                pair.move(here + step)
                new = self._value()
                ratio = (value - new) / promised if math.isfinite(new) else -math.inf
                if ratio > 0.75 and held:
                    state.rate *= 3
                if ratio < 0.25:
                    state.rate /= 4
                if ratio > 0.05:
                    state.gain = promised
                    return new
            pair.move(here)
            self._end(value, converged=False)
            return value

    def _eps(self) -> float:
        return max(torch.finfo(p.dtype).eps for p in self.pair.parameters)

    def _finish(self, value: float, there: Tensor, promised: float) -> float:
        """Values round before gradients do: goes on while each step promises much less."""
        if promised < 0.25 * self.state.gain:
            self.pair.move(there)
            self.state.gain = max(promised, 0.0)
            return value
        self._end(value, converged=True)
        return value

    def _end(self, value: float, *, converged: bool) -> None:
        state = self.state
        self.finish(converged=converged)
        error = math.nan
        if converged:
            with torch.enable_grad(), self.pair.measuring(self.seed):
                _, _, hessian = self._derivatives()
                shifts = self._shifts(_inverse(hessian))
                shifts = shifts - shifts.mean(0)
                error = 0.5 * float(torch.einsum("ri,ij,rj->r", shifts, hessian, shifts).mean())
        self._close(state.steps + 1, math.nan, error, -value - state.reached, 0.0)

    # -- what the optimum says

    def _shifts(self, inverse: Tensor) -> Float[Tensor, "replicates numbers"]:
        """How far fresh draws would move the optimum, by one Newton step.

        Their mean is minus the error of this optimum; their spread is that of any.
        """
        like = self.normal.latent_model.like
        found = []
        for other in range(1, _REPLICATES + 1):
            noise = balanced_noise(self.num_draws, self.normal.dim, self.seed + 7919 * other)
            gradient = self._gradient(noise.to(like)).detach().double().cpu()
            found.append(-inverse @ gradient)
        return torch.stack(found)

    def posterior(self, config: Mapping[str, Any], data_sha256: str | None) -> Result:
        """Means and sds with their Monte-Carlo errors, and linear-response covariances."""
        parameters, latent_model = self.pair.parameters, self.normal.latent_model
        count = _MOMENT_DRAWS if latent_model.structure.vectorizable else self.num_draws
        with torch.enable_grad(), self.pair.measuring(self.seed):
            _, _, hessian = self._derivatives()
            inverse = _inverse(hessian)
            shifts = self._shifts(inverse)
            loc, root = self.normal.read()
            of_q = loc.sum() + root.sum()
            own = torch.autograd.grad(of_q, parameters, retain_graph=True, allow_unused=True)
            noise = balanced_noise(count, self.normal.dim, self.seed + 1).to(latent_model.like)
            draws, names = constrained(latent_model, _at(loc, root, noise))
            mean = draws.mean(0)
            sd = (draws - mean).square().mean(0).sqrt()
            of_mean, of_sd = (_jacobian(part, parameters) for part in (mean, sd))
        # Parameters of the model are held: the posterior is the one given them.
        pairs = zip(parameters, own, strict=True)
        kept = torch.cat([torch.full((p.numel(),), g is not None) for p, g in pairs])
        held = _inverse(hessian[kept][:, kept])
        covariance = of_mean[:, kept] @ held @ of_mean[:, kept].T
        columns = {
            "mean": (("latent",), mean, "mean of q"),
            "mean_se": (("latent",), (shifts @ of_mean.T).std(0), "of the draws"),
            "sd": (("latent",), sd, "standard deviation of q"),
            "sd_se": (("latent",), (shifts @ of_sd.T).std(0), "of the draws"),
            "linear_response_sd": (
                ("latent",),
                covariance.diagonal().clamp_min(0.0).sqrt(),
                "posterior standard deviation by linear response",
            ),
            "linear_response_covariance": (
                ("latent", "other_latent"),
                covariance,
                "posterior covariance by linear response",
            ),
        }
        return posterior_result(
            columns,
            names,
            num_draws=self.num_draws,
            seed=self.seed,
            config=config,
            data_sha256=data_sha256,
            notes=[] if covariance.isfinite().all() else [_NO_OPTIMUM],
        )


_NO_OPTIMUM = (
    "the Hessian is not positive definite where training ended, so there is no optimum to respond: "
    "linear-response columns and errors are nan."
)


def balanced_noise(num_draws: int, dim: int, seed: int) -> Float[Tensor, "draws dim"]:
    """Standard normal draws with a mean of exactly zero and variances of exactly one.

    With more draws than latents their covariance is the identity, so that the ELBO of a normal
    posterior is exact on them.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    noise = torch.randn(num_draws, dim, generator=generator, dtype=torch.float64)
    noise = noise - noise.mean(0)
    if num_draws > dim:
        q, r = torch.linalg.qr(noise)
        return q * r.diagonal().sign() * math.sqrt(num_draws)
    return noise / noise.square().mean(0).sqrt()


def _at(loc: Tensor, root: Tensor, noise: Tensor) -> Tensor:
    return loc + (noise * root if root.dim() == 1 else noise @ root.T)


def _flat(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    parts = zip(gradients, like, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in parts])


def _jacobian(values: Float[Tensor, " rows"], parameters: list[Tensor]) -> Tensor:
    """Of values by parameters, `[rows, numbers]`, in double precision."""
    rows = torch.eye(len(values)).to(values)
    return torch.cat([_products(values, part, parameters) for part in rows.split(_COLUMNS)])


def _products(values: Tensor, rows: Tensor, parameters: list[Tensor]) -> Tensor:
    kept: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    if not values.requires_grad:
        return rows.new_zeros(len(rows), sum(p.numel() for p in parameters)).double().cpu()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operations that are batched by a loop
            found = torch.autograd.grad(values, parameters, rows, is_grads_batched=True, **kept)
        parts = [
            p.new_zeros(len(rows), p.numel()) if g is None else g.reshape(len(rows), -1)
            for g, p in zip(found, parameters, strict=True)
        ]
        return torch.cat(parts, 1).detach().double().cpu()
    except RuntimeError:  # an operation that cannot be batched
        each = [torch.autograd.grad(values, parameters, row, **kept) for row in rows]
        return torch.stack([_flat(g, parameters) for g in each]).detach().double().cpu()


def _inverse(hessian: Tensor) -> Tensor:
    """Of a positive definite matrix, in units in which its diagonal is one; else of nan.

    Numbers that nothing depends on (half of a triangular factor) have zeros.
    """
    live = hessian.abs().sum(0) > 0
    both = live[:, None] & live
    part = hessian[live][:, live]
    unit = part.diagonal().clamp_min(0.0).sqrt()
    chol, failed = torch.linalg.cholesky_ex(part / unit[:, None] / unit)
    if int(failed) or not bool((unit > 0).all()):
        return torch.where(both, math.nan, torch.zeros_like(hessian))
    found = torch.zeros_like(hessian)
    found[both] = (torch.cholesky_inverse(chol) / unit[:, None] / unit).flatten()
    return found
