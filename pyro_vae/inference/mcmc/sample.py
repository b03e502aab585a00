"""What Markov chains give: draws of the posterior of each datum, and how well they mixed."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_vae.inference.draws import labelled_draws
from pyro_vae.inference.programs import (
    LabelledSites,
    ProgramError,
    ProgramStructure,
    UnconstrainedModel,
    program_scope,
    site_log_probs,
)
from pyro_vae.results import ArvizGroups, Result, data_text, label, make_result, shapes_text

__all__ = ["PosteriorSample"]


@dataclass(frozen=True, repr=False)
class PosteriorSample:
    """Draws from p(z | x) of each datum, and how well the chains mixed.

    Attributes:
        draws: By site, `[chains, draws, batch, inner plates, event]`; without batch if joint.
        unconstrained: All latents in unconstrained space, `[chains, draws, batch, dim]`.
        log_joint: log p(x, z) with the Jacobian of the transforms, `[chains, draws, batch]`.
        acceptance: Mean acceptance probability after warm-up, `[chains, batch]`.
        step_size: After warm-up, `[batch]`.
        divergences: Trajectories given up after warm-up, `[chains, batch]`.
        rhat: The largest rank-normalised split R-hat over the datum's latents, `[batch]`.
        ess: The smallest bulk effective sample size over them, `[batch]`.
        latent_model: The log joint that was sampled.
        config: The settings.
        data_sha256: Hash of the data.
        sites: Names of dims, observed values and masks.
    """

    draws: dict[str, Tensor]
    unconstrained: Float[Tensor, "chains draws batch dim"]
    log_joint: Float[Tensor, "chains draws batch"]
    acceptance: Float[Tensor, "chains batch"]
    step_size: Float[Tensor, " batch"]
    divergences: Int[Tensor, "chains batch"]
    rhat: Float[Tensor, " batch"]
    ess: Float[Tensor, " batch"]
    latent_model: UnconstrainedModel
    config: dict[str, Any]
    data_sha256: str
    sites: LabelledSites

    def __repr__(self) -> str:
        chains, draws, data = self.log_joint.shape
        whose = "joint draws" if self.structure.batch_dim is None else f"draws of {data:,} data"
        lines = [
            f"PosteriorSample: {chains} chains x {draws:,} {whose}, seed {self.config['seed']}",
            f"latents: {shapes_text(self.draws)}",
            f"data: {shapes_text(self.sites.observed)}",
            f"R-hat up to {float(self.rhat.max()):.3f}; effective draws from "
            f"{float(self.ess.min()):.4g}; {int(self.divergences.sum())} divergences",
        ]
        return "\n  ".join(lines)

    @property
    def latents(self) -> dict[str, Tensor]:
        """The draws by site, as other draws of a posterior call them."""
        return self.draws

    @property
    def structure(self) -> ProgramStructure:
        """What `inspect_programs` found."""
        return self.latent_model.structure

    @property
    def sample_dims(self) -> tuple[str, ...]:
        """Names of the dims of the draws."""
        return ("chain", "draw")

    def arviz_groups(self) -> ArvizGroups:
        """What `pyro_vae.results.to_arviz` reads; ``lp`` has the Jacobian, as in Stan."""
        joint = self.structure.batch_dim is None
        per_datum = () if joint else ("datum",)
        statistics = {
            "rhat": self.rhat,
            "ess": self.ess,
            "acceptance_rate": self.acceptance.mean(0),
            "step_size": self.step_size,
            "divergences": self.divergences.sum(0),
        }
        log_joint = self.log_joint[..., 0] if joint else self.log_joint
        groups = {
            "posterior": labelled_draws(self.draws, self.sites, self.sample_dims),
            "sample_stats": {"lp": ((*self.sample_dims, *per_datum), log_joint)},
            "log_likelihood": labelled_draws(self._log_likelihood(), self.sites, self.sample_dims),
            **self.sites.arviz_groups(),
            "fit": {
                name: (per_datum, values[0] if joint else values)
                for name, values in statistics.items()
            },
        }
        attrs = {"draws_from": "hmc", "seed": self.config["seed"]}
        if notes := self.notes():
            attrs["notes"] = " ".join(notes)
        return ArvizGroups({name: group for name, group in groups.items() if group}, attrs)

    def _log_likelihood(self) -> dict[str, Tensor]:
        """By observed site, `[chains, draws, batch, inner plates]`; none if latents are summed out.

        Raises:
            ProgramError: If the model's parameters are not those that the draws were made with.
        """
        structure = self.structure
        if structure.enumerated:
            return {}
        found: dict[str, list[Tensor]] = {name: [] for name in structure.observed}
        with torch.no_grad(), program_scope():
            last = self.latent_model.log_density(self.unconstrained[:, -1])
            if not torch.allclose(last, self.log_joint[:, -1], rtol=1e-4, atol=1e-3):
                raise ProgramError(
                    "the model's parameters have changed since these draws were made, so their log "
                    "likelihood is another one; draw again"
                )
            for draw in self.unconstrained.unbind(1):
                parts: dict[str, list[Tensor]] = {name: [] for name in structure.observed}
                for trace, count in self.latent_model.traces(draw):
                    for name, kept in parts.items():
                        kept.append(site_log_probs(trace, name, structure, count))
                for name, kept in parts.items():
                    found[name].append(torch.cat(kept))
        return {name: torch.stack(values, 1) for name, values in found.items()}

    def notes(self) -> list[str]:
        """What must not be parted from the draws."""
        bad = int((~(self.rhat <= 1.01)).sum())
        runs = int((self.divergences.sum(0) > 0).sum())
        found = []
        if bad:
            found.append(
                f"R-hat is above 1.01 for {data_text(bad, len(self.rhat))} (largest "
                f"{float(self.rhat.max()):.3g}): there the chains have not mixed; run them longer."
            )
        if runs:
            found.append(
                f"trajectories diverged for {data_text(runs, len(self.rhat))} "
                f"({int(self.divergences.sum())} in all): there the draws may miss a region; raise "
                "target_accept."
            )
        return found

    def result(self) -> Result:
        """The diagnostics of each datum as a labelled result.

        Returns:
            Over `datum`:

            =============  ===============  ==================================================
            name           unit, bound      meaning
            =============  ===============  ==================================================
            `rhat`         none, none       largest rank-normalised split R-hat of the latents
            `ess`          particles, none  smallest bulk effective sample size of the latents
            `acceptance`   none, none       mean acceptance probability
            `step_size`    none, none       leapfrog step size after warm-up
            `divergences`  none, none       trajectories given up after warm-up
            =============  ===============  ==================================================
        """
        total = self.unconstrained.shape[0] * self.unconstrained.shape[1]
        columns = {
            "rhat": (self.rhat, "none", "largest rank-normalised split R-hat of the latents"),
            "ess": (self.ess, "particles", "smallest bulk effective sample size of the latents"),
            "acceptance": (self.acceptance.mean(0), "none", "mean acceptance probability"),
            "step_size": (self.step_size, "none", "leapfrog step size after warm-up"),
            "divergences": (
                self.divergences.sum(0).double(),
                "none",
                "trajectories given up after warm-up",
            ),
        }
        variables = {
            name: (
                "datum",
                values,
                label(
                    unit=unit,
                    bound="none",
                    reduction="per datum",
                    num_particles=total,
                    description=text,
                ),
            )
            for name, (values, unit, text) in columns.items()
        }
        return make_result(
            variables,
            function="sample_posterior",
            config=self.config,
            seed=self.config["seed"],
            data_sha256=self.data_sha256,
            notes=self.notes(),
        )
