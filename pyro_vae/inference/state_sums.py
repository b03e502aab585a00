r"""Discrete latents summed out of a trace: log p of what is left, whatever plates and chains do.

.. math:: \log \sum_c \prod_s p_s(\cdot \mid c) \quad \text{inside a plate,} \qquad
          \sum_n \log \sum_{c_n} \dots \quad \text{over it}

Pyro lays the states of each enumerated site out along a dim and knows which site reads which; a
mixture sums over each datum's component, a hidden Markov model runs its forward recursion.
"""

from collections import OrderedDict
from collections.abc import Collection, Mapping
from functools import reduce
from typing import Any

import torch
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing
from pyro.poutine import Trace
from torch import Tensor

__all__ = ["StateSumError", "read_states", "sum_states"]

Packed = Any  # a tensor that carries the symbols of its dims
Terms = dict[str, tuple[frozenset[str], Packed]]


class StateSumError(ValueError):
    """The states cannot be summed out; the message names the sites."""


def read_states(trace: Trace, log_probs: Mapping[str, Tensor]) -> dict[str, frozenset[str]]:
    """The enumerated sites whose states each site's log-probability depends on, itself included.

    Args:
        trace: A run with enumerated sites.
        log_probs: Of its sites, as the run has their dims.

    Raises:
        StateSumError: If one that reads states has a dim in no plate; names the site.
    """
    terms, names = _packed(trace, log_probs), _enumerated(trace)
    return {
        site: frozenset(names[symbol] for symbol in term._pyro_dims if symbol in names)
        for site, (_, term) in terms.items()
    }


def sum_states(trace: Trace, log_probs: Mapping[str, Tensor], *, scaled: bool) -> list[Tensor]:
    """Sums the states out of the log-probabilities of sites, those without any as they are.

    In log space throughout: no state is lost because it is hundreds of nats less probable.

    Args:
        trace: A run with enumerated sites (`poutine.enum`).
        log_probs: Of the sites to keep, as the run has their dims; of enumerated ones, unmasked.
        scaled: Whether the sites count by their scales, which lie outside of the sums.

    Returns:
        For each set of sites that read states in common, in nats and in the dims of a run: the
        plates that all of these sites are in. Over others it is summed.

    Raises:
        StateSumError: If sites cannot be summed plate by plate, one reads a state whose own site is
            left out, or has a dim in no plate, or their scales differ; names them.

    References:
        Obermeyer et al. (2019), Tensor variable elimination for plated factor graphs.
    """
    terms, names = _packed(trace, log_probs), _enumerated(trace)
    found = [
        log_prob * trace.nodes[name]["scale"] if scaled else log_prob
        for name, log_prob in log_probs.items()
        if name not in terms
    ]
    for sites in _components(terms, names):
        states = {s for site in sites for s in terms[site][1]._pyro_dims if s in names}
        missing = sorted({names[symbol] for symbol in states} - set(sites))
        if missing:
            raise StateSumError(
                f"site '{sites[0]}' reads the state of the enumerated site '{missing[0]}', which "
                "all data share"
            )
        tree: OrderedDict[frozenset[str], list[Packed]] = OrderedDict()
        for site in sites:
            plates, term = terms[site]
            tree.setdefault(plates, []).append(term)
        log_prob = _contract(trace, tree, states, sites)
        found.append(log_prob * _common_scale(trace, sites) if scaled else log_prob)
    return found


def _common_scale(trace: Trace, sites: tuple[str, ...]) -> Any:
    """The scale that sites have in common, as a sum over their states needs."""
    scales = {name: trace.nodes[name]["scale"] for name in sites}
    values = {name: set(torch.as_tensor(s).flatten().tolist()) for name, s in scales.items()}
    first = values[sites[0]]
    for name, own in values.items():
        if own != first or len(own) > 1:
            raise StateSumError(
                f"sites '{sites[0]}' and '{name}' read the same enumerated state, but count by "
                f"different scales ({min(first):g} and {max(own):g}), and no mini-batch estimates "
                "the log of their sum: pass batch_size=None, draw the state inside the plate of "
                "the data"
            )
    return scales[sites[0]]


class _LogSpace(LogRing):
    """Sums by logsumexp of whole tables, where Pyro's multiplies probabilities."""

    def sumproduct(self, terms: Any, dims: Collection[str]) -> Packed:
        left = list(terms)
        # The latest site first: of a chain or a tree that leaves tables of two states.
        for dim in sorted(dims, key=self._dim_to_size.__getitem__, reverse=True):
            table = _product([term for term in left if dim in term._pyro_dims])
            summed: Packed = table.logsumexp(table._pyro_dims.index(dim))
            summed._pyro_dims = table._pyro_dims.replace(dim, "")
            left = [term for term in left if dim not in term._pyro_dims] + [summed]
        return _product(left)


def _contract(trace: Trace, tree: Any, states: set[str], sites: tuple[str, ...]) -> Tensor:
    """One tensor of sites that read states in common, in the dims of a run."""
    order = {symbol: place for place, symbol in enumerate(_enumerated(trace))}
    try:
        tree = contract_tensor_tree(tree, states, ring=_LogSpace(None, order))
    except NotImplementedError as error:
        raise StateSumError(
            f"the states that the sites {', '.join(sites)} read lie in plates of which neither is "
            "inside the other, so that their sum does not split by plates: make one of them a "
            "sequential plate (for i in pyro.plate(...))"
        ) from error
    ((term,),) = tree.values()
    return packed.unpack(term, trace.symbol_to_dim)


def _packed(trace: Trace, log_probs: Mapping[str, Tensor]) -> Terms:
    """The log-probabilities that depend on states, in dims with names, and their plates."""
    trace.symbolize_dims()
    terms = {}
    for name, log_prob in log_probs.items():
        site = trace.nodes[name]
        dims = [dim for dim in site["infer"].get("_dim_to_id", ()) if dim >= -log_prob.dim()]
        if all(log_prob.shape[dim] == 1 for dim in dims):
            continue
        try:
            term = packed.pack(log_prob, site["infer"]["_dim_to_symbol"])
        except ValueError as error:
            raise StateSumError(
                f"site '{name}' has log-probabilities of shape {tuple(log_prob.shape)}, not all of "
                "whose dims are in a plate, so that it does not say which of them have states of "
                "their own: add .to_event(1) to its distribution, declare the dim with a pyro.plate"
            ) from error
        plates = (trace.plate_to_symbol[f.name] for f in site["cond_indep_stack"] if f.vectorized)
        terms[name] = frozenset(plates), term
    return terms


def _enumerated(trace: Trace) -> dict[str, str]:
    """Names of the enumerated sites by their symbols, in the order of the run."""
    return {
        site["infer"]["_enumerate_symbol"]: name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and "_enumerate_symbol" in site["infer"]
    }


def _components(terms: Terms, states: Collection[str]) -> list[tuple[str, ...]]:
    """The sites, those together that read a state in common, however indirectly."""
    groups: list[tuple[set[str], list[str]]] = []
    for site, (_, term) in terms.items():
        own = set(term._pyro_dims) & set(states)
        joined = [group for group in groups if own & group[0]]
        groups = [group for group in groups if not own & group[0]]
        sites = [name for group in joined for name in group[1]]
        groups.append((own.union(*(group[0] for group in joined)), [*sites, site]))
    return [tuple(sites) for _, sites in groups]


def _product(terms: list[Packed]) -> Packed:
    """The sum of log-probabilities in packed dims."""
    if len(terms) == 1:
        return terms[0]
    aligned = packed.broadcast_all(*terms)
    total: Packed = reduce(torch.add, aligned)
    total._pyro_dims = aligned[0]._pyro_dims
    return total
