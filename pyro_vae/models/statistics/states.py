"""Models with discrete states, which are summed out: a mixture, topics, a hidden Markov chain."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions import constraints
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyro_vae.models.statistics.entry import Example, Simulated, make_global_guide

__all__ = ["HIDDEN_MARKOV", "MIXTURE", "TOPICS"]


def sample_ordered_locs(num_components: int) -> Tensor:
    """Rising locations, so that no two orders of the components are the same; (components,)."""
    first = pyro.sample("first", dist.Normal(0.0, 3.0))
    gaps = pyro.sample("gaps", dist.LogNormal(torch.zeros(num_components - 1), 1.0).to_event(1))
    return torch.cat([first[..., None], first[..., None] + gaps.cumsum(-1)], -1)


# --- Bayesian mixture -----------------------------------------------------------------------------

NUM_COMPONENTS = 3


def bayesian_mixture(x: Float[Tensor, " batch"]) -> None:
    """Normals of one scale; the component of each datum is summed out."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((NUM_COMPONENTS,), 2.0)))
    locs = sample_ordered_locs(NUM_COMPONENTS)
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        component = pyro.sample(
            "component", dist.Categorical(weights), infer={"enumerate": "parallel"}
        )
        pyro.sample("x", dist.Normal(Vindex(locs)[..., component], scale), obs=x)


def make_mixture_guide() -> Callable[..., Any]:
    """A normal over the parameters that begins wide: from the prior's median it ends elsewhere."""
    start = {"first": torch.tensor(-3.0), "gaps": torch.full((2,), 3.0), "scale": torch.tensor(1.0)}
    return make_global_guide(bayesian_mixture, "component", "x", start=start)


def one_normal(x: Float[Tensor, " batch"]) -> None:
    """A single component."""
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def simulate_mixture(seed: int) -> Simulated:
    """300 data of three components that overlap a little."""
    random = torch.Generator().manual_seed(seed)
    weights, scale = torch.tensor([0.5, 0.3, 0.2]), torch.tensor(0.7)
    first, gaps = torch.tensor(-2.0), torch.tensor([2.5, 2.5])
    locs = torch.cat([first[None], first + gaps.cumsum(0)])
    component = torch.multinomial(weights, 300, replacement=True, generator=random)
    x = locs[component] + scale * torch.randn(300, generator=random)
    return Simulated(x, {"weights": weights, "first": first, "gaps": gaps, "scale": scale})


MIXTURE = Example(
    title="Bayesian mixture",
    model=bayesian_mixture,
    simulate=simulate_mixture,
    make_guide=make_mixture_guide,
    simpler=one_normal,
    make_simpler_guide=lambda: make_global_guide(one_normal),
    lacks="components",
    batch_size=75,
)


# --- topics ---------------------------------------------------------------------------------------

NUM_TOPICS = 3
VOCABULARY = (
    *("goal", "match", "team", "coach"),
    *("vote", "law", "party", "senate"),
    *("cell", "gene", "virus", "lab"),
)
LENGTH = 40  # words of a document
ALPHA = 0.7  # concentration of topics in a document


def topic_prior() -> Float[Tensor, "topics words"]:
    """Concentrations that give each topic a word of its own, so that topics have names."""
    prior = torch.full((NUM_TOPICS, len(VOCABULARY)), 0.5)
    for topic in range(NUM_TOPICS):
        prior[topic, 4 * topic] = 10.0
    return prior


def topic_model(counts: Float[Tensor, "batch words"]) -> None:
    """Latent Dirichlet allocation; the topic of each word is summed out."""
    topics = pyro.sample("topics", dist.Dirichlet(topic_prior()).to_event(1))
    with pyro.plate("data", len(counts)):
        alpha = torch.full((NUM_TOPICS,), ALPHA)
        proportions = pyro.sample("proportions", dist.Dirichlet(alpha))
        words = (proportions[..., None] * topics).sum(-2)
        pyro.sample("counts", dist.Multinomial(LENGTH, probs=words), obs=counts)


def make_topic_guide() -> Callable[..., Any]:
    """Dirichlets over the words of topics; over the topics of a document, Blei's E step given them.

    References:
        Blei, Ng & Jordan (2003), Latent Dirichlet allocation, for the fixed point; Hoffman, Blei,
        Wang & Paisley (2013), Stochastic variational inference, for its use on mini-batches.
    """

    def guide(counts: Float[Tensor, "batch words"]) -> None:
        concentration = pyro.param(
            "concentration", lambda: topic_prior() + 1.0, constraint=constraints.positive
        )
        topics = pyro.sample("topics", dist.Dirichlet(concentration).to_event(1))
        shape = torch.broadcast_shapes((len(counts), 1), topics.shape[:-1])
        gamma = torch.full(shape, ALPHA + LENGTH / NUM_TOPICS)
        for _ in range(20):
            share = gamma.digamma().exp()[..., None] * topics  # up to a factor of each document
            share = share / share.sum(-2, keepdim=True)
            gamma = ALPHA + (share * counts[:, None, :]).sum(-1)
        with pyro.plate("data", len(counts)):
            pyro.sample("proportions", dist.Dirichlet(gamma))

    return guide


def one_topic(counts: Float[Tensor, "batch words"]) -> None:
    """The same probabilities of words in all documents."""
    words = pyro.sample("words", dist.Dirichlet(topic_prior().mean(0)))
    with pyro.plate("data", len(counts)):
        pyro.sample("counts", dist.Multinomial(LENGTH, probs=words), obs=counts)


def simulate_topics(seed: int) -> Simulated:
    """30 documents of 40 words out of twelve."""
    random = torch.Generator().manual_seed(seed)
    topics = torch.full((NUM_TOPICS, len(VOCABULARY)), 0.02)
    for topic in range(NUM_TOPICS):
        topics[topic, 4 * topic : 4 * topic + 4] = torch.tensor([0.36, 0.2, 0.16, 0.12])
    topics = topics / topics.sum(-1, keepdim=True)
    # Normalised exponentials to a power: most documents have one topic, or two.
    uneven = -torch.rand(30, NUM_TOPICS, generator=random).log()
    proportions = uneven**1.5 / (uneven**1.5).sum(-1, keepdim=True)
    words = torch.multinomial(proportions @ topics, LENGTH, replacement=True, generator=random)
    counts = torch.zeros(50, len(VOCABULARY)).scatter_add_(1, words, torch.ones(words.shape))
    return Simulated(counts, {"topics": topics})


TOPICS = Example(
    title="topics (latent Dirichlet allocation)",
    model=topic_model,
    simulate=simulate_topics,
    make_guide=make_topic_guide,
    simpler=one_topic,
    make_simpler_guide=lambda: make_global_guide(one_topic),
    lacks="topics",
    batch_size=15,
)


# --- hidden Markov chain --------------------------------------------------------------------------

TIME = 8


def hidden_markov(x: Float[Tensor, "batch time"]) -> None:
    """Sequences whose hidden state, summed out, stays or changes; the first is a fair coin's."""
    stay = pyro.sample("stay", dist.Beta(2.0, 2.0))
    locs = sample_ordered_locs(2)
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        one: Any = torch.full_like(stay, 0.5)  # probability of state 1
        for t in pyro.markov(range(x.shape[1])):
            state = pyro.sample(f"state_{t}", dist.Bernoulli(one), infer={"enumerate": "parallel"})
            loc = Vindex(locs)[..., state.long()]
            pyro.sample(f"x_{t}", dist.Normal(loc, scale), obs=x[:, t])
            one = torch.where(state > 0, stay, 1 - stay)


def without_memory(x: Float[Tensor, "batch time"]) -> None:
    """The state is drawn anew each time."""
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    locs = sample_ordered_locs(2)
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        for t in range(x.shape[1]):
            state = pyro.sample(
                f"state_{t}", dist.Bernoulli(share), infer={"enumerate": "parallel"}
            )
            loc = Vindex(locs)[..., state.long()]
            pyro.sample(f"x_{t}", dist.Normal(loc, scale), obs=x[:, t])


def make_chain_guide(model: Callable[..., Any]) -> Callable[..., Any]:
    """A normal over the parameters of either chain."""
    return make_global_guide(model, *(f"state_{t}" for t in range(TIME)))


def simulate_chains(seed: int) -> Simulated:
    """60 sequences of eight values."""
    random = torch.Generator().manual_seed(seed)
    stay, first, gap, scale = map(torch.tensor, (0.85, -0.8, 1.8, 0.7))
    state = torch.bernoulli(torch.full((60,), 0.5), generator=random)
    values = []
    for _ in range(TIME):
        values.append(first + gap * state + scale * torch.randn(60, generator=random))
        kept = torch.bernoulli(stay.expand(60), generator=random)
        state = torch.where(kept > 0, state, 1 - state)
    truth = {"stay": stay, "first": first, "gaps": gap[None], "scale": scale}
    return Simulated(torch.stack(values, 1), truth)


HIDDEN_MARKOV = Example(
    title="state space (hidden Markov)",
    model=hidden_markov,
    simulate=simulate_chains,
    make_guide=lambda: make_chain_guide(hidden_markov),
    simpler=without_memory,
    make_simpler_guide=lambda: make_chain_guide(without_memory),
    lacks="memory",
    batch_size=20,
)
