r"""Mixtures as functions of one vector of free natural parameters, for their information matrix.

The vector holds the log odds of the weights against the last, and the natural parameters of the
components: of Gaussians :math:`\Lambda_k \mu_k` and :math:`\Lambda_k` (the natural parameter is
:math:`-\Lambda_k / 2`), of Bernoullis logits, of Poissons log rates. It is in the coordinates of
the `MixtureProblem`, where data are centred and scaled, so that its information is well conditioned
wherever the data lie; `values` takes it to the data's units.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["NaturalForm", "flat_roots", "gaussian_form", "mean_form", "roots_of"]


def flat_roots(roots: Float[Tensor, "*batch d d"]) -> Float[Tensor, " numbers"]:
    """Lower roots as free numbers: the logarithms of their diagonals and what lies below."""
    rows, columns = torch.tril_indices(roots.shape[-1], roots.shape[-1], -1).unbind()
    diagonal = roots.diagonal(dim1=-2, dim2=-1).log()
    return torch.cat([diagonal.flatten(), roots[..., rows, columns].flatten()])


def roots_of(numbers: Float[Tensor, " numbers"], *shape: int) -> Float[Tensor, "*batch d d"]:
    """The lower roots, of shape (*shape, d, d) without the last d, that `flat_roots` flattens."""
    dim, size = shape[-1], math.prod(shape)
    rows, columns = torch.tril_indices(dim, dim, -1).unbind()
    roots = numbers[:size].reshape(shape).exp().diag_embed()
    roots[..., rows, columns] = numbers[size:].reshape(*shape[:-1], len(rows))
    return roots


@dataclass(frozen=True, eq=False)
class NaturalForm:
    """A mixture at its parameters, with the data in the same coordinates.

    Attributes:
        theta: Free natural parameters, shape (parameters,), float64.
        x: The data, shape (batch, features).
        labels: Of the entries of `theta`, such as "log_rates[0, 1]".
        log_joint: From theta and x to log p(x, z = k), up to what theta does not change, shape
            (batch, components).
        values: From theta to the same parameters in the data's units, shape (parameters,).
        fitted: From theta to weights, locs and so on by name, in the data's units.
    """

    theta: Float[Tensor, " parameters"]
    x: Float[Tensor, "batch features"]
    labels: tuple[str, ...]
    log_joint: Callable[[Tensor, Tensor], Tensor]
    values: Callable[[Tensor], Tensor]
    fitted: Callable[[Tensor], dict[str, Tensor]]


def _log_weights(theta: Tensor, num_components: int) -> Tensor:
    odds = torch.cat([theta[: num_components - 1], theta.new_zeros(1)])
    return odds.log_softmax(0)


def _odds(log_weights: Tensor) -> Tensor:
    return log_weights[:-1] - log_weights[-1]


def _names(name: str, *sizes: int) -> list[str]:
    """A label for each entry, in the order of the memory."""
    return [f"{name}{list(index)}" for index in itertools.product(*map(range, sizes))]


def mean_form(problem: Any, name: str) -> NaturalForm:
    """Of a mixture with T(x) = x: `name` is that of its natural parameters."""
    mixture, number, dim = problem.mixture, problem.num_components, problem.mixture.dim
    parameters = problem.read()

    def natural(theta: Tensor) -> Tensor:
        return theta[number - 1 :].reshape(number, dim)

    def log_joint(theta: Tensor, x: Tensor) -> Tensor:
        eta = natural(theta)
        return _log_weights(theta, number) - mixture._log_normaliser(eta) + x @ eta.mT

    def fitted(theta: Tensor) -> dict[str, Tensor]:
        names = list(mixture.fitted_values())
        values = _log_weights(theta, number).exp(), mixture._to_mean(natural(theta))
        return dict(zip(names, values, strict=True))

    theta = [_odds(parameters.log_weights), mixture._to_natural(parameters.locs).flatten()]
    labels = (*_names("log_odds", number - 1), *_names(name, number, dim))
    return NaturalForm(
        torch.cat(theta), problem._x.double(), labels, log_joint, lambda theta: theta, fitted
    )


class _Gaussian:
    """Where in theta the parts of a Gaussian mixture lie."""

    def __init__(self, problem: Any) -> None:
        self.kind, self.dim = problem.mixture.covariance, problem.mixture.dim
        self.number = problem.num_components
        self.dense = self.kind in ("full", "tied")
        self.rows, self.columns = torch.tril_indices(self.dim, self.dim)
        self.center, self.scale = problem._center, problem._scale

    def parts(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log weights, Lambda mu, and Lambda: matrices (full: K, tied: 1) or (K, D or 1)."""
        begin, number, dim = self.number - 1, self.number, self.dim
        linear = theta[begin : begin + number * dim].reshape(number, dim)
        free = theta[begin + number * dim :]
        if not self.dense:
            return _log_weights(theta, number), linear, free.reshape(number, -1)
        free = free.reshape(-1, len(self.rows))
        full = free.new_zeros(len(free), dim, dim)
        full = full.index_put((torch.arange(len(free))[:, None], self.rows, self.columns), free)
        return _log_weights(theta, number), linear, full + full.tril(-1).mT

    def free(self, precision: Tensor) -> Tensor:
        """The entries of Lambda that are free, in theta's order."""
        if self.dense:
            precision = precision[:, self.rows, self.columns]
        return precision.flatten()

    def locs(self, linear: Tensor, precision: Tensor) -> Tensor:
        if not self.dense:
            return linear / precision
        return torch.linalg.solve(precision, linear[..., None])[..., 0]

    def log_joint(self, theta: Tensor, x: Tensor) -> Tensor:
        log_weights, linear, precision = self.parts(theta)
        inner = (linear * self.locs(linear, precision)).sum(-1)
        if self.dense:
            log_det = torch.linalg.cholesky(precision).diagonal(dim1=-2, dim2=-1).log().sum(-1)
            square = torch.einsum("ni,kij,nj->nk", x, precision, x)
        else:
            each = precision.expand(self.number, self.dim)
            log_det, square = 0.5 * each.log().sum(-1), x.square() @ each.mT
        constant = log_weights + log_det - 0.5 * inner - 0.5 * self.dim * math.log(2 * math.pi)
        return constant + x @ linear.mT - 0.5 * square

    def observed_log_joint(self, theta: Tensor, x: Tensor) -> Tensor:
        """The same with entries that are NaN integrated out; see `missing` for the formula."""
        log_weights, linear, precision = self.parts(theta)
        locs = self.locs(linear, precision)
        if not self.dense:
            precision = precision.expand(self.number, self.dim).diag_embed()
        gone = x.isnan().to(x.dtype)
        away = (x.nan_to_num(nan=0.0)[:, None] - locs) * (1 - gone)[:, None]
        pulled = torch.einsum("kij,nkj->nki", precision.expand(self.number, -1, -1), away)
        both = (gone[:, :, None] * gone[:, None, :])[:, None]
        root = torch.linalg.cholesky(both * precision + (1 - gone).diag_embed()[:, None])
        root = root.expand(-1, self.number, -1, -1)
        moved = (pulled * gone[:, None])[..., None]
        moved = torch.linalg.solve_triangular(root, moved, upper=False)[..., 0]
        square = (away * pulled).sum(-1) - moved.square().sum(-1)
        log_det = torch.linalg.cholesky(precision).diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_det = log_det - root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        seen = (1 - gone).sum(-1, keepdim=True) * math.log(2 * math.pi)
        return log_weights + log_det - 0.5 * (square + seen)

    def values(self, theta: Tensor) -> Tensor:
        _, linear, precision = self.parts(theta)
        if self.dense:
            precision = precision / self.scale.outer(self.scale)
            moved = precision @ self.center
        else:
            narrow = self.scale.square()[: precision.shape[1]]  # of spheres all scales are one
            precision = precision / narrow
            moved = precision * self.center
        linear = linear / self.scale + moved
        return torch.cat([theta[: self.number - 1], linear.flatten(), self.free(precision)])

    def fitted(self, theta: Tensor) -> dict[str, Tensor]:
        log_weights, linear, precision = self.parts(theta)
        locs = self.locs(linear, precision) * self.scale + self.center
        if self.dense:
            covariances = torch.linalg.inv(precision) * self.scale.outer(self.scale)
            covariances = covariances if self.kind == "full" else covariances[0]
        else:
            covariances = self.scale.square()[: precision.shape[1]] / precision
            covariances = covariances if self.kind == "diag" else covariances[:, 0]
        return {"weights": log_weights.exp(), "locs": locs, "covariances": covariances}

    def labels(self) -> tuple[str, ...]:
        pairs = [
            f"{i}, {j}" for i, j in zip(self.rows.tolist(), self.columns.tolist(), strict=True)
        ]
        if self.kind == "full":
            own = [f"precisions[{k}, {pair}]" for k in range(self.number) for pair in pairs]
        elif self.kind == "tied":
            own = [f"precisions[{pair}]" for pair in pairs]
        else:
            own = _names("precisions", *(self.number, self.dim)[: 1 + (self.kind == "diag")])
        names = (
            _names("log_odds", self.number - 1),
            _names("precision_locs", self.number, self.dim),
        )
        return (*names[0], *names[1], *own)


def gaussian_form(problem: Any) -> NaturalForm:
    """Of a Gaussian mixture, whatever its covariances share."""
    parameters, form = problem.read(), _Gaussian(problem)
    roots = parameters.roots
    if form.dense:
        precision = roots.mT @ roots
        linear = (precision @ parameters.locs[..., None])[..., 0]
    else:
        precision = roots.square()
        linear = precision * parameters.locs
        precision = precision if form.kind == "diag" else precision[:, :1]
    theta = torch.cat([_odds(parameters.log_weights), linear.flatten(), form.free(precision)])
    x = problem._standardise(problem._x).mT
    log_joint = form.log_joint
    if problem.has_missing:
        x, log_joint = x.masked_fill(problem._x.isnan(), math.nan), form.observed_log_joint
    return NaturalForm(theta, x, form.labels(), log_joint, form.values, form.fitted)
