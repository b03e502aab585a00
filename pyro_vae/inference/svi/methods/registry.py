"""The table of fitting methods: a row each, with its paper, what it asks for, what it refuses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pyro.infer import ELBO
from pyro.infer.autoguide import AutoMultivariateNormal

from pyro_vae.checks import check_count
from pyro_vae.inference.estimators import PathwiseELBO
from pyro_vae.inference.programs import Program, ProgramError
from pyro_vae.inference.supports import init_to_middle
from pyro_vae.inference.svi.convergence import BlockRule, PhaseRule, Rule
from pyro_vae.inference.svi.evaluation import TrainedPair, default_loss
from pyro_vae.inference.svi.methods.batch_and_match import BatchAndMatchRule
from pyro_vae.inference.svi.methods.deterministic import DeterministicRule
from pyro_vae.inference.svi.methods.pathfinder import PathfinderRule
from pyro_vae.inference.svi.methods.rule import MethodRule
from pyro_vae.inference.svi.settings import DEFAULT_RATE
from pyro_vae.results import Result

__all__ = [
    "METHODS",
    "FittingMethod",
    "check_method",
    "guide_for",
    "loss_for",
    "method_config",
    "posterior_of",
    "rule_for",
]


@dataclass(frozen=True)
class FittingMethod:
    """A row of the table.

    Attributes:
        name: As `fit` takes it.
        reference: Its paper.
        requirement: What it asks of the pair.
        refusal: What it does not take, and why.
        most_steps: At most so many.
        num_draws: The default; None where it depends on the latents, or SVI's loss says it.
        least_draws: The fewest that make sense.
        num_paths: The default; None where there are no paths.
        makes_guide: Whether `guide=None` makes an `AutoMultivariateNormal`.
        rule: Makes the rule from a trained pair and settings; None for SVI's own rules.
    """

    name: str
    reference: str
    requirement: str
    refusal: str
    most_steps: int
    num_draws: int | None = None
    least_draws: int = 1
    num_paths: int | None = None
    makes_guide: bool = False
    rule: Callable[[TrainedPair, "FittingMethod", Any], MethodRule] | None = None


def _deterministic(pair: TrainedPair, row: FittingMethod, asked: Any) -> MethodRule:
    num_draws = asked.num_draws or row.num_draws or row.least_draws
    return DeterministicRule(pair, row.most_steps, num_draws, asked.seed)


def _pathfinder(pair: TrainedPair, row: FittingMethod, asked: Any) -> MethodRule:
    num_draws = asked.num_draws or row.num_draws or row.least_draws
    num_paths = asked.num_paths or row.num_paths or 1
    return PathfinderRule(pair, num_draws, num_paths, asked.seed)


def _batch_and_match(pair: TrainedPair, row: FittingMethod, asked: Any) -> MethodRule:
    return BatchAndMatchRule(pair, row.most_steps, asked.num_draws, asked.seed)


_ROWS = (
    FittingMethod(
        "svi",
        "Hoffman, Blei, Wang & Paisley (2013), Stochastic variational inference",
        "a model and a guide with parameters",
        "nothing but what Pyro's SVI would train in part or not at all",
        most_steps=30_000,
    ),
    FittingMethod(
        "deterministic",
        "Giordano, Ingram & Broderick (2024), Black box variational inference with a deterministic "
        "objective",
        "a guide that is a normal distribution in unconstrained space, with a log joint that has "
        "second derivatives, and at most 1,000 parameters",
        "flows, and full covariances with no more draws than latents: such guides grow without "
        "bound where no fixed draw looks",
        most_steps=500,
        num_draws=30,
        least_draws=2,
        rule=_deterministic,
    ),
    FittingMethod(
        "pathfinder",
        "Zhang, Carpenter, Gelman & Vehtari (2022), Pathfinder: Parallel quasi-Newton variational "
        "inference",
        "continuous latents; AutoMultivariateNormal, AutoDiagonalNormal or AutoNormal as guide, or "
        "none",
        "other guides, into which no normal distribution can be written",
        most_steps=1,
        num_draws=1000,
        least_draws=100,
        num_paths=8,
        makes_guide=True,
        rule=_pathfinder,
    ),
    FittingMethod(
        "batch_and_match",
        "Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei & Saul (2024), Batch and match: "
        "black-box variational inference with a score-based divergence",
        "continuous latents; AutoMultivariateNormal, AutoDiagonalNormal or AutoNormal as guide, or "
        "none",
        "other guides, into which no normal distribution can be written",
        most_steps=400,
        least_draws=2,
        makes_guide=True,
        rule=_batch_and_match,
    ),
)
METHODS: Mapping[str, FittingMethod] = MappingProxyType({row.name: row for row in _ROWS})
"""By name."""


def check_method(asked: Any) -> None:
    """Refuses settings of `fit` that the method has no use for.

    Raises:
        ValueError: Names the argument.
    """
    if asked.method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {asked.method!r}")
    row = METHODS[asked.method]
    check_count("num_draws", asked.num_draws, row.least_draws, optional=True)
    check_count("num_paths", asked.num_paths, optional=True)
    if row.num_paths is None and asked.num_paths is not None:
        raise ValueError("num_paths is of method='pathfinder'; leave it out")
    if row.rule is None:
        if asked.num_draws is not None:
            raise ValueError(
                "num_draws is of the other methods; for method='svi' pass a loss with as many "
                "particles, such as StickingTheLanding(8)"
            )
        return
    unused = {
        "loss": asked.loss is not None,
        "optimizer": asked.optimizer is not None,
        "learning_rate": asked.learning_rate is not None,
        "epochs": asked.epochs not in (None, "converged"),
        "batch_size": asked.batch_size is not None,
        "patience": asked.patience is not None,
        "warmup_epochs": asked.warmup_epochs > 0,
    }
    if named := [name for name, given in unused.items() if given]:
        raise ValueError(
            f"method={asked.method!r} takes steps of its own on all data at once and has no use "
            f"for {named[0]}; leave it out, or pass method='svi'"
        )


def guide_for(method: str, model: Program, guide: Program | None) -> Program:
    """The guide that was given, or where the method makes one, that.

    Raises:
        ValueError: If there is none.
    """
    if guide is not None:
        return guide
    if method in METHODS and not METHODS[method].makes_guide:
        makers = " or ".join(f"{row.name!r}" for row in _ROWS if row.makes_guide)
        raise ValueError(f"method={method!r} needs a guide; pass one, or method={makers}")
    return AutoMultivariateNormal(model, init_loc_fn=init_to_middle)


def loss_for(asked: Any, model: Program, guide: Program, prepared: Any) -> ELBO | None:
    """What is minimised where the caller names nothing and all data make one batch."""
    row = METHODS[asked.method]
    if row.rule is None:
        return default_loss(model, guide, prepared)
    return PathwiseELBO(asked.num_draws or row.num_draws or 1, joint=prepared.joint)


def method_config(asked: Any) -> dict[str, Any]:
    """What config.json says of a method that has no optimizer; nothing of SVI."""
    row = METHODS[asked.method]
    if row.rule is None:
        return {}
    return {
        "method": row.name,
        "num_draws": asked.num_draws or row.num_draws,
        "num_paths": asked.num_paths or row.num_paths,
        "optimizer": None,
        "optimizer_arguments": {},
    }


def posterior_of(
    rule: Rule | None, config: Mapping[str, Any], data_sha256: str | None
) -> Result | None:
    """What a method says of the posterior; None of SVI, and before its first step."""
    if not isinstance(rule, MethodRule) or not rule.state.steps:
        return None
    return rule.posterior(config, data_sha256)


def rule_for(run: Any) -> Rule:
    """The rule of a `TrainingRun` that ends by itself.

    Raises:
        ProgramError: If the method does not take the pair.
    """
    asked, steps = run.settings, -(-run.data.length // run.prepared.batch_size)
    row = METHODS[asked.method]
    own = run.optim.rate if asked.optimizer is not None else asked.learning_rate
    assert not callable(own)
    if row.rule is None and not run.one_batch:
        return BlockRule(run.optim, own or DEFAULT_RATE, run.epochs, steps)
    if row.rule is not None and (not run.one_batch or run.prepared.structure is None):
        why = "the pair has no log weights"
        if not run.one_batch:
            why = f"this training would go by mini-batches of {run.prepared.batch_size}"
        raise ProgramError(
            f"method={asked.method!r} needs {row.requirement}, and all data at once; {why}: pass "
            "method='svi'"
        )
    pair = TrainedPair(run.model, run.guide, run.prepared, run.loss, run.optim)
    if row.rule is not None:
        return row.rule(pair, row, asked)
    return PhaseRule(pair, own, run.epochs, newton=asked.optimizer is None, seed=asked.seed)
