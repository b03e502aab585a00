"""A decoder that has learned the data without latents: the ELBO leaves them empty, InfoVAE not."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae import fit
from pyro_vae.diagnostics.gap import elbo_surgery
from pyro_vae.inference.estimators import InfoVAE, PathwiseELBO
from pyro_vae.results import Result

BITS, FLIP = 6, 0.1


class Chain(nn.Module):
    """Each bit given the one before and z; at the start it knows the data's law but for z."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, BITS))
        self.before = nn.Parameter(torch.full((BITS,), math.log((1 - FLIP) / FLIP)))
        self.encoder = nn.Sequential(nn.Linear(BITS, 16), nn.Tanh(), nn.Linear(16, 2))

    def model(self, x: Tensor) -> None:
        pyro.module("hidden", self.hidden)
        before = pyro.param("before", self.before)
        past = torch.nn.functional.pad(2 * x[:, :-1] - 1, (1, 0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            logits = before * past + self.hidden(z)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        loc, log_scale = self.encoder(2 * x - 1).split(1, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def chains(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    x = [torch.bernoulli(torch.full((count,), 0.5), generator=generator)]
    for _ in range(BITS - 1):
        flips = torch.bernoulli(torch.full((count,), FLIP), generator=generator)
        x.append((x[-1] - flips).abs())
    return torch.stack(x, 1)


def surgery(loss: PathwiseELBO | InfoVAE, x: Tensor) -> Result:
    torch.manual_seed(0)
    pair = Chain()
    fit(pair.model, pair.guide, x, loss=loss, epochs=60, batch_size=300, learning_rate=0.03,
        evaluate_every=60, progress=False)  # fmt: skip
    return elbo_surgery(pair.model, pair.guide, x[:100], num_particles=10)


def test_the_elbo_ignores_latents_that_a_powerful_decoder_does_not_need() -> None:
    x = chains(300)
    ignored = surgery(PathwiseELBO(), x)
    kept = surgery(InfoVAE(weight=20.0), x)
    information = {
        name: found.quantity("mutual_information")
        for name, found in (("ELBO", ignored), ("InfoVAE", kept))
    }
    assert abs(information["ELBO"].value) < 0.05
    assert information["InfoVAE"].value > 1.0  # of log 100 = 4.6 nats
    # What the decoder reaches without latents is the entropy of the chain.
    entropy = math.log(2) - (BITS - 1) * (FLIP * math.log(FLIP) + (1 - FLIP) * math.log(1 - FLIP))
    spread = math.log((1 - FLIP) / FLIP) * math.sqrt((BITS - 1) * FLIP * (1 - FLIP) / 100)
    assert abs(ignored.quantity("elbo").value + entropy) < 5 * spread  # of 100 chains: 6e-7
    assert kept.quantity("distortion").value < 0.75 * ignored.quantity("distortion").value
