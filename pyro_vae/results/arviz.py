"""Draws as ArviZ's own container, whichever of its two majors is installed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import xarray as xr

__all__ = ["ArvizGroups", "HasArvizGroups", "to_arviz"]

_CHAINS = ("chain", "draw")
_NO_CHAINS = ("sample",)
_NOTHING: Mapping[str, Any] = MappingProxyType({})

Variable = tuple[tuple[str, ...], Any]
Groups = Mapping[str, Mapping[str, Variable]]


@dataclass(frozen=True)
class ArvizGroups:
    """Arrays in the groups of ArviZ's schema.

    Attributes:
        groups: By group and variable, the names of the first dims, and the array. Draws come first,
            as ``sample``, or as ``chain`` and ``draw`` where chains made them. Dims without a name
            are those of an event.
        attrs: What is to be known of the draws: text and numbers.
    """

    groups: Groups
    attrs: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class HasArvizGroups(Protocol):
    """What `to_arviz` takes: anything that can say what it has for ArviZ."""

    def arviz_groups(self) -> ArvizGroups:
        """What there is, by group."""


def _container(datasets: dict[str, xr.Dataset]) -> Any:
    """What the installed major of ArviZ works on."""
    if int(version("arviz").split(".")[0]) >= 1:
        return xr.DataTree.from_dict(datasets)
    import arviz

    return arviz.InferenceData(**datasets)


def to_arviz(
    *parts: HasArvizGroups,
    history: xr.Dataset | None = None,
    khat: Any = None,
    dims: Mapping[str, Sequence[str]] = _NOTHING,
    coords: Mapping[str, Any] = _NOTHING,
    sample_dims: Sequence[str] = _CHAINS,
) -> Any:
    r"""Puts draws, with all that belongs to them, into the container that ArviZ works on.

    The groups are those of ArviZ's schema: ``posterior``, ``prior``, ``prior_predictive``,
    ``posterior_predictive``, ``observed_data``, ``log_likelihood``, and ``sample_stats`` with
    ``lp`` (log p(x, z)), ``log_q`` (log q(z | x)) and ``log_weight`` (their difference), in nats.
    Masks are in ``constant_data``; where data are masked, log likelihoods are 0. The group ``fit``
    holds the history of a training, k-hat and the effective sample size of the weights; the
    schema has no place for these yet, so the group is provisional.

    Data lie along ``datum``; inner plates have their own names, events ``<site>_dim_<i>`` or
    those of `dims`. Draws without chains lie along ``chain`` (one) and ``draw``, on which
    ``summary``, ``loo``, ``compare`` and ``plot_trace`` of both majors work.
    ``sample_dims=["sample"]`` gives them the one dimension that ArviZ 1's own converter for
    variational inference uses; of ArviZ 1.3 ``loo`` and ``compare`` refuse it (they insist on
    chains), and ``summary`` wants ``kind="stats", sample_dims="sample"``.

    Args:
        parts: What `draw_posterior`, its ``resampled``, `sample_posterior`, `draw_prior` and
            `draw_predictive` give, in any number.
        history: The history of a training, ``fit.history``.
        khat: The Pareto k-hat of each datum, from `pareto_khat` of the log weights.
        dims: Names for the dims of an event, by site: ``{"z": ["latent"]}``.
        coords: Values along a dimension, by its name: ``{"datum": ids}``. Others count from 0.
        sample_dims: ``["chain", "draw"]`` or, for draws without chains, ``["sample"]``.

    Returns:
        `arviz.InferenceData` (ArviZ 0.23) or `xarray.DataTree` (ArviZ 1).

    Raises:
        ValueError: If two parts have the same group, a name stands for a site and a dimension or
            for dimensions of two sizes, or `dims`, `coords` or `sample_dims` do not fit.

    Note: `arviz.loo` leaves out one entry of ``log_likelihood`` at a time. With global latents
    that is the predictive density of a datum given the others. With latents of each datum, given
    which the data are independent, it estimates log p(x_n) itself, by a harmonic mean that seldom
    has a finite variance: its k-hat will say so, and `log_evidence` is the better tool. Draws of
    a guide are not draws of the posterior: pass those of ``resampled``, or use
    ``arviz.loo_approximate_posterior`` (ArviZ 1) with ``lp`` and ``log_q``.

    Example:
        >>> import torch
        >>> from pyro_vae import LinearGaussian
        >>> from pyro_vae.inference.draws import draw_posterior
        >>> model = LinearGaussian(data_dim=3, latent_dim=2)
        >>> draws = draw_posterior(model.model, model.exact_guide, torch.zeros(5, 3), num_draws=7)
        >>> data = to_arviz(draws, dims={"z": ["latent"]})
        >>> data["posterior"]["z"].dims
        ('chain', 'draw', 'datum', 'latent')
    """
    found = [part.arviz_groups() for part in parts]
    groups = _joined([part.groups for part in found])
    leading = _sample_dims(groups, sample_dims)
    if khat is not None:
        groups.setdefault("fit", {})["khat"] = _per_datum(khat, groups)
    datasets = _datasets(groups, leading, dims, coords)
    attrs = {key: value for part in found for key, value in part.attrs.items()}
    if history is not None:
        plain = xr.Dataset(history.data_vars, history.coords, history.attrs)
        datasets["fit"] = plain.merge(datasets.get("fit", xr.Dataset()))
        datasets["fit"].attrs |= plain.attrs
    stamp = {
        "created_at": datetime.now(UTC).isoformat(),
        "creation_library": "pyro_vae",
        "inference_library": "pyro_vae",
        "inference_library_version": version("pyro-vae"),
        **attrs,
    }
    for dataset in datasets.values():
        has_draws = [dim for dim in leading if dim in dataset.dims]
        dataset.attrs |= stamp | ({"sample_dims": has_draws} if has_draws else {})
    return _container(datasets)


def _joined(
    parts: Sequence[Groups],
) -> dict[str, dict[str, Variable]]:
    """The groups of all parts; ``fit`` may be of several."""
    joined: dict[str, dict[str, Variable]] = {}
    for part in parts:
        for group, variables in part.items():
            if group in joined and group not in ("fit", "constant_data", "observed_data"):
                raise ValueError(
                    f"two parts have the group {group}: convert each set of draws by itself"
                )
            joined.setdefault(group, {}).update(variables)
    return joined


def _per_datum(khat: Any, groups: Groups) -> Variable:
    """With joint weights there is one k-hat for all data."""
    values = _numbers(khat)
    if values.size == 1 and "datum" not in groups.get("sample_stats", {}).get("lp", ((), None))[0]:
        return (), values.reshape(())
    return ("datum",), values


def _sample_dims(groups: Groups, asked: Sequence[str]) -> tuple[str, ...]:
    if tuple(asked) not in (_CHAINS, _NO_CHAINS):
        raise ValueError(f"sample_dims is {tuple(asked)}, but must be {_NO_CHAINS} or {_CHAINS}")
    chains = any("chain" in names for group in groups.values() for names, _ in group.values())
    if chains and tuple(asked) != _CHAINS:
        raise ValueError(f"these draws come in chains: leave sample_dims out, or pass {_CHAINS}")
    return tuple(asked)


def _datasets(
    groups: Groups,
    leading: tuple[str, ...],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Any],
) -> dict[str, xr.Dataset]:
    arrays = {
        group: {name: _array(name, *variable, leading, dims) for name, variable in content.items()}
        for group, content in groups.items()
    }
    named = {
        (name, dim) for content in arrays.values() for name, a in content.items() for dim in a.dims
    }
    for site, names in dims.items():
        if not {(site, dim) for dim in names} <= named:
            raise ValueError(f"dims names an event of {site!r}, but no site of that name has one")
    _check_dims(arrays, coords)
    datasets = {}
    for group, variables in arrays.items():
        sizes = {str(d): n for array in variables.values() for d, n in array.sizes.items()}
        index = {dim: coords.get(dim, np.arange(size)) for dim, size in sizes.items()}
        datasets[group] = xr.Dataset(variables, index)
    return datasets


def _array(
    name: str,
    names: tuple[str, ...],
    values: Any,
    leading: tuple[str, ...],
    dims: Mapping[str, Sequence[str]],
) -> xr.DataArray:
    """One variable with all its dims named, its draws along the leading ones."""
    numbers = _numbers(values)
    if names[:1] == _NO_CHAINS and leading == _CHAINS:
        names, numbers = (*_CHAINS, *names[1:]), numbers[None]
    left = numbers.ndim - len(names)
    event = tuple(dims.get(name, (f"{name}_dim_{i}" for i in range(left)))) if left else ()
    if len(event) != left:
        raise ValueError(
            f"dims names {len(event)} dimensions of {name}, but its event has {left} beside "
            f"{', '.join(names)}"
        )
    every = (*names, *event)
    taken = {*_CHAINS, *_NO_CHAINS} - set(leading)
    clash = next((dim for dim in every if dim in taken or every.count(dim) > 1), None)
    if clash is not None:
        raise ValueError(
            f"a dimension of {name} is called {clash!r} like another one that stands for draws or "
            "data: give its plate or event another name"
        )
    return xr.DataArray(numbers, dims=every)


def _check_dims(
    arrays: Mapping[str, Mapping[str, xr.DataArray]], coords: Mapping[str, Any]
) -> None:
    every = [(name, array) for content in arrays.values() for name, array in content.items()]
    sizes: dict[str, tuple[str, int]] = {}
    for name, array in every:
        for dim, size in array.sizes.items():
            if dim in (*_CHAINS, *_NO_CHAINS):  # the prior may have more draws than the posterior
                sizes[str(dim)] = (name, size)
                continue
            other, known = sizes.setdefault(str(dim), (name, size))
            if size != known:
                raise ValueError(
                    f"the dimension {dim!r} has {known} entries in {other} and {size} in {name}: "
                    "give each an own name with dims"
                )
    reserved = {*sizes, *_CHAINS, *_NO_CHAINS, "datum"}
    for name, _ in every:
        if name in reserved:
            raise ValueError(
                f"the site {name!r} has the name of a dimension, and a dataset can hold only one "
                "of them: rename the site in model and guide"
            )
    for dim, values in coords.items():
        if dim not in sizes:
            raise ValueError(f"coords names {dim!r}, but the dimensions are {sorted(sizes)}")
        if len(values) != sizes[dim][1]:
            raise ValueError(f"coords has {len(values)} values for {sizes[dim][1]} of {dim!r}")


def _numbers(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu().numpy() if hasattr(values, "detach") else values)
