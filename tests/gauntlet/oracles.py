"""What is true of a pair, from its description alone: sums over states, and trapezoids.

Nothing here runs a Pyro program or a torch distribution. Every latent of a datum is laid along an
axis of one grid: its states, or points of the unconstrained line, where the trapezoidal rule is
exact to rounding for densities that decay at both ends. Everything is differentiable in the
parameters.
"""

import itertools
import math
from typing import Any

import torch
from gauntlet.programs import FAMILIES, TABLE, TRIL, Pair, Site, summary
from torch import Tensor

Latents = dict[tuple[str, tuple[int, ...]], Tensor]


# --- densities ------------------------------------------------------------------------------------


def _normal(x: Tensor, loc: Any, scale: Any) -> Tensor:
    scale = torch.as_tensor(scale)
    return -0.5 * ((x - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


def _bits(x: Tensor, *logits: Any) -> Tensor:
    columns = [x] if len(logits) == 1 else list(x.unbind(-1))
    total = torch.zeros(())
    for value, logit in zip(columns, map(torch.as_tensor, logits), strict=True):
        total = total + value * logit - torch.logaddexp(logit, torch.zeros_like(logit))
    return total


def _log_softmax(logits: tuple[Any, ...]) -> list[Tensor]:
    parts = torch.broadcast_tensors(*map(torch.as_tensor, logits))
    total = parts[0]
    for part in parts[1:]:
        total = torch.logaddexp(total, part)
    return [part - total for part in parts]


def _categorical(x: Tensor, *logits: Any) -> Tensor:
    return sum((x == k) * part for k, part in enumerate(_log_softmax(logits)))


def _onehot(x: Tensor, *logits: Any) -> Tensor:
    return sum(x[..., k] * part for k, part in enumerate(_log_softmax(logits)))


def _choose(n: float, k: Tensor) -> Tensor:
    n = torch.as_tensor(n)
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def _binomial(x: Tensor, logit: Any) -> Tensor:
    logit = torch.as_tensor(logit)
    return _choose(2.0, x) + x * logit - 2 * torch.logaddexp(logit, torch.zeros_like(logit))


def _successes(x: Tensor, p: Any) -> Tensor:
    return _choose(3.0, x) + x * p.log() + (3 - x) * torch.log1p(-p)


def _poisson(x: Tensor, rate: Any) -> Tensor:
    rate = torch.as_tensor(rate)
    return x * rate.log() - rate - torch.lgamma(x + 1)


def _zeros(x: Tensor, rate: Any) -> Tensor:
    log_p = math.log(0.7) + _poisson(x, rate)
    return torch.where(x == 0, torch.logaddexp(log_p, torch.tensor(math.log(0.3))), log_p)


def _negative(x: Tensor, logit: Any) -> Tensor:
    zero = torch.zeros(())
    logit = torch.as_tensor(logit)
    return (
        torch.lgamma(x + 3) - torch.lgamma(x + 1) - math.log(2)
        - 3 * torch.logaddexp(logit, zero) - x * torch.logaddexp(-logit, zero)
    )  # fmt: skip


def _student(x: Tensor, loc: Any, scale: Any) -> Tensor:
    scale = torch.as_tensor(scale)
    constant = math.lgamma(2.5) - math.lgamma(2.0) - 0.5 * math.log(4 * math.pi)
    return constant - scale.log() - 2.5 * torch.log1p(((x - loc) / scale) ** 2 / 4)


def _gamma(x: Tensor, a: Any, rate: Any) -> Tensor:
    a, rate = torch.as_tensor(a), torch.as_tensor(rate)
    return a * rate.log() + (a - 1) * x.log() - rate * x - torch.lgamma(a)


def _beta(x: Tensor, a: Any, b: Any) -> Tensor:
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    constant = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
    return constant + (a - 1) * x.log() + (b - 1) * torch.log1p(-x)


def _logit_normal(x: Tensor, loc: Any, scale: Any) -> Tensor:
    return _normal(torch.logit(x), loc, scale) - x.log() - torch.log1p(-x)


def _normals(x: Tensor, first: Any, second: Any) -> Tensor:
    return _normal(x[..., 0], first, 0.8) + _normal(x[..., 1], second, 0.8)


def _mvn(x: Tensor, first: Any, second: Any) -> Tensor:
    (a, _), (b, c) = TRIL  # x0 = m0 + a e0; x1 = m1 + b e0 + c e1
    e = (x[..., 0] - first) / a
    return _normal(x[..., 0], first, a) + _normal(x[..., 1], second + b * e, c)


def _mixture(x: Tensor, *logits: Any) -> Tensor:
    first, second = _log_softmax(logits)
    return torch.logaddexp(first + _normal(x, -1.0, 0.8), second + _normal(x, 1.5, 0.8))


DENSITIES = {
    "normal": _normal,
    "affine": _normal,
    "normals": _normals,
    "mvn": _mvn,
    "lognormal": lambda x, m, s: _normal(x.log(), m, s) - x.log(),
    "expnormal": lambda x, m, s: _normal(x.log(), m, s) - x.log(),
    "gamma": _gamma,
    "logitnormal": _logit_normal,
    "beta": _beta,
    "bernoulli": _bits,
    "bits": _bits,
    "categorical": _categorical,
    "onehot": _onehot,
    "binomial": _binomial,
    "successes": _successes,
    "poisson": _poisson,
    "zeros": _zeros,
    "negative": _negative,
    "student": _student,
    "exponential": lambda x, rate: torch.as_tensor(rate).log() - rate * x,
    "mixture": _mixture,
}
STATES = {
    "bit": [0.0, 1.0],
    "bits": [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]],
    "three": [0, 1, 2],
    "onehot": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
    "upto2": [0.0, 1.0, 2.0],
}
LINES = {"real": (-14.0, 14.0), "reals": (-14.0, 14.0), "positive": (-18.0, 9.0)}
LINES["unit"] = (-24.0, 24.0)
_STEP = 0.2
_COARSE = 0.3  # on grids of two dims


def to_line(z: Tensor, support: str) -> tuple[Tensor, Tensor]:
    """The unconstrained value of a latent, and log |dz / du| there."""
    if support == "positive":
        return z.log(), z.log()
    if support == "unit":
        return torch.logit(z), z.log() + torch.log1p(-z)
    return z, torch.zeros_like(z)


def axis(site: Site, step: float) -> tuple[Tensor, Tensor]:
    """The values of a latent along its axis of the grid, and the logs of their quadrature weights.

    States have weight 1, points the length of line that they stand for.
    """
    support = FAMILIES[site.family].support
    if support in STATES:
        values = torch.tensor(STATES[support])
        return values, torch.zeros(len(values))
    low, high = LINES[support]
    u = torch.arange(low, high, step)
    weight = torch.full_like(u, math.log(step))
    if support == "positive":
        return u.exp(), weight + u
    if support == "unit":
        z = torch.sigmoid(u)
        return z, weight + torch.nn.functional.logsigmoid(u) + torch.nn.functional.logsigmoid(-u)
    if support == "reals":
        return torch.cartesian_prod(u, u), torch.full((len(u) ** 2,), 2 * math.log(step))
    return u, weight


# --- a pair's truth -------------------------------------------------------------------------------


class Oracle:
    """Log-densities of each datum at any latents, and what follows from them.

    Args:
        pair: The description.
        parameters: In place of the pair's own; one of each for each datum.
        auto: Of an autoguide: for each latent its loc and scale, laid out as the latent.
    """

    def __init__(
        self,
        pair: Pair,
        parameters: dict[str, Tensor] | None = None,
        auto: dict[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.pair, self.auto = pair, auto
        self.parameters = pair.parameters if parameters is None else parameters

    def _names(self, n: int, site: Site, cell: tuple[int, ...], latents: Latents) -> dict[str, Any]:
        """What a site's expressions can name."""
        pair = self.pair
        observed = next(s.name for s in pair.sites if s.kind == "observed")
        at = dict(zip(site.plates, cell, strict=True))
        names: dict[str, Any] = {"torch": torch, "TABLE": torch.tensor(TABLE)}
        names |= {name: value[n] for name, value in self.parameters.items()}
        names |= {"c": pair.data["c"][n], "s": summary(pair.data[observed])[n]}
        for other in pair.sites:
            if other is site or not set(other.plates) <= set(site.plates):
                continue
            own = tuple(at[p] for p in other.plates)
            if (other.name, own) in latents:
                names[other.name] = latents[other.name, own]
            elif other.kind == "deterministic" and site in pair.sites[pair.sites.index(other) :]:
                inner = self._names(n, other, own, latents)
                names[other.name] = eval(other.arguments[0], inner)
        return names

    def site(self, n: int, site: Site, cell: tuple[int, ...], latents: Latents) -> Tensor:
        """The log-probability of one cell of a site."""
        pair = self.pair
        if site.mask and not bool(pair.data["m"][(n, *cell)]):
            return torch.zeros(())
        names = self._names(n, site, cell, latents)
        arguments = [eval(text, names) for text in site.arguments]
        if site.kind == "factor":
            return arguments[0]
        observed = site.kind == "observed"
        value = pair.data[site.name][(n, *cell)] if observed else latents[site.name, cell]
        return DENSITIES[site.family](value, *arguments)

    def log_p(self, n: int, latents: Latents, *, globally: bool = False) -> Tensor:
        """Of the sites of one datum, or of those outside the data plate."""
        return self._total(self.pair.sites, n, latents, globally)

    def log_q(self, n: int, latents: Latents, *, globally: bool = False) -> Tensor:
        if not isinstance(self.pair.guide, str):
            return self._total(self.pair.guide, n, latents, globally)
        total = torch.zeros(())
        assert self.auto is not None
        for site in self.pair.drawn:
            if (site.name in self.pair.joint) != globally:
                continue
            for cell in self.pair.cells(site):
                u, slope = to_line(latents[site.name, cell], FAMILIES[site.family].support)
                loc, scale = (self.pick(part, site, n, cell) for part in self.auto[site.name])
                density = _normal(u, loc, scale) - slope
                total = total + (density.sum(-1) if site.event else density)
        return total

    def _total(self, sites: Any, n: int, latents: Latents, globally: bool) -> Tensor:
        total = torch.zeros(())
        for site in sites:
            if site.kind == "deterministic" or (site.name in self.pair.joint) != globally:
                continue
            for cell in self.pair.cells(site):
                total = total + self.site(n, site, cell, latents)
        return total

    def pick(self, value: Tensor, site: Site, n: int, cell: tuple[int, ...]) -> Tensor:
        """One datum's cell of a tensor that is laid out along the dims of the plates.

        Dims to the left of the plates' are kept.
        """
        at = {} if site.name in self.pair.joint else {"data": n}
        at |= dict(zip(site.plates, cell, strict=True))
        events, depth = int(site.event > 0), self.pair.depth
        value = value.reshape((1,) * (depth + events - value.dim()) + tuple(value.shape))
        for dim in range(-1, -depth - 1, -1):
            plate = next((name for name, d in self.pair.dims.items() if d == dim), "")
            place = dim - events
            index = at.get(plate, 0) if value.shape[place] > 1 else 0
            value = value.narrow(place, index, 1)
        return value.flatten(value.dim() - depth - events, value.dim() - 1 - events).squeeze(
            -1 - events
        )

    # -- at known draws

    def at_draws(self, kept: dict[str, Tensor], count: int, rows: list[int]) -> tuple:
        """Log p and log q at draws that the programs saw, `[particles, batch]` each.

        With joint latents the batch is 1 and everything is summed.
        """
        log_p, log_q = [], []
        for place_, n in enumerate(rows):
            latents = {}
            for site in self.pair.drawn:
                for cell in self.pair.cells(site):
                    value = self.pick(kept[site.name], site, place_, cell)
                    latents[site.name, cell] = value.reshape(
                        (-1, site.event) if site.event else (-1,)
                    )
            hidden = [s for s in self.pair.latents if s.enumerated]
            log_p.append(self._summed(n, latents, hidden).expand(count))
            log_q.append(self.log_q(n, latents).expand(count))
        p, q = torch.stack(log_p, 1), torch.stack(log_q, 1)
        if not self.pair.joint:
            return p, q
        p = p.sum(1) + self.log_p(0, latents, globally=True)
        q = q.sum(1) + self.log_q(0, latents, globally=True)
        return p[:, None], q[:, None]

    def _summed(self, n: int, latents: Latents, hidden: list[Site]) -> Tensor:
        """Log p with the enumerated latents summed out, one state of all of them at a time."""
        states = [list(torch.tensor(STATES[FAMILIES[s.family].support])) for s in hidden]
        found = [
            self.log_p(n, latents | {(s.name, ()): v for s, v in zip(hidden, chosen, strict=True)})
            for chosen in itertools.product(*states)
        ]
        return torch.stack(torch.broadcast_tensors(*found)).logsumexp(0)

    # -- on the grid

    def grid(self, sites: list[Site]) -> tuple[Latents, Tensor]:
        """All values of these latents of a datum at once, and the logs of their weights."""
        dims = sum(
            max(s.event, 1) * len(self.pair.cells(s)) for s in sites if s.family not in STATES_OF
        )
        step = _STEP if dims <= 1 else _COARSE
        axes = [(s, cell, *axis(s, step)) for s in sites for cell in self.pair.cells(s)]
        shape = [len(weight) for *_, weight in axes]
        latents: Latents = {}
        log_weight = torch.zeros(shape or [1])
        for number, (site, cell, values, weight) in enumerate(axes):
            view = [1] * len(shape)
            view[number] = shape[number]
            index = torch.arange(shape[number]).reshape(view).expand(shape).reshape(-1)
            latents[site.name, cell] = values[index]
            log_weight = log_weight + weight.reshape(view)
        return latents, log_weight.reshape(-1)

    def table(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log p(x, z), log q(z | x) and log weights of every z that the guide draws."""
        latents, weight = self.grid(self.pair.drawn)
        log_p = self._summed(n, latents, [s for s in self.pair.latents if s.enumerated])
        return log_p.expand_as(weight), self.log_q(n, latents).expand_as(weight), weight

    def total_elbo(self) -> Tensor:
        """The ELBO of all data, of a pair with joint latents."""
        pair = self.pair
        outside = [s for s in pair.drawn if s.name in pair.joint]
        inside = [s for s in pair.drawn if s.name not in pair.joint]
        latents, weight = self.grid([*outside, *inside])
        _, above = self.grid(outside)
        rest = len(weight) // len(above)
        first = {key: value[::rest] for key, value in latents.items() if key[0] in pair.joint}
        log_q = self.log_q(0, first, globally=True)
        value = self.log_p(0, first, globally=True) - log_q
        own = weight - above.repeat_interleave(rest)
        for n in range(pair.num_data):
            inner = self.log_q(n, latents)
            hidden = [s for s in pair.latents if s.enumerated]
            terms = (inner + own).exp() * (self._summed(n, latents, hidden) - inner)
            value = value + terms.reshape(len(above), rest).nan_to_num().sum(1)
        return ((log_q + above).exp() * value).nan_to_num().sum()[None]

    def log_evidence(self) -> Tensor:
        """Log p(x) of each datum; of all of them with joint latents."""
        pair = self.pair
        if not pair.joint:
            tables = [self.table(n) for n in range(pair.num_data)]
            return torch.stack([(p + weight).logsumexp(0) for p, _, weight in tables])
        outside = [s for s in pair.latents if s.name in pair.joint]
        inside = [s for s in pair.latents if s.name not in pair.joint]
        latents, weight = self.grid([*outside, *inside])
        _, above = self.grid(outside)
        rest = len(weight) // len(above)
        total = above
        first = {key: value[::rest] for key, value in latents.items() if key[0] in pair.joint}
        total = total + self.log_p(0, first, globally=True)
        own = weight - above.repeat_interleave(rest)
        for n in range(pair.num_data):
            each = (self.log_p(n, latents) + own).reshape(len(above), rest)
            total = total + each.logsumexp(1)
        return total.logsumexp(0)[None]

    def expect(self, n: int, value: Any, count: int, *, fixed: bool = False) -> Tensor:
        """E over `count` particles of a value of their log weights, differentiable throughout.

        Args:
            n: Which datum.
            value: From log p and log q, `[particles, outcomes]` each, to a number for each outcome.
            count: Particles.
            fixed: Whether the probabilities of the outcomes are held fixed.
        """
        log_p, log_q, weight = self.table(n)
        states = torch.cartesian_prod(*[torch.arange(len(weight))] * count).reshape(-1, count).T
        chance = (log_q + weight)[states].sum(0).exp()
        chance = chance.detach() if fixed else chance
        found = value(log_p[states], log_q[states])
        return torch.where(chance > 0, chance * found, 0.0).sum()


STATES_OF = {name for name, family in FAMILIES.items() if family.support in STATES}
