"""Evidence by every method, its bounds and its gap, beside closed forms."""

from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import norm

from benchmarks.coverage.kinds import Checked, Row, Study, interval, joined, watched
from benchmarks.coverage.planted import (
    BetaBinomial,
    Correlated,
    Discrete,
    GammaPoisson,
    NormalNormal,
    OneBit,
    Pair,
    tensor,
)
from pyro_vae.diagnostics.evidence import log_evidence
from pyro_vae.diagnostics.gap import elbo_gap, elbo_surgery, gap_on_both
from pyro_vae.diagnostics.resolve import resolve
from pyro_vae.inference.log_weights import importance_bound, importance_bound_error, pareto_tail
from pyro_vae.results import paired_difference

__all__ = ["STUDIES"]

Found = dict[str, Checked]


def _importance(pair: Pair, particles: int, count: int, seed: int) -> Found:
    x = pair.data(count, seed)
    found = watched(
        log_evidence(pair.model, pair.guide, x, num_particles=particles, seed=seed, progress=False)
    )
    evidence, kl = pair.log_evidence(x), pair.kl(x)
    flagged = ~found.error_reliable.values
    truths = {"log_evidence": evidence, "elbo": evidence - kl, "gap": kl}
    return {
        f"{name}_se": interval(
            found[name], found[f"{name}_se"], truth, False if name == "elbo" else flagged
        )
        for name, truth in truths.items()
    }


def _missing_state(count: int, seed: int) -> Found:
    pair = Discrete(missing=True)
    x = torch.full((count,), 1.5, dtype=torch.float64)
    found = log_evidence(pair.model, pair.guide, x, seed=seed, progress=False)
    spoken = any("never visits" in note for note in found.provenance["notes"])
    checked = interval(
        found.log_evidence, found.log_evidence_se, pair.log_evidence(x), np.full(count, spoken)
    )
    return {"log_evidence_se": checked}


def _lognormal(sd: float, chains: int, count: int, seed: int) -> Found:
    """Weights whose mean is exactly 1, as those of chains are."""
    noise = np.random.default_rng(seed).normal(size=(chains, count))
    weights = tensor(sd * noise - sd**2 / 2)
    error = importance_bound_error(weights)
    flagged = ~error.reliable.numpy()
    return {"log_evidence_se": interval(importance_bound(weights), error.se, 0.0, flagged)}


def _khat(shape: float, count: int, seed: int) -> Found:
    """Generalised Pareto weights, whose tail beyond any cutoff has the same shape."""
    uniform = np.random.default_rng(seed).uniform(size=(1000, count))
    tail = pareto_tail(tensor(np.log1p(np.expm1(-shape * np.log(uniform)) / shape)))
    return {"khat_se": interval(tail.khat, tail.khat_se, shape)}


_FAST: dict[str, Any] = {"num_temperatures": 20, "num_leapfrog": 2, "num_chains": 16}


def _annealed(pair: Pair, temperatures: int, count: int, seed: int) -> Found:
    x = pair.data(count, seed)
    options = {**_FAST, "num_temperatures": temperatures}
    found = watched(
        log_evidence(pair.model, None, x, method="annealed", seed=seed, progress=False, **options)
    )
    flagged = ~found.error_reliable.values
    truth = pair.log_evidence(x)
    return {"log_evidence_se": interval(found.log_evidence, found.log_evidence_se, truth, flagged)}


def _bidirectional(count: int, seed: int) -> Found:
    pair = OneBit()
    x = pair.data(count, seed)
    found = watched(
        log_evidence(
            pair.model, None, x, method="bidirectional", seed=seed, progress=False, **_FAST
        )
    )
    return {
        f"{name}_se": interval(found[name], found[f"{name}_se"], np.log(0.5))
        for name in ("simulated_lower", "simulated_upper")
    }


def _two_sided(count: int, seed: int) -> Found:
    """KL both ways does not depend on the datum, so that of any simulated one is known."""
    pair, parts = NormalNormal(), []
    variance, shift = pair.scale**2, pair.shift**2
    truth = (variance + shift - 1) / 2 + ((1 + shift) / variance - 1) / 2
    for i in range(count):
        options: dict[str, Any] = {"num_particles": 20, "seed": seed + i, "progress": False}
        x = pair.data(50, seed + i)
        found = watched(log_evidence(pair.model, pair.guide, x, method="two_sided", **options))
        parts.append(
            {"symmetric_kl_se": interval(found.symmetric_kl, found.symmetric_kl_se, truth)}
        )
    return joined(parts)


def _bridge(pair: Pair, proposal: str, samples: int, count: int, seed: int) -> Found:
    x = pair.data(count, seed)
    found = watched(
        log_evidence(
            pair.model,
            pair.guide,
            x,
            method="bridge",
            seed=seed,
            progress=False,
            proposal=proposal,
            num_warmup=50 if samples > 50 else 1,
            num_samples=samples,
            num_leapfrog=3,
        )
    )
    truth, flagged = pair.log_evidence(x), ~(found.rhat.values <= 1.05)
    return {"log_evidence_se": interval(found.log_evidence, found.log_evidence_se, truth, flagged)}


def _quadrature(count: int, seed: int) -> Found:
    """Claimed errors are bounds: no z in between."""
    missed = []
    for pair in (NormalNormal(), GammaPoisson(), BetaBinomial(), OneBit()):
        x = pair.data(-(-count // 4), seed)
        found = watched(log_evidence(pair.model, pair.guide, x, method="quadrature", seed=seed))
        away = np.abs(found.log_evidence.values - pair.log_evidence(x))
        missed.append(away > found.quadrature_error.values + 1e-12)
    every = np.concatenate(missed).astype(float)
    return {"quadrature_error": Checked(every, np.zeros(len(every), dtype=bool))}


def _gap(given: bool, count: int, seed: int) -> Found:
    pair = Correlated()
    x = pair.data(count, seed)
    evidence = {"method": "quadrature"} if given else "importance"
    found = watched(
        elbo_gap(
            pair.model,
            pair.guide,
            x,
            evidence=evidence,
            num_particles=200,
            max_steps=150,
            richer=("full",),
            seed=seed,
            progress=False,
        )
    )
    log_p, kl, best = pair.log_evidence(x), pair.kl(x), pair.best_kl()
    truths = {
        "log_evidence": log_p,
        "elbo": log_p - kl,
        "gap": kl,
        "approximation_gap": np.full(count, best),
        "amortization_gap": kl - best,
        "elbo_refitted": log_p - best,
        "elbo_full": log_p,
        "gain_full": np.full(count, best),
    }
    return {
        f"{name}_se": interval(found[name], found[f"{name}_se"], truth)
        for name, truth in truths.items()
        if f"{name}_se" in found
    }


def _both(count: int, seed: int) -> Found:
    """Training and test data of one distribution, and a guide that was not fitted to either."""
    pair, parts = Correlated(scale=1.0, shift=0.3), []
    options = {"num_particles": 4, "max_steps": 2, "richer": (), "progress": False}
    for i in range(count):
        halves = pair.data(120, seed + i).split(60)
        both = gap_on_both(pair.model, pair.guide, *halves, seed=seed + i, **options)
        found = watched(both.summary)
        names = [f"{part}_generalization" for part in ("model", "encoder", "approximation")]
        parts.append({f"{n}_se": interval(found[n], found[f"{n}_se"], 0.0) for n in names})
    return joined(parts)


def _surgery(count: int, seed: int) -> Found:
    pair, size, parts = NormalNormal(scale=1.2, shift=0.3), 50, []
    for i in range(-(-count // size)):
        x = pair.data(size, seed + i)
        found = watched(elbo_surgery(pair.model, pair.guide, x, num_particles=100, seed=seed + i))
        truths = _surgery_truth(pair, x).items()
        parts.append({f"{n}_se": interval(found[n], found[f"{n}_se"], t) for n, t in truths})
    return joined(parts)


def _surgery_truth(pair: NormalNormal, x: torch.Tensor) -> dict[str, np.ndarray]:
    """By quadrature over z, in one dimension."""
    loc = (pair.mean(x) + pair.shift * pair.sd).numpy()
    sd = pair.scale * pair.sd
    z = loc[:, None] + sd * np.linspace(-9, 9, 2001)
    log_q = norm.logpdf(z, loc[:, None], sd)
    each = norm.logpdf(z[..., None], loc, sd)  # [data, nodes, data]
    mixture = np.log(np.exp(each).mean(-1))
    own = np.exp(each[np.arange(len(x)), :, np.arange(len(x))])
    rest = np.log(np.exp(each).sum(-1) - own) - np.log(len(x) - 1)
    prior = norm.logpdf(z)
    likelihood = norm.logpdf(x.numpy()[:, None], z, pair.noise)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.trapezoid(np.exp(log_q) * values, z, axis=1)

    return {
        "elbo": mean(likelihood + prior - log_q),
        "distortion": mean(-likelihood),
        "rate": mean(log_q - prior),
        "mutual_information": mean(log_q - mixture),
        "mutual_information_upper": mean(log_q - rest),
        "marginal_kl": mean(mixture - prior),
    }


def _quantities(size: int, count: int, seed: int) -> Found:
    """Means over the data: for these data, for their population, and of two guides, paired."""
    pair, other = NormalNormal(), NormalNormal(0.9, -0.4)
    x = pair.data(count * size, seed)
    first, second = (
        log_evidence(p.model, p.guide, x, num_particles=50, seed=seed + i, progress=False)
        for i, p in enumerate((pair, other))
    )
    truth = pair.log_evidence(x)
    population = -0.5 * np.log(2 * np.pi * (1 + pair.noise**2)) - 0.5 - pair.kl(x)[0]
    apart = other.kl(x)[0] - pair.kl(x)[0]
    rows: dict[str, list[tuple[float, float | None, float, bool]]] = {}
    for i in range(count):
        part = slice(i * size, (i + 1) * size)
        a, b = first.isel(datum=part), second.isel(datum=part)
        mine, bound = a.quantity("log_evidence"), a.quantity("elbo")
        alone, paired = bound.difference(b.quantity("elbo")), paired_difference(a, b, "elbo")
        for name, found, error, aim in (
            ("standard_error", mine, mine.standard_error, float(truth[part].mean())),
            ("data_standard_error", bound, bound.data_standard_error, population),
            ("difference.standard_error", alone, alone.standard_error, apart),
            ("paired.data_standard_error", paired, paired.data_standard_error, apart),
        ):
            few = "data_" in name and not found.data_error_reliable
            rows.setdefault(name, []).append((found.value, error, aim, few))
    columns = {name: np.array(values, dtype=float).T for name, values in rows.items()}
    return {name: interval(v[0], v[1], v[2], v[3] > 0) for name, v in columns.items()}


def _resolve(count: int, seed: int) -> Found:
    pair = NormalNormal(1.15, 0.2)
    x = pair.data(count, seed)
    found = watched(resolve(pair.model, pair.guide, x, seed=seed, progress=False).result)
    truth = pair.log_evidence(x)
    return {"log_evidence_se": interval(found.log_evidence, found.log_evidence_se, truth)}


_HEAVY = "k-hat above its threshold: the guide is too narrow, or draws are few"
_FLAG = "`error_reliable` (a question mark on the number), a note"
_SKEWED = "fewer than 30 data, or than 25 times their squared skewness"
_FEW = "`data_error_reliable` (words beside the number)"
_BEYOND = "the evidence is a bound: low by what it misses"
_PAIRS: dict[str, Pair] = {
    "normal-normal": NormalNormal(),
    "gamma-Poisson": GammaPoisson(),
    "beta-binomial": BetaBinomial(),
    "three states": Discrete(),
}
_OF_WEIGHTS = (
    Row("log_evidence_se", breaks=_HEAVY, guard=_FLAG),
    Row("elbo_se", breaks="fewer than about 30 particles", guard="particles stand on the number"),
    Row("gap_se", breaks=_HEAVY, guard=_FLAG),
)


def _broken(name: str, speaks: float, breaks: str, guard: str = _FLAG) -> Row:
    return Row(name, most=None, breaks=breaks, guard=guard, speaks=speaks)


STUDIES = [
    *(
        Study(f"importance, {name}", "log_evidence", partial(_importance, pair, 1000), _OF_WEIGHTS)
        for name, pair in _PAIRS.items()
    ),
    Study(
        "importance, 16 particles",
        "log_evidence",
        partial(_importance, NormalNormal(1.2, 0.3), 16),
        (Row("log_evidence_se", breaks=_HEAVY, guard=_FLAG),),
    ),
    Study(
        "importance, true k-hat 0.6",
        "log_evidence",
        partial(_importance, NormalNormal(0.4**0.5, 0.0), 1000),
        (_broken("log_evidence_se", 0.5, "infinite variance of the weights"),),
    ),
    Study(
        "importance, true k-hat 0.9",
        "log_evidence",
        partial(_importance, NormalNormal(0.1**0.5, 0.0), 1000),
        (_broken("log_evidence_se", 0.9, "weights hardly have a mean"),),
    ),
    Study(
        "importance, a state is missing",
        "log_evidence",
        _missing_state,
        (_broken("log_evidence_se", 1.0, "always", "a note on every result"),),
    ),
    *(
        Study(
            f"16 chains, log weights with sd {sd:g}",
            "importance_bound_error",
            partial(_lognormal, sd, 16),
            (
                Row("log_evidence_se", breaks="sd above 1 nat", guard=_FLAG)
                if sd < 2
                else _broken("log_evidence_se", 0.8, "few chains, wide weights"),
            ),
        )
        for sd in (0.5, 1.0, 2.0, 3.0)
    ),
    *(
        Study(
            f"Pareto weights, k = {k}",
            "pareto_tail",
            partial(_khat, k),
            (Row("khat_se", most=0.07, breaks="the tail ends where the guide ends", guard="none"),),
        )
        for k in (0.3, 0.5, 0.7)
    ),
    Study(
        "annealed, one bit",
        "log_evidence",
        partial(_annealed, OneBit(), 20),
        (Row("log_evidence_se", most=0.1, breaks="few temperatures", guard=_FLAG),),
        quick=80,
        longest=500,
    ),
    Study(
        "annealed, gamma-Poisson",
        "log_evidence",
        partial(_annealed, GammaPoisson(), 20),
        (Row("log_evidence_se", most=0.1, breaks="few temperatures", guard=_FLAG),),
        quick=0,
        longest=500,
    ),
    Study(
        "annealed in 2 steps, noise 0.02",
        "log_evidence",
        partial(_annealed, NormalNormal(noise=0.02), 2),
        (_broken("log_evidence_se", 0.9, "few temperatures"),),
        quick=0,
        longest=500,
    ),
    Study(
        "two-sided, 50 simulations",
        "log_evidence",
        _two_sided,
        (Row("symmetric_kl_se"),),
        quick=0,
        longest=500,
    ),
    Study(
        "bidirectional, one bit",
        "log_evidence",
        _bidirectional,
        (
            Row("simulated_lower_se", most=0.1, breaks="few temperatures", guard=_BEYOND),
            Row(
                "simulated_upper_se",
                most=0.08,
                breaks="fewer than 10 data: the chains of each share their exact draw",
                guard="a note",
            ),
        ),
        quick=0,
        longest=500,
    ),
    *(
        Study(
            f"bridge from the {proposal}, one bit",
            "log_evidence",
            partial(_bridge, OneBit(), proposal, 100),
            (Row("log_evidence_se", most=0.09, breaks="chains did not mix", guard="R-hat note"),),
            quick=80 if proposal == "guide" else 0,
            longest=500,
        )
        for proposal in ("guide", "normal")
    ),
    Study(
        "bridge, 10 draws without warm-up",
        "log_evidence",
        partial(_bridge, NormalNormal(), "guide", 10),
        (_broken("log_evidence_se", 0.8, "short chains", "R-hat note"),),
    ),
    Study(
        "quadrature",
        "log_evidence",
        _quadrature,
        (Row("quadrature_error", 1.0, 1e-3, "points run out", "label `none` for `exact`, a note"),),
        quick=20,
    ),
    *(
        Study(
            f"gap, evidence by {'quadrature' if given else 'importance'}",
            "elbo_gap",
            partial(_gap, given),
            tuple(
                Row(f"{name}_se", most=0.08, breaks="search did not settle", guard="`converged`")
                for name in names
            ),
            quick=0 if given else 60,
        )
        for given, names in (
            (True, ("gap", "approximation_gap", "amortization_gap", "elbo_refitted")),
            (False, ("log_evidence", "elbo", "gap", "approximation_gap", "elbo_full", "gain_full")),
        )
    ),
    Study(
        "gap on two halves of one population",
        "gap_on_both",
        _both,
        tuple(
            Row(
                f"{name}_generalization_se",
                most=0.09,
                breaks="shared draws: too large",
                guard="a note",
            )
            for name in ("model", "encoder", "approximation")
        ),
        quick=2,
        longest=100,
    ),
    Study(
        "ELBO surgery",
        "elbo_surgery",
        _surgery,
        tuple(
            Row(f"{name}_se", breaks="fewer than about 30 particles", guard="particles are shown")
            for name in (
                "elbo",
                "distortion",
                "rate",
                "mutual_information",
                "mutual_information_upper",
                "marginal_kl",
            )
        ),
        quick=50,
    ),
    Study(
        "means over 60 data",
        "Result.quantity",
        partial(_quantities, 60),
        (
            Row("standard_error", breaks="as that of a datum", guard="`num_unreliable`"),
            Row("data_standard_error", most=0.08, breaks=_SKEWED, guard=_FEW),
            Row("difference.standard_error", breaks="the same draws", guard="never too small"),
            Row("paired.data_standard_error", most=0.08, breaks=_SKEWED, guard=_FEW),
        ),
        quick=60,
    ),
    Study(
        "means over 8 data",
        "Result.quantity",
        partial(_quantities, 8),
        (_broken("data_standard_error", 1.0, _SKEWED, _FEW),),
        quick=0,
    ),
    Study(
        "resolve",
        "resolve",
        _resolve,
        (Row("log_evidence_se", breaks=_HEAVY, guard="the datum goes up to the next rung"),),
        quick=80,
        longest=1000,
    ),
]
