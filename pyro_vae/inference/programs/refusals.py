"""What is refused of a pair's sites: each check names the site and says what to do."""

from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_vae.inference.programs.arguments import (
    Arguments,
    NoParametersError,
    PointMassError,
    Program,
    ProgramError,
    ProgramStructure,
    SitesError,
    SubsampleError,
    SupportError,
)
from pyro_vae.inference.programs.scope import (
    keep_random_state,
    modules_of,
    pyro_parameters,
    shown_value,
)
from pyro_vae.inference.programs.traces import (
    measured,
    naming_the_site,
    site_log_prob,
    subsamples,
    trace_programs,
    weighted_sites,
)

__all__ = [
    "FirstRun",
    "check_enumerable",
    "check_guide_draws",
    "check_latents",
    "check_module_names",
    "check_observed",
    "check_parameters",
    "check_point_mass",
    "check_same_latents",
    "check_unchanged",
    "common_scale",
    "first_run",
    "is_delta",
    "is_enumerable",
    "leaves",
    "max_plate_nesting",
    "versions",
]


def versions(arguments: Arguments) -> dict[str | int, int]:
    """How often each tensor among the arguments was written to."""
    args, kwargs = arguments
    named: dict[str | int, Any] = dict(enumerate(args, 1))
    named.update(kwargs)
    return {
        name: value._version
        for name, value in named.items()
        if isinstance(value, Tensor) and not value.is_inference()
    }


def check_unchanged(arguments: Arguments, before: dict[str | int, int]) -> None:
    """Refuses programs that wrote to an argument in place."""
    for name, version in versions(arguments).items():
        if version != before[name]:
            raise ProgramError(
                f"model or guide writes to argument {name!r} in place (as x.clamp_() and x[0] = 0 "
                "do), so that runs see different data, and so does the caller afterwards; write "
                "to a copy, x = x.clone()"
            )


class FirstRun(NamedTuple):
    """One run of a pair.

    Attributes:
        traces: Of guide and model.
        parameters: Their parameters, unconstrained.
        size: A measure of the run's memory, in bytes.
    """

    traces: tuple[Trace, Trace]
    parameters: dict[str, Tensor]
    size: int


def first_run(model: Program, guide: Program, arguments: Arguments) -> FirstRun:
    """Runs guide and model; a failure of theirs is said as a fault of the pair where it is one."""
    with measured() as size, poutine.trace(param_only=True) as seen:
        traces = _trace(model, guide, arguments)
    # Now: a value forgets what it was made from when the store is put back.
    parameters = {n: _unconstrained(site["value"]) for n, site in seen.trace.nodes.items()}
    return FirstRun(traces, parameters, size(traces))


def _unconstrained(value: Tensor) -> Tensor:
    """The tensor behind a parameter; one under a handler that substitutes it has none."""
    return value.unconstrained() if hasattr(value, "unconstrained") else value


def _trace(model: Program, guide: Program, arguments: Arguments) -> tuple[Trace, Trace]:
    try:
        with naming_the_site():
            return trace_programs(model, guide, arguments)
    except RuntimeError:  # how Pyro answers a latent that the guide observes
        args, kwargs = arguments
        alone = poutine.trace(guide).get_trace(*args, **kwargs)
        check_guide_draws(weighted_sites(alone), {"not seen": {}})
        raise
    except ValueError as error:
        if "inside plate" in str(error):  # Pyro's own, whose first line names plate and site
            raise ProgramError(
                f"{str(error).splitlines()[0]}: give the plate the number of data, or, if the "
                "dim is one of a datum, add .to_event(1) to the site's distribution"
            ) from error
        raise


def check_same_latents(traces: tuple[Trace, Trace], summed: set[str]) -> None:
    """Refuses a pair that does not sample the same latents.

    Args:
        traces: Of guide and model.
        summed: The kinds of enumeration whose latents the guide may leave out.
    """
    guide_sites, model_sites = map(weighted_sites, traces)
    check_guide_draws(guide_sites, model_sites)
    check_latents(guide_sites, model_sites, summed)


def check_guide_draws(guide_sites: dict[str, dict], model_sites: dict[str, dict]) -> None:
    """Refuses a guide that observes, or a pair passed in the other order."""
    swapped = not any(site.get("is_observed", True) for site in model_sites.values())
    for name, site in guide_sites.items():
        factor = type(site["fn"]).__name__ == "Unit"  # pyro.factor
        if site["is_observed"] and (swapped or not factor):
            raise SitesError(
                f"the guide's site '{name}' is observed, so the guide is no density of the "
                "latents; "
                + (
                    "the model observes nothing: were they passed in the other order?"
                    if swapped
                    else "take obs= out of the guide, or sample the site there"
                )
            )


def check_latents(
    guide_sites: dict[str, dict], model_sites: dict[str, dict], summed: set[str]
) -> None:
    """Refuses a pair that does not sample the same latents."""
    if not model_sites:
        raise SitesError("the model has no site; draw latents and observe data with pyro.sample")
    for name, site in model_sites.items():
        left_to_sum = site["infer"].get("enumerate") in summed
        if not site["is_observed"] and name not in guide_sites and not left_to_sum:
            raise SitesError(
                f"the model's latent site '{name}' is missing from the guide, so Pyro would draw "
                "it from the prior and bound nothing; sample it in the guide under the same name, "
                "or, if it is discrete, have it summed out (infer={'enumerate': 'parallel'}, for "
                "which fit needs loss=None, TraceEnum_ELBO() or one of this package)"
            )
        if site["is_observed"] and name in guide_sites:
            raise SitesError(
                f"site '{name}' is observed in the model but stands in the guide as well; take it "
                "out of the guide, or give it another name"
            )
        if name in guide_sites and not site["is_observed"]:
            dims = {f.name: f.dim for f in guide_sites[name]["cond_indep_stack"] if f.vectorized}
            # A plate of that name at another dim is said elsewhere.
            if all(dims.get(f.name, f.dim) == f.dim for f in site["cond_indep_stack"]):
                _check_one_draw_each(name, site)
    for name, site in guide_sites.items():
        if (
            not site["is_observed"]
            and name not in model_sites
            and not site["infer"].get("is_auxiliary")
        ):
            raise SitesError(
                f"the guide samples site '{name}', which the model does not have, so the weights "
                "would bound nothing; sample it in the model as well, or mark it "
                "infer={'is_auxiliary': True} if the density of another site accounts for it, as "
                "Pyro's autoguides do"
            )


def _check_one_draw_each(name: str, site: dict) -> None:
    """Refuses one draw for all entries of a plate, which the model would count once for each."""
    value = site["value"]
    if not isinstance(value, Tensor) or "_enumerate_dim" in site["infer"]:
        return
    for frame in site["cond_indep_stack"]:
        dim = frame.dim - site["fn"].event_dim if frame.vectorized else 0
        if dim and frame.size > 1 and (value.dim() < -dim or value.shape[dim] == 1):
            raise SitesError(
                f"the guide draws the latent '{name}' once for all {frame.size} of plate "
                f"'{frame.name}', where the model has one for each, so the weights would bound "
                f"nothing; draw it inside pyro.plate('{frame.name}', {frame.size}) in the guide "
                "(an EasyGuide: inside self.plate), or outside that plate in the model"
            )


def check_enumerable(model_sites: dict[str, dict], structure: ProgramStructure) -> None:
    """Refuses an enumerated site whose distribution lists no states."""
    for name in structure.enumerated:
        if not is_enumerable(model_sites[name]["fn"]):
            raise ProgramError(
                f"the model's site '{name}' is marked for enumeration, but its distribution "
                f"({type(model_sites[name]['fn']).__name__}) lists no states (a vector of several "
                "discrete values does not); sample it in the guide, or write each as its own site"
            )
        if model_sites[name]["infer"].get("num_samples"):
            raise ProgramError(
                f"the model's site '{name}' is marked for enumeration by num_samples draws, which "
                "are no sum over its states; take num_samples out"
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


def check_point_mass(guide: Program, arguments: Arguments, guide_trace: Trace) -> None:
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
        raise PointMassError(
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


def check_observed(model_sites: dict[str, dict]) -> str:
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
        value = shown_value(site)
        if value.is_floating_point() and bool(value.isnan().any()):
            raise SupportError(
                f"the data at site '{name}' have missing values (NaN) that no mask covers; mask "
                "them, as in dist.Normal(...).mask(~x.isnan()), or leave those data out"
            )
        if not bool(support.check(value).all()):
            raise SupportError(
                f"the data at site '{name}' lie outside the support of their distribution "
                f"({support}): " + _support_advice(support)
            )
        measures.add(_measure_of(support))
    return measures.pop() if len(measures) == 1 else "mixed"


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


def max_plate_nesting(guide_sites: dict, model_sites: dict, shapes: Any) -> int:
    """Dims that plates and batch shapes take."""
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
    exact: list[float] = []
    for sites in (model_sites, guide_sites):
        for name, site in sites.items():
            scale = site["scale"]
            for value in scale.unique().tolist() if isinstance(scale, Tensor) else [float(scale)]:
                seen.setdefault(float(f"{value:.6g}"), name)  # products of factors round
                exact.append(value)
    scale = next(iter(seen), 1.0)
    if len(seen) > 1:
        (a, site_a), (b, site_b) = list(seen.items())[:2]
        sites_are = (
            f"sites '{site_a}' and '{site_b}' have"
            if site_a != site_b
            else f"site '{site_a}' has for its data"
        )
        reason = f"{sites_are} different scales ({a:g} and {b:g}), so no importance weight exists"
    elif joint and scale != 1.0:
        reason = (
            f"joint log weights need the full data, but site '{seen[scale]}' has scale {scale:g}"
        )
    else:
        return 1.0 if scale == 1.0 else exact[0]
    for site in (*model_sites.values(), *guide_sites.values()):
        for plate in site["cond_indep_stack"]:
            if plate.full_size not in (None, plate.size):
                which = f"plate '{plate.name}' draws {plate.size} of {plate.full_size} data"
                raise SubsampleError(f"{reason}: {which}")
    raise ProgramError(
        f"{reason}; remove poutine.scale (annealing is for Trace_ELBO alone), or subsample model "
        "and guide alike"
    )


def check_module_names(model: Program, guide: Program) -> None:
    """Refuses two PyroModules that would share parameters because they share names."""
    seen: dict[str, Tensor] = {}
    for program in (model, guide):
        for full, value in pyro_parameters(program):
            if seen.setdefault(full, value) is not value:
                raise ProgramError(
                    f"two PyroModules both have a parameter '{full}', so Pyro would train one of "
                    "them in place of both; name them: super().__init__(name='guide')"
                )


def check_parameters(
    model: Program,
    guide: Program,
    arguments: Arguments,
    enumerates: bool,
    run: FirstRun | None = None,
) -> list[str]:
    """Refuses pairs that SVI would train in part or not at all; returns the parameters' names."""
    if run is None:
        with keep_random_state(), torch.enable_grad():
            run = first_run(model, guide, arguments)
    check_same_latents(run.traces, {"parallel", "sequential"} if enumerates else set())
    if not run.parameters:
        raise NoParametersError(
            "neither model nor guide has a parameter; register modules with "
            "pyro.module('name', module)"
        )
    with torch.enable_grad():
        sites = [site for trace in run.traces for site in weighted_sites(trace).values()]
        total = sum(site_log_prob(site).sum() for site in sites)
    given = [a for a in (*arguments[0], *arguments[1].values()) if isinstance(a, Tensor)]
    known = {id(tensor) for tensor in (*run.parameters.values(), *given)}
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
    return list(run.parameters)


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
