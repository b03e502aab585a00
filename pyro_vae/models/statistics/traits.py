"""Models with a continuous latent of each datum: Bayesian pPCA, item response."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.models.statistics.entry import Example, Simulated, make_global_guide

__all__ = ["BAYESIAN_PPCA", "ITEM_RESPONSE"]


# --- Bayesian pPCA --------------------------------------------------------------------------------

NUM_FEATURES = 5


def loading_matrix(diagonal: Tensor, below: Tensor) -> Float[Tensor, "*draws 2 features"]:
    """Two loadings without the freedom of a rotation or sign: a zero, and two positive numbers.

    Args:
        diagonal: Positive, (..., 2).
        below: The others, row by row, (..., 2 * features - 3).
    """
    zero = torch.zeros_like(diagonal[..., :1])
    one = torch.cat([diagonal[..., :1], below[..., : NUM_FEATURES - 1]], -1)
    two = torch.cat([zero, diagonal[..., 1:], below[..., NUM_FEATURES - 1 :]], -1)
    return torch.stack([one, two], -2)


def _sample_loadings(num_components: int) -> Tensor:
    """Both rows of the loadings, or the first, (components, features)."""
    diagonal = pyro.sample(
        "diagonal", dist.HalfNormal(torch.full((num_components,), 2.0)).to_event(1)
    )
    size = NUM_FEATURES - 1 if num_components == 1 else 2 * NUM_FEATURES - 3
    below = pyro.sample("below", dist.Normal(torch.zeros(size), 1.0).to_event(1))
    if num_components == 1:
        return torch.cat([diagonal, below], -1)[..., None, :]
    return loading_matrix(diagonal, below)


def _ppca(x: Float[Tensor, "batch features"], num_components: int) -> None:
    loadings = _sample_loadings(num_components)
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        prior = dist.Normal(torch.zeros(num_components), 1.0).to_event(1)
        z = pyro.sample("z", prior)
        loc = (z[..., None] * loadings).sum(-2)
        pyro.sample("x", dist.Normal(loc, noise[..., None]).to_event(1), obs=x)


def bayesian_ppca(x: Float[Tensor, "batch features"]) -> None:
    """Two components with loadings of unknown size, and noise equal in all features."""
    _ppca(x, 2)


def one_component(x: Float[Tensor, "batch features"]) -> None:
    """A single component."""
    _ppca(x, 1)


def make_ppca_guide(model: Callable[..., Any]) -> Callable[..., Any]:
    """A normal over loadings and noise, and the exact posterior of each datum given them."""
    parameters = make_global_guide(model, "z", "x")

    def guide(x: Float[Tensor, "batch features"]) -> None:
        drawn = parameters(x)
        diagonal, below, noise = drawn["diagonal"], drawn["below"], drawn["noise"]
        if diagonal.shape[-1] == 1:
            loadings = torch.cat([diagonal, below], -1)[..., None, :]
        else:
            loadings = loading_matrix(diagonal, below)
        variance = noise[..., None, None] ** 2
        precision = torch.eye(diagonal.shape[-1]) + loadings @ loadings.mT / variance
        projected = (loadings @ x[..., None])[..., 0] / variance[..., 0]
        loc = torch.linalg.solve(precision, projected[..., None])[..., 0]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, precision_matrix=precision))

    return guide


def simulate_ppca(seed: int) -> Simulated:
    """40 data of five features."""
    random = torch.Generator().manual_seed(seed)
    diagonal, noise = torch.tensor([1.5, 1.0]), torch.tensor(0.5)
    below = torch.tensor([0.8, -0.6, 0.0, 0.5, 0.7, -0.5, 0.9])
    z = torch.randn(40, 2, generator=random)
    eps = torch.randn(40, NUM_FEATURES, generator=random)
    x = z @ loading_matrix(diagonal, below) + noise * eps
    return Simulated(x, {"diagonal": diagonal, "below": below, "noise": noise})


BAYESIAN_PPCA = Example(
    title="Bayesian pPCA",
    model=bayesian_ppca,
    simulate=simulate_ppca,
    make_guide=lambda: make_ppca_guide(bayesian_ppca),
    simpler=one_component,
    make_simpler_guide=lambda: make_ppca_guide(one_component),
    lacks="the second component",
    batch_size=20,
)


# --- item response --------------------------------------------------------------------------------

NUM_ITEMS = 8


def item_response(x: Float[Tensor, "batch items"]) -> None:
    """Right or wrong answers, by the ability of a person and two parameters of each item."""
    difficulty = pyro.sample("difficulty", dist.Normal(torch.zeros(NUM_ITEMS), 2.0).to_event(1))
    discrimination = pyro.sample(
        "discrimination", dist.LogNormal(torch.zeros(NUM_ITEMS), 0.5).to_event(1)
    )
    with pyro.plate("data", len(x)):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        logits = discrimination * (ability[..., None] - difficulty)
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def make_item_guide() -> Callable[..., Any]:
    """A normal over the items, and for each person Laplace's approximation given them."""
    items = make_global_guide(item_response, "ability", "x")

    def guide(x: Float[Tensor, "batch items"]) -> None:
        drawn = items(x)
        difficulty, discrimination = drawn["difficulty"], drawn["discrimination"]
        z = torch.zeros(torch.broadcast_shapes(x.shape[:-1], difficulty.shape[:-1]))
        curvature = torch.ones_like(z)
        for _ in range(6):  # Newton's method, on a concave function; the last one's is at the mode
            p = (discrimination * (z[..., None] - difficulty)).sigmoid()
            curvature = 1 + (discrimination**2 * p * (1 - p)).sum(-1)
            z = z + ((discrimination * (x - p)).sum(-1) - z) / curvature
        with pyro.plate("data", len(x)):
            pyro.sample("ability", dist.Normal(z, curvature.rsqrt()))

    return guide


def equal_abilities(x: Float[Tensor, "batch items"]) -> None:
    """Answers of all people are equally likely to be right."""
    difficulty = pyro.sample("difficulty", dist.Normal(torch.zeros(NUM_ITEMS), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(logits=-difficulty).to_event(1), obs=x)


def simulate_items(seed: int) -> Simulated:
    """80 people, eight items."""
    random = torch.Generator().manual_seed(seed)
    difficulty = torch.linspace(-1.5, 1.5, NUM_ITEMS)
    discrimination = torch.tensor([0.7, 1.2, 0.9, 1.6, 1.0, 1.4, 0.8, 1.1])
    ability = torch.randn(80, 1, generator=random)
    x = torch.bernoulli((discrimination * (ability - difficulty)).sigmoid(), generator=random)
    return Simulated(x, {"difficulty": difficulty, "discrimination": discrimination})


ITEM_RESPONSE = Example(
    title="item response",
    model=item_response,
    simulate=simulate_items,
    make_guide=make_item_guide,
    simpler=equal_abilities,
    make_simpler_guide=lambda: make_global_guide(equal_abilities),
    lacks="abilities",
    batch_size=40,
)
