r"""What can be had from a pair of programs, and the sentences that refuse the rest.

`inspect_programs` runs a model and its guide a few times, reads off where the batch lies, and
refuses, naming the site, what no tool built on log weights can do. `check_parameters` refuses what
SVI would silently train in part.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from pyro.nn import PyroModule
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_vae.inference.programs.traces import (
    Arguments,
    Program,
    ProgramError,
    ProgramStructure,
    enumerating,
    fixed_draws,
    keep_random_state,
    modules_of,
    site_log_prob,
    subsamples,
    sum_dims,
    sum_sites,
    trace_programs,
    weighted_sites,
)

__all__ = [
    "check_module_names",
    "check_parameters",
    "common_scale",
    "inspect_programs",
    "is_delta",
    "is_enumerable",
    "leaves",
]


def inspect_programs(
    model: Program,
    guide: Program,
    arguments: Arguments,
    *,
    joint: bool = False,
    num_particles: int = 2,
) -> ProgramStructure:
    """Runs model and guide a few times and says how log weights can be had from them.

    Random numbers that this takes are given back: afterwards the random state is what it was.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior.
        arguments: From `as_arguments`.
        joint: One weight per particle on all data, for models with global latents.
        num_particles: With 1, the check that particles can be vectorised is left out.

    Returns:
        The structure of the pair.

    Raises:
        ProgramError: If a latent lies outside the batch plate, a model latent is missing from the
            guide (or the guide has one that the model lacks), the guide is a point mass or observes
            something, scales differ between sites, a batch dim is undeclared, an observed value is
            off its support, one datum depends on another's latents, two PyroModules share names, or
            the programs are not deterministic given their latents.
    """
    provisional = ProgramStructure(None, 1, 0, 1.0, "mixed", False, True, (), ())
    check_module_names(model, guide)
    with torch.no_grad(), keep_random_state(), _refuse_modules_in_training():
        # A stream of its own: parameters that are first drawn here owe nothing to later draws.
        pyro.set_rng_seed(int(torch.randint(2**31, ())))
        before = _versions(arguments)
        try:
            guide_trace, model_trace = trace_programs(model, guide, arguments)
        except RuntimeError:  # how Pyro answers a latent that the guide observes
            args, kwargs = arguments
            _check_guide_draws(weighted_sites(poutine.trace(guide).get_trace(*args, **kwargs)))
            raise
        except ValueError as error:
            if "inside plate" in str(error):  # Pyro's own, whose first line names plate and site
                raise ProgramError(
                    f"{str(error).splitlines()[0]}: give the plate the number of data, or, if the "
                    "dim is one of a datum, add .to_event(1) to the site's distribution"
                ) from error
            raise
        _check_unchanged(arguments, before)
        guide_sites, model_sites = weighted_sites(guide_trace), weighted_sites(model_trace)
        _check_guide_draws(guide_sites)
        _check_latents(guide_sites, model_sites)
        measure = _check_observed(model_sites)
        shapes = {
            (role, name): _log_prob_of(name, site).shape
            for role, sites in (("guide", guide_sites), ("model", model_sites))
            for name, site in sites.items()
        }
        _check_point_mass(guide, arguments, guide_trace)
        structure = replace(
            provisional,
            max_plate_nesting=_max_plate_nesting(guide_sites, model_sites, shapes.values()),
            scale=common_scale(guide_sites, model_sites, joint),
            measure=measure,
            latents=tuple(
                n for n, s in guide_sites.items() if n in model_sites and not s["is_observed"]
            ),
            observed=tuple(n for n, s in model_sites.items() if s["is_observed"]),
            enumerated=tuple(
                n for n, s in model_sites.items() if _is_left_to_sum(n, s, guide_sites)
            ),
        )
        if not joint:
            dim, size = _find_batch(guide_trace, model_trace, shapes)
            structure = replace(structure, batch_dim=dim, batch_size=size)
        if structure.enumerated:
            _check_enumerable(model_sites, structure)
            model = enumerating(model, structure)
            guide_trace, model_trace = trace_programs(model, guide, arguments)
            _check_enumerated(weighted_sites(model_trace), structure)
        structure = replace(
            structure,
            replayable=_check_deterministic(
                model, guide, arguments, structure, (guide_trace, model_trace)
            ),
        )
        if structure.batch_size > 1:
            _check_independent(model, guide, arguments, structure, (guide_trace, model_trace))
        vectorizable = num_particles > 1 and _is_vectorizable(
            model, guide, arguments, structure, (guide_trace, model_trace)
        )
    return replace(structure, vectorizable=vectorizable)


def _log_prob_of(name: str, site: dict[str, Any]) -> Tensor:
    """A site's log-probability; refuses data that do not fit their distribution's shape."""
    try:
        return site_log_prob(site)
    except ValueError as error:
        fn = site["fn"]
        if not site["is_observed"] or not isinstance(site["value"], Tensor):
            raise
        raise ProgramError(
            f"the data at site '{name}' have shape {tuple(site['value'].shape)}, which does not "
            f"fit their distribution's batch shape {tuple(fn.batch_shape)} and event shape "
            f"{tuple(fn.event_shape)}; add .to_event(1) to the distribution, or give it its plates"
        ) from error


@contextmanager
def _refuse_modules_in_training() -> Iterator[None]:
    """Refuses dropout and batch normalisation in training mode before they do anything."""

    def hook(module: nn.Module, _inputs: Any) -> None:
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.track_running_stats:
            raise ProgramError(
                f"{kind} without running statistics couples the data of a batch in every mode, so "
                "log weights per datum do not exist; give it track_running_stats=True, and call "
                ".eval() on the module"
            )
        if not module.training:
            return
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            raise ProgramError(
                f"{kind} in training mode couples the data of a batch, so log weights per datum do "
                "not exist; call .eval() on the module first"
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ProgramError(
                f"{kind} in training mode makes the program random given its latents; call .eval() "
                "on the module first"
            )

    handle = nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _versions(arguments: Arguments) -> dict[str | int, int]:
    """How often each tensor among the arguments was written to."""
    args, kwargs = arguments
    named = {**dict(enumerate(args, 1)), **kwargs}
    return {
        name: value._version
        for name, value in named.items()
        if isinstance(value, Tensor) and not value.is_inference()
    }


def _check_unchanged(arguments: Arguments, before: dict[str | int, int]) -> None:
    for name, version in _versions(arguments).items():
        if version != before[name]:
            raise ProgramError(
                f"model or guide writes to argument {name!r} in place (as x.clamp_() and x[0] = 0 "
                "do), so that runs see different data, and so does the caller afterwards; write "
                "to a copy, x = x.clone()"
            )


def _check_guide_draws(guide_sites: dict[str, dict]) -> None:
    for name, site in guide_sites.items():
        if site["is_observed"] and type(site["fn"]).__name__ != "Unit":  # pyro.factor
            raise ProgramError(
                f"the guide's site '{name}' is observed, so the guide is no density of the "
                "latents; take obs= out of the guide, or sample the site there"
            )


def _check_latents(guide_sites: dict[str, dict], model_sites: dict[str, dict]) -> None:
    for name, site in model_sites.items():
        if _is_left_to_sum(name, site, guide_sites):
            continue
        if not site["is_observed"] and name not in guide_sites:
            raise ProgramError(
                f"the model's latent site '{name}' is missing from the guide; sample it there "
                "under the same name, or, if it is discrete, sum it out of the model"
            )
        if site["is_observed"] and name in guide_sites:
            raise ProgramError(
                f"site '{name}' is observed in the model but stands in the guide as well; take it "
                "out of the guide, or give it another name"
            )
    for name, site in guide_sites.items():
        if (
            not site["is_observed"]
            and name not in model_sites
            and not site["infer"].get("is_auxiliary")
        ):
            raise ProgramError(
                f"the guide samples site '{name}', which the model does not have, so the weights "
                "would bound nothing; sample it in the model as well, or mark it "
                "infer={'is_auxiliary': True} if the density of another site accounts for it, as "
                "Pyro's autoguides do"
            )


def _is_left_to_sum(name: str, site: dict[str, Any], guide_sites: dict[str, dict]) -> bool:
    """Whether a latent of the model is marked for enumeration and left out of the guide."""
    marked = site["infer"].get("enumerate") == "parallel"
    return marked and not site["is_observed"] and name not in guide_sites


def _check_enumerable(model_sites: dict[str, dict], structure: ProgramStructure) -> None:
    for name in structure.enumerated:
        if not is_enumerable(model_sites[name]["fn"]):
            raise ProgramError(
                f"the model's site '{name}' is marked for enumeration, but its distribution "
                f"({type(model_sites[name]['fn']).__name__}) lists no states (a vector of several "
                "discrete values does not); sample it in the guide, or write each as its own site"
            )


def is_enumerable(fn: Any) -> bool:
    """Whether a distribution can list its states."""
    if not fn.has_enumerate_support:
        return False
    try:
        fn.enumerate_support(expand=False)
    except NotImplementedError:  # Independent says that it can, and then cannot
        return False
    return True


def _check_enumerated(model_sites: dict[str, dict], structure: ProgramStructure) -> None:
    """Refuses enumerated latents that a sum per datum cannot reach."""
    dims = [model_sites[name]["infer"].get("_enumerate_dim") for name in structure.enumerated]
    if len(set(dims)) < len(dims):
        raise ProgramError(
            f"the enumerated sites {', '.join(structure.enumerated)} share dims (pyro.markov), "
            "which log weights cannot sum out; use TraceEnum_ELBO, or sample them in the guide"
        )
    for name in structure.enumerated:
        inner = {
            f.name
            for f in model_sites[name]["cond_indep_stack"]
            if f.vectorized and f.dim != structure.batch_dim
        }
        if inner:
            raise ProgramError(
                f"the enumerated site '{name}' is inside plate '{inner.pop()}', within a datum, "
                "where it would have to be summed before that plate; use TraceEnum_ELBO, or sample "
                "it in the guide"
            )


def _check_point_mass(guide: Program, arguments: Arguments, guide_trace: Trace) -> None:
    """Refuses a `Delta` posterior; one that transforms an auxiliary draw is none."""
    guide_sites = weighted_sites(guide_trace)
    deltas = {n: s for n, s in guide_sites.items() if not s["is_observed"] and is_delta(s["fn"])}
    if not deltas:
        return
    fixed = sorted(deltas)
    if any(s["infer"].get("is_auxiliary") for s in guide_sites.values()):
        args, kwargs = arguments
        same_data = poutine.replay(guide, trace=subsamples(guide_trace))
        again = poutine.trace(same_data).get_trace(*args, **kwargs)
        fixed = [n for n in fixed if torch.equal(deltas[n]["value"], again.nodes[n]["value"])]
    if fixed:
        raise ProgramError(
            f"the guide's site '{fixed[0]}' is a Delta: a point has no density, so its objective "
            "is a MAP objective and neither a bound nor an importance weight exists; use a guide "
            "with a density, such as a Normal"
        )


def is_delta(fn: Any) -> bool:
    """Whether a distribution is a point mass."""
    while not isinstance(fn, pyro.distributions.Delta):
        if not hasattr(fn, "base_dist"):
            return False
        fn = fn.base_dist
    return True


def _check_observed(model_sites: dict[str, dict]) -> str:
    """Refuses observed values off their support; returns the measure that the data live on."""
    measures = set()
    for name, site in model_sites.items():
        if not site["is_observed"] or type(site["fn"]).__name__ == "Unit":  # pyro.factor
            continue
        try:
            support = site["fn"].support
        except (AttributeError, NotImplementedError):  # a user's distribution need not state one
            measures.add("mixed")
            continue
        inside = support.check(site["value"])
        for mask in _masks(site):
            inside = inside | ~torch.as_tensor(mask, device=inside.device)
        if not bool(inside.all()):
            raise ProgramError(
                f"the data at site '{name}' lie outside the support of their distribution "
                f"({support}): " + _support_advice(support)
            )
        measures.add(_measure_of(support))
    return measures.pop() if len(measures) == 1 else "mixed"


def _masks(site: dict[str, Any]) -> list[Any]:
    """The masks of a site: of poutine.mask, and of the distributions inside its own."""
    masks, fn = [] if site["mask"] is None else [site["mask"]], site["fn"]
    events = 0  # dims that Independent took from the masks inside it
    while fn is not None:
        if isinstance(fn, MaskedDistribution):
            mask = torch.as_tensor(fn._mask)
            masks.append(mask.expand(fn.batch_shape).flatten(-events).all(-1) if events else mask)
        events += getattr(fn, "reinterpreted_batch_ndims", 0)
        fn = getattr(fn, "base_dist", None)
    return masks


def _support_advice(support: Any) -> str:
    if _measure_of(support) == "binary":
        return "binarise grey pixels, or use a ContinuousBernoulli"
    return "rescale the data, or use a likelihood whose support holds them"


def _measure_of(support: Any) -> str:
    while isinstance(support, torch.distributions.constraints.independent):
        support = support.base_constraint
    if support is torch.distributions.constraints.boolean:
        return "binary"
    if support.is_discrete:
        return "counts"
    if isinstance(support, torch.distributions.constraints.interval):
        low, high = torch.as_tensor(support.lower_bound), torch.as_tensor(support.upper_bound)
        return "grey" if bool((low == 0).all() and (high == 1).all()) else "real"
    return "real"


def _max_plate_nesting(guide_sites: dict, model_sites: dict, shapes: Any) -> int:
    depths = [
        -frame.dim
        for sites in (guide_sites, model_sites)
        for site in sites.values()
        for frame in site["cond_indep_stack"]
        if frame.vectorized
    ]
    return max([0, *depths, *(len(shape) for shape in shapes)])


def common_scale(guide_sites: dict, model_sites: dict, joint: bool) -> float:
    """The one factor N/B of all sites."""
    seen: dict[float, str] = {}
    for sites in (model_sites, guide_sites):
        for name, site in sites.items():
            scale = site["scale"]
            for value in scale.unique().tolist() if isinstance(scale, Tensor) else [float(scale)]:
                seen.setdefault(float(f"{value:.6g}"), name)  # products of factors round
    if len(seen) > 1:
        (a, site_a), (b, site_b) = list(seen.items())[:2]
        sites_are = (
            f"sites '{site_a}' and '{site_b}' have"
            if site_a != site_b
            else f"site '{site_a}' has for its data"
        )
        raise ProgramError(
            f"{sites_are} different scales ({a:g} and {b:g}), so no importance weight exists; "
            "remove poutine.scale (annealing is for Trace_ELBO alone), or subsample model and "
            "guide alike"
        )
    scale = next(iter(seen), 1.0)
    if joint and scale != 1.0:
        raise ProgramError(
            f"joint log weights need the full data, but site '{seen[scale]}' has scale {scale:g}; "
            "take the subsampling out"
        )
    return scale


def _find_batch(
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
            raise ProgramError(
                f"the {role}'s site '{name}' has one value for the whole batch of {batch_size}, "
                f"not one per datum; give the plate '{plate.name}' its size, or pass joint=True "
                "for one weight per particle on all data"
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
        raise ProgramError(
            f"no site of the {role} is in a vectorised pyro.plate{loop}, so it does not say which "
            "data are independent; write `with pyro.plate('data', len(x)):` around site "
            f"'{next(iter(sites), 'x')}', or pass joint=True"
        )
    name = _outside(deepest[0], stacks)[0]
    kind = "observed" if sites[name]["is_observed"] else "latent"
    raise ProgramError(
        f"the {role}'s {kind} site '{name}' is outside the batch plate '{deepest[0].name}'; put it "
        "there, make a global latent a parameter, or pass joint=True for one weight per particle "
        "on all data"
    )


def _outside(plate: Any, stacks: dict[str, list]) -> list[str]:
    """The sites that are not in a plate."""
    where = (plate.name, plate.dim)
    return [n for n, stack in stacks.items() if where not in [(f.name, f.dim) for f in stack]]


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


def _rerun(
    model: Program, guide: Program, arguments: Arguments, structure: ProgramStructure, given: Trace
) -> tuple[Tensor | None, Tensor]:
    """Log q and log p of one particle at given latents; no log q where the guide cannot give it."""
    args, kwargs = arguments
    model_trace = poutine.trace(poutine.replay(model, trace=given)).get_trace(*args, **kwargs)
    log_p = sum_sites(model_trace, structure, 1)
    drawn = given.copy()  # a Delta computes its value again: its density has no room for rounding
    for name, site in weighted_sites(given).items():
        if is_delta(site["fn"]):
            del drawn.nodes[name]
    try:
        guide_trace = poutine.trace(poutine.replay(guide, trace=drawn)).get_trace(*args, **kwargs)
        return sum_sites(guide_trace, structure, 1), log_p
    except (KeyError, NotImplementedError):  # how Pyro's transforms without an inverse answer
        return None, log_p


def _agree(a: Tensor, b: Tensor) -> bool:
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    return a.shape == b.shape and torch.allclose(
        a, b, rtol=tolerance, atol=10 * tolerance, equal_nan=True
    )


def _check_deterministic(
    model: Program,
    guide: Program,
    arguments: Arguments,
    structure: ProgramStructure,
    traces: tuple[Trace, Trace],
) -> bool:
    """Runs both programs again at the same latents; returns whether the guide could be."""
    if isinstance(poutine.unwrap(guide), poutine.messenger.Messenger):
        return False
    log_q, log_p = _rerun(model, guide, arguments, structure, fixed_draws(*traces))
    for role, trace, again in (("model", traces[1], log_p), ("guide", traces[0], log_q)):
        if again is not None and not _agree(sum_sites(trace, structure, 1), again):
            raise ProgramError(
                f"the {role} is not deterministic given its latents (a second run at the same "
                "latents gave another log-probability); take noise that is no pyro.sample site out "
                "of it, or make it one"
            )
    return log_q is not None


def _check_independent(
    model: Program,
    guide: Program,
    arguments: Arguments,
    structure: ProgramStructure,
    traces: tuple[Trace, Trace],
) -> None:
    """Refuses a model in which one datum moves the density of another, by latents or as data."""
    if structure.batch_dim is None:
        return
    number = torch.arange(structure.batch_size)
    even = number % 2 == 0
    if structure.latents:
        same = subsamples(*traces)
        others = trace_programs(
            poutine.replay(model, trace=same), poutine.replay(guide, trace=same), arguments
        )
        for own in (even, number < (structure.batch_size + 1) // 2):
            given = _latents_of_both(traces, others, structure, own)
            mixed = _run_model(model, arguments, given)
            advice = "latents of other data; make each row depend on its own latents"
            _check_rows(mixed, traces[1], structure, own, advice)
            _check_rows(mixed, others[1], structure, ~own, advice)
    changed = _with_data_of_first(arguments, structure, traces[1], even)
    if changed is None:
        return
    try:
        mixed = _run_model(model, changed, fixed_draws(*traces))
    except Exception:  # whatever a program does with data of rows that it knows to be others
        return
    advice = "observed data of others (their mean, perhaps); pass such a number as an argument"
    _check_rows(mixed, traces[1], structure, even, advice)


def _run_model(model: Program, arguments: Arguments, given: Trace) -> Trace:
    args, kwargs = arguments
    return poutine.trace(poutine.replay(model, trace=given)).get_trace(*args, **kwargs)


def _latents_of_both(
    traces: tuple[Trace, Trace],
    others: tuple[Trace, Trace],
    structure: ProgramStructure,
    own: Tensor,
) -> Trace:
    """A trace to replay whose rows `own` have the latents of the one run, the rest the other's."""
    given, drawn = fixed_draws(*traces), weighted_sites(others[0])
    for name in structure.latents:
        site = given.nodes[name]
        after = -structure.batch_dim - 1 + len(site["fn"].event_shape)  # type: ignore[operator]
        rows = own.to(site["value"].device).reshape(-1, *[1] * after)
        given.nodes[name] = {
            **site,
            "value": torch.where(rows, site["value"], drawn[name]["value"].detach()),
        }
    return given


def _with_data_of_first(
    arguments: Arguments, structure: ProgramStructure, trace: Trace, own: Tensor
) -> Arguments | None:
    """Arguments whose rows but `own` hold the data of the first; None if none is observed as is.

    An argument's rows are known where a site observes a view of it: by their number and stride.
    """
    number = torch.arange(len(own))
    rows = torch.where(own, number, 0)
    views = []
    for site in weighted_sites(trace).values():
        value = site["value"]
        if site["is_observed"] and isinstance(value, Tensor):
            dim = value.dim() - len(site["fn"].event_shape) + structure.batch_dim
            if dim >= 0 and value.shape[dim] == len(own):
                views.append((value.untyped_storage().data_ptr(), value.stride(dim)))
    found = False

    def change(a: Any) -> Any:
        nonlocal found
        if isinstance(a, Tensor):
            start = a.untyped_storage().data_ptr()
            for dim in range(a.dim()):
                if a.shape[dim] == len(own) and (start, a.stride(dim)) in views:
                    found = True
                    return a.index_select(dim, rows.to(a.device))
        return a

    args, kwargs = arguments
    changed = tuple(map(change, args)), {name: change(a) for name, a in kwargs.items()}
    return changed if found else None


def _check_rows(
    mixed: Trace, expected: Trace, structure: ProgramStructure, rows: Tensor, reason: str
) -> None:
    """The densities of these rows must be the same in both runs of the model."""
    sites = weighted_sites(mixed)
    for name, site in weighted_sites(expected).items():
        before = sum_dims(site_log_prob(site), structure, 1)[..., rows]
        again = (
            sum_dims(site_log_prob(sites[name]), structure, 1)[..., rows] if name in sites else None
        )
        if again is None or not _agree(before, again):
            raise ProgramError(
                f"the density of one datum at the model's site '{name}' depends on the {reason}, "
                "or pass joint=True for one weight per particle on all data, for log weights per "
                "datum do not exist"
            )


def _is_vectorizable(
    model: Program,
    guide: Program,
    arguments: Arguments,
    structure: ProgramStructure,
    traces: tuple[Trace, Trace],
) -> bool:
    """Whether two particles in one tensor program weigh what each weighs when run alone.

    Both must: a program whose dims mix the particles has their densities summed, and that sum is
    the density of one of them where it is far the greater.
    """
    if isinstance(poutine.unwrap(guide), poutine.messenger.Messenger):
        return False  # it runs the model itself, and cannot be run again at given latents
    vectorized = replace(structure, vectorizable=True)
    try:
        together = trace_programs(model, guide, arguments, 2, structure.max_plate_nesting)
        totals = [sum_sites(trace, vectorized, 2) for trace in together]
        alone = [_particle(index, together, traces, structure) for index in (0, 1)]
    except Exception:  # whatever a program that was written for one particle does with two
        return False
    for index, given in enumerate(alone):
        if given is None:
            return False
        # A sum over no site has no particles.
        log_q, log_p = (total[index : index + 1] if total.dim() else total for total in totals)
        log_q_alone, log_p_alone = _rerun(model, guide, arguments, structure, given)
        if not _agree(log_p, log_p_alone):
            return False
        if log_q_alone is not None and not _agree(log_q, log_q_alone):
            return False
    return True


def _particle(
    index: int,
    together: tuple[Trace, Trace],
    single: tuple[Trace, Trace],
    structure: ProgramStructure,
) -> Trace | None:
    """One of two particles in the shapes of a run with one; None if they do not fit."""
    given = fixed_draws(*together)
    reference = fixed_draws(*single)
    for name, site in weighted_sites(given).items():
        if site["is_observed"] or name not in reference:
            continue
        value, shape = site["value"], reference.nodes[name]["value"].shape
        dim = value.dim() - len(site["fn"].event_shape) - structure.max_plate_nesting - 1
        if dim < 0 or value.shape[dim] != 2 or value.select(dim, index).numel() != shape.numel():
            return None
        given.nodes[name] = {**site, "value": value.select(dim, index).reshape(shape)}
    return given


def check_module_names(model: Program, guide: Program) -> None:
    """Refuses two PyroModules that would share parameters because they share names."""
    seen: dict[str, Tensor] = {}
    for program in (model, guide):
        for root in modules_of(program):
            if not isinstance(root, PyroModule):
                continue
            for module in root.modules():
                for name in getattr(module, "_pyro_params", {}):
                    full = f"{module._pyro_name}.{name}".lstrip(".")
                    value = getattr(module, f"{name}_unconstrained")
                    if seen.setdefault(full, value) is not value:
                        raise ProgramError(
                            f"two PyroModules both have a parameter '{full}', so Pyro would train "
                            "one of them in place of both; name them: "
                            "super().__init__(name='guide')"
                        )


def check_parameters(
    model: Program, guide: Program, arguments: Arguments, enumerates: bool
) -> list[str]:
    """Refuses pairs that SVI would train in part or not at all; returns the parameters' names."""
    with keep_random_state(), torch.enable_grad():
        with poutine.trace(param_only=True) as params:
            guide_trace, model_trace = trace_programs(model, guide, arguments)
        guide_sites, model_sites = weighted_sites(guide_trace), weighted_sites(model_trace)
        for name, site in model_sites.items():
            if (
                not site["is_observed"]
                and name not in guide_sites
                and not (enumerates and site["infer"].get("enumerate"))
            ):
                raise ProgramError(
                    f"the model's latent site '{name}' is missing from the guide, so Pyro would "
                    "draw it from the prior and optimise no bound; sample it in the guide, or sum "
                    "it out with TraceEnum_ELBO and infer={'enumerate': 'parallel'}"
                )
        registered = [site["value"].unconstrained() for site in params.trace.nodes.values()]
        if not registered:
            raise ProgramError(
                "neither model nor guide has a parameter; register modules with "
                "pyro.module('name', module)"
            )
        total = sum(
            site_log_prob(site).sum() for site in (*guide_sites.values(), *model_sites.values())
        )
        given = [a for a in (*arguments[0], *arguments[1].values()) if isinstance(a, Tensor)]
        known = {id(tensor) for tensor in (*registered, *given)}
        missing = [leaf for leaf in leaves(total) if id(leaf) not in known]
    if missing:
        names = {
            id(p): n
            for program in (model, guide)
            for m in modules_of(program)
            for n, p in m.named_parameters()
        }
        found = ", ".join(
            f"{names.get(id(leaf), 'a tensor')} {tuple(leaf.shape)}" for leaf in missing[:3]
        )
        raise ProgramError(
            f"{len(missing)} parameter tensors influence the bound but were never registered, so "
            f"SVI would not train them: {found}; call pyro.module('name', module) in the program "
            "that uses them, or freeze them with requires_grad_(False)"
        )
    return list(params.trace.nodes)


def leaves(total: Any) -> list[Tensor]:
    """The leaf tensors that require a gradient in the graph of `total`."""
    found: dict[int, Tensor] = {}
    todo, seen = [getattr(total, "grad_fn", None)], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        todo += [following for following, _ in node.next_functions]
    return list(found.values())
