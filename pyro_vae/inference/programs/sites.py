"""What a run shows of its sites beside their values: names of dims, observed values, masks."""

from dataclasses import dataclass, field

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_vae.inference.programs.arguments import ProgramStructure, Site
from pyro_vae.inference.programs.traces import (
    site_log_prob,
    site_log_probs,
    site_values,
    subsamples,
)
from pyro_vae.results import ShortRepr

__all__ = ["LabelledSites", "as_run", "is_factor", "label_sites"]


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
        values[name] = value.detach().expand(*sizes, *value.shape[len(sizes) :])
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
