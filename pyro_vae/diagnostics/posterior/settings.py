"""The arguments of `posterior_quality`, checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pyro_vae.checks import check_count, check_max_memory
from pyro_vae.diagnostics.posterior.assess import Thresholds
from pyro_vae.diagnostics.posterior.reference import HmcReference

__all__ = [
    "CHECKS",
    "CHECKS_OF_REFERENCE",
    "QualityOptions",
    "chosen_checks",
    "hmc_settings",
    "is_hmc",
]

CHECKS = ("stein", "energy", "mmd", "classifier", "predictive")
"""Checks that `posterior_quality` can be told to run."""

CHECKS_OF_REFERENCE = CHECKS[1:4]
"""Those that compare with a reference."""

_DEFAULT = CHECKS[:4]
_TITLES = {
    "stein": "the kernel Stein discrepancy",
    "energy": "the energy distance",
    "mmd": "the kernel two-sample test",
    "classifier": "the classifier two-sample test",
    "predictive": "the posterior predictive check",
}


@dataclass(frozen=True)
class QualityOptions:
    """The arguments of `posterior_quality` that several parts of it need."""

    num_particles: int
    checks: tuple[str, ...] | None
    joint: bool
    max_memory: float
    progress: bool
    num_test_draws: int
    num_permutations: int
    thresholds: Thresholds
    hmc: HmcReference

    def __post_init__(self) -> None:
        for name, least in (("num_particles", 1), ("num_test_draws", 10), ("num_permutations", 1)):
            value = getattr(self, name)
            check_count(name, value, least)
        check_max_memory(self.max_memory)

    def runs(self, check: str) -> bool:
        """Whether a check is to be run where it can be."""
        return check in _DEFAULT if self.checks is None else check in self.checks

    def left_out(self, reference: Any, num_simulations: int) -> list[str]:
        """Checks that were not run, and how to run them."""
        missing = []
        if reference is None:
            missing.append("comparison with Hamiltonian Monte Carlo (reference='hmc')")
        if not num_simulations:
            missing.append("calibration on data from the model (num_simulations=500)")
        for check in CHECKS:
            cannot = check in CHECKS_OF_REFERENCE and reference is None
            if not self.runs(check) and not cannot:
                missing.append(f"{_TITLES[check]} (checks=[..., {check!r}])")
        return missing


def chosen_checks(checks: Sequence[str] | None, reference: Any) -> tuple[str, ...] | None:
    """The checks asked for, or None for those that can be run.

    Raises:
        ValueError: If there is no such check, or it needs a reference and there is none.
    """
    if checks is None:
        return None
    if isinstance(checks, str):
        raise ValueError(f"checks is the text {checks!r}; put its names in a list")
    for name in checks:
        if name not in CHECKS:
            raise ValueError(f"there is no check {name!r}; there are {', '.join(CHECKS)}")
        if name in CHECKS_OF_REFERENCE and reference is None:
            raise ValueError(
                f"the check {name!r} compares with a reference; pass reference='hmc', or draws"
            )
    return tuple(checks)


def hmc_settings(reference: Any, given: Mapping[str, Any]) -> HmcReference:
    """Settings of the reference from the arguments that are left over.

    Raises:
        ValueError: If one is no setting, or the reference is no HMC.
    """
    known = [field.name for field in fields(HmcReference)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(
            f"posterior_quality has no argument {unknown[0]!r}; of the reference 'hmc' there are "
            f"{', '.join(known)}"
        )
    if given and not is_hmc(reference):
        raise ValueError(f"{next(iter(given))} is for reference='hmc' only; leave it out")
    return HmcReference(**given)


def is_hmc(reference: Any) -> bool:
    """Whether the reference is Hamiltonian Monte Carlo that is still to be run.

    Raises:
        ValueError: If it is some other text.
    """
    if isinstance(reference, str) and reference != "hmc":
        raise ValueError(f"reference is {reference!r}, but the only one with a name is 'hmc'")
    return isinstance(reference, str)
