r"""The sufficient statistics of a Gaussian mixture, and the half steps of EM on them.

With :math:`T(x) = [x x^\top, x, 1]`, of which only the lower triangle is kept, an E step is one
matrix product with the natural parameters and an M step one with the responsibilities. Moments
about a common origin cancel where components are narrow for their distance from it, and cost more
than they save where there are few components and many features; there the deviations from each
component's own mean are whitened instead. Data are centred and scaled before either.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae.models.mixtures.natural import flat_roots, roots_of
from pyro_vae.models.mixtures.problem import (
    Chunk,
    MixtureParameters,
    MixtureProblem,
    SingularComponentError,
    Statistics,
)

__all__ = ["GaussianProblem"]

_CANCELS = 1e4  # beyond this ratio, moments about the origin would lose more than four digits
_FEATURES_PER_COMPONENT = 5  # from which on whitening costs less than products of features
_CONSTANT = 8 * torch.finfo(torch.float64).eps  # of a feature's size: its spread is rounding
_SINGULAR = 1e-13  # of a feature's variance: what is left once the others are known


class GaussianProblem(MixtureProblem):
    """Statistics [x x^T, x, 1] of standardised data, about the origin or about given points."""

    mixture: Any  # a GaussianMixture
    _holdable = ("weights", "locs", "covariances")

    def __init__(
        self,
        mixture: Any,
        x: Tensor,
        sample_weights: Tensor | None,
        hold: Sequence[str],
        coordinates: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self._covariance, self._dim = mixture.covariance, mixture.dim
        self._dense = self._covariance in ("full", "tied")
        self._num_pairs = self._dim * (self._dim + 1) // 2
        rows, columns = torch.tril_indices(self._dim, self._dim, device=x.device)
        order = torch.argsort(columns * self._dim + rows)  # by columns, as `_features` writes them
        self._pairs = rows[order], columns[order]
        self._all_pairs: Tensor | None = None
        self._rounding = torch.zeros(self._dim, dtype=torch.float64, device=x.device)
        super().__init__(mixture, x, sample_weights, hold, coordinates)

    def _coordinates(self) -> tuple[Tensor, Tensor]:
        center, variance, size = self._moments()
        self._spread = variance.sqrt()
        self._rounding = _CONSTANT * size  # of each feature, in the data's units
        known = torch.where(self._spread > self._rounding, self._spread, 0.0)
        scale = (known.square() + self.mixture.reg_covar).sqrt()
        if self._covariance == "spherical":  # one scale for all, or spheres would become ellipses
            scale = scale.square().mean().sqrt().expand(self._dim).clone()
        scale[scale == 0] = 1.0
        return center, scale

    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and largest size of each feature."""
        total = torch.zeros(self._dim, dtype=torch.float64, device=self._x.device)
        square, size = torch.zeros_like(total), torch.zeros_like(total)
        parts = self._x.split(1 << 16)
        for part in parts:
            total += part.to(torch.float64).sum(0)
        center = total / self.num_data
        for part in parts:
            away = part.to(torch.float64) - center
            square += away.square().sum(0)
            least, most = part.aminmax(dim=0)
            largest = torch.maximum(most.double().abs(), least.double().abs())
            size = torch.maximum(size, largest)
        return center, square / self.num_data, size

    def check(self) -> None:
        """Raises if there are too few data to fit, or a feature is constant."""
        super().check()
        if self.mixture.reg_covar or "covariances" in self.hold:
            return
        constant = (self._spread <= self._rounding).nonzero().flatten().tolist()
        spherical = self._covariance == "spherical"
        if constant and not (spherical and len(constant) < self._dim):
            raise ValueError(
                f"Features {constant} are constant, so a covariance would be singular: drop them, "
                "or pass reg_covar to the mixture"
            )

    def _width(self) -> int:
        if self._prefers_whitening:
            return 2 * self._dim
        wide = self._num_pairs if self._covariance == "full" else self._dim
        return max(wide + self._dim, self.num_components)

    def _log_base(self, rows: Any) -> Tensor | float:
        return -float(self._scale.log().sum())

    @property
    def _reg(self) -> Tensor:
        return self.mixture.reg_covar / self._scale.square()

    # -- E step

    def origin(self, parameters: MixtureParameters) -> Tensor | None:
        """The means, where moments about the origin would cancel or cost more."""
        return parameters.locs if self._whitens(parameters) else None

    @property
    def _prefers_whitening(self) -> bool:
        enough = self._dim >= _FEATURES_PER_COMPONENT * self.num_components
        return enough and self._covariance == "full"

    def _whitens(self, parameters: MixtureParameters) -> bool:
        """Whether deviations from the means are formed, because they are exacter or faster."""
        roots = parameters.roots
        assert roots is not None
        if self._prefers_whitening:
            return True
        precision = roots.square().sum((-2, -1) if self._dense else -1)
        reach = 1 + parameters.locs.square().sum(-1)
        return bool((precision * reach).max() > _CANCELS * self._dim)

    def _scorer(self, parameters: MixtureParameters) -> Any:
        roots, locs = parameters.roots, parameters.locs
        assert roots is not None
        constant = self._log_constant(parameters)
        if self._whitens(parameters):
            return self._whitening_scorer(roots, locs, constant)
        if self._covariance == "tied":
            return self._tied_scorer(roots[0], locs, constant)
        return self._natural_scorer(roots, locs, constant)

    def _log_constant(self, parameters: MixtureParameters) -> Tensor:
        """The log of weight times density at the mean, of each component."""
        roots = parameters.roots
        assert roots is not None
        diagonal = roots.diagonal(dim1=-2, dim2=-1) if self._dense else roots
        log_det = diagonal.log().sum(-1)
        return parameters.log_weights + log_det - 0.5 * self._dim * math.log(2 * math.pi)

    def _natural_scorer(self, roots: Tensor, locs: Tensor, constant: Tensor) -> Any:
        """eta^T T(x), one matrix product."""
        if self._dense:
            precision = roots.mT @ roots
            rows, columns = self._pairs
            quadratic = -precision[:, rows, columns]
            quadratic[:, rows == columns] *= 0.5
            linear = (precision @ locs[..., None])[..., 0]
        else:
            quadratic = -0.5 * roots.square()
            linear = roots.square() * locs
        natural = torch.cat([quadratic, linear], 1)
        constant = (constant - 0.5 * (linear * locs).sum(1))[:, None]
        return lambda chunk: torch.addmm(constant, natural, self._features(chunk))

    def _tied_scorer(self, root: Tensor, locs: Tensor, constant: Tensor) -> Any:
        """The quadratic term is the same for all components: whiten once, then it is linear."""
        white = locs @ root.mT
        constant = (constant - 0.5 * white.square().sum(1))[:, None]

        def score(chunk: Chunk) -> Tensor:
            whitened = root @ chunk.x
            scores = torch.addmm(constant, white, whitened)
            return scores.sub_(whitened.square_().sum(0), alpha=0.5)

        return score

    def _whitening_scorer(self, roots: Tensor, locs: Tensor, constant: Tensor) -> Any:
        """Squares of the whitened deviations: nothing cancels."""

        def score(chunk: Chunk) -> Tensor:
            parts = []
            for loc, root in zip(locs, roots.expand(len(locs), *roots.shape[1:]), strict=True):
                away = chunk.x - loc[:, None]
                white = root @ away if self._dense else away.mul_(root[:, None])
                parts.append(white.square_().sum(0))
            return torch.stack(parts).mul_(-0.5).add_(constant[:, None])

        return score

    def _features(self, chunk: Chunk) -> Tensor:
        """[x x^T, x] of each datum in a column; of the product the diagonal alone if diagonal."""
        if chunk.features is None:
            x = chunk.x
            dim, size = x.shape
            num_squares = self._num_pairs if self._dense else dim
            features = torch.empty(num_squares + dim, size, dtype=x.dtype, device=x.device)
            if self._dense:
                begin = 0
                for row in range(dim):
                    torch.mul(x[row:], x[row], out=features[begin : begin + dim - row])
                    begin += dim - row
            else:
                torch.mul(x, x, out=features[:dim])
            features[num_squares:] = x
            chunk.features = features
        return chunk.features

    # -- M step

    def _sums(self, chunk: Chunk, q: Tensor, about: Tensor | None) -> Tensor:
        counts = q.sum(1)
        if about is not None:
            return self._sums_about(chunk, q, about, counts)
        if self._covariance == "tied":
            return torch.cat([(q @ chunk.x.mT).reshape(-1), counts])
        return torch.cat([(q @ self._features(chunk).mT).reshape(-1), counts])

    def _sums_about(self, chunk: Chunk, q: Tensor, about: Tensor, counts: Tensor) -> Tensor:
        squares, firsts = [], []
        for part, point in zip(q, about, strict=True):
            away = chunk.x - point[:, None]
            weighted = away * part
            firsts.append(weighted.sum(1))
            if self._dense:
                squares.append((weighted @ away.mT)[self._pairs])
            else:
                squares.append(weighted.mul_(away).sum(1))
        first, square = torch.stack(firsts), torch.stack(squares)
        if self._covariance == "tied":
            return torch.cat([first.reshape(-1), counts, square.sum(0)])
        return torch.cat([torch.cat([square, first], 1).reshape(-1), counts])

    def _completed(self, values: Tensor, rows: Tensor | None, about: Tensor | None) -> Tensor:
        """For a tied covariance the sum of x x^T, which no q changes."""
        if self._covariance != "tied" or about is not None:
            return values
        if rows is not None:
            return torch.cat([values, self._sum_of_pairs(rows)])
        if self._all_pairs is None:
            self._all_pairs = self._sum_of_pairs(None)
        return torch.cat([values, self._all_pairs])

    def _sum_of_pairs(self, rows: Tensor | None) -> Tensor:
        total = torch.zeros(self._dim, self._dim, dtype=torch.float64, device=self._x.device)
        for _, chunk in self._chunks(rows):
            x = chunk.x if chunk.weights is None else chunk.x * chunk.weights
            total += x @ chunk.x.mT
        return total[self._pairs]

    def _unpack(self, statistics: Statistics) -> tuple[Tensor, Tensor, Tensor]:
        """Counts, sums of x, and sums of x x^T (of x^2 if diagonal; pooled if tied)."""
        values, number, dim = statistics.values, self.num_components, self._dim
        if self._covariance == "tied":
            first, counts, square = values.split([number * dim, number, self._num_pairs])
            return counts, first.reshape(number, dim), self._matrices(square)
        table, counts = values[:-number].reshape(number, -1), values[-number:]
        square, first = table[:, :-dim], table[:, -dim:]
        return counts, first, self._matrices(square) if self._dense else square

    def _matrices(self, pairs: Tensor) -> Tensor:
        rows, columns = self._pairs
        full = pairs.new_empty(*pairs.shape[:-1], self._dim, self._dim)
        full[..., rows, columns] = pairs
        full[..., columns, rows] = pairs
        return full

    def counts(self, statistics: Statistics) -> Tensor:
        """The sum of the responsibilities of each component, in data."""
        return self._unpack(statistics)[0]

    def _scatter(self, statistics: Statistics, locs: Tensor) -> tuple[Tensor, Tensor]:
        """Counts, and sums of squares about `locs` in the form of `_unpack`."""
        counts, first, square = self._unpack(statistics)
        away = locs if statistics.about is None else locs - statistics.about
        if self._dense:
            cross = first[:, :, None] * away[:, None, :]
            moved = (counts[:, None] * away)[:, :, None] * away[:, None, :] - cross - cross.mT
            return counts, square + (moved.sum(0) if self._covariance == "tied" else moved)
        return counts, square + away * (counts[:, None] * away - 2 * first)

    def m_step(self, statistics: Statistics, current: MixtureParameters) -> MixtureParameters:
        """Weights, means and covariances of the responsibilities; see `MixtureProblem.m_step`."""
        counts, first, _ = self._unpack(statistics)
        self._check_starved(counts)
        locs = first / counts[:, None]
        locs = locs if statistics.about is None else locs + statistics.about
        locs = current.locs if "locs" in self.hold else locs
        _, scatter = self._scatter(statistics, locs)
        if "covariances" in self.hold:
            roots = current.roots
        elif self._covariance == "tied":
            roots = self._roots(scatter[None] / counts.sum())
        else:
            roots = self._roots(scatter / counts.reshape(-1, *[1] * (scatter.dim() - 1)))
        return MixtureParameters(self._log_weights(counts, current), locs, roots)

    def _roots(self, covariances: Tensor) -> Tensor:
        """W with W^T W the inverse of each covariance, regularised; raises where it is singular."""
        diagonal = covariances.diagonal(dim1=-2, dim2=-1) if self._dense else covariances
        diagonal = diagonal + self._reg
        if self._covariance == "spherical":
            diagonal = diagonal.mean(-1, keepdim=True).expand(-1, self._dim)
        # A variance below the square of what data are rounded to is no variance.
        flat = ~(diagonal > (self._rounding / self._scale).square())
        if self._covariance == "spherical":
            flat = flat.all(-1, keepdim=True)
        if bool(flat.any()):
            self._refuse_singular(int(flat.any(-1).nonzero()[0]))
        if not self._dense:
            return diagonal.rsqrt()
        scales = diagonal.sqrt()
        correlations = covariances / scales[:, :, None] / scales[:, None, :]
        correlations.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        lower, info = torch.linalg.cholesky_ex(correlations)
        pivots = lower.diagonal(dim1=-2, dim2=-1).square()
        bad = (info != 0) | ~(pivots > _SINGULAR).all(-1)
        if bool(bad.any()):
            self._refuse_singular(int(bad.nonzero()[0]))
        identity = torch.eye(self._dim, dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
        return inverse / scales[:, None, :]

    def _refuse_singular(self, component: int) -> None:
        shared = self._covariance == "tied"
        who = "The tied covariance" if shared else f"The covariance of component {component}"
        way = "" if shared else ", fewer components, another start (seed=...)"
        raise SingularComponentError(
            component,
            f"{who} of {self.num_components} is singular: its data lie on a point, a line or a "
            f"plane, where the likelihood has no maximum. Use reg_covar (now "
            f"{self.mixture.reg_covar:g}), covariance='diag'{way}, or on_singular='restart' in "
            "fit_em.",
        )

    def expected_log_joint(self, statistics: Statistics, parameters: MixtureParameters) -> float:
        """E_q log p(x, z), a total in nats, from the statistics of q alone."""
        roots = parameters.roots
        assert roots is not None
        counts, scatter = self._scatter(statistics, parameters.locs)
        squares = ((roots.mT @ roots if self._dense else roots.square()) * scatter).sum()
        each = self._log_constant(parameters) + self._log_base(None)
        return float(counts @ each - 0.5 * squares)

    @property
    def _scales_freely(self) -> bool:
        return not self.mixture.reg_covar and "covariances" not in self.hold

    def _family_residual(self, statistics: Statistics, parameters: MixtureParameters) -> float:
        """(N D - sum of squares) / 2: the precisions alone scale, about any means."""
        roots = parameters.roots
        assert roots is not None
        counts, scatter = self._scatter(statistics, parameters.locs)
        precisions = roots.mT @ roots if self._dense else roots.square()
        return 0.5 * float(counts.sum() * self._dim - (precisions * scatter).sum())

    def unconstrained(self, parameters: MixtureParameters) -> Tensor:
        """Log weights, means and roots with log diagonals, as one vector."""
        roots = parameters.roots
        assert roots is not None
        flat = flat_roots(roots) if self._dense else roots.log().flatten()
        return torch.cat([parameters.log_weights, parameters.locs.flatten(), flat])

    def constrained(self, vector: Tensor) -> MixtureParameters:
        """The parameters that `unconstrained` makes this vector of."""
        number, dim = self.num_components, self._dim
        log_weights, locs, flat = vector.tensor_split([number, number * (dim + 1)])
        if self._dense:
            roots = roots_of(flat, 1 if self._covariance == "tied" else number, dim)
        else:
            roots = flat.reshape(number, dim).exp()
        return MixtureParameters(log_weights.log_softmax(0), locs.reshape(number, dim), roots)

    # -- starts, and the module

    def _start(self, centres: Tensor, statistics: Statistics) -> MixtureParameters:
        """Each cluster's mean, and for all the covariance within clusters."""
        counts, first, square = self._unpack(statistics)
        held = counts > 0
        locs = torch.where(held[:, None], first / counts.clamp(min=1e-300)[:, None], centres)
        _, within = self._scatter(statistics, locs)
        pooled = within if self._covariance == "tied" else within.sum(0)
        try:
            roots = self._roots(pooled[None] / counts.sum())
        except SingularComponentError:  # as many clusters as data: take the spread of all
            total = square if self._covariance == "tied" else square.sum(0)
            mean = first.sum(0) / counts.sum()
            outer = mean[:, None] * mean if self._dense else mean.square()
            roots = self._roots((total / counts.sum() - outer)[None])
        if self._covariance != "tied":
            roots = roots.expand(self.num_components, *roots.shape[1:]).clone()
        weights = counts.clamp(min=0.5)
        return MixtureParameters((weights / weights.sum()).log(), locs, roots)

    @torch.no_grad()
    def read(self) -> MixtureParameters:
        """The parameters in the module, in the problem's coordinates."""
        own = self.mixture.generative
        logits, locs, scales = (
            part.to(self._x.device, torch.float64) for part in (own.logits, own.locs, own.scales())
        )
        locs = (locs - self._center) / self._scale
        if self._dense:
            lower = (scales if scales.dim() == 3 else scales[None]) / self._scale[:, None]
            identity = torch.eye(self._dim, dtype=lower.dtype, device=lower.device)
            roots = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
        else:
            wide = scales if scales.dim() == 2 else scales[:, None].expand(-1, self._dim)
            roots = self._scale / wide
        return MixtureParameters(logits.log_softmax(-1), locs, roots)

    @torch.no_grad()
    def write(self, parameters: MixtureParameters) -> None:
        """Puts parameters into the module, in its own dtype and the data's units."""
        roots = parameters.roots
        assert roots is not None
        locs = parameters.locs * self._scale + self._center
        if self._dense:
            identity = torch.eye(self._dim, dtype=roots.dtype, device=roots.device)
            lower = torch.linalg.solve_triangular(roots, identity.expand_as(roots), upper=False)
            scales = lower * self._scale[:, None]
            scales = scales if self._covariance == "full" else scales[0]
        else:
            scales = self._scale / roots
            scales = scales if self._covariance == "diag" else scales[:, 0]
        self.mixture.generative.set(parameters.log_weights, locs, scales)
