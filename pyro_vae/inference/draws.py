"""Draws from the guide, with everything that the diagnostics of a posterior read off them."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from pyro.poutine import Trace
from torch import Tensor

from pyro_vae.checks import check_count, check_max_memory
from pyro_vae.data import Seed, as_seed
from pyro_vae.inference.log_weights import effective_sample_size
from pyro_vae.inference.programs import (
    LabelledSites,
    Pair,
    Program,
    ProgramStructure,
    label_sites,
    particles_at_once,
    program_scope,
    site_log_probs,
    site_values,
    split_count,
    sum_traces,
    tool,
)
from pyro_vae.results import ArvizGroups, shapes_text

__all__ = [
    "PosteriorDraws",
    "draw_posterior",
    "draws_of",
    "flat_latents",
    "labelled_draws",
    "latent_names",
    "systematic_index",
]


@dataclass(frozen=True, repr=False)
class PosteriorDraws:
    """Draws of the latents from the guide, per datum.

    Attributes:
        latents: By site, `[draws, batch, inner plates, event]`; without batch if joint.
        log_joint: log p(x, z) in nats, `[draws, batch]`; batch 1 if joint.
        log_guide: log q(z | x) in nats, `[draws, batch]`.
        log_likelihood: By observed site, log p(x | z) in nats, `[draws, batch, inner plates]`;
            `[draws, plates]` if joint. Empty where discrete latents were summed out.
        structure: What `inspect_programs` found.
        seed: The seed of the draws.
        sites: Names of dims, observed values and masks.
        weights_ess: Effective sample size of the weights that the draws were resampled with,
            `[batch]`; None for draws as the guide made them.
    """

    latents: dict[str, Tensor]
    log_joint: Float[Tensor, "draws batch"]
    log_guide: Float[Tensor, "draws batch"]
    log_likelihood: dict[str, Tensor]
    structure: ProgramStructure
    seed: int | None
    sites: LabelledSites = field(default_factory=LabelledSites)
    weights_ess: Float[Tensor, " batch"] | None = None

    def __repr__(self) -> str:
        count, data = self.log_joint.shape
        joint = self.structure.batch_dim is None
        whose = " joint draws" if joint else f" draws for each of {data:,} data"
        if self.weights_ess is None:
            ess, how = effective_sample_size(self.log_weights), "from the guide"
        else:
            ess, how = self.weights_ess, "resampled by their weights"
        ends = f"{float(ess.min()):.4g} to {float(ess.max()):.4g} of a datum"
        lines = [
            f"PosteriorDraws: {count:,}{whose}, {how}, seed {self.seed}",
            f"latents: {shapes_text(self.latents)}",
            f"data: {shapes_text(self.sites.observed)}",
            f"effective draws by the weights: {f'{float(ess[0]):.4g}' if joint else ends}",
        ]
        return "\n  ".join(lines)

    @property
    def log_weights(self) -> Float[Tensor, "draws batch"]:
        """Log importance weights log p(x, z) - log q(z | x), in nats."""
        return self.log_joint - self.log_guide

    @property
    def sample_dims(self) -> tuple[str, ...]:
        """Names of the dims of the draws."""
        return ("sample",)

    def resampled(self, num_draws: int | None = None, *, seed: Seed = 0) -> "PosteriorDraws":
        r"""Draws of the posterior: these draws, taken again in proportion to their weights.

        Systematic resampling with the plain weights, each datum by itself, or all together if
        joint, then shuffled: draw k is taken :math:`M w_k / \sum_j w_j` times in expectation, and
        never a whole time more or less.

        Args:
            num_draws: How many to take, M; as many as there are if left out.
            seed: Of the resampling.

        Raises:
            ValueError: If the weights of a datum are all zero, or not finite; says of which.

        Note: repeated draws are no new ones: how much they are worth is `weights_ess`, not what
        diagnostics of chains make of them. Where k-hat is bad the result is no posterior either.

        References:
            Kitagawa (1996), Monte Carlo filter and smoother for non-Gaussian nonlinear state space
            models (stratified resampling, its deterministic variant).
        """
        seed = as_seed(seed)
        count = len(self.log_joint) if num_draws is None else num_draws
        check_count("num_draws", count)
        index = systematic_index(self.log_weights.detach().double(), count, seed)

        def taken(values: Tensor) -> Tensor:
            if self.structure.batch_dim is None:
                return values[index[:, 0]]
            return values[index, torch.arange(index.shape[1], device=index.device)]

        return replace(
            self,
            latents={name: taken(value) for name, value in self.latents.items()},
            log_joint=taken(self.log_joint),
            log_guide=taken(self.log_guide),
            log_likelihood={name: taken(value) for name, value in self.log_likelihood.items()},
            seed=seed,
            weights_ess=effective_sample_size(self.log_weights),
        )

    def arviz_groups(self) -> ArvizGroups:
        """What `pyro_vae.results.to_arviz` reads."""
        joint, sites = self.structure.batch_dim is None, self.sites
        per_draw = ("sample",) if joint else ("sample", "datum")

        def column(values: Tensor) -> tuple[tuple[str, ...], Tensor]:
            return per_draw, values[:, 0] if joint else values

        weights_ess = self.weights_ess
        if weights_ess is None:
            weights_ess = effective_sample_size(self.log_weights)
        groups: dict[str, dict[str, Any]] = {
            "posterior": labelled_draws(self.latents, sites),
            "sample_stats": {
                "lp": column(self.log_joint),
                "log_q": column(self.log_guide),
                "log_weight": column(self.log_weights),
            },
            "log_likelihood": labelled_draws(self.log_likelihood, sites),
            **sites.arviz_groups(),
            "fit": {"weights_ess": (per_draw[1:], weights_ess[0] if joint else weights_ess)},
        }
        attrs = {
            "draws_from": "guide" if self.weights_ess is None else "importance resampling",
            **({} if self.seed is None else {"seed": self.seed}),
            **_notes(self.structure),
        }
        return ArvizGroups({name: group for name, group in groups.items() if group}, attrs)


@tool
def draw_posterior(
    model: Program,
    guide: Program,
    x: Any,
    *,
    num_draws: int = 1000,
    joint: bool | None = None,
    seed: Seed | None = 0,
    max_memory: float = 0.5,
) -> PosteriorDraws:
    r"""Draws the latents of each datum from the guide, with their log weights.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior.
        x: The data; a tuple for several arguments, a dict for keywords.
        num_draws: Draws for each datum.
        joint: True for one posterior on the full data; None for that where latents are global.
        seed: Seeds the draws; the caller's random state is left alone.
        max_memory: Roughly the memory that the draws made at once may take, in GiB.

    Raises:
        ProgramError: If the pair has no log weights; see `log_weights`.
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from pyro_vae import LinearGaussian
        >>> model = LinearGaussian(data_dim=3, latent_dim=2)
        >>> found = draw_posterior(model.model, model.exact_guide, torch.zeros(5, 3), num_draws=7)
        >>> found.latents["z"].shape, found.log_weights.shape
        (torch.Size([7, 5, 2]), torch.Size([7, 5]))
    """
    seed = as_seed(seed)
    check_count("num_draws", num_draws)
    check_max_memory(max_memory)
    with program_scope(seed):
        pair = Pair.inspect(model, guide, x, joint=joint, num_particles=min(num_draws, 2))
    return draws_of(pair, num_draws=num_draws, seed=seed, max_memory=max_memory)


def draws_of(pair: Pair, *, num_draws: int, seed: int | None, max_memory: float) -> PosteriorDraws:
    """What `draw_posterior` does, of a pair that was inspected."""
    structure = pair.structure
    with torch.no_grad(), program_scope(seed):
        most = particles_at_once(num_draws, max_memory, pair.bytes_of_particle)
        parts = [_read(pair.draws(n), structure, seed) for n in split_count(num_draws, most)]
    return PosteriorDraws(
        _join([part.latents for part in parts]),
        torch.cat([part.log_joint for part in parts]),
        torch.cat([part.log_guide for part in parts]),
        _join([part.log_likelihood for part in parts]),
        structure,
        seed,
        parts[0].sites,
    )


def flat_latents(latents: dict[str, Tensor], *, joint: bool) -> Float[Tensor, "draws batch dim"]:
    """All latents of a datum as one vector, in the order of the sites; batch 1 if joint."""
    outer = 1 if joint else 2
    flat = [value.reshape(*value.shape[:outer], -1) for value in latents.values()]
    dtype = next((v.dtype for v in flat if v.is_floating_point()), torch.get_default_dtype())
    vectors = torch.cat([value.to(dtype) for value in flat], -1)
    return vectors[:, None] if joint else vectors


def latent_names(latents: dict[str, Tensor], *, joint: bool) -> list[str]:
    """Names for the entries of `flat_latents`: `z[0]`, `w[1,2]`, or `z` for a single one."""
    names = []
    for name, value in latents.items():
        shape = value.shape[1 if joint else 2 :]
        if math.prod(shape) == 1:
            names.append(name)
        else:
            names += [f"{name}[{','.join(map(str, index))}]" for index in np.ndindex(*shape)]
    return names


def labelled_draws(
    values: dict[str, Tensor], sites: LabelledSites, sample: tuple[str, ...] = ("sample",)
) -> dict[str, tuple[tuple[str, ...], Tensor]]:
    """Draws by site with the names of their first dims, as `ArvizGroups` holds them."""
    return {name: ((*sample, *sites.dims[name]), value) for name, value in values.items()}


def _read(
    traces: list[tuple[Trace, Trace, int]], structure: ProgramStructure, seed: int | None
) -> PosteriorDraws:
    guides = [(guide, count) for guide, _, count in traces]
    models = [(model, count) for _, model, count in traces]
    latents = _join(
        [{n: site_values(model, n, structure) for n in structure.latents} for model, _ in models]
    )
    likelihood: dict[str, Tensor] = {}
    if not structure.enumerated:
        likelihood = _join(
            [
                {n: site_log_probs(model, n, structure, count) for n in structure.observed}
                for model, count in models
            ]
        )
    log_joint, log_guide = sum_traces(models, structure), sum_traces(guides, structure)
    log_guide = log_guide.to(log_joint).expand_as(log_joint)
    sites = label_sites(models[0][0], structure, models[0][1])
    return PosteriorDraws(latents, log_joint, log_guide, likelihood, structure, seed, sites)


def systematic_index(
    log_weights: Float[Tensor, "draws batch"], count: int, seed: int
) -> Int[Tensor, "count batch"]:
    """Which draws of each datum to take."""
    top = log_weights.amax(0)
    bad = torch.nonzero(~top.isfinite() | log_weights.isnan().any(0))[:, 0].tolist()
    if bad:
        raise ValueError(
            f"the weights of datum {', '.join(map(str, bad[:5]))}{', ...' * (len(bad) > 5)} are "
            "all zero or not finite, so there is nothing to resample by: leave these data out"
        )
    generator = torch.Generator().manual_seed(seed)
    batch = log_weights.shape[1]
    uniform = torch.rand(batch, 1, generator=generator, dtype=torch.float64)
    shuffle = torch.rand(batch, count, generator=generator, dtype=torch.float64).argsort(1)
    heights = (log_weights - top).exp().T.cpu().cumsum(1)
    marks = (torch.arange(count) + uniform) / count * heights[:, -1:]
    index = torch.searchsorted(heights, marks).clamp_max(len(log_weights) - 1)
    return index.gather(1, shuffle).T.to(log_weights.device)


def _notes(structure: ProgramStructure) -> dict[str, str]:
    if not structure.enumerated:
        return {}
    names = ", ".join(structure.enumerated)
    return {
        "notes": f"{names} summed out exactly: lp is log p(x, z) without them, and there is no log "
        "likelihood given the other latents site by site."
    }


def _join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
