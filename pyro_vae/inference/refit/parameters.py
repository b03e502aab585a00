"""Any distribution with other parameters: those that `arg_constraints` names, wherever they stand.

A distribution is a tree: what its constructor takes are parameters, other distributions, and things
that stay as they are. Whoever builds it anew from its own parameters gets the same density back, or
it is refused.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch import distributions as torch_dist
from torch.distributions import constraints, transform_to

from pyro_vae.inference.programs import ProgramError, keep_random_state
from pyro_vae.inference.supports import family_of

__all__ = [
    "Node",
    "check_rebuilt",
    "constraint_of",
    "in_plates",
    "nodes",
    "normal_kinds",
    "rebuild",
]

normal_kinds = (
    torch_dist.Normal,
    torch_dist.MultivariateNormal,
    torch_dist.LowRankMultivariateNormal,
)

_WRAPPERS = (torch_dist.Independent, MaskedDistribution, ExpandedDistribution)
# Of two names for one parameter, the one that is freed, where the distribution has both.
_OTHER_NAMES = {
    "probs": "logits",
    "gate": "gate_logits",
    "covariance_matrix": "scale_tril",
    "precision_matrix": "scale_tril",
}
# What moves the ends of a support, and is kept because the other parameters can move.
_KEPT = {dist.AffineBeta: ("loc", "scale"), dist.CoalescentTimes: ("leaf_times",)}
_ENDS: dict[str, Callable[[Mapping[str, Tensor]], Any]] = {  # of Uniform, which torch leaves open
    "low": lambda _: constraints.real,
    "high": lambda at: constraints.greater_than(at["low"]),
}
# Their draws are rounded from what their density is of.
_ROUNDED = (
    dist.RelaxedBernoulliStraightThrough,
    dist.RelaxedOneHotCategoricalStraightThrough,
)
Change = Callable[[str, Any], Mapping[str, Tensor]]


class Node(NamedTuple):
    """A distribution within another.

    Attributes:
        path: Which constructor arguments lead to it: `"component_distribution."`, mostly `""`.
        fn: The distribution.
        batch_shape: Its batch shape in the plates of the site, where it may have been expanded.
        names: Its parameters that are freed.
    """

    path: str
    fn: Any
    batch_shape: torch.Size
    names: tuple[str, ...]


def nodes(fn: Any) -> list[Node]:
    """The distributions within one that have parameters to free."""
    return [node for node in _every(fn) if node.names]


def _every(fn: Any) -> Iterator[Node]:
    return _walk("", fn, torch.Size(fn.batch_shape))  # which some of Pyro's keep as a tuple


def _walk(path: str, fn: Any, batch_shape: torch.Size) -> Iterator[Node]:
    fn = copy.copy(fn)  # some of Pyro's cannot be expanded once they were asked for their logits
    yield Node(path, fn, batch_shape, _free_names(fn))
    for name, child in _children(fn).items():
        inner = batch_shape + child.batch_shape[len(fn.batch_shape) :]
        yield from _walk(_below(path, fn, name), child, inner)


def _below(path: str, fn: Any, name: str) -> str:
    return path if _is_wrapper(fn) else f"{path}{name}."


def _is_wrapper(fn: Any) -> bool:
    plain = (torch_dist.TransformedDistribution, dist.TransformedDistribution)
    return isinstance(fn, _WRAPPERS) or type(fn) in plain


def _children(fn: Any) -> dict[str, Any]:
    """The distributions that a distribution is made of."""
    if _is_wrapper(fn):
        return {"base_dist": fn.base_dist}
    given = {name: getattr(fn, name, None) for name in _signature(fn)}
    return {
        name: value for name, value in given.items() if isinstance(value, torch_dist.Distribution)
    }


def _free_names(fn: Any) -> tuple[str, ...]:
    """The parameters of real numbers, each under one name."""
    if _is_wrapper(fn):
        return ()
    known, given = fn.arg_constraints, _signature(fn)
    kept = next((names for kind, names in _KEPT.items() if isinstance(fn, kind)), ())
    return tuple(
        name
        for name in given
        if name in known
        and name not in kept
        and _OTHER_NAMES.get(name) not in known
        and not _is_discrete(known[name])
    )


def _is_discrete(constraint: Any) -> bool:
    try:
        return constraint.is_discrete
    except NotImplementedError:  # a constraint that depends on something else
        return False


def _signature(fn: Any) -> list[str]:
    return [name for name in inspect.signature(type(fn).__init__).parameters if name != "self"]


def rebuild(fn: Any, change: Change, path: str = "") -> Any:
    """The same distribution with other parameters; transforms are shared and stay as they are.

    Args:
        fn: The distribution.
        change: Gives the parameters of a distribution within it, by its path.
        path: Where it stands itself.
    """
    fn = copy.copy(fn)
    children = {
        name: rebuild(child, change, _below(path, fn, name))
        for name, child in _children(fn).items()
    }
    if isinstance(fn, torch_dist.Independent):
        return dist.Independent(children["base_dist"], fn.reinterpreted_batch_ndims)
    if isinstance(fn, MaskedDistribution):
        return MaskedDistribution(children["base_dist"], fn._mask)
    if isinstance(fn, ExpandedDistribution):
        return ExpandedDistribution(children["base_dist"], fn.batch_shape)
    if _is_wrapper(fn):
        return dist.TransformedDistribution(children["base_dist"], fn.transforms)
    return _build(fn, {**change(path, fn), **children})


def _build(fn: Any, given: Mapping[str, Any]) -> Any:
    """A distribution of the same class; what is not given is taken from it."""
    arguments = dict(given)
    for name, argument in inspect.signature(type(fn).__init__).parameters.items():
        if name in ("self", "validate_args") or name in given or name in _OTHER_NAMES:
            continue
        if hasattr(fn, name) and argument.kind is not argument.VAR_KEYWORD:
            arguments[name] = getattr(fn, name)
    cls = type(fn)
    if isinstance(fn, dist.OneHotCategoricalStraightThrough):
        cls = dist.OneHotCategorical  # whose draws are the same, and have no gradient
    elif not isinstance(fn, dist.torch_distribution.TorchDistributionMixin):
        cls = getattr(dist, cls.__name__)
    if "validate_args" in _signature(fn):
        arguments["validate_args"] = False
    return cls(**arguments)


def constraint_of(fn: Any, name: str, at: Mapping[str, Tensor] | None = None) -> Any:
    """Where a parameter may lie, beside those of the distribution or others before it."""
    if isinstance(fn, torch_dist.Uniform):
        return _ENDS[name]({"low": fn.low} if at is None else at)
    return fn.arg_constraints[name]


def check_rebuilt(name: str, fn: Any) -> None:
    """Refuses what is not the same distribution again when it is built from its parameters.

    Raises:
        ProgramError: With the site's name and what to write.
    """
    if any(_draws_another(node.fn) for node in nodes(fn)):
        raise ProgramError(
            f"the guide's site '{name}' has a {family_of(fn)}, whose draws in torch do not have "
            "its density where dim is above 2, so every weight and gap would be wrong; transform "
            "normal draws by CorrCholeskyTransform instead"
        )
    if not _is_rebuilt(fn):
        raise ProgramError(
            f"the guide's site '{name}' has a {family_of(fn)}, whose parameters cannot be freed "
            "for each datum: it is not built from those that its arg_constraints name; use a "
            "distribution that is (a Normal, Gamma, MixtureSameFamily, ...), a bijective transform "
            "of one, or give the class each argument of its constructor as an attribute"
        )


def _draws_another(fn: Any) -> bool:
    """Torch's onion method has its row's beta off by a half from the third row on (2.13, 2.15)."""
    return isinstance(fn, torch_dist.LKJCholesky) and fn.dim > 2


def _is_rebuilt(fn: Any) -> bool:
    if any(not _can_be_known(node.fn) for node in _every(fn)):
        return False
    found = nodes(fn)
    if not found:
        return False
    with keep_random_state(), torch.no_grad():
        try:
            again = rebuild(fn, _there_and_back({node.path: node for node in found}))
            shapes = (torch.Size(fn.batch_shape), fn.event_shape)
            return (again.batch_shape, again.event_shape) == shapes and all(map(_is_same, found))
        except Exception:  # whatever a constructor says to what it was not made for
            return False


def _can_be_known(fn: Any) -> bool:
    if isinstance(fn, _ROUNDED):
        return False
    if _is_wrapper(fn) and isinstance(fn, torch_dist.TransformedDistribution):
        return all(t.bijective for t in fn.transforms)
    return True


def _is_same(node: Node) -> bool:
    """Whether a distribution taken apart and put together has the density that it had."""
    fn = node.fn
    again = rebuild(fn, _there_and_back({"": Node("", fn, fn.batch_shape, node.names)}))
    value = fn.sample()
    tolerance = torch.finfo(torch.get_default_dtype()).eps ** 0.5
    before, after = fn.log_prob(value), again.log_prob(value)
    return torch.allclose(before, after, rtol=tolerance, atol=tolerance, equal_nan=True)


def _there_and_back(found: Mapping[str, Node]) -> Change:
    """Gives the parameters that are there, by way of their unconstrained spaces."""

    def change(path: str, fn: Any) -> dict[str, Tensor]:
        moved: dict[str, Tensor] = {}
        for name in found[path].names if path in found else ():
            onto = transform_to(constraint_of(fn, name))
            start = onto.inv(in_plates(found[path], name))
            if bool(start.isnan().any()):
                raise ValueError(name)
            moved[name] = onto(start)
        return moved

    return change


def in_plates(node: Node, name: str) -> Tensor:
    """A parameter of a distribution, expanded as its site is in its plates."""
    value = getattr(node.fn, name)
    event = max(value.dim() - len(node.fn.batch_shape), constraint_of(node.fn, name).event_dim)
    return value.expand(node.batch_shape + value.shape[value.dim() - event :])
