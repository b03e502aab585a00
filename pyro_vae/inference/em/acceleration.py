r"""SQUAREM: two steps of EM show where the path leads, and a third goes there at once.

With :math:`r = \theta_1 - \theta_0` and :math:`v = (\theta_2 - \theta_1) - r` in unconstrained
coordinates, the jump is to :math:`\theta_0 + 2 a r + a^2 v` with
:math:`a = \lVert r \rVert / \lVert v \rVert` (scheme S3 of Varadhan & Roland 2008, Simple and
globally convergent methods for accelerating the convergence of any EM algorithm). A jump that ends
below the bound that EM has reached is not made.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["Extrapolation"]

_GROWTH = 4.0  # of the longest jump, after one of that length


class Extrapolation:
    """Where EM went since the last jump, and how long the next may be.

    Args:
        problem: Whose parameters are taken to unconstrained coordinates and back; a
            `StatisticsProblem`, of which this needs no more.
    """

    def __init__(self, problem: Any) -> None:
        self._problem = problem
        self._path: list[Tensor] = []
        self._longest = self._length = 1.0

    def add(self, parameters: Any) -> None:
        """Notes where a step of EM, or a jump, ended."""
        self._path.append(self._problem.unconstrained(parameters))

    def jump(self) -> Any:
        """Parameters to go on from, after two steps; None where there is no jump yet."""
        if len(self._path) < 3:
            return None
        first, second, third = self._path
        self._path = []
        r = second - first
        v = third - second - r
        bend = float(v.norm())
        wanted = float(r.norm()) / bend if bend > 0 else 1.0
        self._length = min(max(wanted, 1.0), self._longest)
        if self._length == 1:  # where EM stands
            self.settle(True)
            return None
        parameters = first + 2 * self._length * r + self._length**2 * v
        try:
            return self._problem.constrained(parameters)
        except torch.linalg.LinAlgError:
            self.settle(False)
            return None

    def settle(self, made: bool) -> None:
        """Allows longer jumps after the longest one allowed was made, and shorter ones if not."""
        if made and self._length == self._longest:
            self._longest *= _GROWTH
        elif not made:
            self._longest = max(self._longest / _GROWTH, 1.0)
