"""What a run shows of plates and sites: where the batch lies, names of dims, observed values."""

from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_vae.inference.programs.arguments import (
    JointOnlyError,
    ProgramError,
    ProgramStructure,
    Site,
    Split,
)
from pyro_vae.inference.programs.traces import (
    site_log_prob,
    site_log_probs,
    site_values,
    subsamples,
    weighted_sites,
)
from pyro_vae.results import ShortRepr

__all__ = [
    "LabelledSites",
    "agree",
    "as_run",
    "count_data",
    "find_batch",
    "find_split",
    "is_factor",
    "label_sites",
]


@dataclass(frozen=True, repr=False)
class LabelledSites(ShortRepr):
    """Names and places of the dims of latent and observed sites, with what was observed.

    Attributes:
        dims: By site, the names of the dims between draws and event: ``datum``, then inner plates.
        places: By site, where these dims are in a run of the program, counted from the right and
            without the event's.
        observed: By observed site that is no `pyro.factor`, `[batch, inner plates, event]`.
        masks: By masked site, `[batch, inner plates]`, True where it counts; a mask that differs
            between draws is left out.
        subsamples: By subsampled plate, the indices of the data that the run saw.
    """

    dims: dict[str, tuple[str, ...]] = field(default_factory=dict)
    places: dict[str, tuple[int, ...]] = field(default_factory=dict)
    observed: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    subsamples: dict[str, Tensor] = field(default_factory=dict)

    def arviz_groups(self) -> dict[str, dict[str, tuple[tuple[str, ...], Tensor]]]:
        """The groups that need no draws."""
        groups = {
            "observed_data": {name: (self.dims[name], v) for name, v in self.observed.items()},
            "constant_data": {
                f"{name}_mask": (self.dims[name], v) for name, v in self.masks.items()
            },
        }
        return {name: group for name, group in groups.items() if group}


def label_sites(trace: Trace, structure: ProgramStructure, num_particles: int) -> LabelledSites:
    """Reads a run of the model with this number of particles.

    With joint weights there is no batch; if one plate holds every observed site, its name becomes
    ``datum`` all the same.
    """
    sites = {name: trace.nodes[name] for name in (*structure.latents, *structure.observed)}
    places = {name: _places(site, structure) for name, site in sites.items()}
    plates = {name: _plates(site, structure) for name, site in sites.items()}
    observed = [set(plates[name].values()) for name in structure.observed]
    common = set.intersection(*observed) if structure.batch_dim is None and observed else set()
    data = common.pop() if len(common) == 1 else None

    def name_of(site: str, dim: int) -> str:
        if dim == structure.batch_dim:
            return "datum"
        plate = plates[site][dim]
        return "datum" if plate == data else plate[0]

    dims = {name: tuple(name_of(name, dim) for dim in found) for name, found in places.items()}
    values = {}
    for name in structure.observed:
        if is_factor(sites[name]):
            continue
        value = site_values(trace, name, structure)[0]
        sizes = [_size(plates[name], dim, structure) for dim in places[name]]
        values[name] = value.detach().expand((*sizes, *value.shape[len(sizes) :]))
    masks = {}
    for name in sites if not structure.enumerated else ():
        mask = _mask(trace, name, structure, num_particles)
        if mask is not None:
            masks[name] = mask
    seen = {
        name: site["value"]
        for name, site in subsamples(trace).nodes.items()
        if name != "_particles"
    }
    return LabelledSites(dims, places, values, masks, seen)


def as_run(
    value: Tensor, places: tuple[int, ...], structure: ProgramStructure, *, one: bool
) -> Tensor:
    """Undoes `site_values`: `[draws, batch, inner plates, event]` as a run of the program has it.

    Args:
        value: The draws; of one draw where `one` is set, which then has no dim for draws.
        places: From `label_sites`.
        structure: What `inspect_programs` found.
        one: Whether the run has a single particle, and so no dim for them.
    """
    plates = max((-place for place in places), default=0) if one else structure.max_plate_nesting
    draws = [] if one else [0]
    kept = [*draws, *(len(draws) + plates + place for place in places)]
    padding = [dim for dim in range(len(draws) + plates) if dim not in kept]
    event = value.shape[len(kept) :]
    spread = value.reshape((*value.shape[: len(kept)], *(1,) * len(padding), *event))
    order = torch.tensor([*kept, *padding], dtype=torch.long).argsort().tolist()
    return spread.permute((*order, *range(len(order), spread.dim())))


def is_factor(site: Site) -> bool:
    """Whether a site is a `pyro.factor`, which observes nothing."""
    return type(site["fn"]).__name__ == "Unit"


def _plates(site: Site, structure: ProgramStructure) -> dict[int, tuple[str, int]]:
    """Names and sizes of the vectorised plates of a site by dim, without the particles'."""
    return {
        frame.dim: (frame.name, frame.size)
        for frame in site["cond_indep_stack"]
        if frame.vectorized and frame.dim >= -structure.max_plate_nesting
    }


def _places(site: Site, structure: ProgramStructure) -> tuple[int, ...]:
    inner = sorted(dim for dim in _plates(site, structure) if dim != structure.batch_dim)
    return tuple(inner) if structure.batch_dim is None else (structure.batch_dim, *inner)


def _size(plates: dict[int, tuple[str, int]], dim: int, structure: ProgramStructure) -> int:
    return plates[dim][1] if dim in plates else structure.batch_size


def _mask(
    trace: Trace, name: str, structure: ProgramStructure, num_particles: int
) -> Tensor | None:
    site = trace.nodes[name]
    if site["mask"] is None or site["mask"] is True:
        return None
    log_prob = site_log_prob(site)
    whole = torch.as_tensor(site["mask"], device=log_prob.device).expand(log_prob.shape)
    masked = trace.copy()
    masked.nodes[name] = {**site, "masked_log_prob": whole}
    mask = site_log_probs(masked, name, structure, num_particles)
    return mask[0].detach() if bool((mask == mask[:1]).all()) else None


# --- plates of the data ---------------------------------------------------------------------------


def find_batch(
    guide_trace: Trace, model_trace: Trace, shapes: dict[tuple[str, str], torch.Size]
) -> tuple[int, int]:
    """The outermost plate around every site, and its size as the log-probabilities have it."""
    guide_sites, model_sites = weighted_sites(guide_trace), weighted_sites(model_trace)
    plate = _common_plate(model_sites, "model")
    guide_plate = _common_plate(guide_sites, "guide", plate.dim) if guide_sites else plate
    sized = -1 not in (guide_plate.size, plate.size)
    if sized and (guide_plate.dim, guide_plate.size) != (plate.dim, plate.size):
        raise ProgramError(
            f"the model's batch plate '{plate.name}' (dim {plate.dim}, size {plate.size}) and the "
            f"guide's '{guide_plate.name}' (dim {guide_plate.dim}, size {guide_plate.size}) "
            "differ; use the same plate in both"
        )
    _check_declared(guide_sites, model_sites, shapes)
    sizes = {
        key: shape[plate.dim] if len(shape) >= -plate.dim else 1 for key, shape in shapes.items()
    }
    batch_size = max(sizes.values())
    for (role, name), size in sizes.items():
        if size != batch_size:
            raise JointOnlyError(
                f"the {role}'s site '{name}' has one value for the whole batch of {batch_size}, "
                f"not one per datum; give the plate '{plate.name}' its size"
            )
    _check_subsamples(guide_trace, model_trace, plate, guide_plate)
    return plate.dim, batch_size


def _common_plate(sites: dict, role: str, dim: int | None = None) -> Any:
    """The outermost vectorised plate (at `dim`, if given) that every site is in."""
    stacks = {
        name: [f for f in site["cond_indep_stack"] if f.vectorized and dim in (None, f.dim)]
        for name, site in sites.items()
    }
    deepest = max(stacks.values(), key=len, default=[])
    for frame in deepest:
        if not _outside(frame, stacks):
            return frame
    if not deepest:
        frames = [frame for site in sites.values() for frame in site["cond_indep_stack"]]
        if dim is not None and any(frame.vectorized for frame in frames):
            raise ProgramError(
                f"the model's batch plate is at dim {dim}, where the {role} has no plate; use the "
                "same plate in both"
            )
        loop = " (a sequential 'for i in pyro.plate' cannot hold a batch)" if frames else ""
        raise JointOnlyError(
            f"no site of the {role} is in a vectorised pyro.plate{loop}, so it does not say which "
            "data are independent; write `with pyro.plate('data', len(x)):` around site "
            f"'{next(iter(sites), 'x')}'"
        )
    name = _outside(deepest[0], stacks)[0]
    kind = "observed" if sites[name]["is_observed"] else "latent"
    raise JointOnlyError(
        f"the {role}'s {kind} site '{name}' is outside the batch plate '{deepest[0].name}'; put it "
        "there, make a global latent a parameter"
    )


def _outside(plate: Any, stacks: dict[str, list]) -> list[str]:
    """The sites that are not in a plate."""
    where = (plate.name, plate.dim)
    return [n for n, stack in stacks.items() if where not in [(f.name, f.dim) for f in stack]]


def count_data(model_trace: Trace) -> list[tuple[int, int]]:
    """How many data a run of the model says there are, and how many of them it saw.

    That is the size of the outermost plate around every site; with global latents, of each plate
    around everything observed, of which more than one may hold data; empty if there is none.
    """
    sites = list(weighted_sites(model_trace).values())
    for some in (sites, [site for site in sites if site["is_observed"]]):
        stacks = [{f.name: f for f in site["cond_indep_stack"]} for site in some]
        common = [f for n, f in stacks[0].items() if all(n in s for s in stacks)] if stacks else []
        if common:
            counts = [_count_in(plate, some) for plate in common]
            return counts[:1] if some is sites else counts
    return []


def find_split(guide_trace: Trace, model_trace: Trace) -> Split | None:
    """Where the data are of a pair with global latents; None if it has none, or no plate tells."""
    guide_sites, model_sites = weighted_sites(guide_trace), weighted_sites(model_trace)
    observed = [s for s in model_sites.values() if s["is_observed"] and not is_factor(s)]
    latents = [n for n in guide_sites if n in model_sites and not model_sites[n]["is_observed"]]
    stacks = [{f.name: f for f in s["cond_indep_stack"] if f.vectorized} for s in observed]
    around = [f for n, f in stacks[0].items() if all(n in s for s in stacks)] if stacks else []
    if not around or not latents:
        return None
    names = {n: {f.name for f in s["cond_indep_stack"]} for n, s in model_sites.items()}
    # The plate of the data is the one with latents of its own, or else the outermost.
    plate = max(around, key=lambda f: (sum(f.name in names[n] for n in latents), -f.dim))
    global_latents = tuple(name for name in latents if plate.name not in names[name])
    if not global_latents:
        return None
    known = {f.name for s in model_sites.values() for f in s["cond_indep_stack"]}

    def is_local(frame: Any) -> bool:
        alike = (frame.dim, frame.size) == (plate.dim, plate.size) and frame.name not in known
        return frame.name == plate.name or alike

    local = frozenset(
        name
        for sites in (guide_sites, model_sites)
        for name, site in sites.items()
        if any(map(is_local, site["cond_indep_stack"]))
    )
    return Split(global_latents, local, plate.dim, _count_in(plate, observed)[1])


def _count_in(plate: Any, sites: list[dict[str, Any]]) -> tuple[int, int]:
    if plate.size != -1:
        return plate.full_size or plate.size, plate.size
    shapes = [site_log_prob(site).shape for site in sites]
    size = max(shape[plate.dim] if len(shape) >= -plate.dim else 1 for shape in shapes)
    return size, size


def _check_declared(
    guide_sites: dict, model_sites: dict, shapes: dict[tuple[str, str], torch.Size]
) -> None:
    """Refuses batch dims that no plate declares: a forgotten `to_event` sums the wrong dim."""
    for (role, name), shape in shapes.items():
        site = (guide_sites if role == "guide" else model_sites)[name]
        declared = {f.dim for f in site["cond_indep_stack"] if f.vectorized}
        for dim in range(-len(shape), 0):
            if shape[dim] > 1 and dim not in declared:
                raise ProgramError(
                    f"the {role}'s site '{name}' has log-probabilities of shape {tuple(shape)}, "
                    f"whose dim {dim} is in no plate; add .to_event(1) to its distribution, or "
                    "declare the dim with a pyro.plate"
                )


def _check_subsamples(guide_trace: Trace, model_trace: Trace, plate: Any, guide_plate: Any) -> None:
    full = plate.full_size if plate.full_size is not None else plate.size
    if full != plate.size and plate.name != guide_plate.name and guide_plate.size != -1:
        raise ProgramError(
            f"the model subsamples plate '{plate.name}' and the guide plate '{guide_plate.name}', "
            "so they see different data; use one name in both"
        )


def agree(a: Tensor, b: Tensor) -> bool:
    """Whether two runs gave the same densities, up to half the digits."""
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    return a.shape == b.shape and torch.allclose(
        a, b, rtol=tolerance, atol=10 * tolerance, equal_nan=True
    )
