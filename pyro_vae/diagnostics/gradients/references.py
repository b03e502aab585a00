"""True gradients of bounds to measure a bias against: exact ones, or pooled draws."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.diagnostics.gradients.candidates import TRUSTED, Candidate, option_text
from pyro_vae.diagnostics.gradients.sampler import Bench, CannotMakeError
from pyro_vae.diagnostics.gradients.statistics import ReferenceRows
from pyro_vae.inference.programs import ProgramError

__all__ = ["Reference", "References"]

Reference = Mapping[str, Tensor] | Callable[[str, int], Mapping[str, Tensor] | Tensor | None] | str

_FACTOR = 5  # a pooled reference has so many times the repeats
_BLOCKS = 100


class References:
    """True gradients of bounds, made when first asked for: exact ones, or means of blocks."""

    def __init__(
        self,
        bench: Bench,
        given: Reference | None,
        particles: tuple[int, ...],
        repeats: int,
    ) -> None:
        self.bench, self.given, self.repeats = bench, given, repeats
        self.most = max(particles)
        self.known: dict[tuple[str, int], dict[str, ReferenceRows] | None] = {}
        self.notes: list[str] = []
        if given == "none":
            self.notes.append("Bias was not measured: reference='none'.")

    def get(self, candidate: Candidate, num_particles: int) -> dict[str, ReferenceRows] | None:
        """For each group the reference: one row if exact, else independent rows to average."""
        if isinstance(self.given, str):
            return None
        family, options = candidate.bound_at(num_particles)
        # The gradient of the ELBO does not depend on K.
        k = max(self.most, 2) if family == "ELBO" else num_particles
        bound = family + (option_text(options) if options else "")
        key = (bound, k)
        if key not in self.known:
            exact = self._exact(bound, k)
            self.known[key] = exact or self._pooled(candidate, family, options, bound, k)
        return self.known[key]

    def _exact(self, bound: str, k: int) -> dict[str, ReferenceRows] | None:
        bench = self.bench
        if self.given is None or isinstance(self.given, str):
            return None
        if isinstance(self.given, Mapping):
            found: Any = self.given if bound == "ELBO" else None
        else:
            found = self.given(bound, k)
        if found is None:
            return None
        of = bound if bound == "ELBO" else f"{bound} with K = {k}"
        self.notes.append(f"Bias of estimators of the {of}: against the exact gradient given.")
        if isinstance(found, Tensor):
            leaves = list(bench.leaves.values())
            total = found.sum() if bench.joint else found.mean()
            grads = torch.autograd.grad(total, leaves, allow_unused=True)
            found = {
                name: torch.zeros_like(leaf) if grad is None else grad
                for (name, leaf), grad in zip(bench.leaves.items(), grads, strict=True)
            }
        return {group: self._flat(group, found)[None] for group in bench.groups}

    def _flat(self, group: str, found: Mapping[str, Tensor]) -> Tensor:
        given = {name.replace("$$$", "."): value for name, value in found.items()}
        parts = []
        for name in self.bench.groups[group]:
            shape = self.bench.leaves[name].shape
            if name not in given:
                raise ValueError(f"the reference lacks the gradient of parameter '{name}'; add it")
            if given[name].shape != shape:
                raise ValueError(
                    f"the reference of '{name}' has shape {tuple(given[name].shape)}, but the "
                    f"unconstrained parameter {tuple(shape)}; give it that shape"
                )
            parts.append(given[name].detach().reshape(-1))
        return self.bench.select(group, torch.cat(parts)).cpu().double()

    def _pooled(
        self,
        candidate: Candidate,
        family: str,
        options: Mapping[str, Any],
        bound: str,
        k: int,
    ) -> dict[str, ReferenceRows] | None:
        bench = self.bench
        for kind in TRUSTED.get(family, ()) if bench.structure is not None else ():
            trusted = Candidate(
                kind.__name__,
                partial(kind, joint=bench.joint, **options),
                family,
                kind.bound_kind,
            )
            try:
                elbo = bench.make(trusted, k)
                bench.step(elbo)
            except (ProgramError, CannotMakeError):  # the next that is trusted may take this pair
                continue
            stream = int(np.random.SeedSequence((bench.seed, 1)).generate_state(1)[0])
            blocks = min(_BLOCKS, self.repeats)
            size = math.ceil(_FACTOR * self.repeats / blocks)
            means: dict[str, list[Tensor]] = {group: [] for group in bench.groups}
            for block in range(blocks):
                drawn = bench.draw(elbo, size, stream + block, lambda: None)
                for group, gradients in drawn.gradients.items():
                    means[group].append(gradients.mean(0))
            text = f"{bound} with K = {k}" if family != "ELBO" else "ELBO"
            self.notes.append(
                f"Bias of estimators of the {text}: against a pooled reference, {blocks * size:,} "
                f"further draws of {kind.__name__} with K = {k}; its standard error is in bias_se."
            )
            return {group: torch.stack(rows) for group, rows in means.items()}
        self.notes.append(
            f"{candidate.name} has no reference for the bound '{bound}' with K = {k}, so its bias "
            "is unknown; pass reference=."
        )
        return None
