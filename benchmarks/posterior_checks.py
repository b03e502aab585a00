"""Which check of a posterior sees which fault: detection rates, measured.

Guides that are exact, or wrong by a stated amount, on models whose posterior is known in closed
form; every check that the package has for a posterior; how often each speaks up. The table is
written from the numbers, and the tests check the sentences about it.

    python -m benchmarks.posterior_checks --out docs/posterior_checks.md
    python -m benchmarks.posterior_checks --quick
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from scipy.stats import norm
from threadpoolctl import threadpool_limits
from torch import Tensor

from pyro_vae.diagnostics.calibration import calibrate
from pyro_vae.diagnostics.posterior import HmcReference, khat_threshold, posterior_quality
from pyro_vae.inference.mcmc import sample_posterior
from pyro_vae.inference.programs import Program
from pyro_vae.models import LinearGaussian
from pyro_vae.progress import progress_bar
from pyro_vae.results import Result

LEVEL = 0.05
CLEAR = 0.8  # a rate that is printed bold
EXACT_RUNS = 4  # calibrations of an exact guide for each one of a wrong guide
Seen = dict[str, list[bool]]


# --- models whose posterior is known --------------------------------------------------------------


def linear_gaussian() -> LinearGaussian:
    """Three latents, four features; two latents have a posterior correlation of 0.93."""
    weight = [[1.0, -1.0, 0.0], [0.8, -1.0, 0.0], [0.3, -0.2, 1.0], [0.0, 0.0, 1.0]]
    return LinearGaussian.from_parameters(
        torch.tensor(weight, dtype=torch.float64),
        torch.tensor([0.5, -0.2, 0.0, 0.1], dtype=torch.float64),
        torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64),
    )


@dataclass(frozen=True)
class TwoModes:
    """Two latents, three features; the first latent's prior has two equal modes.

    The data hardly tell the modes apart, so each posterior is a mixture of two normals, in closed
    form, whose lighter mode holds about 0.2 to 0.5 of the mass.

    Attributes:
        apart: Half the distance of the modes, in their standard deviations.
    """

    apart: float

    _sd = 0.4
    _weight = ((0.0, 1.0), (0.0, -0.5))
    _noise = 0.6

    @property
    def locs(self) -> Float[Tensor, "modes latent"]:
        """Means of the prior's modes."""
        return torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64) * self._sd * self.apart

    @property
    def weight(self) -> Float[Tensor, "features latent"]:
        """Loadings; the third feature has a mean a quarter of its noise away at either mode."""
        hint = 0.25 * self._noise / (self._sd * self.apart)
        return torch.tensor([*self._weight, (hint, 0.3)], dtype=torch.float64)

    @property
    def covariance(self) -> Float[Tensor, "latent latent"]:
        """Of each of the prior's modes."""
        return torch.tensor([self._sd**2, 1.0], dtype=torch.float64).diag()

    def prior(self) -> dist.MixtureSameFamily:
        """The mixture that latents are drawn from."""
        modes = dist.MultivariateNormal(self.locs, self.covariance)
        return dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(2).double()), modes)

    def model(self, x: Float[Tensor, "batch features"]) -> None:
        """Sites "z" and, observed, "x"."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(z @ self.weight.mT, self._noise).to_event(1), obs=x)

    def sample(self, num_samples: int, *, generator: torch.Generator) -> Tensor:
        """Draws data from p(x)."""
        mode = torch.randint(2, (num_samples,), generator=generator)
        noise = torch.randn(num_samples, 5, generator=generator, dtype=torch.float64)
        z = self.locs[mode] + noise[:, :2] @ self.covariance.sqrt()
        return z @ self.weight.mT + self._noise * noise[:, 2:]

    def posterior(self, x: Float[Tensor, "batch features"]) -> dist.MixtureSameFamily:
        """The exact posterior."""
        return dist.MixtureSameFamily(dist.Categorical(logits=self._logits(x)), self._modes(x))

    def heavier_mode(self, x: Float[Tensor, "batch features"]) -> dist.MultivariateNormal:
        """The exact posterior without its lighter mode."""
        modes, chosen = self._modes(x), self._logits(x).argmax(-1)
        loc = modes.loc[torch.arange(len(x)), chosen]
        return dist.MultivariateNormal(loc, scale_tril=modes.scale_tril[:, 0])

    def _logits(self, x: Tensor) -> Tensor:
        noise = self._noise**2 * torch.eye(len(self.weight), dtype=torch.float64)
        spread = self.weight @ self.covariance @ self.weight.mT + noise
        return dist.MultivariateNormal(self.locs @ self.weight.mT, spread).log_prob(x[:, None])

    def _modes(self, x: Tensor) -> dist.MultivariateNormal:
        inverse = self.covariance.inverse()
        covariance = (inverse + self.weight.mT @ self.weight / self._noise**2).inverse()
        pull = self.locs @ inverse + (x @ self.weight / self._noise**2)[:, None]
        return dist.MultivariateNormal(
            pull @ covariance, covariance.expand(*pull.shape, pull.shape[-1])
        )


# --- guides ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A guide with its model.

    Attributes:
        fault: What is wrong with the guide.
        exact: Whether nothing is.
        model: The generative program.
        guide: The guide's program.
    """

    fault: str
    exact: bool
    model: Program
    guide: Program


def program(make: Callable[[Tensor], dist.Distribution]) -> Program:
    """A guide that draws "z" from what a function makes of the data."""

    def guide(x: Tensor) -> None:
        q = make(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", q)

    return guide


def linear_subjects(model: LinearGaussian) -> Iterable[Subject]:
    """The exact guide, and those that are wrong."""
    exact = model.posterior

    def off(x: Tensor) -> dist.Distribution:
        q = exact(x)
        return dist.MultivariateNormal(q.mean + 0.5 * q.stddev, scale_tril=q.scale_tril)

    def times(factor: float) -> Callable[[Tensor], dist.Distribution]:
        return lambda x: dist.MultivariateNormal(
            exact(x).mean, scale_tril=factor * exact(x).scale_tril
        )

    def heavy(x: Tensor) -> dist.Distribution:
        q = exact(x)  # five degrees of freedom: 3/5 makes the covariance that of the posterior
        return dist.MultivariateStudentT(5.0, q.mean, math.sqrt(3 / 5) * q.scale_tril)

    guides: dict[str, Callable[[Tensor], dist.Distribution]] = {
        "exact": exact,
        "mean +0.5 sd": off,
        "sd x 0.5": times(0.5),
        "sd x 2": times(2.0),
        "no correlation": lambda x: dist.Normal(exact(x).mean, exact(x).stddev).to_event(1),
        "prior": lambda x: dist.Normal(torch.zeros_like(exact(x).mean), 1.0).to_event(1),
        "Student t": heavy,
    }
    for fault, make in guides.items():
        yield Subject(fault, fault == "exact", model.model, program(make))


def bimodal_subjects(model: TwoModes, where: str) -> Iterable[Subject]:
    """The exact guide, and one that never visits the lighter mode."""
    yield Subject(f"exact, {where}", True, model.model, program(model.posterior))
    yield Subject(f"mode missing, {where}", False, model.model, program(model.heavier_mode))


# --- what each check says -------------------------------------------------------------------------

Verdict = Callable[[Result], np.ndarray]


def _p_value(name: str) -> Verdict:
    """Rejections, with the smallest p-value times their number where there are several latents."""

    def seen(found: Result) -> np.ndarray:
        p = found[name].values
        if "latent" in found[name].dims:
            p = p.min(-1) * p.shape[-1]
        return np.where(np.isnan(p), np.nan, p <= LEVEL)

    return seen


def _error(name: str) -> Verdict:
    """Whether an error is beyond its noise in any latent."""

    def seen(found: Result) -> np.ndarray:
        z = np.abs(found[name].values) / found[f"{name}_se"].values
        bound = norm.isf(LEVEL / (2 * z.shape[-1]))
        return np.where(np.isnan(z).any(-1), np.nan, (z > bound).any(-1))

    return seen


def _high_khat(found: Result) -> np.ndarray:
    return ~(found.khat.values <= khat_threshold(found.provenance["config"]["num_particles"]))


def _kl_above_noise(found: Result) -> np.ndarray:
    kl, se = found.kl_guide_posterior.values, found.kl_guide_posterior_se.values
    return kl > norm.isf(LEVEL) * se + 1e-9  # the weights of an exact guide differ by rounding


def _uncovered(found: Result) -> np.ndarray:
    away = np.abs(found.coverage.values - found.level.values[:, None]) / found.coverage_se.values
    return np.asarray(away.max() > norm.isf(LEVEL / (2 * away.size)))


BY_WEIGHTS: dict[str, Verdict] = {
    "k-hat above its threshold": _high_khat,
    "ESS < 100": lambda found: found.ess.values < 100,
    "KL(q, p) > 1.64 se": _kl_above_noise,
    "kernel Stein discrepancy": _p_value("ksd_p_value"),
    "`trust_guide` is False": lambda found: ~found.trust_guide.values,
    "`trust_weights` is False": lambda found: ~found.trust_weights.values,
}
BESIDE_HMC: dict[str, Verdict] = {
    "HMC did not converge": lambda found: ~found.reference_converged.values,
    "means": _error("mean_error"),
    "standard deviations": _error("scale_error"),
    "energy distance": _p_value("energy_p_value"),
    "MMD": _p_value("mmd_p_value"),
    "classifier": _p_value("c2st_p_value"),
    "HMC: `trust_guide` is False": lambda found: ~found.trust_guide.values,
    "HMC: `trust_weights` is False": lambda found: ~found.trust_weights.values,
}
CALIBRATION: dict[str, Verdict] = {
    "ECDF of ranks": _p_value("ecdf_p_value"),
    "chi-square of ranks": _p_value("chi_square_p_value"),
    "coverage": _uncovered,
    "VSBC": _p_value("symmetry_p_value"),
    "TARP": _p_value("tarp_p_value"),
    "rank of log p(x, z)": _p_value("log_joint_p_value"),
    "`overall_p_value`": _p_value("overall_p_value"),
}
GROUPS = {
    "By the guide's own draws and weights, per datum": BY_WEIGHTS,
    "Beside HMC, per datum": BESIDE_HMC,
    "By calibration on simulated data, per run": CALIBRATION,
}


# --- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Design:
    """How much is measured.

    Attributes:
        repeats: Batches of data.
        num_data: Data in a batch.
        num_particles: Draws of the guide for each datum.
        num_test_draws: Draws of each side for tests that compare draws.
        num_permutations: Behind their p-values.
        num_simulations: In a calibration.
        calibrations: Of each wrong guide; the exact ones get `EXACT_RUNS` times as many.
        hmc: Settings of the reference.
    """

    repeats: int = 1
    num_data: int = 150
    num_particles: int = 1000
    num_test_draws: int = 250
    num_permutations: int = 199
    num_simulations: int = 500
    calibrations: int = 25
    hmc: HmcReference = HmcReference()  # noqa: RUF009  # frozen


QUICK = Design(
    repeats=1,
    num_data=10,
    num_test_draws=150,
    num_permutations=99,
    num_simulations=300,
    calibrations=1,
    hmc=HmcReference(num_chains=8, num_warmup=100, num_samples=250),
)


class Rate(NamedTuple):
    """A share of cases, how surely it is known, and of how many it is."""

    value: float
    se: float
    cases: int


Table = dict[str, dict[str, Rate]]
"""Rates by check and fault."""


def subjects() -> dict[str, tuple[LinearGaussian | TwoModes, list[Subject]]]:
    """Models with their guides."""
    linear, near, far = linear_gaussian(), TwoModes(1.7), TwoModes(6.0)
    return {
        "linear": (linear, list(linear_subjects(linear))),
        "near": (near, list(bimodal_subjects(near, "modes near"))),
        "far": (far, list(bimodal_subjects(far, "modes far"))),
    }


def measure(
    design: Design,
    *,
    models: Sequence[str] = ("linear", "near", "far"),
    seed: int = 0,
    progress: bool = True,
) -> Table:
    """Rates at which every check speaks up, for every guide of the models.

    Guides of one model are judged on the same data and beside the same chains.
    """
    seen: dict[str, Seen] = {}
    everything = [subjects()[name] for name in models]
    total = sum(design.repeats * (1 + len(guides)) for _, guides in everything)
    with progress_bar(total, "step", show=progress, what="checks") as bar:
        for number, (model, guides) in enumerate(everything):
            for repeat in range(design.repeats):
                own = seed + 1000 * number + repeat
                x = model.sample(design.num_data, generator=torch.Generator().manual_seed(own))
                chains = _chains(model.model, x, design, own)
                bar.update()
                for subject in guides:
                    found = seen.setdefault(subject.fault, {})
                    _judge(subject, x, chains, design, own, found)
                    if not repeat:
                        _calibrate(subject, x, design, own, found)
                    bar.update()
    names = [name for group in GROUPS.values() for name in group]
    return {name: {fault: _rate(found[name]) for fault, found in seen.items()} for name in names}


def _chains(model: Program, x: Tensor, design: Design, seed: int) -> object:
    options = {key: value for key, value in vars(design.hmc).items() if key != "start"}
    return sample_posterior(model, x, seed=seed, progress=False, **options)


def _judge(
    subject: Subject, x: Tensor, chains: object, design: Design, seed: int, seen: Seen
) -> None:
    def quality(reference: object, checks: list[str]) -> Result:
        return posterior_quality(
            subject.model,
            subject.guide,
            x,
            num_particles=design.num_particles,
            reference=reference,
            checks=checks,
            seed=seed,
            progress=False,
            num_test_draws=design.num_test_draws,
            num_permutations=design.num_permutations,
        )

    _note(seen, BY_WEIGHTS, quality(None, ["stein"]))
    _note(seen, BESIDE_HMC, quality(chains, ["energy", "mmd", "classifier"]))


def _calibrate(subject: Subject, x: Tensor, design: Design, seed: int, seen: Seen) -> None:
    shapes = x[:1].expand(design.num_simulations, -1)  # calibrate takes no more from the data
    for again in range(design.calibrations * (EXACT_RUNS if subject.exact else 1)):
        found = calibrate(
            subject.model,
            subject.guide,
            shapes,
            num_simulations=design.num_simulations,
            seed=seed + 10_000 * (1 + again),
            progress=False,
        )
        _note(seen, CALIBRATION, found)


def _note(seen: Seen, checks: Mapping[str, Verdict], found: Result) -> None:
    for name, verdict in checks.items():
        values = np.atleast_1d(verdict(found)).astype(float)
        kept = seen.setdefault(name, [])
        kept += (values[~np.isnan(values)] > 0).tolist()


def _rate(seen: list[bool]) -> Rate:
    if not seen:
        return Rate(math.nan, math.nan, 0)
    value = sum(seen) / len(seen)
    return Rate(value, math.sqrt(value * (1 - value) / len(seen)), len(seen))


# --- the document ---------------------------------------------------------------------------------


def write_document(table: Table, design: Design, minutes: float) -> str:
    """The document, in Markdown.

    Args:
        table: From `measure`.
        design: What was measured.
        minutes: Processor time that it took.
    """
    data, runs = design.repeats * design.num_data, design.calibrations
    converged = [rate.cases for name in BESIDE_HMC for rate in table[name].values()]
    return TEXT.format(
        table="\n".join(_rows(table)),
        **vars(design),
        **vars(design.hmc),
        threshold=khat_threshold(design.num_particles),
        level=LEVEL,
        clear=CLEAR,
        data=data,
        exact_calibrations=EXACT_RUNS * runs,
        se_data=_largest_se(table, BY_WEIGHTS),
        se_calibration=_largest_se(table, CALIBRATION),
        three_data=_bound_of_none(data),
        three_calibration=_bound_of_none(runs),
        least_converged=min((count for count in converged if count), default=0),
        minutes=minutes,
    )


def _bound_of_none(cases: int) -> float:
    """The probability at which none of so many cases is seen with probability 0.05."""
    return 1 - 0.05 ** (1 / cases)


def _largest_se(table: Table, group: Mapping[str, Verdict]) -> float:
    return max(rate.se for name in group for rate in table[name].values())


def _rows(table: Table) -> Iterable[str]:
    faults = list(next(iter(table.values())))
    yield _row(["check", *faults])
    yield _row(["---", *["---:"] * len(faults)])
    for title, group in GROUPS.items():
        yield _row([f"*{title}*", *[""] * len(faults)])
        for name in group:
            yield _row([name, *(_cell(rate) for rate in table[name].values())])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(rate: Rate) -> str:
    if not rate.cases:
        return "--"
    text = f"{rate.value:.2f}"
    return f"**{text}**" if rate.value >= CLEAR else text


TEXT = """# Which check sees which fault

Guides that are exact, or wrong by a stated amount, on models whose posterior is known in closed
form; in the table, how often each check of a posterior speaks up. In the columns called exact this
is its rate of false alarms, in all others its rate of detection; from {clear} on it is bold.

- **Models.** A linear Gaussian model with three latents, two of which have a posterior correlation
  of 0.93 (the first seven columns); and a model with two latents whose posterior has two normal
  modes, 3.4 of their standard deviations apart (near) or 12 (far). The mode that is missing is the
  lighter one, which holds between 0.3 and 0.5 of most posteriors.
- **Faults.** All means +0.5 posterior sd; all sds halved or doubled; no correlation, but the right
  margins; the prior, so the data are ignored. Student t has the posterior's mean and covariance and
  heavier tails (5 degrees of freedom): it is no fault to speak of, at a total variation of 0.18.
- **Size.** {data} data from the model ({repeats} x {num_data}), {num_particles} draws of the guide
  for each, {num_test_draws} for tests of draws, {num_permutations} permutations or signs.
  HMC: {num_chains} chains of {num_samples} draws after {num_warmup}, the same for all guides.
  A calibration: {num_simulations} simulations; {calibrations} of each wrong guide and
  {exact_calibrations} of each exact one.
- **Levels.** Tests reject at p <= {level}; where a test is of each latent (and interval), the least
  p counts, times their number. k-hat is held to {threshold:.2f} and the ESS to 100 draws; verdicts
  have their default limits, which aim at a false alarm in 1 % of results.
- **Errors.** The binomial standard error is at most {se_data:.2f} per datum and
  {se_calibration:.2f} per calibration; 0.00 and 1.00 are within {three_data:.2f} and
  {three_calibration:.2f} of the truth with 95 % confidence. What compares with HMC is of the data
  for which it converged: -- if none did, and at least {least_converged} of {data} elsewhere.
- **False alarms.** Within these errors every test keeps its level for exact guides (the classifier
  is on the safe side), but beside HMC where modes are far apart; see below.

{table}

## Why some cells are blind

- **k-hat and ESS** say whether weighted draws can be used, not whether the guide is right. A guide
  twice too wide has weights of at most 2^3 = 8 times their mean: they correct it well. So
  `trust_weights` accepts a shifted or wide guide, and `trust_guide` does not.
- **k-hat misses sd x 0.5** for one datum in four, and for more where fewer latents are narrow: it
  sees the tail only slowly, and weighted sds are too small. `trust_weights` also asks that the
  tail of weight times squared deviation is light, and that weighted draws are at most 1.41 times as
  wide as the guide in any direction: a normal guide narrower than that has weights of infinite
  variance. So it refuses a lost correlation too, where the posterior is long and the guide is not.
- **A missing mode far away**: k-hat, ESS, KL and the Stein discrepancy look only where the guide
  draws, and there it is the posterior up to a constant. Near modes they see, for the guide's tail
  reaches into the other one.
- **HMC between far modes**: chains stay where they start. R-hat shows it, and neither guide is
  trusted, not even the exact one. But all n chains (8 by default) start in the same one of two
  equal modes with probability 2^(1 - n), in the same one of unequal modes more often. HMC then
  "converged" to a part of the posterior: the exact guide is called wrong, and the one without the
  mode may pass. More chains make it rarer.
- **Ranks and coverage of single latents** cannot see a lost correlation, for the margins are right,
  nor a guide that returns the prior, for truth and draws then come from the same distribution. The
  rank of log p(x, z) and TARP look at all latents together with the data.
- **VSBC** tests symmetry. Guides and posteriors here are symmetric, so it sees bias alone: a wrong
  width is symmetric, and so on average is a mode that is missing now on one side, now on the other.
  Elsewhere it also rejects guides of another shape without a bias, which `bias` tells apart.
- **Student t**: where `trust_guide` is False it says "too few draws to tell whether the spread is
  off", which more draws settle. Calibration pools thousands of draws and sees the shape itself.
- **KL of an exact guide** has no noise, as all weights are equal: its false alarms are 0, not 0.05.

## When to use which check

1. Always read KL and `trust_guide`: they cost a thousand draws and miss only what no draw reaches.
2. Read k-hat and ESS before using weights, and for nothing else.
3. Where several modes are possible, add `reference="hmc"`, with more chains for more modes, and
   take "did not converge" for an answer.
4. Calibrate every amortised guide, and read `overall_p_value`: of its parts, the rank of
   log p(x, z) and TARP see joint faults; ECDF and VSBC then say which latent is off, and how.
5. Energy distance, MMD and classifier only say that something differs; for how much, read
   `mean_error`, `scale_error` and `total_variation`.

## How to reproduce

    python -m benchmarks.posterior_checks --out docs/posterior_checks.md

took {minutes:.1f} minutes of processor time on one core; `--repeats` takes more data, `--quick`
fewer of everything. The script writes this page; its tests check the sentences above.
"""


def main() -> None:
    """Measures, and writes the document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, help="batches of data (and of chains)")
    parser.add_argument("--quick", action="store_true", help="few data: rates are rough")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="Markdown file to write; printed if left out")
    options = parser.parse_args()
    design = QUICK if options.quick else Design()
    if options.repeats is not None:
        if options.repeats < 1:
            parser.error("--repeats must be at least 1")
        design = replace(design, repeats=options.repeats)
    started = time.process_time()
    with threadpool_limits(1):
        torch.set_num_threads(1)
        table = measure(design, seed=options.seed)
    text = write_document(table, design, (time.process_time() - started) / 60)
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text, encoding="utf-8")
        print(f"written to {options.out}")


if __name__ == "__main__":
    main()
