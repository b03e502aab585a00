r"""A Gaussian mixture on data with missing entries, which are integrated out exactly.

With o and m the entries of a datum that are observed and missing, and :math:`\Lambda_k` the
precision of component k,

.. math:: p(x_m \mid x_o, z = k) = \mathcal N\bigl(x_m \mid \mu_m
          - \Lambda_{mm}^{-1} \Lambda_{mo} (x_o - \mu_o), \Lambda_{mm}^{-1}\bigr)

and the density of :math:`x_o` is that of the datum with this mean put in, times
:math:`(2 \pi)^{|m| / 2} |\Lambda_{mm}|^{-1/2}`. The E step expects the same sums of
:math:`[x x^\top, x, 1]` under this posterior that complete data have, so that the M step stays what
it is (Ghahramani & Jordan 1994, Supervised learning from incomplete data via an EM approach).
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.models.mixtures.gaussian_problem import GaussianProblem
from pyro_vae.models.mixtures.problem import Chunk, MixtureParameters, Statistics

__all__ = ["MissingGaussianProblem"]

_NAMED = 10  # rows that an error names


class _Completed(NamedTuple):
    """Some data with their missing entries expected, under each component.

    Attributes:
        locs: Means of the components, (components, features).
        away: The data with means put in, less the locs, (components, features, chunk).
        covariance: Of the missing entries, zero elsewhere: a matrix for each pattern and component,
            (patterns, components, features, features), the components as one if tied; if diagonal
            that of each entry were it missing, (components, features).
        pattern: That of each datum, a row of `covariance`, (chunk,).
        missing: 1 where an entry is missing, else 0, (features, chunk).
        log_det: Of the precision of the missing entries, (components, chunk).
    """

    locs: Tensor
    away: Tensor
    covariance: Tensor
    pattern: Tensor
    missing: Tensor
    log_det: Tensor


class MissingGaussianProblem(GaussianProblem):
    """Statistics of data in which NaN says that an entry is missing, and so latent.

    They have the layout of complete data, and one more number at the end: the entropy of the
    missing entries given the components, so that `expected_log_joint` has it and the bound is one
    on the log-likelihood of what is observed. An E step costs
    (data x components x features^2), and a factorisation for each pattern of missing entries.
    """

    _least_chunk = 16  # their covariances are a matrix a datum

    def _check_values(self, x: Tensor, mixture: Any) -> None:
        if bool(x.isinf().any()):
            raise ValueError("the data hold infinite values; remove them, or write NaN for missing")
        missing = x.isnan()
        if empty := missing.all(1).nonzero().flatten().tolist():
            named = f"{empty[:_NAMED]}{' and more' if len(empty) > _NAMED else ''}"
            raise ValueError(f"rows {named} have no entry that is observed: leave them out")
        self.has_missing = bool(missing.any())
        patterns, self._pattern = torch.unique(missing, dim=0, return_inverse=True)
        self._patterns = patterns.to(torch.float64)

    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        x = self._x.to(torch.float64)
        number = (~x.isnan()).sum(0)
        if never := (number == 0).nonzero().flatten().tolist():
            raise ValueError(f"features {never} are never observed: drop them")
        center = x.nansum(0) / number
        variance = (x - center).square().nansum(0) / number
        return center, variance, x.abs().nan_to_num(nan=0.0).amax(0)

    def _standardise(self, x: Tensor) -> Tensor:
        """With 0, the mean, where an entry is missing: all that starts look at."""
        return super()._standardise(x).nan_to_num_(nan=0.0)

    def _width(self) -> int:
        return self.num_components * self._dim * (self._dim if self._dense else 3)

    def _log_base(self, rows: Any) -> Tensor | float:
        """Of the entries observed; of complete data if rows is None."""
        if rows is None:
            return super()._log_base(None)
        return ((self._patterns - 1) @ self._scale.log())[self._pattern[rows]]

    def _chunks(self, rows: Tensor | None, width: int | None = None) -> Iterator[tuple[Any, Chunk]]:
        for place, chunk in super()._chunks(rows, width):
            chunk.pattern = self._pattern[place if rows is None else rows[place]]
            yield place, chunk

    # -- E step

    def _complete(self, chunk: Chunk) -> _Completed:
        """The data expected at `chunk.at`; under one standard normal if that is None."""
        assert chunk.pattern is not None
        locs, roots = self._center.new_zeros(1, self._dim), self._center.new_ones(1, self._dim)
        if chunk.at is not None:
            assert chunk.at.roots is not None
            locs, roots = chunk.at.locs, chunk.at.roots
        elif self._dense:
            roots = roots.diag_embed()
        which, index = chunk.pattern.unique(return_inverse=True)
        patterns = self._patterns[which]
        missing = patterns[index].mT
        away = (chunk.x - locs[:, :, None]) * (1 - missing)
        if not self._dense:
            log_det = 2 * roots.log() @ missing
            return _Completed(locs, away, roots.pow(-2), index, missing, log_det)
        precision = roots.mT @ roots
        both = (patterns[:, :, None] * patterns[:, None, :])[:, None]
        lower = torch.linalg.cholesky(both * precision + (1 - patterns).diag_embed()[:, None])
        covariance = torch.cholesky_inverse(lower) * both
        log_det = 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        pulled = precision @ away
        moved = torch.einsum(
            "nkij,kjn->kin", covariance[index].expand(-1, len(locs), -1, -1), pulled
        )
        return _Completed(locs, away - moved, covariance, index, missing, log_det[index].mT)

    def _scorer(self, parameters: MixtureParameters) -> Any:
        constant, roots = self._log_constant(parameters)[:, None], parameters.roots
        assert roots is not None

        def score(chunk: Chunk) -> Tensor:
            chunk.at = parameters
            chunk.completed = done = self._complete(chunk)
            white = roots @ done.away if self._dense else roots[:, :, None] * done.away
            free = done.missing.sum(0) * math.log(2 * math.pi) - done.log_det
            return constant + 0.5 * (free - white.square().sum(1))

        return score

    # -- M step

    def _sums(self, chunk: Chunk, q: Tensor, about: Tensor | None) -> Tensor:
        done = chunk.completed or self._complete(chunk)
        points = done.locs if about is None else done.locs - about
        away = done.away + points[:, :, None]
        weighted = away * q[:, None]
        first, counts = weighted.sum(2), q.sum(1)
        if self._dense:
            shares = q.new_zeros(len(q), len(done.covariance)).index_add_(1, done.pattern, q)
            covariance = done.covariance.expand(-1, len(q), -1, -1)
            square = weighted @ away.mT + torch.einsum("kp,pkij->kij", shares, covariance)
            square = square[:, self._pairs[0], self._pairs[1]]
        else:
            square = (weighted * away).sum(2) + (q @ done.missing.mT) * done.covariance
        each = done.missing.sum(0) * (math.log(2 * math.pi) + 1) - done.log_det
        entropy = 0.5 * (q * each).sum() + q.sum(0) @ (done.missing.mT @ self._scale.log())
        if self._covariance == "tied":
            return torch.cat([first.reshape(-1), counts, square.sum(0), entropy[None]])
        table = torch.cat([square, first], 1).reshape(-1)
        return torch.cat([table, counts, entropy[None]])

    def _completed(self, values: Tensor, rows: Tensor | None, about: Tensor | None) -> Tensor:
        return values

    def _unpack(self, statistics: Statistics) -> tuple[Tensor, Tensor, Tensor]:
        return super()._unpack(replace(statistics, values=statistics.values[:-1]))

    def expected_log_joint(self, statistics: Statistics, parameters: MixtureParameters) -> float:
        """E_q [log p(x, z) - log q(missing entries | z)], a total in nats."""
        entropy = float(statistics.values[-1])
        return super().expected_log_joint(statistics, parameters) + entropy
