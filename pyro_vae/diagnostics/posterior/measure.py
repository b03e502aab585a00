"""What `posterior_quality` measures datum by datum, chunk by chunk."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.diagnostics.evidence import ChunkPlan, Columns
from pyro_vae.diagnostics.posterior.reference import (
    Reference,
    given_reference,
    hmc_reference,
    reference_columns,
)
from pyro_vae.diagnostics.posterior.settings import CHECKS_OF_REFERENCE, QualityOptions, is_hmc
from pyro_vae.diagnostics.posterior.stein import kernel_stein_discrepancy
from pyro_vae.inference.draws import draws_of, flat_latents, latent_names
from pyro_vae.inference.log_weights import weighted_columns
from pyro_vae.inference.programs import Pair, ProgramError, UnconstrainedModel, tensors_of
from pyro_vae.inference.tempered import Tempered
from pyro_vae.progress import progress_bar
from pyro_vae.results import sha256_of

__all__ = ["Measured", "QualityWork"]


@dataclass(frozen=True)
class Measured:
    """Columns over all data, the latents' names, and what must be said."""

    columns: Columns
    names: list[str]
    notes: list[str]


@dataclass(frozen=True)
class QualityWork:
    """Everything that is measured datum by datum, chunk by chunk."""

    plan: ChunkPlan
    options: QualityOptions
    reference: Any

    def run(self) -> Measured:
        """Measures every chunk and joins the columns; uses the global random stream."""
        parts, notes = [], []
        shown = progress_bar(
            self.plan.num_data, "datum", show=self.options.progress, what="measuring"
        )
        with shown:
            for start, part in self.plan.parts():
                columns, names, said = self._measure(start, part)
                parts.append(columns)
                notes += said
                shown.update(len(columns["khat"]))
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return Measured(joined, names, list(dict.fromkeys(notes)))

    def _measure(self, start: int, part: Pair) -> tuple[Columns, list[str], list[str]]:
        """Columns of a chunk, the names of the latents, and what must be said."""
        options = self.options
        drawn = draws_of(
            part,
            num_draws=options.num_particles,
            seed=_drawn_seed(),
            max_memory=options.max_memory,
        )
        draws = flat_latents(drawn.latents, joint=options.joint).cpu().double()
        columns = weighted_columns(draws, drawn.log_weights.cpu())
        notes: list[str] = []
        if options.runs("stein"):
            found, notes = self._stein(part)
            columns |= found
        reference = self._reference(start, part, list(drawn.latents), draws)
        if reference is not None:
            columns |= self._compare(draws, columns, reference)
            notes = [*notes, *reference.notes]
        return columns, latent_names(drawn.latents, joint=options.joint), notes

    def _reference(
        self, start: int, part: Pair, sites: list[str], draws: Tensor
    ) -> Reference | None:
        joint = self.options.joint
        if self.reference is None:
            return None
        if is_hmc(self.reference):
            return hmc_reference(
                part,
                sites,
                self.options.hmc,
                seed=_drawn_seed(),
                progress=self.options.progress,
            )
        whole = given_reference(
            self.reference,
            sites,
            (self.plan.num_data, draws.shape[2]),
            joint=joint,
            data_sha256=sha256_of(*tensors_of(self.plan.pair.x)),
        )
        return whole.part(start, draws.shape[1])

    def _compare(self, draws: Tensor, moments: Columns, reference: Reference) -> Columns:
        options = self.options
        return reference_columns(
            draws,
            moments,
            reference,
            max_rhat=options.thresholds.rhat,
            min_ess=options.thresholds.reference_ess,
            checks=[check for check in CHECKS_OF_REFERENCE if options.runs(check)],
            num_test_draws=options.num_test_draws,
            num_permutations=options.num_permutations,
            resolve=self._resolve(),
            seed=_drawn_seed(),
        )

    def _resolve(self) -> float | None:
        """The p-value that a single datum needs to be found among all."""
        options = self.options
        return None if options.joint else options.thresholds.level / self.plan.num_data

    def _stein(self, part: Pair) -> tuple[Columns, list[str]]:
        """The kernel Stein discrepancy, or why there is none."""
        options, asked = self.options, self.options.checks is not None
        try:
            latent_model = UnconstrainedModel(part)
        except ProgramError as error:
            if asked:
                raise
            return {}, [f"no kernel Stein discrepancy, which needs gradients: {error}."]
        count, most = options.num_test_draws, self.plan.particle_chunk
        target = Tempered(latent_model, capture=False)
        draws, scores = [], []
        outside = torch.zeros_like(latent_model.active[:, 0])
        for start in range(0, count, most):
            u = latent_model.draw(min(most, count - start), "guide")
            draws.append(u)
            point = target(u)
            # Where the density is 0 there is no score, although autograd may return one.
            nowhere = point.joint == -math.inf
            scores.append(point.gradient.masked_fill(nowhere[..., None], math.nan))
            outside = outside | nowhere.any(0)
        found = kernel_stein_discrepancy(
            torch.cat(draws),
            torch.cat(scores),
            num_bootstrap=options.num_permutations,
            seed=_drawn_seed(),
            resolve=self._resolve(),
        )
        # A latent that a mask switches off has no density, hence no score.
        partly = ~latent_model.active.all(1)
        columns = {
            name: value.masked_fill(partly, math.nan).cpu()
            for name, value in (("ksd", found.value), ("ksd_p_value", found.p_value))
        }
        notes = []
        if bool(outside.any()):
            notes.append(
                "the kernel Stein discrepancy is nan where the guide draws latents that have "
                "density 0 under the model."
            )
        if bool(partly.any()):
            notes.append(
                "the kernel Stein discrepancy is nan where a mask switches latents of a datum off."
            )
        return columns, notes


def _drawn_seed() -> int:
    return int(torch.randint(2**31, ()))
