"""The normal distribution that a guide is in unconstrained space: read with gradients, written."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from jaxtyping import Float
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoGuide, AutoMultivariateNormal, AutoNormal
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, TransformedDistribution, transform_to

from pyro_vae.inference.programs import (
    Pair,
    ProgramError,
    Site,
    UnconstrainedModel,
    is_delta,
    weighted_sites,
)
from pyro_vae.inference.svi.evaluation import TrainedPair

__all__ = ["GuideNormal"]


class GuideNormal:
    """A guide as one normal distribution of all unconstrained latents.

    Attributes:
        latent_model: The log joint of all data as a function of those latents.
        dim: Their number.

    Args:
        trained: The pair; run it inside `programs.program_scope`.

    Raises:
        ProgramError: If the guide is no normal distribution there, or a mask switches latents off.
    """

    def __init__(self, trained: TrainedPair) -> None:
        self.trained = trained
        args, kwargs = trained.arguments
        x: Any = kwargs if kwargs and not args else args
        with torch.no_grad(), trained.measuring(0):
            pair = Pair.inspect(trained.model, trained.guide, x, joint=True)
            self.latent_model = UnconstrainedModel(pair)
            guide_trace, model_trace = pair.first_run()
            parts = [_normal_of(name, site) for name, site in _drawn(guide_trace)]
            drawn = torch.cat([value for _, _, value in parts])
            expected = self.latent_model.flatten(model_trace, 1)[0, 0]
        if not bool(self.latent_model.active.all()):
            raise ProgramError(
                "a mask of the model switches latents off, whose normal distribution nothing "
                "determines; leave them out of the model, or pass method='svi'"
            )
        same = drawn.shape == expected.shape and torch.allclose(drawn, expected, 1e-4, 1e-4)
        if not same:
            site = next(iter(_drawn(guide_trace)))[0]
            raise ProgramError(
                f"the guide is no normal distribution in the model's unconstrained space (see its "
                f"site '{site}'): it is a flow, or a support of the model depends on other "
                "latents; pass method='svi', or a guide such as AutoNormal(model)"
            )
        self.dim = len(drawn)

    def check_fixed(self) -> None:
        """Refuses a guide whose locations or scales move with its own draws."""
        here = self.trained.vector()
        self.trained.move(here + 0.01 * torch.randn_like(here))  # a slope may be zero at first
        first, second = self.read(), self.read()
        self.trained.move(here)
        if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            raise ProgramError(
                "the guide's locations or scales move with its own draws (a latent depends on "
                "another), so it is too expressive for fixed draws; write them as parameters, or "
                "pass method='svi'"
            )

    def read(self) -> tuple[Float[Tensor, " dim"], Tensor]:
        """Mean, and scales `[dim]` or a triangular factor `[dim, dim]`; gradients flow to them."""
        args, kwargs = self.trained.arguments
        trace = poutine.trace(self.trained.guide).get_trace(*args, **kwargs)
        parts = [_normal_of(name, site) for name, site in _drawn(trace)]
        loc = torch.cat([loc for loc, _, _ in parts])
        if all(root.dim() == 1 for _, root, _ in parts):
            return loc, torch.cat([root for _, root, _ in parts])
        dense = [root if root.dim() == 2 else root.diag() for _, root, _ in parts]
        return loc, torch.block_diag(*dense)

    @torch.no_grad()
    def write(self, loc: Float[Tensor, " dim"], chol: Float[Tensor, "dim dim"]) -> None:
        """Puts a normal distribution into the guide's parameters; of a diagonal guide, the sds."""
        _writer_of(self.trained.guide)(self, loc, chol)

    def check_writable(self) -> None:
        """Refuses a guide that no normal distribution can be written into."""
        _writer_of(self.trained.guide)


def _drawn(trace: poutine.Trace) -> list[tuple[str, Site]]:
    sites = weighted_sites(trace).items()
    return [(n, s) for n, s in sites if not (s["is_observed"] or is_delta(s["fn"]))]


def _normal_of(name: str, site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, root and drawn value of a site's normal distribution, flat."""
    fn, value = site["fn"], site["value"]
    while hasattr(fn, "base_dist"):
        if isinstance(fn, TransformedDistribution):
            for transform in reversed(fn.transforms):
                value = transform.inv(value)
        fn = fn.base_dist
    shape = value.shape
    if isinstance(fn, MultivariateNormal):
        size = shape[-1]
        chol = fn.scale_tril.expand(*shape, size).reshape(-1, size, size)
        return fn.loc.expand(shape).reshape(-1), torch.block_diag(*chol), value.reshape(-1)
    if isinstance(fn, Normal):
        loc, scale = (part.expand(shape).reshape(-1) for part in (fn.loc, fn.scale))
        return loc, scale, value.reshape(-1)
    raise ProgramError(
        f"the guide's site '{name}' is {type(fn).__name__} and no (transformed) normal "
        "distribution; write one, use AutoNormal(model), or pass method='svi'"
    )


# --- writing --------------------------------------------------------------------------------------


def _full(_normal: GuideNormal, guide: Any, loc: Tensor, chol: Tensor) -> None:
    scale = chol.diagonal()
    guide.loc.copy_(loc)
    _set(guide, "scale", scale)
    _set(guide, "scale_tril", chol / scale[:, None])


def _diagonal(_normal: GuideNormal, guide: Any, loc: Tensor, chol: Tensor) -> None:
    guide.loc.copy_(loc)
    _set(guide, "scale", chol.norm(dim=1))


def _by_site(normal: GuideNormal, guide: Any, loc: Tensor, chol: Tensor) -> None:
    by_site = normal.latent_model.by_site
    for parts, values in ((guide.locs, loc), (guide.scales, chol.norm(dim=1))):
        for name, value in by_site(values[None, None]).items():
            _set(parts, name, value)


_WRITERS: dict[type[AutoGuide], Callable[[GuideNormal, Any, Tensor, Tensor], None]] = {
    AutoMultivariateNormal: _full,
    AutoDiagonalNormal: _diagonal,
    AutoNormal: _by_site,
}


def _writer_of(guide: Any) -> Callable[[GuideNormal, Tensor, Tensor], None]:
    while not isinstance(guide, AutoGuide) and hasattr(guide, "__wrapped__"):
        guide = guide.__wrapped__
    for kind, write in _WRITERS.items():
        if isinstance(guide, kind):
            return lambda normal, loc, chol: write(normal, guide, loc, chol)
    listed = ", ".join(kind.__name__ for kind in _WRITERS)
    raise ProgramError(
        "the fitted normal distribution is written into the guide's parameters, so the guide must "
        f"be one of {listed} (or None, for {AutoMultivariateNormal.__name__}); pass one of these, "
        "or method='svi' or 'deterministic'"
    )


def _set(module: Any, name: str, value: Tensor) -> None:
    """Sets a constrained parameter, whose name may go through modules, in place."""
    path, _, last = name.rpartition(".")
    owner = attrgetter(path)(module) if path else module
    constraint, _ = owner._pyro_params[last]
    parameter = getattr(owner, f"{last}_unconstrained")
    free = transform_to(constraint).inv(value.to(parameter))
    parameter.copy_(free.reshape(parameter.shape))
