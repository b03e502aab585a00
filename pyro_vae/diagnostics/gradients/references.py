"""True gradients of bounds to measure a bias against: exact ones, or pooled draws."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_vae.diagnostics.gradients.sampler import CannotMakeError, GradientSampler
from pyro_vae.diagnostics.gradients.specs import TRUSTED, EstimatorSpec, option_text
from pyro_vae.diagnostics.gradients.statistics import ReferenceRows
from pyro_vae.inference.programs import ProgramError

__all__ = ["Reference", "References"]

Reference = Mapping[str, Tensor] | Callable[[str, int], Mapping[str, Tensor] | Tensor | None] | str

_FACTOR = 5  # a pooled reference has so many times the repeats
_FACTOR_ONE_BY_ONE = 2  # where particles run one by one, and draws cost the most
_BLOCKS = 100


class References:
    """True gradients of bounds: exact ones that were given, or means of blocks of further draws.

    Args:
        sampler: Where gradients are drawn.
        given: The caller's exact gradients, "none", or None.
        pairs: The estimators with their numbers of particles.
        repeats: Gradients of each estimator.
    """

    def __init__(
        self,
        sampler: GradientSampler,
        given: Reference | None,
        pairs: Sequence[tuple[EstimatorSpec, int]],
        repeats: int,
    ) -> None:
        self.sampler, self.given = sampler, given
        self.most = max(k for _, k in pairs)
        self.known: dict[tuple[str, int], dict[str, ReferenceRows] | None] = {}
        self.pooled: dict[tuple[str, int], ELBO] = {}
        self.notes: list[str] = []
        one_by_one = sampler.structure is not None and not sampler.structure.vectorizable
        self.blocks = min(_BLOCKS, repeats)
        factor = _FACTOR_ONE_BY_ONE if one_by_one else _FACTOR
        self.block_size = math.ceil(factor * repeats / self.blocks)
        if given == "none":
            self.notes.append("Bias was not measured: reference='none'.")
        else:
            for spec, k in pairs:
                self._find(spec, k)

    @property
    def num_gradients(self) -> int:
        """How many `draw` makes."""
        return len(self.pooled) * self.blocks * self.block_size

    def get(self, spec: EstimatorSpec, num_particles: int) -> dict[str, ReferenceRows] | None:
        """For each group the reference: one row if exact, else independent rows to average."""
        return self.known.get(self._key(spec, num_particles))

    def draw(self, advance: Callable[[int], Any]) -> None:
        """Draws what was not given, all of it from the same draws where that can be."""
        stream = int(np.random.SeedSequence((self.sampler.seed, 1)).generate_state(1)[0])
        keys, elbos = list(self.pooled), list(self.pooled.values())
        means: list[dict[str, list[Tensor]]] = [{g: [] for g in self.sampler.groups} for _ in keys]
        for block in range(self.blocks if keys else 0):
            for place, drawn in self.sampler.draw(elbos, self.block_size, stream + block, advance):
                for group, gradients in drawn.gradients.items():
                    means[place][group].append(gradients.mean(0))
        for key, rows in zip(keys, means, strict=True):
            self.known[key] = {group: torch.stack(drawn) for group, drawn in rows.items()}

    def _key(self, spec: EstimatorSpec, num_particles: int) -> tuple[str, int]:
        """The bound with its options, and K; the gradient of the ELBO does not depend on K."""
        family, options = spec.bound_at(num_particles)
        bound = family + (option_text(options) if options else "")
        return bound, max(self.most, 2) if family == "ELBO" else num_particles

    def _find(self, spec: EstimatorSpec, num_particles: int) -> None:
        bound, k = key = self._key(spec, num_particles)
        if key in self.known:
            return
        self.known[key] = self._exact(bound, k)
        if self.known[key] is None:
            self._trust(spec, *spec.bound_at(num_particles), key)

    def _exact(self, bound: str, k: int) -> dict[str, ReferenceRows] | None:
        sampler = self.sampler
        if self.given is None or isinstance(self.given, str):
            return None
        found: Any
        if isinstance(self.given, Mapping):
            found = self.given if bound == "ELBO" else None
        else:
            found = self.given(bound, k)
        if found is None:
            return None
        of = bound if bound == "ELBO" else f"{bound} with K = {k}"
        self.notes.append(f"Bias of estimators of the {of}: against the exact gradient given.")
        if isinstance(found, Tensor):
            leaves = list(sampler.leaves.values())
            total = found.sum() if sampler.joint else found.mean()
            grads = torch.autograd.grad(total, leaves, allow_unused=True)
            found = {
                name: torch.zeros_like(leaf) if grad is None else grad
                for (name, leaf), grad in zip(sampler.leaves.items(), grads, strict=True)
            }
        return {group: self._flat(group, found)[None] for group in sampler.groups}

    def _flat(self, group: str, found: Mapping[str, Tensor]) -> Tensor:
        given = {name.replace("$$$", "."): value for name, value in found.items()}
        parts = []
        for name in self.sampler.groups[group]:
            shape = self.sampler.leaves[name].shape
            if name not in given:
                raise ValueError(f"the reference lacks the gradient of parameter '{name}'; add it")
            if given[name].shape != shape:
                raise ValueError(
                    f"the reference of '{name}' has shape {tuple(given[name].shape)}, but the "
                    f"unconstrained parameter {tuple(shape)}; give it that shape"
                )
            parts.append(given[name].detach().reshape(-1))
        return self.sampler.select(group, torch.cat(parts)).cpu().double()

    def _trust(
        self, spec: EstimatorSpec, family: str, options: Mapping[str, Any], key: tuple[str, int]
    ) -> None:
        """Finds an estimator of the bound that is known to be unbiased and takes the pair."""
        sampler, (bound, k) = self.sampler, key
        for kind in TRUSTED.get(family, ()) if sampler.structure is not None else ():
            trusted = EstimatorSpec(
                kind.__name__,
                partial(kind, joint=sampler.joint, **options),
                family,
                kind.bound_kind,
            )
            try:
                elbo = sampler.make(trusted, k)
                sampler.step(elbo)
            except (ProgramError, CannotMakeError):  # the next that is trusted may take this pair
                continue
            self.pooled[key] = elbo
            text = f"{bound} with K = {k}" if family != "ELBO" else "ELBO"
            count = self.blocks * self.block_size
            self.notes.append(
                f"Bias of estimators of the {text}: against a pooled reference, {count:,} further "
                f"draws of {kind.__name__} with K = {k}; its standard error is in bias_se."
            )
            return
        self.notes.append(
            f"{spec.name} has no reference for the bound '{bound}' with K = {k}, so its bias "
            "is unknown; pass reference=."
        )
