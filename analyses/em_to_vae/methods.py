"""The methods of `analyses.em_to_vae`: each maximises one bound and notes how far it came."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from torch import Tensor, nn

from analyses.command import Output
from analyses.standardised import Sample
from pyro_vae import VAE, GaussianMixture, fit, fit_em, log_evidence
from pyro_vae.inference.estimators import make_estimator
from pyro_vae.inference.programs import Program

Row = dict[str, float]

EXACT, GENERALISED, SAMPLED, ONLINE = "exact EM", "generalised EM", "Monte-Carlo EM", "online EM"
ENUMERATED, PER_DATUM, AMORTISED = "enumerated gradient", "per-datum variational", "amortised SVI"
IMPORTANCE = "importance bound, amortised"
SHORT = {
    "exact": EXACT,
    "sampled": SAMPLED,
    "enumerated": ENUMERATED,
    "per_datum": PER_DATUM,
    "amortised": AMORTISED,
}
METHODS = (EXACT, GENERALISED, SAMPLED, ONLINE, ENUMERATED, PER_DATUM, AMORTISED, IMPORTANCE)


@dataclass(frozen=True)
class Settings:
    """How much is done; the defaults take about a minute.

    Attributes:
        iterations: Of exact, generalised and Monte-Carlo EM; passes of online EM.
        epochs: When methods trained by `fit` are measured; the last is where they end.
        learning_rate: Of Adam for the mixture with all data at once.
        batch_learning_rate: Of Adam for the mixture with mini-batches.
        num_samples: Draws for each datum in a Monte-Carlo E step.
        batch_size: Mini-batches of online EM and of amortised guides.
        hidden: Hidden units of encoder and decoder.
        vae_epochs: As `epochs`, for the VAE.
        vae_learning_rate: Of Adam for the VAE with all data at once.
        vae_batch_learning_rate: Of Adam for the VAE with mini-batches.
        vae_particles: Of the VAE's ELBO.
        importance_particles: Of the importance bound that is maximised.
        path_particles: Of the evidence along the way.
        evidence_particles: Of the final evidence.
        refit_steps: In which q is refitted to a datum, at most.
        seed: Seeds everything.
    """

    iterations: int = 60
    epochs: tuple[int, ...] = (1, 2, 3, 5, 8, 13, 20, 30, 50, 80, 130, 200, 300, 500)
    learning_rate: float = 0.05
    batch_learning_rate: float = 0.01
    num_samples: int = 10
    batch_size: int = 64
    hidden: tuple[int, ...] = (16,)
    vae_epochs: tuple[int, ...] = (1, 3, 6, 10, 20, 40, 80, 150, 300, 600, 1000)
    vae_learning_rate: float = 0.03
    vae_batch_learning_rate: float = 5e-3
    vae_particles: int = 4
    importance_particles: int = 5
    path_particles: int = 500
    evidence_particles: int = 5000
    refit_steps: int = 1000
    seed: int = 0


TINY = Settings(
    iterations=2,
    epochs=(1, 2),
    vae_epochs=(1, 2),
    importance_particles=3,
    path_particles=10,
    evidence_particles=20,
    refit_steps=3,
)


# --- guides that know each datum ------------------------------------------------------------------


class PerDatumComponents(nn.Module):
    """A distribution over the components for each datum, with parameters of its own."""

    def __init__(self, num_data: int, num_components: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_data, num_components, dtype=torch.float64))

    def guide(self, x: Tensor) -> None:
        """As many logits as responsibilities."""
        logits = pyro.param("logits", self.logits)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})


class PerDatumNormals(nn.Module):
    """A normal over the latents of each datum, with parameters of its own."""

    def __init__(self, num_data: int, latent_dim: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(num_data, latent_dim, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.zeros(num_data, latent_dim, dtype=torch.float64))

    def guide(self, x: Tensor) -> None:
        """A location and a scale for each datum and latent."""
        loc, scale = pyro.param("loc", self.loc), pyro.param("log_scale", self.log_scale).exp()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


# --- maximising -----------------------------------------------------------------------------------


def maximize_by_em(mixture: GaussianMixture, x: Tensor, method: str, **options: Any) -> list[Row]:
    """A row for each E step of a relative of EM."""
    history = (
        fit_em(mixture, x, method=method, initialization="given", tolerance=0.0, **options)
        .require_finished()
        .history
    )
    rows = history.isel(step=history["phase"].values == "E")
    names = ("data_passes", "seconds", "bound", "log_evidence", "gap")
    return [{n: float(rows[n][i]) for n in names} for i in range(rows.sizes["step"])]


def maximize_by_gradient(
    model: Program,
    guide: Program,
    x: Tensor,
    measure: Callable[[], Row],
    epochs: Sequence[int],
    **options: Any,
) -> list[Row]:
    """A row after so many epochs each: one training, resumed from its checkpoint in between."""
    rows = []
    with TemporaryDirectory() as folder:
        for n in epochs:
            history = (
                fit(
                    model,
                    guide,
                    x,
                    epochs=n,
                    evaluate_every=epochs[-1],
                    checkpoint=Path(folder) / "run",
                    resume=n > epochs[0],
                    **options,
                )
                .require_finished()
                .history
            )
            clock = {name: float(history[name][-1]) for name in ("data_passes", "seconds")}
            rows.append(clock | measure())
    return rows


def measure_mixture(mixture: GaussianMixture, x: Tensor, q: Callable[[], Tensor]) -> Row:
    """The exact log p(x), ELBO and KL of any q over the components, per datum."""
    problem = mixture.prepare(x)
    with torch.no_grad():
        evidence, bound, gap = problem.measure_bound(problem.read(), q())
    return {
        "log_evidence": evidence / len(x),
        "bound": bound / len(x),
        "gap": gap / len(x),
    }


def measure_vae(model: Program, guide: Program, x: Tensor, num_particles: int, seed: int) -> Row:
    """The ELBO by draws, log p(x) by quadrature (one latent: it is exact), and their difference."""
    drawn = log_evidence(model, guide, x, num_particles=num_particles, seed=seed, progress=False)
    exact = log_evidence(model, None, x, method="quadrature", progress=False)
    bound, evidence = drawn.quantity("elbo"), exact.quantity("log_evidence")
    gap = evidence.difference(bound)
    return {"log_evidence": evidence.value, "bound": bound.value, "gap": gap.value}


def warm_up(mixture: GaussianMixture, x: Tensor) -> None:
    """Runs what loads parts of torch at its first use, so that no method's clock pays for it."""
    fit_em(
        mixture, x, method="generalized", initialization="given", max_iterations=1, progress=False
    ).require_finished()
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    fit(mixture.model, mixture.guide, x, loss=loss, epochs=1, progress=False).require_finished()


def maximize_mixture(
    sample: Sample, settings: Settings, out: Output
) -> tuple[dict[str, list[Row]], GaussianMixture]:
    """Every method from the same start; also the mixture that exact EM reached."""
    x, k = sample.x, sample.num_components
    start = GaussianMixture(k, x.shape[1]).double()
    start.initialize(x, sample.start, seed=settings.seed + 3)

    def copied(**arguments: Any) -> GaussianMixture:
        torch.manual_seed(settings.seed)  # the network of an amortised guide
        mixture = GaussianMixture(k, x.shape[1], **arguments).double()
        mixture.generative.load_state_dict(start.generative.state_dict())
        return mixture

    warm_up(copied(), x)
    common: dict[str, Any] = {"seed": settings.seed, "progress": out.progress}
    of_em = common | {"max_iterations": settings.iterations}
    exact = copied()
    rows = {
        EXACT: maximize_by_em(exact, x, "exact", **of_em),
        GENERALISED: maximize_by_em(copied(), x, "generalized", **of_em),
        SAMPLED: maximize_by_em(
            copied(), x, "monte_carlo", num_samples=settings.num_samples, **of_em
        ),
        ONLINE: maximize_by_em(copied(), x, "online", batch_size=settings.batch_size, **of_em),
    }
    out.say("  EM and its approximations done; now by gradients")
    loss = partial(TraceEnum_ELBO, max_plate_nesting=1)
    full = common | {"learning_rate": settings.learning_rate, "batch_size": len(x)}
    mixture = copied()
    rows[ENUMERATED] = maximize_by_gradient(
        mixture.model,
        mixture.guide,
        x,
        partial(measure_mixture, mixture, x, partial(mixture.predict_proba, x)),
        settings.epochs,
        loss=loss(),
        **full,
    )
    own, mixture = PerDatumComponents(len(x), k), copied()
    rows[PER_DATUM] = maximize_by_gradient(
        mixture.model,
        own.guide,
        x,
        partial(measure_mixture, mixture, x, partial(own.logits.softmax, 1)),
        settings.epochs,
        loss=loss(),
        **full,
    )
    mixture = copied(guide="amortized", hidden=settings.hidden)
    network = mixture.recognition
    assert network is not None
    rows[AMORTISED] = maximize_by_gradient(
        mixture.model,
        mixture.guide,
        x,
        partial(measure_mixture, mixture, x, lambda: network(x).softmax(1)),
        settings.epochs,
        loss=loss(),
        learning_rate=settings.batch_learning_rate,
        batch_size=settings.batch_size,
        **common,
    )
    return rows, exact


@dataclass(frozen=True)
class Trained:
    """A model and guide at the end of their training."""

    rows: list[Row]
    vae: VAE
    guide: Program


def maximize_vae(sample: Sample, settings: Settings, out: Output) -> dict[str, Trained]:
    """The VAE with parameters for each datum, amortised, and on the importance bound."""
    x = sample.x

    def maximize(loss: ELBO, per_datum: bool = False) -> Trained:
        torch.manual_seed(settings.seed)
        vae = VAE(x.shape[1], 1, settings.hidden, "gaussian").double()
        guide: Program = PerDatumNormals(len(x), 1).guide if per_datum else vae.guide
        rows = maximize_by_gradient(
            vae.model,
            guide,
            x,
            partial(measure_vae, vae.model, guide, x, settings.path_particles, settings.seed),
            settings.vae_epochs,
            loss=loss,
            learning_rate=settings.vae_learning_rate
            if per_datum
            else settings.vae_batch_learning_rate,
            batch_size=len(x) if per_datum else settings.batch_size,
            seed=settings.seed,
            progress=out.progress,
        )
        return Trained(rows, vae, guide)

    def elbo() -> ELBO:
        return Trace_ELBO(num_particles=settings.vae_particles, vectorize_particles=True)

    found = {PER_DATUM: maximize(elbo(), per_datum=True)}
    out.say(f"  {PER_DATUM} done")
    found[AMORTISED] = maximize(elbo())
    out.say(f"  {AMORTISED} done")
    importance = make_estimator("DReG", settings.importance_particles)
    found[IMPORTANCE] = maximize(importance)
    out.say(f"  {IMPORTANCE} done")
    return found
