r"""When a fit is done: phases of a constant rate, averaged, each at half the rate of the last.

The rule is that of Welandawe et al.: at a constant rate the iterates settle around the optimum and
their mean is better than any of them; a smaller rate brings the mean nearer, until what the next
halving would buy is too little. Here every decision is made in nats of the bound, on the same
draws for both sides, and so counts parameters of the model as well as those of the guide, and is
blind to directions that change nothing. Where parameters are few, later phases follow the gradient
times the inverse of the bound's Hessian, whose rate has no unit and which no scale slows down.

References:
    Welandawe, Andersen, Vehtari & Huggins (2022), Robust, automated, and accurate black-box
    variational inference, arXiv:2203.15945; Dhaka et al. (2020), Robust, accurate stochastic
    optimization for variational inference.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_vae.inference.svi.history import Convergence, Phase
from pyro_vae.inference.svi.optimizer import FusedOptim, positive_inverse

__all__ = ["BlockRule", "PhaseRule", "Rule"]

_RHAT = 1.1  # above it the two halves of a phase do not tell of one place
_RATE, _RATE_OF_MANY = 0.1, 0.01
_MOST_NUMBERS = 100  # with which a Hessian is worth its gradients
_FIRST_BLOCK = 10  # steps
_BLOCKS = 8  # to a phase; then pairs are merged, so that a phase of any length has 4 to 8
_FEWEST_PHASES, _LIVES = 3, 20
_RETREATS, _NEWTONS = 8, 3  # times that it may go back, and try Newton's steps all the same
_EPOCHS_IN_BLOCK, _MOST_HALVINGS = 5, 6
_GRADIENTS, _HALVINGS, _NOISE_DRAWS = 500, 16, 12  # of a descent, of a step, of a rate
_NATS_PER_DATUM, _LONGEST_JUMP = 0.01, 2.0**20


@dataclass
class _State:
    """What changes, apart from tensors; JSON can hold it."""

    rate: float
    kind: str
    own_rate: float  # of the optimizer's own steps
    steps: int = 0
    phase_steps: int = 0
    in_block: int = 0
    block: int = _FIRST_BLOCK
    checks: int = 0
    retreats: int = 0
    ended: bool = False
    converged: bool = False
    gain: float = math.inf
    reached: float = -math.inf
    values: list[float] = field(default_factory=list)
    phases: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Look:
    """What a check saw: the mean of the later half of a phase, and how sure it is."""

    mean: Tensor
    drift: Tensor
    spread: Tensor
    rhat: float
    error: float
    rise: float
    rise_se: float


class Rule:
    """What decides when a training ends: its state, and what it tells."""

    def __init__(self, rate: float, kind: str, threshold: float, limit: int) -> None:
        self.kind, self.threshold, self.limit = kind, threshold, limit
        self.state = _State(rate, kind, rate)

    @property
    def ended(self) -> bool:
        """Whether training is over."""
        return self.state.ended

    def retreat(self) -> bool:
        """After a loss or gradient that is not finite: whether training may go on all the same."""
        return False

    def _close(self, steps: int, rhat: float, error: float, gain: float, se: float) -> None:
        """Takes note of a phase that is over."""
        state = self.state
        phase = Phase(state.kind, state.rate, steps, rhat, error, gain, se)
        state.phases.append(asdict(phase))

    def report(self) -> Convergence:
        """What was done so far."""
        state = self.state
        return Convergence(
            converged=state.converged,
            steps=state.steps,
            gain_nats=state.gain if math.isfinite(state.gain) else math.nan,
            threshold_nats=self.threshold,
            phases=tuple(Phase(**phase) for phase in state.phases),
        )

    def saved(self) -> dict[str, Any]:
        """The state apart from tensors, as JSON can hold it."""
        return asdict(self.state)

    def tensors(self) -> dict[str, Tensor]:
        """The rest of the state."""
        return {}

    def restore(self, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `saved` and `tensors` gave."""
        self.state = _State(**saved)


class PhaseRule(Rule):
    """Phases of a constant rate on one batch; see the module.

    Args:
        target: What is trained: a `TrainedPair`, or what has its methods.
        rate: The first learning rate; None to choose it.
        limit: The most steps.
        newton: Whether later phases may use the Hessian, if the target is small and smooth.
        seed: Seeds the draws of the checks.
    """

    def __init__(
        self, target: Any, rate: float | None, limit: int, *, newton: bool, seed: int
    ) -> None:
        if rate is None:
            rate = _RATE if target.size <= _MOST_NUMBERS else _RATE_OF_MANY
        super().__init__(rate, target.kind, target.threshold, limit)
        self.target, self.seed = target, seed
        self.newton = newton and target.size <= _MOST_NUMBERS and target.is_smooth()
        self.origin = target.vector()  # where the phase began, from which all is measured
        self.sums: list[tuple[Tensor, Tensor]] = [self._empty()]
        self.matrix: Tensor | None = None
        self.best = self.origin
        target.set_rate(rate, None)

    def _empty(self) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(self.origin), torch.zeros_like(self.origin)

    # -- after each step

    def step(self) -> bool:
        """Takes note of a step; True if the rule looked at where it leads."""
        state = self.state
        offset = self.target.vector() - self.origin
        total, square = self.sums[-1]
        total += offset
        square += offset**2
        state.steps += 1
        state.phase_steps += 1
        state.in_block += 1
        looked = False
        if state.in_block == state.block:
            looked = len(self.sums) in (_BLOCKS - 2, _BLOCKS)
            if looked:
                self._check()
            if state.in_block:  # the phase goes on
                self._next_block()
        if state.steps >= self.limit and not state.ended:
            self._give_up()
            looked = True
        return looked

    def _next_block(self) -> None:
        if len(self.sums) == _BLOCKS:
            pairs = zip(self.sums[::2], self.sums[1::2], strict=True)
            self.sums = [(a + c, b + d) for (a, b), (c, d) in pairs]
            self.state.block *= 2
        self.sums.append(self._empty())
        self.state.in_block = 0

    def _begin(self, start: Tensor, rate: float, matrix: Tensor | None) -> None:
        """Begins a phase at `start`."""
        state = self.state
        state.own_rate = rate if matrix is None else state.own_rate
        self.target.move(start)
        self.origin, self.matrix = self.target.vector(), matrix
        self.sums = [self._empty()]
        state.rate, state.kind = rate, self.kind if matrix is None else "Newton"
        state.phase_steps, state.in_block, state.block = 0, 0, _FIRST_BLOCK
        self.target.set_rate(rate, matrix)

    def retreat(self) -> bool:
        """Goes back to the start of the phase, to smaller steps; False if that was done too often.

        For a loss or a gradient that is not finite.
        """
        state = self.state
        state.retreats += 1
        if state.retreats > _RETREATS:
            return False
        if state.kind == "Newton":
            self.newton = state.retreats < _NEWTONS
        else:
            state.own_rate /= 4
        self._begin(self.best, state.own_rate, None)
        return True

    # -- what a check sees

    def _look(self) -> _Look:
        blocks, size = self.sums[-4:], self.state.block
        parts = [tuple(sum(both) for both in zip(*blocks[i : i + 2], strict=True)) for i in (0, 2)]
        means = [total / (2 * size) for total, _ in parts]
        variances = [
            (square / (2 * size) - mean**2).clamp_min(0.0)
            for (_, square), mean in zip(parts, means, strict=True)
        ]
        within, drift = (variances[0] + variances[1]) / 2, means[1] - means[0]
        moved = drift**2 / 2
        ratio = torch.where(moved > 0, moved / within, 0.0)
        mean = self.origin + (means[0] + means[1]) / 2
        before, after = (self._draws(self.origin + each) for each in means)
        middle = self._draws(mean)
        rise, rise_se = _mean_and_error(after - before)
        return _Look(
            mean=mean,
            drift=drift,
            spread=within.sqrt(),
            rhat=math.sqrt(1 + float(ratio.max())),
            # Of two halves that wander independently: curvature makes their middle the better one.
            error=abs(float((middle - (before + after) / 2).mean())),
            rise=rise,
            rise_se=rise_se,
        )

    def _draws(self, vector: Tensor) -> Tensor:
        """The bound at a place, by the draws of this check."""
        here = self.target.vector()
        self.target.move(vector)
        found = self.target.draws(self.seed + self.state.checks)
        self.target.move(here)
        return found.nan_to_num(nan=-math.inf)

    # -- what it decides

    def _check(self) -> None:
        state = self.state
        state.checks += 1
        seen = self._look()
        still = abs(seen.rise) <= 3 * seen.rise_se + 4 * seen.error + self.threshold
        if not (still and (seen.rhat < _RHAT or seen.error <= self.threshold)):
            # Newton's steps are near the optimum: what they lack is a longer mean.
            if state.kind != "Newton" or seen.rise > self._near:
                self._hasten(seen)
            return
        # Small steps look still on a slope: the first phase lasts until its iterates have gone
        # about, or could have.
        first = all(phase["kind"] != state.kind for phase in state.phases)
        if first and seen.rhat >= _RHAT and state.phase_steps * state.rate < _LIVES:
            if state.kind != "Newton":
                self._jump(seen)
            return
        # The iterates of Newton's steps forget where they were within about 1 / rate steps.
        lives = state.phase_steps * state.rate if state.kind == "Newton" else math.inf
        if seen.error > self.threshold / 100 and lives < _LIVES:
            return
        gain, se = _mean_and_error(self._draws(seen.mean) - self._draws(self.best))
        if state.kind == "Newton" and not gain > -3 * se - self.threshold:
            self.retreat()  # the Hessian led astray
            return
        if seen.error > max(self.threshold, 0.1 * abs(gain)) and state.phase_steps < self.limit / 8:
            return
        self._close(state.phase_steps, seen.rhat, seen.error, gain, se)
        self.best = seen.mean
        state.gain = max(gain, 0.0) + 2 * se + seen.error
        if len(state.phases) >= _FEWEST_PHASES and state.gain <= self.threshold:
            state.ended = state.converged = True
            self.target.move(self.best)
            return
        self._next_phase(seen)

    def _next_phase(self, seen: _Look) -> None:
        state = self.state
        rate = state.rate / 2
        if not self.newton:
            self._begin(seen.mean, rate, None)
            return
        matrix = self._inverse_hessian(seen.mean, seen.spread)
        if matrix is None:
            self.newton = False
            rate = state.own_rate / 2
        elif state.kind != "Newton":
            rate = self._newton_rate(seen.mean, matrix)
        self._begin(seen.mean, rate, matrix)

    def _newton_rate(self, here: Tensor, matrix: Tensor) -> float:
        """At which the noise of the gradient keeps the iterates within about half a nat."""
        self.target.move(here)
        seeds = range(self.seed, self.seed + _NOISE_DRAWS)
        drawn = torch.stack([self.target.gradient(seed, single=True) for seed in seeds])
        drawn = drawn - drawn.mean(0)
        trace = float(((drawn @ matrix) * drawn).sum()) / (_NOISE_DRAWS - 1)
        return min(0.5, 2 / trace) if trace > 0 else 0.5

    def begin(self) -> None:
        """Before the first step: Newton's method from where the parameters are."""
        if self.newton and not self.state.checks:
            self.state.checks += 1
            self._descend(torch.full_like(self.origin, 4e-3))

    def _hasten(self, seen: _Look) -> None:
        """On the way: Newton's method where it can be had, else a long jump."""
        newton = self.state.kind == "Newton"
        if newton and len(self.sums) < _BLOCKS:
            return
        if self.newton and self._descend(seen.spread):
            return
        if newton:
            self.retreat()
        else:
            self._jump(seen)

    def _descend(self, spread: Tensor) -> bool:
        """Newton's method on fixed draws; False if it does not move the parameters.

        Where it ends because no step promises more than a nat, a phase of such steps begins.
        """
        here, begun = self.target.vector(), self.target.vector()
        for _ in range(max(4, _GRADIENTS // len(here))):
            matrix = self._inverse_hessian(here, spread)
            if matrix is None:
                break
            step, promised = self._newton_step(here, matrix)
            if abs(promised) <= self._near:
                self.best = here
                self._begin(here, self._newton_rate(here, matrix), matrix)
                return True
            reached = self._draws(here)
            trials = (here + step / 2**shorter for shorter in range(_HALVINGS))
            found = next((v for v in trials if self._brings(v, reached)), None)
            if found is None:
                break
            here, spread = found, matrix.diagonal().clamp_min(0.0).sqrt()
        if torch.equal(here, begun):
            return False
        self.best = here
        self._begin(here, self.state.own_rate, None)
        return True

    @property
    def _near(self) -> float:
        """Nats within which Newton's steps with averages do the rest."""
        return 1 + len(self.origin) / 4

    def _newton_step(self, here: Tensor, matrix: Tensor) -> tuple[Tensor, float]:
        """The step, and the nats that it promises (twice those of a quadratic bound)."""
        self.target.move(here)
        gradient = self.target.gradient(self.seed + self.state.checks)
        step = -matrix @ gradient
        return step, float(-step @ gradient)

    def _brings(self, trial: Tensor, reached: Tensor) -> bool:
        return float((self._draws(trial) - reached).mean()) > self.threshold

    def _jump(self, seen: _Look) -> None:
        """Goes on along the drift as far as the bound rises: steps are small far from home."""
        start = self.target.vector()
        best, length, trial = self._draws(start), 0.0, 1.0
        while trial <= _LONGEST_JUMP:
            found = self._draws(start + trial * seen.drift)
            gain, se = _mean_and_error(found - best)
            if not gain > -2 * se:
                break
            if gain > 2 * se + self.threshold:
                best, length = found, trial
            trial *= 2
        if length:
            self._begin(start + length * seen.drift, self.state.rate, None)

    def _inverse_hessian(self, place: Tensor, spread: Tensor) -> Tensor | None:
        """Of minus the bound, by central differences of gradients of the same draws."""
        here, seed = self.target.vector(), self.seed + self.state.checks
        widths = (spread / 4).clamp(1e-5, 0.1)
        rows = []
        for i, width in enumerate(widths.tolist()):
            ends = []
            for sign in (1, -1):
                at = place.clone()
                at[i] += sign * width
                self.target.move(at)
                ends.append(self.target.gradient(seed))
            rows.append((ends[0] - ends[1]) / (2 * width))
        self.target.move(here)
        return positive_inverse(torch.stack(rows))

    def _give_up(self) -> None:
        """The limit of steps: the last mean, if it is better than the best so far."""
        state = self.state
        state.ended = True
        state.checks += 1
        if len(self.sums) >= 4:
            seen = self._look()
            gain, se = _mean_and_error(self._draws(seen.mean) - self._draws(self.best))
            self._close(state.phase_steps, seen.rhat, seen.error, gain, se)
            state.gain = max(gain, seen.rise, 0.0) + 2 * se + seen.error
            if gain > 0:
                self.best = seen.mean
        self.target.move(self.best)

    # -- files

    def saved(self) -> dict[str, Any]:
        """The state apart from tensors, as JSON can hold it."""
        return super().saved() | {"newton": self.newton}

    def tensors(self) -> dict[str, Tensor]:
        """The rest of the state."""
        found = {"origin": self.origin, "best": self.best}
        if self.matrix is not None:
            found["matrix"] = self.matrix
        for i, both in enumerate(self.sums):
            found |= {f"sum.{i}": both[0], f"square.{i}": both[1]}
        return found

    def restore(self, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `saved` and `tensors` gave."""
        self.newton = saved["newton"]
        super().restore({k: v for k, v in saved.items() if k != "newton"}, tensors)
        self.origin, self.best = tensors["origin"], tensors["best"]
        self.matrix = tensors.get("matrix")
        count = sum(name.startswith("sum.") for name in tensors)
        self.sums = [(tensors[f"sum.{i}"], tensors[f"square.{i}"]) for i in range(count)]
        self.target.set_rate(self.state.rate, self.matrix)


class BlockRule(Rule):
    """Halves the rate when the bound has stopped to rise, for mini-batches; no more than that.

    The bound after each epoch is averaged over blocks of epochs. When a block is no better than the
    one before by two standard errors, the rate is halved; training ends when the block after that
    has bought less than the threshold, or after `_MOST_HALVINGS`.

    Args:
        optim: The optimizer.
        rate: Its first learning rate.
        limit: The most epochs.
        steps: In an epoch.
    """

    def __init__(self, optim: FusedOptim, rate: float, limit: int, steps: int) -> None:
        super().__init__(rate, optim.name, _NATS_PER_DATUM, limit)
        self.set_rate, self.steps = optim.set_learning_rate, steps
        self.set_rate(rate)

    def take(self, bound: float, epoch: int) -> None:
        """Takes note of the bound after an epoch, in nats per datum."""
        state = self.state
        state.steps = epoch * self.steps
        state.values.append(bound)
        if len(state.values) == 2 * _EPOCHS_IN_BLOCK:
            self._compare()
        if epoch >= self.limit and not state.ended:
            state.ended = True

    def _compare(self) -> None:
        state = self.state
        blocks = torch.tensor(state.values, dtype=torch.float64).reshape(2, -1)
        rise = float(blocks[1].mean() - blocks[0].mean())
        se = float((blocks.var(1) / blocks.shape[1]).sum().sqrt())
        state.values = state.values[_EPOCHS_IN_BLOCK:]
        if rise > 2 * se and rise > self.threshold:
            return
        gain = float(blocks[1].mean()) - state.reached if state.phases else math.inf
        steps = state.steps - sum(phase["steps"] for phase in state.phases)
        state.reached = float(blocks[1].mean())
        self._close(steps, math.nan, se, gain, se)
        state.gain = max(gain, 0.0) + 2 * se
        if len(state.phases) >= _FEWEST_PHASES and gain <= max(self.threshold, 2 * se):
            state.ended = state.converged = True
        elif len(state.phases) > _MOST_HALVINGS:
            state.ended = True
        state.rate /= 2
        state.values = []
        self.set_rate(state.rate)

    def restore(self, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `saved` gave."""
        super().restore(saved, tensors)
        self.set_rate(self.state.rate)


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    mean = float(values.mean())
    if len(values) < 2 or not math.isfinite(mean):
        return mean, 0.0
    return mean, float(values.std()) / math.sqrt(len(values))
