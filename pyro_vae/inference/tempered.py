r"""The geometric path from a start to a model's joint density, with gradients: what chains follow.

.. math:: \log f_\beta(u) = (1 - \beta) \log f_0(u) + \beta \log p(x, u)
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.inference.programs import UnconstrainedModel

__all__ = ["Point", "Tempered", "in_double"]


class Point(NamedTuple):
    """Latents, and what is known there.

    Attributes:
        u: Unconstrained latents, `[chains, batch, dim]`.
        log_density: Of the tempered target, `[chains, batch]`; -inf where it is undefined.
        gradient: Of it, `[chains, batch, dim]`; zero where it is not finite.
        joint: log p(x, z), `[chains, batch]`.
        start: log p(z) or log q(z | x), `[chains, batch]`.
    """

    u: Tensor
    log_density: Tensor
    gradient: Tensor
    joint: Tensor
    start: Tensor


class Tempered:
    r"""The geometric path :math:`(1 - \beta) \log f_0(u) + \beta \log p(x, u)` with gradients.

    The program is captured once as a graph of tensor operations where that can be done, and is
    checked to give what the program gives; a program that branches on its latents is run as it is.

    Args:
        latent_model: The model.
        start: f_0: `"prior"` or `"guide"`.
        capture: Whether to try to capture.
    """

    def __init__(
        self, latent_model: UnconstrainedModel, start: str = "prior", *, capture: bool = True
    ) -> None:
        self.latent_model, self.start = latent_model, start
        self.evaluations = 0
        self._captured: dict[int, Callable[..., Any] | None] = {}
        self._capture = capture

    def __call__(
        self, u: Float[Tensor, "chains batch dim"], beta: float | Float[Tensor, " batch"] = 1.0
    ) -> Point:
        """Evaluates the target at `u`, at one temperature or one a datum; never gives a nan."""
        self.evaluations += 1
        weight = torch.as_tensor(beta, dtype=u.dtype, device=u.device)
        u = u.detach().contiguous()  # a captured graph knows the strides it was captured with
        if self._capture and len(u) not in self._captured:
            self._captured[len(u)] = self._try_capture(u, weight)
        run = self._captured.get(len(u)) or self._evaluate
        try:
            log_density, gradient, joint, start = run(u, weight)
        except torch.linalg.LinAlgError:
            log_density, gradient, joint, start = self._one_by_one(u, weight)
        joint, start, log_density = (_or_minus_infinity(t) for t in (joint, start, log_density))
        gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        return Point(u, log_density, gradient, joint, start)

    @property
    def is_captured(self) -> bool:
        """Whether a captured graph stands in for the program."""
        return any(graph is not None for graph in self._captured.values())

    def _evaluate(self, u: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            joint, start = self.latent_model.log_densities(u, self.start)
            log_density = start + beta * (joint - start)
            (gradient,) = torch.autograd.grad(log_density.sum(), u)
        return log_density.detach(), gradient, joint.detach(), start.detach()

    def _one_by_one(self, u: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        """The same where a matrix of the program cannot be factorised at the place of some chain.

        Such chains are where the density is 0 up to rounding, so their steps will be rejected.
        """
        found = []
        for chain in u.split(1):
            try:
                found.append(self._evaluate(chain, beta))
            except torch.linalg.LinAlgError:
                nowhere = chain.new_full(chain.shape[:2], -math.inf)
                found.append((nowhere, torch.zeros_like(chain), nowhere, nowhere))
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def _try_capture(self, u: Tensor, beta: Tensor) -> Callable[..., Any] | None:
        if not self.latent_model.structure.vectorizable and len(u) > 1:
            return None
        try:
            graph = make_fx(lambda at, weight: self._evaluate(at, weight))(u, beta)
            graph.graph.eliminate_dead_code()
            graph.recompile()
        except Exception:  # whatever a program does that tracing cannot follow
            return None
        for point, weight in ((u, beta), (u.roll(1, 0) * 1.1 + 0.1, beta / 2)):
            expected, found = self._evaluate(point, weight), graph(point, weight)
            for a, b in zip(expected, found, strict=True):
                tolerance = 100 * torch.finfo(a.dtype).eps
                if not torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True):
                    return None
        return graph


def in_double(target: Tempered) -> Callable[..., Point]:
    """The target with its values in double precision, whatever the model's is."""
    like = target.latent_model.like

    def evaluate(u: Tensor, beta: Any = 1.0) -> Point:
        temperature = beta.to(like) if isinstance(beta, Tensor) else beta
        return Point(u, *(value.double() for value in target(u.to(like), temperature)[1:]))

    return evaluate


def _or_minus_infinity(log_density: Tensor) -> Tensor:
    return torch.where(log_density.isnan(), -math.inf, log_density)
