r"""Guides un-amortised: the best member of a family for each datum, found by ascent on the bound.

An amortised guide computes the parameters of its distributions from x. `refit_guide` frees them:
every parameter :math:`\lambda` that the guide computes at a latent site becomes, for datum n,

.. math:: \lambda'_n = t\bigl(t^{-1}(\lambda) + \delta_n\bigr)

with t the map onto the parameter's constraint. At :math:`\delta = 0` it is the amortised guide. An
offset, not a constant, so that q(z2 | x, z1) still depends on z1 as the guide says.

Richer families reshape the standard normal noise :math:`\varepsilon` from which all sites of the
refitted guide are drawn, jointly and for each datum: a normal of full covariance, then affine
couplings on top of it. Each family thereby holds the one before it, and starts at its optimum.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float, Int64
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import transform_to

from pyro_vae.checks import check_count, check_positive
from pyro_vae.data import Seed, known_seed
from pyro_vae.inference.programs import (
    JointOnlyError,
    Pair,
    Program,
    ProgramError,
    SubsampleError,
    bytes_of_run,
    messenger_of,
    particles_at_once,
    program_scope,
    split_count,
    sum_traces,
    tool,
    weighted_sites,
)
from pyro_vae.inference.refit.ascent import _DRAWS, _along, maximize_per_datum
from pyro_vae.inference.refit.freed import _lay_out, _Layout, _Reshaped
from pyro_vae.inference.refit.noise import _check_noise, _noise_distribution, _noise_start
from pyro_vae.inference.refit.parameters import constraint_of, rebuild
from pyro_vae.inference.refit.transport import from_noise
from pyro_vae.progress import progress_bar

__all__ = [
    "FAMILIES",
    "RefittedGuide",
    "inspect_refittable",
    "paired_log_weights",
    "refit_guide",
    "refits",
]

FAMILIES = ("same", "full", "flow")
"""The families in the order of inclusion: each one holds those before it."""
_NOISE_SITE = "_refitted_noise"
_SELECTION_DRAWS = 256  # fresh draws that choose among the start, the last and the mean iterate


# --- the refitted guide ---------------------------------------------------------------------------


@dataclass
class RefittedGuide:
    """A guide with parameters of its own for each datum: a program for the data it was fitted to.

    It can be passed to `log_weights`, `log_evidence` and every other tool together with the same
    data. Calling it with another number of data is an error.

    Attributes:
        family: One of `FAMILIES`.
        steps: Steps that each datum took, in this family.
        converged: Whether the bound of a datum had stopped rising when its steps ended.
        log_weight: The mean log weight of each datum on the draws that chose it, in nats.
    """

    __wrapped__: Program
    family: str
    layout: _Layout = field(repr=False)
    values: dict[str, Tensor] = field(repr=False)
    steps: Int64[Tensor, " batch"] = field(repr=False)
    converged: Bool[Tensor, " batch"] = field(repr=False)
    log_weight: Float[Tensor, " batch"] = field(repr=False)
    path_only: bool = field(default=False, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the guide with its distributions replaced."""
        noise: dict[str, Tensor] = {}
        if self.family != "same":
            layout = self.layout
            with IndepMessenger(layout.plate, layout.num_data, dim=layout.batch_dim):
                drawn = pyro.sample(
                    _NOISE_SITE,
                    _noise_distribution(self.family, self.values, layout, self.path_only),
                    infer={"is_auxiliary": True},
                )
            noise = layout.split(drawn)
        with _Replace(self.layout, self.values, noise, self.path_only):
            return self.__wrapped__(*args, **kwargs)

    def __hash__(self) -> int:
        return id(self)


class _Replace(Messenger):
    """Puts freed parameters, and noise where a family reshapes it, into a guide's sites."""

    def __init__(
        self,
        layout: _Layout,
        values: Mapping[str, Tensor],
        noise: Mapping[str, Tensor],
        path_only: bool,
    ) -> None:
        super().__init__()
        self.layout, self.values, self.noise = layout, values, noise
        self.path_only = path_only and not noise

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.layout.sites or msg["done"]:
            return
        length = msg["fn"].batch_shape[self.layout.batch_dim]
        if length != self.layout.num_data:
            raise ValueError(
                f"this guide was refitted to {self.layout.num_data} data and got {length}; pass "
                "the same data, or refit it to these"
            )
        moved = rebuild(msg["fn"], lambda path, fn: self._move(name, path, fn, detach=False))
        if name in self.noise:
            value = from_noise(moved, self.noise[name])
            log_density = moved.log_prob(value)
            msg["fn"] = dist.Delta(value, log_density, event_dim=moved.event_dim)
        elif self.path_only:
            scored = moved
            if moved.has_rsample and not self.layout.sites[name].moves_support:
                scored = rebuild(
                    msg["fn"], lambda path, fn: self._move(name, path, fn, detach=True)
                )
            msg["fn"] = _Reshaped(moved, scored)
        else:
            msg["fn"] = moved

    def _move(self, site: str, path: str, fn: Any, *, detach: bool) -> dict[str, Tensor]:
        """The parameters of one distribution within a site's."""
        moved: dict[str, Tensor] = {}
        for name in fn.arg_constraints:
            free = self.layout.sites[site].parameters.get(path + name)
            if free is None:
                continue
            offset = self.values[f"{site}.{path}{name}"]
            offset = free.unit * (offset.detach() if detach else offset)
            start = transform_to(constraint_of(fn, name)).inv(getattr(fn, name))
            moved[name] = transform_to(constraint_of(fn, name, moved))(start + offset)
        return moved


# --- refitting ------------------------------------------------------------------------------------


@tool
def refit_guide(
    model: Program,
    guide: Program,
    x: Any,
    *,
    family: str = "same",
    max_steps: int = 1000,
    step_size: float = 0.05,
    seed: Seed = 0,
    max_memory: float = 0.5,
    progress: bool = True,
) -> RefittedGuide:
    r"""Finds the guide's best parameters for each datum, from those that it computes for it.

    The ELBO of every datum is maximised in parallel, with the gradient of the path through the
    latents, or, of distributions that have none (discrete ones, VonMises, mixtures), by the score,
    with the other draws as baseline; the noise of both vanishes at the exact posterior. Which of
    the start, the last and the mean iterate is kept is decided, for each datum, by fresh draws.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior. Of its latent sites the parameters that
            `arg_constraints` names are freed, of any distribution that can be built from them, and
            also within Independent, masks, expansions, mixtures and bijective transforms; the
            transforms' own parameters stay as the guide computes them, and so do integers.
        x: The data; a tuple for several arguments, a dict for keywords.
        family: `"same"`; `"full"`, a normal of full covariance in place of the standard normal
            noise from which all sites can be drawn (by their quantile functions, where it is no
            normal); or `"flow"`, affine couplings on top of it (a spline where a datum has one
            latent).
        max_steps: The most steps of each family.
        step_size: Of Adam's first steps, in the guide's own scales.
        seed: Seeds the draws; the caller's random state is left alone.
        max_memory: Roughly the memory that draws without gradients may take, in GiB.
        progress: Shows a bar on stderr where that is a terminal.

    Returns:
        A Pyro program for the same data, which any tool takes in place of the guide.

    Raises:
        ProgramError: If the pair has no log weights (see `log_weights`), the data are subsampled, a
            latent is global, or a distribution is unknown; the sentence names the site.
        ValueError: If an argument is out of its range.

    Note: The last of the families holds the others, but no ascent is sure to find the best: its
        ELBO is a lower bound of the family's best.

    References:
        Cremer, Li & Duvenaud (2018), Inference suboptimality in variational autoencoders, section
        4; Roeder, Wu & Duvenaud (2017), Sticking the landing.

    Example:
        >>> import torch
        >>> from pyro_vae import LinearGaussian, log_weights
        >>> pair, x = LinearGaussian(data_dim=3, latent_dim=2), torch.zeros(4, 3)
        >>> better = refit_guide(pair.model, pair.guide, x, max_steps=100, progress=False)
        >>> log_weights(pair.model, better, x, num_particles=5).shape
        torch.Size([5, 4])
    """
    seed = known_seed(seed)
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}, but must be one of {', '.join(FAMILIES)}")
    chain = FAMILIES[: FAMILIES.index(family) + 1]
    with program_scope(seed):
        found = refits(
            inspect_refittable(model, guide, x),
            chain,
            max_steps=max_steps,
            step_size=step_size,
            max_memory=max_memory,
            progress=progress,
        )
        return list(found)[-1]


def inspect_refittable(model: Program, guide: Program, x: Any) -> Pair:
    """`Pair.inspect`, and the refusals of guides that have no parameters per datum."""
    if messenger_of(guide) is not None:
        raise ProgramError(
            "the guide is a messenger that runs the model itself, so its distributions cannot be "
            "replaced; write it as a program of its own"
        )
    try:
        pair = Pair.inspect(model, guide, x)
    except JointOnlyError as error:
        raise ProgramError(
            f"{error.reason}; parameters per datum and a gap per datum need latents per datum"
        ) from error
    if pair.structure.scale != 1.0:
        raise SubsampleError("the programs subsample their data, so every run would refit others")
    return pair


def refits(
    pair: Pair,
    families: tuple[str, ...],
    *,
    max_steps: int,
    step_size: float,
    max_memory: float,
    progress: bool,
) -> Iterator[RefittedGuide]:
    """Refits each family in turn, from the optimum of the one before; `"same"` comes first.

    Runs in the caller's `program_scope`, and takes its random numbers from the global stream.
    """
    check_count("max_steps", max_steps)
    check_positive("step_size", step_size)
    layout = _lay_out(pair.guide, pair.arguments, pair.structure)
    if len(families) > 1:
        _check_noise(layout)
    none = torch.zeros(layout.num_data)
    values = {
        f"{site}.{name}": free.start
        for site, freed in layout.sites.items()
        for name, free in freed.parameters.items()
    }
    axes = {
        f"{site}.{name}": free.axis
        for site, freed in layout.sites.items()
        for name, free in freed.parameters.items()
    }
    now = RefittedGuide(pair.guide, "same", layout, values, none.long(), none.bool(), none)
    for family in families:
        if family != "same":
            # The sites' own parameters stay where they are: the noise moves in their place.
            started = _noise_start(family, layout)
            if family == "flow" and "noise.loc" not in now.values:  # it bends the full normal
                started = _noise_start("full", layout) | started
            axes = {name: free.axis for name, free in started.items()} | (
                axes if family == "flow" and "noise.loc" in axes else {}
            )
            now = replace(
                now,
                family=family,
                values={**now.values, **{name: free.start for name, free in started.items()}},
            )
        now = _refit(
            pair,
            now,
            axes,
            max_steps=max_steps,
            step_size=step_size,
            max_memory=max_memory,
            progress=progress,
        )
        yield now


def _refit(
    pair: Pair,
    guide: RefittedGuide,
    axes: Mapping[str, int],
    *,
    max_steps: int,
    step_size: float,
    max_memory: float,
    progress: bool,
) -> RefittedGuide:
    def value(moved: dict[str, Tensor]) -> Float[Tensor, " batch"]:
        trial = replace(guide, values={**guide.values, **moved}, path_only=True)
        return _elbo(pair.with_guide(trial))

    start = {name: guide.values[name] for name in axes}
    what = f"refitting ({guide.family})"
    shown = progress_bar(max_steps, "step", show=progress, what=what)
    with shown, pyro.validation_enabled(False):  # one datum that leaves a support stops no other
        reached = maximize_per_datum(
            value, start, axes, max_steps=max_steps, step_size=step_size, advance=shown.update
        )
        candidates = (start, reached.last, reached.mean)
        chosen, log_weight = _choose(pair, guide, axes, candidates, max_memory)
    values = {**guide.values, **chosen}
    return replace(
        guide,
        values=values,
        steps=reached.steps.cpu(),
        converged=reached.converged.cpu(),
        log_weight=log_weight,
    )


def _elbo(pair: Pair) -> Float[Tensor, " batch"]:
    """The bound of each datum with its gradient: along the path, else by the score of a site.

    The score of sites without a path is weighed by the log weights less the mean of the others
    (leave-one-out), so that its noise vanishes at the exact posterior, as the path's does.
    """
    draws = pair.draws(_DRAWS)
    guides = [(guide, count) for guide, _, count in draws]
    log_p = sum_traces([(model, count) for _, model, count in draws], pair.structure)
    weights = log_p - sum_traces(guides, pair.structure)
    drawn = weighted_sites(guides[0][0])
    unpathed = [name for name, site in drawn.items() if not site["fn"].has_rsample]
    if not unpathed:
        return weights.mean(0)
    score = sum_traces(guides, pair.structure, lambda name, _: name in unpathed)
    seen = weights.detach()
    along = (seen - seen.mean(0)) / (_DRAWS - 1) + 1 / _DRAWS  # the second: no score in the weights
    surrogate = (along * score).sum(0)
    return weights.mean(0) + surrogate - surrogate.detach()


def _choose(
    pair: Pair,
    guide: RefittedGuide,
    axes: Mapping[str, int],
    candidates: Sequence[dict[str, Tensor]],
    max_memory: float,
) -> tuple[dict[str, Tensor], Float[Tensor, " batch"]]:
    """The best candidate for each datum, by its ELBO on draws in common."""
    trials = [replace(guide, values={**guide.values, **values}) for values in candidates]
    weights = paired_log_weights(pair, trials, _SELECTION_DRAWS, max_memory)
    means = torch.stack([w.mean(0).nan_to_num(-math.inf, math.inf, -math.inf) for w in weights])
    best = means.max(0)
    chosen = {}
    for name in axes:
        together = torch.stack([values[name] for values in candidates])
        which = _along(best.indices, together[0], axes[name]).expand_as(together[0])
        chosen[name] = together.gather(0, which[None])[0]
    return chosen, best.values


@torch.no_grad()
def paired_log_weights(
    pair: Pair,
    guides: Sequence[Program],
    num_particles: int,
    max_memory: float,
) -> list[Float[Tensor, "particles batch"]]:
    """Fresh log weights of every guide, all from the same random numbers; float64, on the CPU.

    Runs in the caller's `program_scope`.
    """
    size = max(bytes_of_run(pair.model, guide, pair.arguments) for guide in guides)
    most = particles_at_once(num_particles, max_memory, size)
    parts: list[list[Tensor]] = [[] for _ in guides]
    for count in split_count(num_particles, most):
        seed = int(torch.randint(2**31, ()))
        for guide, part in zip(guides, parts, strict=True):
            pyro.set_rng_seed(seed)
            part.append(pair.with_guide(guide).log_weights(count).double().cpu())
    return [torch.cat(part) for part in parts]
