"""What a fitting method is to the training loop: a rule that makes the steps as well."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vae.inference.draws import flat_latents, latent_names
from pyro_vae.inference.programs import UnconstrainedModel
from pyro_vae.inference.svi.convergence import Rule
from pyro_vae.inference.svi.evaluation import TrainedPair
from pyro_vae.results import Result, label, make_result

__all__ = ["MethodRule", "constrained", "posterior_result"]


class MethodRule(Rule):
    """A method that moves the parameters itself, step by step, where SVI would.

    The training loop gives it what every training has: history, files, resume, Ctrl-C.

    Args:
        pair: What is fitted.
        kind: What its phases are called.
        limit: The most steps.
        seed: Seeds its draws.
    """

    def __init__(self, pair: TrainedPair, kind: str, limit: int, seed: int) -> None:
        super().__init__(0.0, kind, pair.threshold, limit)
        self.pair, self.seed = pair, seed

    def begin(self) -> None:
        """Before the first step."""

    def advance(self, *_args: Any, **_kwargs: Any) -> float:
        """Makes a step, and returns minus the ELBO that it saw, in nats of all data."""
        raise NotImplementedError

    def step(self) -> bool:
        """Takes note of a step; True, for every one is worth a row of the history."""
        state = self.state
        state.steps += 1
        state.ended = bool(state.checks) or state.steps >= self.limit
        return True

    def finish(self, *, converged: bool) -> None:
        """In a step: says that it is the last one (which Ctrl-C may keep from being noted)."""
        self.state.checks, self.state.converged = 1, converged

    def posterior(self, config: Mapping[str, Any], data_sha256: str | None) -> Result:
        """What the method says of the posterior, by latent, as `Fit.posterior` holds it."""
        raise NotImplementedError


def constrained(
    latent_model: UnconstrainedModel, u: Float[Tensor, "draws dim"]
) -> tuple[Float[Tensor, "draws latents"], list[str]]:
    """Joint draws in constrained space, and the latents' names; gradients flow to `u`."""
    by_site = latent_model.constrain(u[:, None].to(latent_model.like))
    return flat_latents(by_site, joint=True)[:, 0], latent_names(by_site, joint=True)


def posterior_result(
    columns: Mapping[str, tuple[Any, Any, str]],
    names: list[str],
    *,
    num_draws: int,
    seed: int,
    config: Mapping[str, Any],
    data_sha256: str | None,
    notes: list[str],
) -> Result:
    """A labelled result of columns: dims, values and what they are; numbers without a unit."""
    variables: dict[str, Any] = {}
    for name, (dims, values, text) in columns.items():
        unit = "nats" if name == "elbo" else "none"
        attrs = label(
            unit=unit,
            reduction="total" if unit == "nats" else "none",
            bound="lower" if unit == "nats" else "none",
            num_particles=num_draws,
            description=text,
        )
        variables[name] = (dims, torch.as_tensor(values).detach(), attrs)
    coords = {"latent": names}
    if "other_latent" in {dim for dims, _, _ in columns.values() for dim in dims}:
        coords["other_latent"] = names
    return make_result(
        variables,
        function="fit",
        config=config,
        seed=seed,
        data_sha256=data_sha256,
        coords=coords,
        notes=notes,
    )
