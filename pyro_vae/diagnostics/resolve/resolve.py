"""For every datum a posterior that may be used, and the evidence that says so."""

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from jaxtyping import Int
from torch import Tensor

from pyro_vae.checks import check_count, check_max_memory
from pyro_vae.data import Seed, as_seed
from pyro_vae.diagnostics.evidence import plan_chunks
from pyro_vae.diagnostics.posterior import Thresholds
from pyro_vae.diagnostics.resolve.ladder import RUNGS, Attempt, LadderState
from pyro_vae.inference.draws import labelled_draws
from pyro_vae.inference.programs import (
    LabelledSites,
    Pair,
    Program,
    ProgramStructure,
    UnconstrainedModel,
    label_sites,
    program_scope,
    tensors_of,
    tool,
)
from pyro_vae.inference.refit import WeightedDraws
from pyro_vae.progress import progress_bar
from pyro_vae.results import ArvizGroups, Result, data_text, label, make_result, sha256_of

__all__ = ["ResolvedDraws", "resolve"]

_COLUMNS = {  # unit, bound, description
    "log_evidence": ("nats", "none", "log p(x) by the rung that delivered the draws"),
    "khat": ("none", "none", "Pareto k-hat of the weights behind the draws; nan for chains"),
    "ess": ("particles", "none", "effective draws"),
    "rhat": ("none", "none", "largest split R-hat of the chains; nan for weighted draws"),
}


@dataclass(frozen=True)
class ResolvedDraws:
    """Draws from the posterior of each datum, and how they were come by.

    Attributes:
        latents: By site, `[draws, batch, inner plates, event]`; without batch if joint.
        rung: The number of the rung that delivered each datum's draws, `[batch]`; -1 where none
            did: the draws are then the last rung's, and are no posterior.
        result: A row a datum (rung, k-hat, ESS, R-hat, log evidence) and seconds by rung.
        structure: What inspection found.
        sites: Names of dims, observed values and masks.
    """

    latents: dict[str, Tensor]
    rung: Int[Tensor, " batch"]
    result: Result
    structure: ProgramStructure
    sites: LabelledSites

    @property
    def unresolved(self) -> list[int]:
        """The data for which no rung gave usable draws."""
        return torch.nonzero(self.rung < 0)[:, 0].tolist()

    @property
    def sample_dims(self) -> tuple[str, ...]:
        """Names of the dims of the draws."""
        return ("sample",)

    def table(self) -> str:
        """How many data each rung delivered, and what it cost."""
        seconds = self.result["seconds"].values
        lines = [f"{'rung':24s} {'data':>6s} {'share':>7s} {'seconds':>8s}"]
        for number, rung in enumerate(RUNGS):
            count = int((self.rung == number).sum())
            share = count / len(self.rung)
            lines.append(f"{rung.name:24s} {count:6d} {share:7.1%} {seconds[number]:8.1f}")
        left = len(self.unresolved)
        lines.append(f"{'none: no usable draws':24s} {left:6d} {left / len(self.rung):7.1%}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        count = len(next(iter(self.latents.values())))
        return f"ResolvedDraws: {count} draws of {', '.join(self.latents)}\n{self.table()}"

    def arviz_groups(self) -> ArvizGroups:
        """What `pyro_vae.results.to_arviz` reads."""
        per_datum = () if self.structure.batch_dim is None else ("datum",)
        columns = {name: torch.as_tensor(self.result[name].values) for name in _COLUMNS}
        fit = {n: (per_datum, v if per_datum else v.reshape(-1)[0]) for n, v in columns.items()}
        groups: dict[str, Any] = {
            "posterior": labelled_draws(self.latents, self.sites),
            **self.sites.arviz_groups(),
            "fit": fit,
        }
        return ArvizGroups({n: g for n, g in groups.items() if g}, {"draws_from": "resolve"})


@tool
def resolve(
    model: Program,
    guide: Program,
    x: Any,
    *,
    num_draws: int = 1000,
    budget: float | None = None,
    thresholds: Thresholds | None = None,
    joint: bool | None = None,
    seed: Seed = 0,
    max_memory: float = 1.0,
    progress: bool = True,
) -> ResolvedDraws:
    r"""Draws from every datum's posterior by the cheapest means that can be shown to be right.

    Each datum goes up a ladder until it passes: the guide's draws as they are; resampled by their
    weights; moved to the moments of the weighted ones; a normal distribution of full covariance
    fitted to the datum, weighted; Hamiltonian Monte Carlo, started from tempered draws. Every rung
    works on all data that are still on it and starts from what the last one found. Draws pass by
    the rule of `posterior_quality`'s verdict (`Thresholds`), chains by R-hat and effective draws.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior.
        x: The data; a tuple for several arguments, a dict for keywords.
        num_draws: Draws for each datum.
        budget: Seconds after which no further rung is begun; None for no limit.
        thresholds: What counts as good enough.
        joint: True for one posterior on the full data; None for that where latents are global.
        seed: Seeds everything; the caller's random state is left alone.
        max_memory: Of the data worked on at once, in GiB, roughly.
        progress: Shows a bar on stderr where that is a terminal.

    Returns:
        Draws, the rung of each datum and a labelled result (with `joint` without the dimension
        `datum`):

        ==============  =========  ===============  ==============================================
        name            dims       unit, bound      meaning
        ==============  =========  ===============  ==============================================
        `rung`          datum      text             name of the rung, or "none"
        `log_evidence`  datum      nats, none       log p(x) by the rung that delivered the draws,
                                                    with `log_evidence_se`; a total with `joint`
        `khat`          datum      none, none       Pareto k-hat of the weights behind the draws;
                                                    nan for chains
        `ess`           datum      particles, none  effective draws
        `rhat`          datum      none, none       largest split R-hat of the chains; nan for
                                                    weighted draws
        `seconds`       rung_name  seconds, none    spent on each rung
        ==============  =========  ===============  ==============================================

    Raises:
        ProgramError: If the pair has no log weights (see `log_weights`), or a latent is discrete.
        ValueError: If an argument is out of its range.

    Draws tempered from the prior, which owe nothing to the guide, stand beside every rung: draws
    that leave some of them out have missed a mode and do not pass.

    Note: a mode that neither the guide nor the draws tempered from the prior visit is not seen.

    References:
        Li, Vehtari, Buerkner, Radev, Acerbi & Schmitt (2026), Amortized Bayesian workflow, whose
        ladder has three rungs; the others' papers stand in `pyro_vae.diagnostics.resolve.RUNGS`.

    Example:
        >>> import torch
        >>> from pyro_vae import LinearGaussian
        >>> model = LinearGaussian(data_dim=3, latent_dim=2)
        >>> found = resolve(model.model, model.exact_guide, torch.randn(5, 3), progress=False)
        >>> found.rung.tolist(), found.unresolved
        ([0, 0, 0, 0, 0], [])
    """
    seed = as_seed(seed)
    _check(num_draws, budget, max_memory)
    seconds = np.zeros(len(RUNGS))
    with program_scope(seed):
        # Chains keep several runs of the model in memory, with gradients.
        pair = Pair.inspect(model, guide, x, joint=joint)
        plan = plan_chunks(pair, num_particles=num_draws, max_memory=max_memory / 3)
        deadline = None if budget is None else time.monotonic() + budget
        parts = []
        shown = progress_bar(plan.num_data, "datum", show=progress)
        with shown:
            for first, part in plan.parts():
                pyro.set_rng_seed((seed + 7919 * first) % 2**31)
                work = _Part(part, num_draws, thresholds or Thresholds())
                parts.append(work.resolve(seconds, deadline))
                shown.update(len(parts[-1].rung))
    latents = {
        name: torch.cat([part.latents[name] for part in parts], 0 if pair.joint else 1)
        for name in parts[0].latents
    }
    columns = {name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns}
    rung = torch.cat([part.rung for part in parts])
    config = {"num_draws": num_draws, "budget": budget, "joint": pair.joint}
    result = _result(columns, rung, seconds, plan.structure, x, config, seed)
    return ResolvedDraws(latents, rung, result, plan.structure, parts[0].sites)


def _check(num_draws: Any, budget: Any, max_memory: Any) -> None:
    few = ": with fewer no rung can show that its draws are right"
    check_count("num_draws", num_draws, 200, because=few)
    if budget is not None and not budget > 0:
        raise ValueError(f"budget is in seconds and must be positive or None, not {budget!r}")
    check_max_memory(max_memory)


@dataclass(frozen=True)
class _Resolved:
    """A part of the data, off the ladder."""

    latents: dict[str, Tensor]
    rung: Int[Tensor, " batch"]
    columns: dict[str, Tensor]
    sites: LabelledSites


class _Part:
    """Data that are worked on at once."""

    def __init__(
        self,
        pair: Pair,
        num_draws: int,
        thresholds: Thresholds,
    ) -> None:
        self.pair = pair
        self.latent_model = UnconstrainedModel(pair)
        with torch.no_grad():
            u = self.latent_model.draw(num_draws, "guide")
            found = self.latent_model.log_densities(u, "guide")
        draws = WeightedDraws(u.double(), found.joint.double(), found.start.double())
        self.state = LadderState(self.latent_model, num_draws, thresholds, draws)
        self.state.send_scouts()
        self.open = torch.arange(self.latent_model.num_data)
        self.u = u.double().clone()
        self.rung = torch.full_like(self.open, -1)
        self.columns = {
            name: torch.full((len(self.open),), math.nan, dtype=torch.float64)
            for name in (*_COLUMNS, "log_evidence_se")
        }

    def resolve(self, seconds: np.ndarray, deadline: float | None) -> _Resolved:
        """Goes up the ladder with what is left after each rung; adds to the rungs' seconds."""
        for number, rung in enumerate(RUNGS):
            if not len(self.open) or (deadline is not None and time.monotonic() > deadline):
                break
            began = time.monotonic()
            attempt = rung.run(self.state)
            seconds[number] += time.monotonic() - began
            self._take(number, attempt)
        with torch.no_grad():
            latents = self.latent_model.constrain(self.u.to(self.latent_model.like))
            ((trace, count), *_) = self.latent_model.traces(self.u[:1].to(self.latent_model.like))
        sites = label_sites(trace, self.latent_model.structure, count)
        return _Resolved(latents, self.rung, self.columns, sites)

    def _take(self, number: int, attempt: Attempt) -> None:
        """Keeps what passed, and the latest of what did not; goes on with the rest."""
        todo = self.rung[self.open] < 0  # all, where the data can be taken apart
        data = self.open[todo]
        self.u[:, data] = attempt.u[torch.arange(len(self.u)) % len(attempt.u)][:, todo]
        for name, column in self.columns.items():
            values = getattr(attempt, name).double()[todo]
            keep = values.isnan() & torch.tensor(name.startswith("log_evidence"))
            column[data] = torch.where(keep, column[data], values)
        self.rung[self.open[todo & attempt.passed]] = number
        rest = self.rung[self.open] < 0
        if bool(rest.all()) or not bool(rest.any()):
            self.open = self.open[rest]
            return
        left = torch.nonzero(rest)[:, 0]
        pair = self.pair if self.pair.axes else self.pair.sliceable(len(left))
        if pair is not None:  # else the programs take all data or none
            self.state = self.state.of(left, UnconstrainedModel(pair.rows(self.open[left])))
            self.open = self.open[left]


def _result(
    columns: dict[str, Tensor],
    rung: Tensor,
    seconds: np.ndarray,
    structure: ProgramStructure,
    x: Any,
    config: dict[str, Any],
    seed: int,
) -> Result:
    names = [one.name for one in RUNGS]
    joint = config["joint"]
    dims = () if joint else "datum"

    def of(values: Any) -> Any:
        return values[0] if joint else values

    variables: dict[str, Any] = {
        "rung": (dims, of(np.array([names[n] if n >= 0 else "none" for n in rung.tolist()])), {}),
        "seconds": ("rung_name", seconds, label(unit="seconds", reduction="none", bound="none")),
    }
    for name, (unit, bound, description) in _COLUMNS.items():
        nats = unit == "nats"
        attrs = label(
            unit=unit,
            bound=bound,
            reduction=("total" if nats else "none") if joint else "per datum",
            measure=structure.measure if nats else None,
            num_particles=config["num_draws"],
            description=description,
        )
        variables[name] = (dims, of(columns[name]), attrs)
    variables["log_evidence_se"] = (dims, of(columns["log_evidence_se"]), {})
    left = torch.nonzero(rung < 0)[:, 0].tolist()
    count, total = len(rung) - len(left), len(rung)
    verdict = [f"usable draws for {data_text(count, total)}"]
    if left:
        listed = ", ".join(map(str, left[:10])) + (", ..." if len(left) > 10 else "")
        verdict.append(f"no rung gave usable draws for datum {listed}")
    return make_result(
        variables,
        function="resolve",
        config=config,
        seed=seed,
        data_sha256=sha256_of(*tensors_of(x)),
        coords={"rung_name": names},
        notes=[
            "a mode that neither guide nor fitted normal distribution visits is seen by no rung"
        ],
        verdict=verdict,
    )
