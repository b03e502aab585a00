"""What every pair is put through, and the count of how it went.

Chance: a mean over independent copies is compared at 6 standard errors (a right one fails with
probability 2e-9 at each of some 10 coordinates, were it normal), everything else exactly. Seeds
are fixed.
"""

import math
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyro
import torch
from gauntlet.generator import FAULTS, draw_pair, draw_wrong
from gauntlet.oracles import STATES_OF, Oracle, to_line
from gauntlet.programs import FAMILIES, Built, Pair
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae import elbo_gap, fit_em, log_evidence, log_weights
from pyro_vae.inference.estimators import make_estimator

EXACT = 1e-8
ERRORS = 6.0
PARTICLES = 6  # no plate is as long


def log_mean_exp(w: Tensor) -> Tensor:
    return w.logsumexp(0) - math.log(len(w))


def mean(w: Tensor) -> Tensor:
    return w.mean(0)


# Row: its value as a function of log weights, for the model's parameters and for the guide's.
VALUES: dict[str, tuple[Callable, Callable]] = {
    "PathwiseELBO": (mean, mean),
    "StickingTheLanding": (mean, mean),
    "ScoreFunction": (mean, mean),
    "LeaveOneOut": (mean, mean),
    "ImportanceWeighted": (log_mean_exp, log_mean_exp),
    "DReG": (log_mean_exp, log_mean_exp),
    "VIMCO": (log_mean_exp, log_mean_exp),
    "Renyi": (lambda w: 2 * log_mean_exp(w / 2), lambda w: 2 * log_mean_exp(w / 2)),
    "RenyiDReG": (lambda w: 2 * log_mean_exp(w / 2), lambda w: 2 * log_mean_exp(w / 2)),
    "CIWAE": (
        lambda w: (mean(w) + log_mean_exp(w)) / 2,
        lambda w: (mean(w) + log_mean_exp(w)) / 2,
    ),
    "PIWAE": (log_mean_exp, mean),  # of two particles, in groups of one
    "MIWAE": (mean, mean),
    "ReweightedWakeSleep": (log_mean_exp, log_mean_exp),
    "WakeDReG": (log_mean_exp, log_mean_exp),
}
ANY_LATENT = ("ScoreFunction", "LeaveOneOut", "VIMCO", "ReweightedWakeSleep")
MIXED = ("PathwiseELBO", "ImportanceWeighted", "Renyi", "CIWAE", "MIWAE", "PIWAE")
SMOOTH = (*MIXED, "StickingTheLanding", "DReG", "RenyiDReG", "WakeDReG")


class _Scripted(Messenger):
    """Gives the latents in the runs whose shapes are the script's; stands outside all else."""

    def __init__(self, script: dict[str, Tensor]) -> None:
        super().__init__()
        self.script = script

    def _pyro_sample(self, msg: Any) -> None:
        value = self.script.get(msg["name"])
        if value is not None and msg["fn"].shape() == value.shape:
            msg["value"], msg["done"] = value.clone(), True


def _rows(built: Built) -> list[int]:
    pair = built.pair
    if isinstance(pair.rows, int):
        return built.kept["rows"][-1].tolist()
    return list(range(pair.num_data) if pair.rows is None else pair.rows)


def _kept(built: Built, count: int) -> dict[str, Tensor]:
    """The last `count` draws of every latent, particles first and plates laid out."""
    pair, found = built.pair, {}
    for site in pair.drawn:
        seen = built.kept[site.name]
        events = int(site.event > 0)
        full = pair.depth + events
        if seen[-1].dim() > full:
            found[site.name] = seen[-1]
        else:
            parts = [v.reshape((1,) * (full - v.dim()) + tuple(v.shape)) for v in seen[-count:]]
            found[site.name] = torch.stack(parts)
    return found


def _auto(built: Built) -> dict[str, tuple[Tensor, Tensor]] | None:
    """Sets an AutoNormal to random parameters, and returns them."""
    if built.pair.guide != "AutoNormal":
        return None
    args, kwargs = built.arguments
    built.guide(*args, **kwargs)
    found = {}
    for site in built.pair.drawn:
        loc = getattr(built.guide.locs, site.name)
        with torch.no_grad():
            loc.copy_(0.5 * torch.randn(loc.shape))
            getattr(built.guide.scales, f"{site.name}_unconstrained").fill_(0.4)
        found[site.name] = (loc.detach(), getattr(built.guide.scales, site.name).detach())
    return found


def _agree(found: Tensor, truth: Tensor, what: str, tolerance: float = EXACT) -> None:
    assert found.shape == truth.shape, f"{what}: shape {found.shape}, not {truth.shape}"
    error = (found - truth).abs() / (1 + truth.abs())
    error = torch.where(found == truth, 0.0, error)
    assert float(error.max()) < tolerance, f"{what}: {found.tolist()}, not {truth.tolist()}"


# --- right programs -------------------------------------------------------------------------------


def check_weights(pair: Pair) -> None:
    """Log weights at the draws that the model saw."""
    built = pair.build()
    auto = _auto(built)
    found = log_weights(
        built.model, built.guide, built.x, PARTICLES, joint=bool(pair.joint), seed=pair.seed
    ).detach()
    if isinstance(pair.guide, str) and auto is None:
        return _check_joint_autoguide(built, found)
    oracle = Oracle(pair, auto=auto)
    log_p, log_q = oracle.at_draws(_kept(built, PARTICLES), PARTICLES, _rows(built))
    _agree(found, log_p - log_q, "log_weights")


def _check_joint_autoguide(built: Built, found: Tensor) -> None:
    """A normal over all latents in one vector: its density by hand."""
    pair, guide = built.pair, built.guide
    kept = _kept(built, PARTICLES)
    log_p, _ = Oracle(_all_summed(pair)).at_draws(kept, PARTICLES, _rows(built))
    columns, slope = [], torch.zeros(PARTICLES)
    for site in pair.drawn:
        u, own = to_line(kept[site.name], FAMILIES[site.family].support)
        columns.append(u.reshape(PARTICLES, -1))
        slope = slope + own.reshape(PARTICLES, -1).sum(1)
    u = torch.cat(columns, 1)
    scale = guide.scale.detach()
    factor = torch.diag(scale)
    if pair.guide == "AutoMultivariateNormal":
        factor = scale[:, None] * guide.scale_tril.detach()
    e = torch.linalg.solve_triangular(factor, (u - guide.loc.detach()).T, upper=False)
    constant = factor.diagonal().log().sum() + 0.5 * len(e) * math.log(2 * math.pi)
    _agree(found, log_p - (-0.5 * e.square().sum(0) - constant - slope)[:, None], "joint weights")


def check_evidence(pair: Pair) -> bool | None:
    """Importance evidence: the identity at its own draws, and the truth within its error."""
    built = pair.build()
    auto = _auto(built)
    if isinstance(pair.guide, str) and auto is None:
        return False
    found = log_evidence(
        *(built.model, built.guide, built.x),
        num_particles=400, joint=bool(pair.joint), seed=pair.seed, progress=False,
    )  # fmt: skip
    oracle = Oracle(pair, auto=auto)
    log_p, log_q = oracle.at_draws(_kept(built, 400), 400, _rows(built))
    value = torch.as_tensor(found.log_evidence.values).reshape(-1)
    _agree(value, log_mean_exp(log_p - log_q), "importance evidence at its draws")
    _agree(
        torch.as_tensor(found.elbo.values).reshape(-1), (log_p - log_q).mean(0), "ELBO at its draws"
    )
    truth = oracle.log_evidence()
    truth = truth if pair.joint else truth[_rows(built)]
    error = torch.as_tensor(found.log_evidence_se.values).reshape(-1)
    sure = torch.as_tensor(found.ess.values).reshape(-1) > 100
    z = (value - truth).abs() / (error + 1e-9)
    # The weights' tails make 400 of them less than normal: twice the distance.
    assert float(z[sure].max() if sure.any() else 0.0) < 2 * ERRORS, f"evidence: z = {z.tolist()}"


def check_quadrature(pair: Pair) -> None:
    """Where quadrature is offered it is right to its own tolerance."""
    built = pair.build()
    auto = _auto(built)
    found = log_evidence(
        *(built.model, built.guide, built.x),
        method="quadrature", joint=bool(pair.joint), progress=False,
    )  # fmt: skip
    truth = Oracle(pair, auto=auto).log_evidence()
    truth = truth if pair.joint else truth[_rows(built)]
    value = torch.as_tensor(found.log_evidence.values).reshape(-1)
    _agree(value, truth, "quadrature", 1e-6)


def check_gradient(pair: Pair) -> bool | None:
    """One row of the table: by every outcome of two particles, or the mean of many copies."""
    if isinstance(pair.guide, str) or pair.joint or pair.rows is not None or not pair.guide:
        return False
    families = {site.family for site in pair.guide}
    finite = families <= STATES_OF
    if finite and pair.style["one_particle"]:
        return False  # the outcomes are scripted for particles in one tensor
    names = ANY_LATENT if finite else SMOOTH if not families & STATES_OF else MIXED
    name = names[pair.seed % len(names)]
    tables = len(Oracle(pair).table(0)[0])
    if finite:
        _by_outcomes(pair, name, tables)
    else:
        _by_copies(pair, name, tables)
    return None


def _expected_gradient(pair: Pair, name: str, count: int) -> dict[str, Tensor]:
    """The gradient, in expectation, for each datum's own parameters."""
    leaves = {n: v.clone().requires_grad_() for n, v in pair.parameters.items()}
    oracle = Oracle(pair, leaves)
    for_model, for_guide = VALUES[name]
    found: dict[str, Tensor] = {}
    for letter, value in (("a", for_model), ("b", for_guide)):
        own = {n: v for n, v in leaves.items() if n[0] == letter}
        if not own:
            continue
        wake = letter == "b" and name in ("ReweightedWakeSleep", "WakeDReG")

        def of(log_p: Tensor, log_q: Tensor, value: Any = value, wake: bool = wake) -> Tensor:
            if wake:
                return ((log_p - log_q).detach().softmax(0) * log_q).sum(0)
            return value(log_p - log_q)

        total = sum(oracle.expect(n, of, count, fixed=wake) for n in range(pair.num_data))
        parts = torch.autograd.grad(total, list(own.values()), allow_unused=True)
        found |= {
            n: torch.zeros_like(v) if g is None else g
            for (n, v), g in zip(own.items(), parts, strict=True)
        }
    return {n: pair.scale * g for n, g in found.items()}


def _gradient(built: Built, name: str, count: int = 2) -> dict[str, Tensor]:
    """What `loss_and_grads` leaves in the parameters: `[copies, data]`."""
    args, kwargs = built.arguments
    estimator = make_estimator(name, count)
    estimator.loss(built.model, built.guide, *args, **kwargs)  # registers the parameters
    leaves = built.leaves()
    estimator.loss_and_grads(built.model, built.guide, *args, **kwargs)
    shape = (built.repeats, built.pair.num_data)
    return {
        n: -(torch.zeros(shape) if leaf.grad is None else leaf.grad.reshape(shape))
        for n, leaf in leaves.items()
    }


def _by_outcomes(pair: Pair, name: str, states: int) -> None:
    oracle, repeats = Oracle(pair), states**2
    built = pair.build(repeats)
    table, _ = oracle.grid(list(pair.drawn))
    chosen = torch.cartesian_prod(torch.arange(states), torch.arange(states)).T  # [2, outcomes]
    script = {s.name: _laid_out(pair, s, table, chosen) for s in pair.drawn}

    chance = torch.stack(
        [oracle.log_q(n, table).expand(states)[chosen].sum(0).exp() for n in range(pair.num_data)],
        1,
    ).detach()
    expected = _expected_gradient(pair, name, 2)
    with _Scripted(script):
        gradients = _gradient(built, name)
    for leaf, found in gradients.items():
        _agree((chance * found).sum(0), expected[leaf], f"gradient of {leaf} by {name}")


def _laid_out(pair: Pair, site: Any, table: Any, chosen: Tensor) -> Tensor:
    """The values of a latent, each outcome a copy of the data: [2, plates, event]."""
    full = [1] * pair.depth
    full[pair.dims["data"]] = chosen.shape[1] * pair.num_data
    for plate in site.plates:
        full[pair.dims[plate]] = pair.plates[plate]
    event = (site.event,) if site.event else ()
    sample = table[site.name, pair.cells(site)[0]]
    value = torch.zeros((2, *full, *event), dtype=sample.dtype)
    for cell in pair.cells(site):
        part = table[site.name, cell][chosen].repeat_interleave(pair.num_data, 1)
        index: list[Any] = [slice(None)] * (1 + pair.depth)
        for plate, at in zip(site.plates, cell, strict=True):
            index[1 + pair.depth + pair.dims[plate]] = slice(at, at + 1)
        view = [2, *[1] * pair.depth, *event]
        view[1 + pair.depth + pair.dims["data"]] = part.shape[1]
        value[tuple(index)] = part.reshape(view)
    return value


def _by_copies(pair: Pair, name: str, states: int) -> None:
    elbos = ("PathwiseELBO", "StickingTheLanding", "LeaveOneOut", "MIWAE")
    if states > 600 and name not in elbos:
        name = "PathwiseELBO"
    copies = 2000
    built = pair.build(copies)
    expected = _expected_gradient(pair, name, 1 if name in elbos else 2)
    for leaf, found in _gradient(built, name).items():
        average, error = found.mean(0), found.std(0) / math.sqrt(copies)
        z = (average - expected[leaf]).abs() / (error + 1e-8)
        assert float(z.max()) < ERRORS, (
            f"gradient of {leaf} by {name}: {average.tolist()}, not {expected[leaf].tolist()}; "
            f"z = {z.tolist()}"
        )


def check_em(pair: Pair) -> bool | None:
    """Generalised EM reports the evidence of where it starts and ends, and never goes down."""
    if pair.rows is not None or pair.joint:
        return False
    built = pair.build()
    fitted = fit_em(
        built.model, built.x, method="generalized", max_iterations=2, tolerance=0.0, progress=False
    )
    rows = fitted.history
    evidence = torch.as_tensor(rows.log_evidence_total.values)
    start = pair.scale * Oracle(_all_summed(pair)).log_evidence().sum()
    _agree(evidence[0], start, "EM's first evidence")
    after = {n: v.reshape(-1) for n, v in _fitted(pair, fitted).items()}
    end = pair.scale * Oracle(_all_summed(pair), {**pair.parameters, **after}).log_evidence().sum()
    _agree(evidence[-1], end, "EM's last evidence")
    assert bool((evidence.diff() > -1e-9).all()), f"EM went down: {evidence.tolist()}"
    gap = torch.as_tensor(rows.log_evidence_total.values - rows.bound_total.values)
    assert bool((gap > -1e-8).all()), f"EM's bound is above the evidence by {gap.tolist()}"


def _fitted(pair: Pair, fitted: Any) -> dict[str, Tensor]:
    return {n.split(".")[-1].split("$")[-1]: v.detach() for n, v in fitted.parameters.items()}


def _all_summed(pair: Pair) -> Pair:
    """The pair without a guide, whose evidence is the same."""
    return replace(pair, guide=())


def check_gap(pair: Pair) -> None:
    """The parts of the gap: they add up, and the ELBO is the true one within its error."""
    built = pair.build()
    auto = _auto(built)
    found = elbo_gap(
        *(built.model, built.guide, built.x),
        num_particles=300, richer=(), max_steps=20, progress=False, seed=pair.seed,
    )  # fmt: skip
    oracle = Oracle(pair, auto=auto)
    if pair.joint:
        exact = oracle.total_elbo()
    else:
        rows = [oracle.expect(n, lambda p, q: (p - q)[0], 1) for n in _rows(built)]
        exact = torch.stack(rows)
    value = torch.as_tensor(found.elbo.values).reshape(-1)
    z = (value - exact).abs() / (torch.as_tensor(found.elbo_se.values).reshape(-1) + 1e-8)
    assert float(z.max()) < ERRORS, f"ELBO of elbo_gap: z = {z.tolist()}"
    if pair.joint:
        parts = found.global_gap + found.local_gap.sum() - found.gap
    else:
        parts = found.approximation_gap + found.amortization_gap - found.gap
    assert float(abs(parts).max()) < EXACT, f"the gap's parts differ from it by {parts.values}"


# What is checked, at every how many-th program, and whether a refusal is an answer.
CHECKS: dict[str, tuple[Callable[[Pair], bool | None], int, bool]] = {
    "log_weights": (check_weights, 1, False),
    "gradient": (check_gradient, 2, False),
    "evidence": (check_evidence, 3, False),
    "quadrature": (check_quadrature, 10, True),
    "fit_em": (check_em, 5, True),
    "elbo_gap": (check_gap, 20, True),
}


@contextmanager
def _fresh() -> Any:
    with pyro.get_param_store().scope():
        yield


def check_right(seed: int, counts: Counter[str], failures: list[str]) -> None:
    """Puts one right pair through the checks whose turn it is."""
    pair = draw_pair(seed)
    for name, (check, every, may_refuse) in CHECKS.items():
        if seed % every:
            continue
        try:
            with _fresh():
                pyro.set_rng_seed(seed)
                if check(pair) is False:  # does not apply
                    continue
            counts[f"{name}: right"] += 1
        except Exception as error:
            if may_refuse and _is_ours(error):
                counts[f"{name}: refused"] += 1
                continue
            counts[f"{name}: FAILED"] += 1
            failures.append(_report(name, pair, error))


def _is_ours(error: BaseException) -> bool:
    """Whether it is a refusal, raised in the package itself."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, ValueError) and frame.f_globals["__name__"].startswith("pyro_vae.")


def check_wrong(seed: int, fault: str, counts: Counter[str], failures: list[str]) -> None:
    """A pair with a fault is refused by a sentence that names what is wrong."""
    pair = draw_wrong(seed, fault)
    built = pair.build()
    try:
        with _fresh():
            pyro.set_rng_seed(seed)
            found = log_weights(built.model, built.guide, built.x, 4, seed=seed, joint=False)
        raise AssertionError(f"accepted, and gave {found.detach().tolist()}")
    except Exception as error:
        if _is_ours(error) and any(word in str(error) for word in FAULTS[fault]):
            counts["wrong by design: refused"] += 1
            return
        counts["wrong by design: FAILED"] += 1
        failures.append(_report(f"fault {fault}", pair, error))


def _report(name: str, pair: Pair, error: Exception) -> str:
    where = "".join(traceback.format_tb(error.__traceback__)[-2:])
    return f"{name}: {type(error).__name__}: {error}\n{where}{pair.build().describe()}"


def run(
    seeds: range, counts: Counter[str] | None = None, *, wrong_every: int = 2
) -> tuple[Counter[str], list[str]]:
    """Right pairs of these seeds, and after every few of them a wrong one."""
    counts = Counter() if counts is None else counts
    failures: list[str] = []
    faults = list(FAULTS)
    for seed in seeds:
        check_right(seed, counts, failures)
        if seed % wrong_every == 0:
            turn = seed // wrong_every
            check_wrong(turn, faults[turn % len(faults)], counts, failures)
    return counts, failures
