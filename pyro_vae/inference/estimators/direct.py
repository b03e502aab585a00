r"""Direct estimators, which have no log-weight coefficients: analytic KL, relaxation, sleep."""

import math
from typing import Any, final

import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae.inference.estimators.base import (
    Coefficients,
    Estimator,
    Objective,
    Terms,
    WeightedTerms,
    Weights,
    is_number,
    log_p_of,
    log_q_of,
    scale_of,
    sites_without_path,
)
from pyro_vae.inference.log_weights import elbo
from pyro_vae.inference.programs import (
    Arguments,
    Program,
    ProgramError,
    ProgramStructure,
    draw_traces,
    is_delta,
    sum_dims,
    sum_sites,
    weighted_sites,
)

__all__ = ["AnalyticELBO", "SleepPhi", "StraightThrough", "WakeSleep", "closed_kl"]


@final
class AnalyticELBO(WeightedTerms):
    """The ELBO with KL(q || p) in closed form at every site where one is registered.

    After a call `sampled_sites` names the sites whose KL was drawn instead: no closed form is
    registered for their pair of distributions, or their prior depends on a latent that the guide
    draws later.

    References:
        Kingma & Welling (2014), Auto-encoding variational Bayes.
    """

    value_name = "ELBO"
    linear = True
    sampled_sites: tuple[str, ...] = ()

    def weigh(self, terms: Terms) -> tuple[Float[Tensor, " batch"], dict[str, Weights]]:
        """The mean over particles of a term of its own."""
        fixed = sites_without_path(terms.traces)
        if fixed:
            raise ProgramError(
                f"AnalyticELBO needs reparameterised latents, but the guide's site '{fixed[0]}' is "
                "not; use LeaveOneOut, ScoreFunction or VIMCO"
            )
        log_weights = terms.define("analytic", self._terms)[: self.num_particles]
        each = torch.full_like(log_weights, 1 / len(log_weights))
        return log_weights.detach().mean(0), {"analytic": each}

    def _terms(
        self, guide_trace: Trace, model_trace: Trace, count: int, structure: ProgramStructure
    ) -> Weights:
        closed = {}
        for name in structure.latents:
            kl = closed_kl(name, guide_trace, model_trace)
            if kl is not None:
                kl = kl * guide_trace.nodes[name]["scale"] if structure.scaled else kl
                kl = sum_dims(kl, structure, count)
            if kl is not None and kl.dim() == 2:  # a prior may depend on an enumerated latent
                closed[name] = kl
        self.sampled_sites = tuple(name for name in structure.latents if name not in closed)

        def is_drawn(name: str, _site: Any) -> bool:
            return name not in closed

        total = sum_sites(model_trace, structure, count, is_drawn)
        total = total - sum_sites(guide_trace, structure, count, is_drawn)
        for kl in closed.values():
            total = total - kl
        return total


@final
class StraightThrough(Objective):
    """The ELBO of discrete latents with a relaxed gradient (Gumbel-softmax, straight-through).

    Bernoulli and OneHotCategorical sites of the guide are drawn by Pyro's straight-through
    relaxations. The value is that of the discrete model. The gradient is biased: less so, and
    noisier, as the temperature falls. In that limit it is exact where log w is at most quadratic in
    each bit, as with a Gaussian likelihood of a linear decoder.

    References:
        Jang, Gu & Poole (2017), Categorical reparameterization with Gumbel-softmax;
        Maddison, Mnih & Teh (2017).
    """

    value_name = "ELBO"
    unbiased = False
    linear = True

    def __init__(
        self, num_particles: int = 1, *, temperature: float = 0.5, joint: bool | None = None
    ) -> None:
        if not (is_number(temperature) and 0 < temperature < math.inf):
            raise ValueError(f"temperature must be positive, not {temperature!r}")
        super().__init__(num_particles, joint=joint)
        self.temperature = temperature

    def _surrogate(
        self, model: Program, guide: Program, arguments: Arguments
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, ""], float]:
        structure = self.structure_of(model, guide, arguments)
        with _Relaxed(self.temperature):
            traces = draw_traces(model, guide, arguments, structure, self.num_particles)
        log_weights = log_p_of(traces, structure) - log_q_of(traces, structure)
        value = elbo(log_weights)
        return value, value.sum(), scale_of(traces, structure)


def _with_base(fn: Any, change: Any) -> Any:
    """Rebuilds a distribution around its innermost base, which `change` replaces."""
    if isinstance(fn, torch.distributions.Independent):
        base = _with_base(fn.base_dist, change)
        return base.to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        return _with_base(fn.base_dist, change).mask(fn._mask)
    return change(fn)


class _OneHot(dist.OneHotCategorical):
    """Its log-probability is linear in the value, so that a gradient passes."""

    def log_prob(self, value: Tensor) -> Tensor:
        return (value * self.logits).sum(-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_OneHot":
        return _OneHot(logits=self.logits.expand(*batch_shape, self.logits.shape[-1]))


def _linear(base: Any) -> Any:
    return _OneHot(logits=base.logits) if type(base) is dist.OneHotCategorical else base


class _Relaxed(Messenger):
    """Draws discrete latents by Pyro's straight-through relaxations."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or type(msg["fn"]).__name__ == "_Subsample":
            return
        fn = msg["fn"] = _with_base(msg["fn"], _linear)
        if msg["done"] or fn.has_rsample:
            return
        base = fn
        while isinstance(base, torch.distributions.Independent | dist.MaskedDistribution):
            base = base.base_dist
        kinds = {
            dist.Bernoulli: dist.RelaxedBernoulliStraightThrough,
            _OneHot: dist.RelaxedOneHotCategoricalStraightThrough,
        }
        if type(base) not in kinds:
            raise ProgramError(
                "StraightThrough relaxes Bernoulli and OneHotCategorical sites, but the guide's "
                f"'{msg['name']}' is a "
                f"{type(base).__name__}; write it as one of these, or use LeaveOneOut or VIMCO"
            )
        temperature = base.logits.new_tensor(self.temperature)
        msg["value"] = kinds[type(base)](temperature, logits=base.logits).rsample()
        msg["done"] = True


class _Simulated(Messenger):
    """Draws what is observed; leaves alone what is computed (poutine.uncondition does not)."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not msg["infer"].get("_deterministic"):
            msg["is_observed"], msg["done"], msg["value"] = False, False, None


@final
class SleepPhi(Objective):
    """The sleep phase: the guide learns to infer the latents of data simulated from the model.

    Its value is E_p(x,z) log q(z | x), an objective that bounds nothing; the model gets no
    gradient.

    References:
        Hinton, Dayan, Frey & Neal (1995), The wake-sleep algorithm; Bornschein & Bengio (2015).
    """

    bound_kind = "objective"
    value_name = "sleep"
    unbiased = True

    def _surrogate(
        self, model: Program, guide: Program, arguments: Arguments
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, ""], float]:
        structure = self.structure_of(model, guide, arguments)
        value, scale = _sleep(self, model, guide, arguments, structure)
        return value, value.sum(), scale


@final
class WakeSleep(Estimator):
    r"""The wake-sleep algorithm: awake the model learns, asleep the guide.

    Awake, the model follows the gradient of :math:`\mathbb E_q \log p(x, z)` at latents that the
    guide drew, its gradient of the ELBO. Asleep, the guide follows that of
    :math:`\mathbb E_{p(x, z)} \log q(z \mid x)` on as many data simulated from the model
    (`SleepPhi`), which lowers KL(p || q) over simulated data; both together are the gradient of no
    function. Both moves are made at the same parameters. Latents need not be reparameterised. The
    value is the ELBO of the wake phase.

    Note: parameters that both programs use are moved by both phases. As many data are simulated as
        x has.

    References:
        Hinton, Dayan, Frey & Neal (1995), The wake-sleep algorithm for unsupervised neural
        networks, Science 268, 1158-1161; Dayan, Hinton, Neal & Zemel (1995), The Helmholtz machine.
    """

    value_name = "ELBO"
    unbiased = False

    def coefficients(self, log_weights: Weights) -> Coefficients:
        """The wake phase, a row of the table without a term of the guide."""
        each = torch.full_like(log_weights, 1 / len(log_weights))
        return Coefficients(elbo(log_weights), each, None, torch.zeros_like(log_weights), None)

    def _surrogate(
        self, model: Program, guide: Program, arguments: Arguments
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, ""], float]:
        value, wake, scale = super()._surrogate(model, guide, arguments)
        structure = self.structure_of(model, guide, arguments)
        asleep, sleep_scale = _sleep(self, model, guide, arguments, structure)
        return value, wake + sleep_scale / scale * asleep.sum(), scale


def _sleep(
    estimator: Objective,
    model: Program,
    guide: Program,
    arguments: Arguments,
    structure: ProgramStructure,
) -> tuple[Float[Tensor, " batch"], float]:
    """Mean over simulated data of log q(z | x), attached to the guide, and the factor N/B."""
    estimator.check_replayable(structure)
    parts = [
        _log_q_of_simulated(estimator, model, guide, arguments, structure)
        for _ in range(estimator.num_particles)
    ]
    return torch.cat([log_q for log_q, _ in parts]).mean(0), parts[0][1]


def _log_q_of_simulated(
    estimator: Objective,
    model: Program,
    guide: Program,
    arguments: Arguments,
    structure: ProgramStructure,
) -> tuple[Weights, float]:
    """Log q at the latents of one simulated set, and the factor N/B."""
    args, kwargs = arguments
    name = type(estimator).__name__
    with torch.no_grad():
        simulated = poutine.trace(_Simulated()(model)).get_trace(*args, **kwargs)
    x = simulated.nodes[structure.observed[0]]["value"]
    if len(structure.observed) != 1 or len(args) != 1 or kwargs or args[0].shape != x.shape:
        raise ProgramError(
            f"{name} puts what the model simulates at its one observed site in place of x, so the "
            f"programs must take x alone and observe it at one site, not at {structure.observed}"
        )
    replayed = poutine.trace(poutine.replay(guide, trace=simulated)).get_trace(x.to(args[0].dtype))
    if any(s["infer"].get("is_auxiliary") for s in weighted_sites(replayed).values()):
        raise ProgramError(
            f"{name} needs log q at latents of the model's choice, which a guide with auxiliary "
            "sites cannot give"
        )
    return sum_sites(replayed, structure, 1), scale_of([(replayed, simulated, 1)], structure)


def closed_kl(
    name: str, guide: Trace, model: Trace, *, by_dimension: bool = False
) -> Tensor | None:
    """KL(q || p) of a latent site in closed form, given the latents above it.

    Args:
        name: The site.
        guide: A trace of the guide.
        model: A trace of the model at the guide's latents.
        by_dimension: Of each dimension of the event by itself, for sites whose distributions are
            `Independent` over one dim.

    Returns:
        In nats, with the site's mask and without its scale, of the site's batch shape (and its
        dimensions); None where log q - log p must be drawn: no form is registered, model and guide
        mask differently (the difference is then no KL), or the prior depends on latents that the
        guide draws later (which then depend on this site's draw).
    """
    q, p = guide.nodes[name], model.nodes[name]
    guide_order, model_order = list(weighted_sites(guide)), list(weighted_sites(model))
    above = set(model_order[: model_order.index(name)]).intersection(guide_order)
    if not above <= set(guide_order[: guide_order.index(name)]):
        return None
    if not _same_mask(q["mask"], p["mask"]) or _is_masked(q["fn"]) or _is_masked(p["fn"]):
        return None  # Pyro's KL of masked distributions takes what both masks leave
    if is_delta(q["fn"]):  # Pyro's KL leaves out the Jacobian that an autoguide's Delta carries
        return None
    mask = q["mask"]
    pair = (q["fn"], p["fn"])
    if by_dimension:
        pair = (q["fn"].base_dist, p["fn"].base_dist)
        mask = mask[..., None] if isinstance(mask, Tensor) else mask
    try:
        return scale_and_mask(kl_divergence(*pair), 1.0, mask)
    except NotImplementedError:  # this pair has no closed form
        return None


def _same_mask(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))


def _is_masked(fn: Any) -> bool:
    while not isinstance(fn, MaskedDistribution):
        if not hasattr(fn, "base_dist"):
            return False
        fn = fn.base_dist
    return True
