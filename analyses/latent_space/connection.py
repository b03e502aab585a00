"""From the autoencoder to the VAE: two lines of a program, and what they change."""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor

from analyses.latent_space.work import Work, make, percent, train_programs
from analyses.pages import Rows
from pyro_vae import VAE, log_evidence
from pyro_vae.extras.latents import kl_from_standard_normal, relative_error
from pyro_vae.extras.samples import nearest_training_distance, precision_recall
from pyro_vae.inference.programs import Program, ProgramError
from pyro_vae.plots import plot_picture_rows
from pyro_vae.results import Result


def programs(networks: VAE, *, point: bool, flat: bool) -> tuple[Program, Program]:
    """One pair of networks, two choices: both True the autoencoder, both False the VAE."""

    def model(x: Tensor) -> None:
        pyro.module("decoder", networks.decoder)
        pyro.module("likelihood", networks.likelihood)
        prior = dist.Normal(x.new_zeros(networks.latent_dim), 1.0).to_event(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior.mask(False) if flat else prior)
            pyro.sample("x", networks.likelihood.distribution(networks.decoder(z)), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", networks.encoder)
        normal = networks.encode(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(normal.mean, event_dim=1) if point else normal)

    return model, guide


_SHOWN = 12  # pictures in a row
STEPS = {  # name -> (the guide is a point, the prior is flat)
    "autoencoder": (True, True),
    "with the prior N(0, I)": (True, False),
    "VAE": (False, False),
}
LINES: Rows = [
    {
        "line of the program": "model",
        "autoencoder": 'z = pyro.sample("z", prior.mask(False))',
        "VAE": 'z = pyro.sample("z", prior)',
    },
    {
        "line of the program": "guide",
        "autoencoder": 'pyro.sample("z", dist.Delta(normal.mean, event_dim=1))',
        "VAE": 'pyro.sample("z", normal)',
    },
]


@dataclass(frozen=True)
class Step:
    """What became of the networks under one pair of programs.

    Attributes:
        history: From `fit`; its `bound` says whether it is one.
        evidence: What `log_evidence` answered, or the sentence with which it refused.
        refused: Whether it refused.
        lost: The share of the variance of test pixels that reconstructions lose.
        kl: Of the normal with the codes' moments from N(0, I), in nats.
        reconstructions: Of the first test data.
        drawn: Decoded draws of N(0, I).
        own: Decoded draws of the normal with the codes' moments.
    """

    history: Result
    evidence: str
    refused: bool
    lost: float
    kl: float
    reconstructions: Tensor
    drawn: Tensor
    own: Tensor


def take_step(work: Work, networks: VAE, point: bool, flat: bool) -> Step:
    """Trains the networks under one pair of programs and looks at what they have become."""
    model, guide = programs(networks, point=point, flat=flat)
    history = train_programs(model, guide, work.x, work.settings, work.progress).history
    try:
        found = log_evidence(model, guide, work.test[:100], num_particles=200, progress=False)
        evidence, refused = str(found.quantity("log_evidence")), False
    except ProgramError as error:
        evidence, refused = str(error), True
    generator = torch.Generator().manual_seed(work.settings.seed)
    size = networks.latent_dim
    with torch.no_grad():
        noise = torch.randn(work.settings.num_samples, size, generator=generator)
        posterior = networks.encode(work.x)
        codes = posterior.mean
        if not point:
            codes = codes + posterior.stddev * torch.randn(codes.shape, generator=generator)
        root = torch.linalg.cholesky(codes.T.cov())
        again = networks.reconstruct(work.test)
        return Step(
            history,
            evidence,
            refused,
            relative_error(work.test, again)[0],
            kl_from_standard_normal(codes),
            again[:_SHOWN],
            networks.decode(noise),
            networks.decode(codes.mean(0) + noise @ root.T),
        )


def tell_connection(work: Work) -> dict[str, Any]:
    """Two lines, one after the other, and what they change."""
    start = make("VAE", work.x, work.settings)
    assert isinstance(start, VAE)
    steps = {
        name: take_step(work, copy.deepcopy(start), *choices) for name, choices in STEPS.items()
    }
    for name, step in steps.items():
        work.results[f"history_{'_'.join(re.findall('[a-zA-Z]+', name))}"] = step.history
    first, alone, vae = steps.values()
    samples = {
        "autoencoder": first.drawn,
        "autoencoder, codes' own normal": first.own,
        "with the prior N(0, I)": alone.drawn,
        "VAE": vae.drawn,
    }
    drawn = sample_rows(work, samples)
    verdict = (
        f"The VAE's reconstructions lose {percent(vae.lost)} of the variance against the "
        f"autoencoder's {percent(first.lost)}, and its codes are {vae.kl:.1f} nats from N(0, I) "
        f"where the autoencoder's are {first.kl:.1f} (with the prior alone, {alone.kl:.1f}); of "
        f"pictures decoded from N(0, I), {drawn[-1]['like data']} lie among the data against "
        f"{drawn[1]['like data']}"
    )
    refusals = [f"log_evidence of {n}: {s.evidence}." for n, s in steps.items() if s.refused]
    return {
        "connection": connection_figure(work, steps, samples),
        "connection_verdict": verdict,
        "program_lines": LINES,
        "steps": [step_row(name, step) for name, step in steps.items()],
        "drawn": drawn,
        "refusals": refusals[:1],
    }


def step_row(name: str, step: Step) -> dict[str, str]:
    """A row of the table of programs."""
    bound = step.history["bound"]
    maximised = {"objective": "a MAP objective", "lower": "the ELBO"}[str(bound.attrs["bound"])]
    return {
        "programs": name,
        "fit maximises": maximised,
        "at the end, nats": f"{float(bound[-1]):.1f}",
        "variance of test pixels lost": percent(step.lost),
        "codes from N(0, I), nats": f"{step.kl:.1f}",
        "log_evidence": "refuses" if step.refused else step.evidence.split(" (")[0],
    }


def connection_figure(
    work: Work, steps: Mapping[str, Step], samples: Mapping[str, Tensor]
) -> Figure:
    """Reconstructions at the left, new pictures at the right."""
    figure = Figure(figsize=(12.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for ax, rows, title in (
        (
            left,
            {
                "test data": work.test[:_SHOWN],
                **{name: step.reconstructions for name, step in steps.items()},
            },
            "reconstructions",
        ),
        (right, samples, "decoded draws of N(0, I), unless said otherwise"),
    ):
        names = [n.replace(" the prior", "\nthe prior").replace(", c", ",\nc") for n in rows]
        strips = torch.stack([pictures[:_SHOWN] for pictures in rows.values()])
        plot_picture_rows(strips, work.shape, names, ax, title=title, pixels=work.data.pixels)
    return figure


def spread_over(x: Tensor, count: int) -> Tensor:
    """So many rows, spread evenly: neighbours are of one writer, or of one moment of a film."""
    return x[torch.linspace(0, len(x) - 1, count).round().long()]


def sample_rows(work: Work, samples: Mapping[str, Tensor]) -> Rows:
    """How like data drawn pictures are, and how many of the data are like one; test data beside.

    Every row has as many pictures as there are data beside them: the balls shrink with their
    number.
    """
    rows = []
    count = min(work.settings.num_samples, len(work.test), len(work.x))
    data = spread_over(work.x, count)
    for name, pictures in {"test data": spread_over(work.test, count), **samples}.items():
        near = nearest_training_distance(pictures[:count], work.x, work.test)
        both = precision_recall(pictures[:count], data)
        rows.append(
            {
                "pictures": name,
                "like data": percent(both.precision, both.precision_se),
                "data like them": percent(both.recall, both.recall_se),
                "distance from data / test data's": f"{near.ratio:.2f} ± {near.ratio_se:.2f}",
            }
        )
    return rows
