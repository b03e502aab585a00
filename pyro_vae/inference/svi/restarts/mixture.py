r"""The mixture of several fitted guides, as a guide.

.. math:: q(z) = \frac1K \sum_k q_k(z)

The bound that it gives is that of Kviman et al., the MISELBO. Sites are drawn together, from one
component for each datum (or one for all data, where latents are shared), and the density of each is
that given the sites before it, so that their sum is log q. The components are run out of sight of
the caller's handlers, but within its plates.

References:
    Kviman, Melin, Koptagel, Elvira & Lagergren (2022), Multiple importance sampling ELBO and deep
    ensembles of variational approximations, AISTATS.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_vae.inference.programs import FittedProgram, Program, ProgramError, agree, is_delta

__all__ = ["HeldProgram", "MixtureGuide", "refuse_mixture"]

_Places = list[tuple[dict[str, Any], str, Tensor]]


class HeldProgram(FittedProgram):
    """A program with all the values that one training gave it, those of modules as well.

    They are copies, put into the modules' places while the program runs, so that another training
    of the same modules does not reach them.

    Args:
        program: With fitted values around it.
        modules: All that it reaches.
    """

    def __init__(self, program: FittedProgram, modules: Iterable[nn.Module]) -> None:
        state = program.state
        own = {n for n, v in state["params"].items() if not isinstance(v, nn.Parameter)}
        bare = {part: {n: v for n, v in state[part].items() if n in own} for part in state}
        super().__init__(program.__wrapped__, bare)  # modules bring their own values
        copies: dict[int, Tensor] = {}  # tied ones stay tied
        self._places: _Places = []
        for module in modules:
            for held in (module._parameters, module._buffers):
                for name, value in held.items():
                    if value is not None:
                        copy = copies.setdefault(id(value), _copied(value))
                        self._places.append((held, name, copy))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        with self._in_place():
            return super().__call__(*args, **kwargs)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        before = [held[name] for held, name, _ in self._places]
        try:
            for held, name, value in self._places:
                held[name] = value
            yield
        finally:
            for (held, name, _), value in zip(self._places, before, strict=True):
                held[name] = value

    @property
    def holds_modules(self) -> bool:
        """Whether values of modules are among those it carries."""
        return bool(self._places)


def _copied(value: Tensor) -> Tensor:
    copy = value.detach().clone()
    if isinstance(value, nn.Parameter):
        return nn.Parameter(copy, requires_grad=value.requires_grad)
    return copy


def refuse_mixture(*programs: Any) -> None:
    """Refuses to train a mixture of guides, or modules by a copy of their values.

    Raises:
        ProgramError: If one of the programs is such.
    """
    for program in programs:
        if isinstance(program, MixtureGuide):
            raise ProgramError(
                "a mixture of guides has no parameters of its own to train: its components were "
                "trained each by itself; pass the guide that they were made of"
            )
        if isinstance(program, HeldProgram) and program.holds_modules:
            raise ProgramError(
                "this run carries copies of its modules' values, and training would move the "
                "modules themselves; pass the fit's own model and guide, those of the run that "
                "was kept"
            )


@dataclass(eq=False)
class MixtureGuide:
    """The mixture of guides, in equal parts: a program for every tool that takes a guide.

    Tools that need the parameters of a guide's distributions (refitting), or the latents of a datum
    by themselves given shared ones, refuse it with a sentence.

    Attributes:
        parts: The guides.
        batch_dim: The dim of the plate of the data, whose data have a mixture each; None for one
            mixture of the latents of all data together.
    """

    __wrapped__: Program = field(repr=False)
    parts: Sequence[Program]
    batch_dim: int | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the components, and the first of them once more with the mixture's sites."""
        drawn: list[dict[str, Any]] = []
        rows: dict[str, Tensor] = {}
        outer = _outer_dims()
        for part in self.parts:
            run = _Hidden(rows=rows)
            with run:
                part(*args, **kwargs)
            rows |= run.rows
            drawn.append(run.sites)
        kept = outer | ({self.batch_dim} if self.batch_dim is not None else set())
        leader = _Leader(self._mixed(drawn, kept), rows)
        with leader:
            result = self.parts[0](*args, **kwargs)
        for part in self.parts:
            run = _Hidden(rows=rows, given=leader.values)
            with run:
                part(*args, **kwargs)
            leader.take(run.sites)
        return result

    def _mixed(self, drawn: list[dict[str, Any]], kept: set[int]) -> dict[str, "_MixedSite"]:
        """The sites of the mixture at draws of a component chosen anew for each datum."""
        names = list(drawn[0])
        for sites in drawn[1:]:
            if odd := set(names) ^ set(sites):
                raise ProgramError(
                    f"the guides do not all draw the site '{min(odd)}', so their mixture has no "
                    "density; use guides that draw the same latents at every call"
                )
        shapes = [_kept_shape(site["fn"].batch_shape, kept) for site in drawn[0].values()]
        chosen = torch.randint(len(drawn), torch.broadcast_shapes(*shapes))
        found = {}
        for name in names:
            fn, value = drawn[0][name]["fn"], drawn[0][name]["value"]
            if self.batch_dim is not None and -self.batch_dim > len(fn.batch_shape):
                raise ProgramError(
                    f"site '{name}' of the guide lies outside the plate of the data, which have a "
                    "mixture each; pass the data that the guide was fitted to"
                )
            which = chosen.reshape(chosen.shape[max(chosen.dim() - len(fn.batch_shape), 0) :])
            which = which.to(value.device)[(...,) + (None,) * fn.event_dim]
            for place, sites in enumerate(drawn[1:], 1):
                value = torch.where(which == place, sites[name]["value"], value)
            found[name] = _MixedSite(name, fn, value, kept, together=self.batch_dim is None)
        return found

    def __hash__(self) -> int:
        return id(self)


def _kept_shape(shape: Sequence[int], kept: set[int]) -> list[int]:
    return [n if i - len(shape) in kept else 1 for i, n in enumerate(shape)]


def _outer_dims() -> set[int]:
    """The dims of the plates that the guide is called in, such as that of particles."""
    with _Hidden() as run:
        pyro.sample("_probe", dist.Delta(torch.tensor(0.0)))
    return {f.dim for f in run.sites["_probe"]["cond_indep_stack"] if f.vectorized}


class _Hidden(Messenger):
    """Runs a component so that handlers around it neither see its sites nor set them.

    The plates around it hold all the same.

    Args:
        rows: Subsamples of plates to take, by name.
        given: Values of the latents to take; fresh draws where there are none.
    """

    def __init__(
        self, rows: Mapping[str, Tensor] | None = None, given: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.rows, self.given = dict(rows or {}), given
        self.sites: dict[str, dict[str, Any]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["infer"].get("_deterministic"):
            msg["stop"] = True
            return
        if site_is_subsample(msg):  # seen, and set, once: of the first component
            if msg["name"] in self.rows:
                msg["value"], msg["stop"] = self.rows[msg["name"]], True
            return
        if msg["is_observed"]:
            raise ProgramError(
                f"the guide's site '{msg['name']}' is a factor or observed, of which a mixture of "
                "guides makes no density; take it out of the guide"
            )
        msg["infer"] = {**msg["infer"], "_do_not_trace": True, "is_auxiliary": True}
        if self.given is not None and msg["name"] in self.given:
            msg["value"] = self.given[msg["name"]]
        msg["name"] = f"_component/{msg['name']}"

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self.rows[msg["name"]] = msg["value"]
        elif not msg["stop"]:
            self.sites[msg["name"].removeprefix("_component/")] = dict(msg)

    def _pyro_param(self, msg: Any) -> None:
        msg["stop"] = True


class _Leader(Messenger):
    """Puts the mixture's sites into a run of a component, which handlers around it do see."""

    def __init__(self, sites: Mapping[str, "_MixedSite"], rows: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.sites, self.rows = sites, rows
        self.values: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.rows and site_is_subsample(msg):
            msg["value"], msg["stop"] = self.rows[name], True
        elif name in self.sites:
            site = self.sites[name]
            before = [n for n, v in self.values.items() if v is not self.sites[n].drawn]
            site.replaced = before[0] if before else ""
            msg["fn"] = site

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.sites:
            self.values[msg["name"]] = msg["value"]

    def _pyro_param(self, msg: Any) -> None:
        msg["stop"] = True

    def take(self, sites: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes a component's density of the values that the run ended with."""
        before = torch.zeros(())
        for name, mixed in self.sites.items():
            before = mixed.add(sites[name], before, self.values[name])


class _MixedSite(TorchDistribution):
    """A site of the mixture, given the sites before it.

    Where there are several entries for each mixture (inner plates), they share its density in equal
    parts.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - torch's own form

    def __init__(
        self, name: str, like: Any, drawn: Tensor, kept: set[int], *, together: bool
    ) -> None:
        self.name, self.drawn, self.kept = name, drawn, kept
        self.draws_together, self.replaced = together, ""
        self.has_rsample, self._support = like.has_rsample, like.support
        self._parts: list[tuple[Callable[[Tensor], Tensor], Tensor]] = []
        self._share: Tensor | None = None
        super().__init__(like.batch_shape, like.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self._support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_MixedSite":
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        raise ProgramError(
            f"site '{self.name}' of a mixture of guides cannot be put into further plates"
        )

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """The draw of the component; all sites are of one."""
        if tuple(sample_shape) or self.replaced:
            why = f" given '{self.replaced}'" if self.replaced else ""
            raise ProgramError(
                f"a mixture of guides draws its latents together, and '{self.name}' not by "
                f"itself{why}; pass joint=True, or one of the guides (fit.guide)"
            )
        return self.drawn

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.sample(sample_shape)

    def add(self, site: Mapping[str, Any], before: Tensor, value: Tensor) -> Tensor:
        """Adds a component: its site, and its log density of the sites before.

        Returns:
            Its log density of the sites up to this one.
        """
        fn, mask = site["fn"], site["mask"]

        def log_prob(value: Tensor) -> Tensor:
            found = _density(self.name, fn, value)
            return scale_and_mask(found, 1.0, mask)

        if isinstance(mask, Tensor):
            self._share = mask.expand(self.batch_shape).to(value.dtype)
        self._parts.append((log_prob, before))
        return before + self._sum(log_prob(value))

    def log_prob(self, value: Tensor) -> Tensor:
        before, after = [], []
        for log_prob, ahead in self._parts:
            here = self._sum(log_prob(value))
            before.append(ahead + torch.zeros_like(here))
            after.append(ahead + here)
        ahead = torch.stack(before).logsumexp(0)
        total = torch.stack(after).logsumexp(0) - ahead
        total = torch.where(ahead == -torch.inf, 0.0, total)  # said by an earlier site
        total = total.reshape(total.shape[total.dim() - len(self.batch_shape) :])
        share = total.new_ones(self.batch_shape) if self._share is None else self._share
        return total * share / self._sum(share).clamp_min(1.0)

    def _sum(self, values: Tensor) -> Tensor:
        values = values.expand(self.batch_shape)
        others = [d for d in range(-values.dim(), 0) if d not in self.kept]
        return values.sum(others, keepdim=True) if others else values


def _density(name: str, fn: Any, value: Tensor) -> Tensor:
    """A component's log density; a Delta of an autoguide is what it makes of an auxiliary site."""
    if not is_delta(fn):
        return fn.log_prob(value)
    if not isinstance(fn, dist.Delta) or not agree(fn.v.expand_as(value), value):
        raise ProgramError(
            f"the guides make site '{name}' of an auxiliary draw, each by parameters of its own, "
            "so one has no density at the draws of another; use AutoNormal, "
            "AutoMultivariateNormal or AutoLowRankMultivariateNormal"
        )
    return torch.as_tensor(fn.log_density).expand(fn.batch_shape)
