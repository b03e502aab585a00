r"""The posteriors of posteriordb as Pyro models, with the reference draws of each.

Every model takes its data as keywords and is run with `joint=True`. Recursions in time are solved
in a logarithmic number of tensor operations, differential equations by Runge and Kutta's classical
method in steps that move no posterior by a hundredth of its sd.

References:
    Magnusson, Torgander, Bürkner, Zhang, Carpenter & Vehtari (2024), posteriordb: Testing,
    benchmarking and developing Bayesian inference algorithms, arXiv:2407.04967.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float, Float64
from pyro.distributions import constraints
from torch import Tensor

__all__ = ["NAMES", "RealPosterior", "load_posterior"]

Draws = Mapping[str, Tensor]


@dataclass(frozen=True)
class RealPosterior:
    """A model with its data, and what thinned NUTS draws say of its posterior.

    Attributes:
        name: A short one.
        model: Takes `data` as keywords; all latents are global.
        data: Its arguments.
        names: Of the parameters.
        draws: Every tenth reference draw, `[1000, parameters]`.
        mean: Of all 10,000 reference draws.
        sd: Of the same.
        report: The parameters of `names`, `[draws, parameters]`, of draws by site `[draws, ...]`.
    """

    name: str
    model: Callable[..., Any]
    data: dict[str, Tensor]
    names: tuple[str, ...]
    draws: Float64[Tensor, "draws parameters"]
    mean: Float64[Tensor, " parameters"]
    sd: Float64[Tensor, " parameters"]
    report: Callable[[Draws], Float[Tensor, "draws parameters"]]


def load_posterior(name: str) -> RealPosterior:
    """One of `NAMES`, read from the folder ``posteriordb`` of `PYRO_VAE_DATA`."""
    row = _ROWS[name]
    folder = Path(os.environ.get("PYRO_VAE_DATA", "data")) / "posteriordb"
    described = json.loads((folder / f"{row.file}.json").read_text(encoding="utf-8"))
    given = {k: torch.as_tensor(np.asarray(v, dtype=float)) for k, v in described["data"].items()}
    with np.load(folder / f"{row.file}.npz") as kept:
        names, draws = tuple(map(str, kept["names"])), torch.from_numpy(kept["draws"]).double()
    moments = described["reference"]
    mean, sd = (torch.tensor([moments[n][k] for n in names]).double() for k in ("mean", "sd"))
    data = row.data(given)
    return RealPosterior(
        name, row.model, data, names, draws, mean, sd, lambda found: row.report(found, data)
    )


@dataclass(frozen=True)
class _Row:
    file: str
    model: Callable[..., Any]
    data: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    report: Callable[[Draws, dict[str, Tensor]], Tensor]


def _keep(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda given: {name.lower(): given[name] for name in names}


def _sites(*names: str) -> Callable[[Draws, Any], Tensor]:
    """The sites one after the other."""

    def report(draws: Draws, _data: Any) -> Tensor:
        return torch.cat([draws[name].reshape(len(draws[name]), -1) for name in names], -1)

    return report


def _flat(support: Any, size: int | None = None, batch: tuple[int, ...] = ()) -> Any:
    return dist.ImproperUniform(support, batch, () if size is None else (size,))


# --- regressions ----------------------------------------------------------------------------------


def _regression(x: Tensor, y: Tensor, beta: Tensor, sigma: Tensor) -> None:
    pyro.sample("y", dist.Normal(beta @ x.T, sigma[..., None]).to_event(1), obs=y)


def flat_regression(x: Tensor, y: Tensor) -> None:
    """Flat coefficients and noise."""
    beta = pyro.sample("beta", _flat(constraints.real, x.shape[1]))
    _regression(x, y, beta, pyro.sample("sigma", _flat(constraints.positive)))


def cauchy_regression(x: Tensor, y: Tensor) -> None:
    """Flat coefficients, half-Cauchy noise."""
    beta = pyro.sample("beta", _flat(constraints.real, x.shape[1]))
    _regression(x, y, beta, pyro.sample("sigma", dist.HalfCauchy(torch.tensor(2.5))))


def normal_regression(x: Tensor, y: Tensor) -> None:
    """Normal coefficients, half-normal noise."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), 10.0).to_event(1))
    _regression(x, y, beta, pyro.sample("sigma", dist.HalfNormal(torch.tensor(10.0))))


def diamonds(x: Tensor, y: Tensor) -> None:
    """Twenty-four nearly collinear columns, and an intercept of its own."""
    b = pyro.sample("b", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    intercept = pyro.sample("Intercept", dist.StudentT(3.0, torch.tensor(8.0), 10.0))
    sigma = pyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3.0, torch.tensor(0.0), 10)))
    mean = intercept[..., None] + b @ x.T
    pyro.sample("y", dist.Normal(mean, sigma[..., None]).to_event(1), obs=y)


def kilpisjarvi(
    x: Tensor, y: Tensor, pmualpha: Tensor, psalpha: Tensor, pmubeta: Tensor, psbeta: Tensor
) -> None:
    """A line through years that are not centred: slope and intercept correlate by -0.99999."""
    alpha = pyro.sample("alpha", dist.Normal(pmualpha, psalpha))
    beta = pyro.sample("beta", dist.Normal(pmubeta, psbeta))
    sigma = pyro.sample("sigma", _flat(constraints.positive))
    mean = alpha[..., None] + beta[..., None] * x
    pyro.sample("y", dist.Normal(mean, sigma[..., None]).to_event(1), obs=y)


def _design(*columns: Tensor) -> Tensor:
    return torch.stack(torch.broadcast_tensors(torch.ones(()).double(), *columns), -1)


def _earnings(g: dict[str, Tensor]) -> dict[str, Tensor]:
    x = _design(g["height"], g["male"], g["height"] * g["male"])
    return {"x": x, "y": g["earn"].log()}


def _mesquite(g: dict[str, Tensor]) -> dict[str, Tensor]:
    wide, narrow, high = g["diam1"], g["diam2"], g["canopy_height"]
    logs = (wide * narrow * high, wide * narrow, wide / narrow, g["total_height"], g["density"])
    return {"x": _design(*(c.log() for c in logs), g["group"]), "y": g["weight"].log()}


def _nes(g: dict[str, Tensor]) -> dict[str, Tensor]:
    ages = [(g["age_discrete"] == age).double() for age in (2, 3, 4)]
    x = _design(g["real_ideo"], g["race_adj"], *ages, g["educ1"], g["gender"], g["income"])
    return {"x": x, "y": g["partyid7"]}


def _diamonds(g: dict[str, Tensor]) -> dict[str, Tensor]:
    x = g["X"][:, 1:]
    return {"x": x - x.mean(0), "y": g["Y"]}


# --- time series ----------------------------------------------------------------------------------


def linear_recursion(
    coefficient: Float[Tensor, "*chains"], inputs: Float[Tensor, "*chains time"]
) -> Float[Tensor, "*chains time"]:
    """Solves e_t = input_t + coefficient e_{t-1} from e_0 = 0, by doubling."""
    total, power, reach = inputs, coefficient[..., None], 1
    while reach < inputs.shape[-1]:
        earlier = torch.nn.functional.pad(total[..., :-reach], (reach, 0))
        total, power, reach = total + power * earlier, power.square(), 2 * reach
    return total


def arma(y: Tensor) -> None:
    """Autoregression and moving average, of order one each."""
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 10.0))
    phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 2.0))
    theta = pyro.sample("theta", dist.Normal(torch.tensor(0.0), 2.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(torch.tensor(2.5)))
    before = torch.cat([mu[..., None], y[:-1].expand(*mu.shape, -1)], -1)
    errors = linear_recursion(-theta, y - mu[..., None] - phi[..., None] * before)
    pyro.sample("y", dist.Normal(y - errors, sigma[..., None]).to_event(1), obs=y)


def garch(y: Tensor, sigma1: Tensor) -> None:
    """A variance that depends on the last deviation and the last variance."""
    mu = pyro.sample("mu", _flat(constraints.real))
    alpha0 = pyro.sample("alpha0", _flat(constraints.positive))
    alpha1 = pyro.sample("alpha1", _flat(constraints.unit_interval))
    beta1 = pyro.sample("beta1", _flat(constraints.interval(0.0, 1 - alpha1), batch=alpha1.shape))
    shocks = alpha0[..., None] + alpha1[..., None] * (y[:-1] - mu[..., None]).square()
    first = sigma1.square().expand(*mu.shape, 1)
    variance = linear_recursion(beta1, torch.cat([first, shocks], -1))
    pyro.sample("y", dist.Normal(mu[..., None], variance.sqrt()).to_event(1), obs=y)


def hmm_drive(u: Tensor, v: Tensor, alpha: Tensor) -> None:
    """Two hidden states, summed out by Pyro's parallel-scan HMM; rates in rising order."""
    theta = pyro.sample("theta", dist.Dirichlet(alpha).to_event(1))
    rates = []
    for name in ("phi", "lambda"):
        rate = pyro.sample(name, _flat(constraints.positive_ordered_vector, 2))
        pyro.factor(
            f"{name}_prior", dist.Normal(torch.tensor([0.0, 3.0]), 1.0).log_prob(rate).sum(-1)
        )
        rates.append(rate)
    both = torch.stack(rates, -1)[..., None, :, :]  # [*chains, time, state, what is seen]
    seen = dist.Exponential(both, validate_args=False).to_event(1)
    start = torch.full((2,), -math.log(2.0)).double()
    steps = theta.log()[..., None, :, :]
    hidden = dist.DiscreteHMM(start, steps, seen, duration=len(u), validate_args=False)
    pyro.sample("x", hidden, obs=torch.stack([u, v], -1))


# --- Gaussian processes ---------------------------------------------------------------------------


def _kernel(x: Tensor, alpha: Tensor, rho: Tensor) -> Tensor:
    alpha, rho = alpha[..., None, None], rho[..., None, None]
    return alpha.square() * (-0.5 * ((x[:, None] - x) / rho).square()).exp()


def _gp_values(x: Tensor, alpha: Tensor, rho: Tensor, f_tilde: Tensor) -> Tensor:
    covariance = _kernel(x, alpha, rho) + 1e-10 * torch.eye(len(x)).to(x)
    chol, failed = torch.linalg.cholesky_ex(covariance)
    chol = torch.where((failed > 0)[..., None, None], math.nan, chol)  # the density is then zero
    return (chol @ f_tilde[..., None])[..., 0]


def _scales() -> tuple[Tensor, Tensor]:
    rho = pyro.sample("rho", dist.Gamma(torch.tensor(25.0), 4.0))
    return rho, pyro.sample("alpha", dist.HalfNormal(torch.tensor(2.0)))


def gp_poisson(x: Tensor, k: Tensor) -> None:
    """Counts whose log rate is a Gaussian process."""
    rho, alpha = _scales()
    f_tilde = pyro.sample("f_tilde", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
    rate = _gp_values(x, alpha, rho, f_tilde).exp()
    pyro.sample("k", dist.Poisson(rate, validate_args=False).to_event(1), obs=k)


def gp_regression(x: Tensor, y: Tensor) -> None:
    """Values of a Gaussian process with noise of variance sigma."""
    rho, alpha = _scales()
    sigma = pyro.sample("sigma", dist.HalfNormal(torch.tensor(1.0)))
    noise = sigma[..., None, None] * torch.eye(len(x)).to(x)
    covariance = _kernel(x, alpha, rho) + noise
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), covariance), obs=y)


def _gp_report(draws: Draws, data: dict[str, Tensor]) -> Tensor:
    rho, alpha = draws["rho"], draws["alpha"]
    f = _gp_values(data["x"], alpha, rho, draws["f_tilde"])
    return torch.cat([rho[..., None], alpha[..., None], f], -1)


# --- differential equations -----------------------------------------------------------------------


def runge_kutta(
    slope: Callable[[int, Tensor], Tensor], state: Tensor, step: float, num_steps: int
) -> list[Tensor]:
    """States after each step of the classical method; `slope` is told the half step it is at."""
    states = []
    for n in range(num_steps):
        k1 = slope(2 * n, state)
        k2 = slope(2 * n + 1, state.add(k1, alpha=step / 2))
        k3 = slope(2 * n + 1, state.add(k2, alpha=step / 2))
        k4 = slope(2 * n + 2, state.add(k3, alpha=step))
        state = state.add(k1 + k4, alpha=step / 6).add(k2 + k3, alpha=step / 3)
        states.append(state)
    return states


ELIMINATION_STEPS = 1  # between measurements, half a day apart
PREDATION_STEPS = 2  # a year


def one_compartment(times: Tensor, c_hat: Tensor, d: Tensor, v: Tensor) -> None:
    """A drug absorbed at first order and eliminated after Michaelis and Menten.

    What is absorbed is known in closed form, so that the equation is one of what is eliminated.
    """
    k_a, k_m, v_m, sigma = (
        pyro.sample(name, dist.HalfCauchy(torch.tensor(1.0)))
        for name in ("k_a", "K_m", "V_m", "sigma")
    )
    step = 0.5 / ELIMINATION_STEPS
    num_steps = len(times) * ELIMINATION_STEPS
    grid = torch.arange(2 * num_steps + 1).to(times) * step / 2
    absorbed = d / v * (1 - (-k_a[..., None] * grid).exp())
    fastest = v_m / v
    shifted, product = (absorbed + k_m[..., None]).unbind(-1), fastest * k_m

    def slope(half_step: int, eliminated: Tensor) -> Tensor:
        return fastest - product / (shifted[half_step] - eliminated)

    gone = runge_kutta(slope, torch.zeros_like(k_a), step, num_steps)
    left = absorbed[..., 2::2] - torch.stack(gone, -1)
    mean = left[..., ELIMINATION_STEPS - 1 :: ELIMINATION_STEPS].log()
    noise = dist.LogNormal(mean, sigma[..., None], validate_args=False)
    pyro.sample("C_hat", noise.to_event(1), obs=c_hat)


def lotka_volterra(y_init: Tensor, y: Tensor) -> None:
    """Hares and lynxes, a year apart; solved in logarithms, in which the slopes are bounded."""
    loc, scale = torch.tensor([1.0, 0.05, 1.0, 0.05]), torch.tensor([0.5, 0.05, 0.5, 0.05])
    positive = constraints.positive
    theta = pyro.sample("theta", _flat(positive, 4))
    pyro.factor("theta_prior", dist.Normal(loc, scale).log_prob(theta).sum(-1))
    z_init = pyro.sample(
        "z_init", dist.LogNormal(torch.full((2,), math.log(10.0)), 1.0).to_event(1)
    )
    sigma = pyro.sample("sigma", dist.LogNormal(torch.full((2,), -1.0), 1.0).to_event(1))
    growth = theta[..., 0::2] * torch.tensor([1.0, -1.0])
    meeting = theta[..., 1::2] * torch.tensor([-1.0, 1.0])

    def slope(_half_step: int, log_z: Tensor) -> Tensor:
        return torch.addcmul(growth, meeting, log_z.flip(-1).exp())

    log_z = runge_kutta(slope, z_init.log(), 1 / PREDATION_STEPS, len(y) * PREDATION_STEPS)
    mean = torch.stack([z_init.log(), *log_z[PREDATION_STEPS - 1 :: PREDATION_STEPS]], -2)
    noise = dist.LogNormal(mean, sigma[..., None, :], validate_args=False).to_event(2)
    pyro.sample("y", noise, obs=torch.cat([y_init[None], y]))


def _hmm_report(draws: Draws, _data: Any) -> Tensor:
    theta = draws["theta"].flatten(-2)
    return torch.cat([theta, draws["phi"], draws["lambda"]], -1)


_BETA = _sites("beta", "sigma")
_ROWS = {
    "arma": _Row("arma-arma11", arma, _keep("y"), _sites("mu", "phi", "theta", "sigma")),
    "garch": _Row(
        "garch-garch11",
        garch,
        _keep("y", "sigma1"),
        _sites("mu", "alpha0", "alpha1", "beta1"),
    ),
    "gp_pois_regr": _Row("gp_pois_regr-gp_pois_regr", gp_poisson, _keep("x", "k"), _gp_report),
    "gp_regr": _Row(
        "gp_pois_regr-gp_regr", gp_regression, _keep("x", "y"), _sites("rho", "alpha", "sigma")
    ),
    "logearn_interaction": _Row("earnings-logearn_interaction", flat_regression, _earnings, _BETA),
    "logmesquite_logvas": _Row("mesquite-logmesquite_logvas", flat_regression, _mesquite, _BETA),
    "nes": _Row("nes1980-nes", flat_regression, _nes, _BETA),
    "kilpisjarvi": _Row(
        "kilpisjarvi_mod-kilpisjarvi",
        kilpisjarvi,
        _keep("x", "y", "pmualpha", "psalpha", "pmubeta", "psbeta"),
        _sites("alpha", "beta", "sigma"),
    ),
    "one_comp_mm": _Row(
        "one_comp_mm_elim_abs-one_comp_mm_elim_abs",
        one_compartment,
        _keep("times", "C_hat", "D", "V"),
        _sites("k_a", "K_m", "V_m", "sigma"),
    ),
    "blr": _Row("sblrc-blr", normal_regression, _keep("X", "y"), _BETA),
    "diamonds": _Row("diamonds-diamonds", diamonds, _diamonds, _sites("b", "Intercept", "sigma")),
    "kidscore_momhsiq": _Row(
        "kidiq-kidscore_momhsiq",
        cauchy_regression,
        lambda g: {"x": _design(g["mom_hs"], g["mom_iq"]), "y": g["kid_score"]},
        _BETA,
    ),
    "hmm_drive_0": _Row(
        "bball_drive_event_0-hmm_drive_0", hmm_drive, _keep("u", "v", "alpha"), _hmm_report
    ),
    "lotka_volterra": _Row(
        "hudson_lynx_hare-lotka_volterra",
        lotka_volterra,
        _keep("y_init", "y"),
        _sites("theta", "z_init", "sigma"),
    ),
}
NAMES = tuple(_ROWS)
