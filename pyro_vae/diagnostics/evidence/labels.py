"""What each number of `log_evidence` bounds, is measured in and rests on."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vae.diagnostics.evidence.quadrature import is_exact
from pyro_vae.inference.programs import ProgramStructure, tensors_of
from pyro_vae.results import Result, label, make_result, sha256_of, spread_error

__all__ = ["labelled_evidence"]

_TEXTS = {
    "elbo": ("nats", "lower", "evidence lower bound of the guide"),
    "gap": ("nats", "lower", "log evidence - ELBO, estimates KL(q(z|x) || p(z|x)) from below"),
    "ess": ("particles", "none", "effective sample size"),
    "khat": ("none", "none", "Pareto k-hat of the importance weights"),
    "acceptance": ("none", "none", "mean acceptance probability of the chains"),
    "rhat": ("none", "none", "largest split R-hat of the posterior chains"),
    "quadrature_error": ("nats", "none", "estimated error of the quadrature"),
    "simulated_elbo": ("nats", "lower", "ELBO of data simulated from the model"),
    "simulated_lower": ("nats", "lower", "log p(x) of data simulated from the model, from below"),
    "simulated_upper": ("nats", "upper", "log p(x) of data simulated from the model, from above"),
}
_OF_EVIDENCE = {
    "importance": ("nats", "lower", "importance-weighted estimate of log p(x)"),
    "two_sided": ("nats", "lower", "importance-weighted estimate of log p(x)"),
    "annealed": ("nats", "lower", "annealed importance sampling; unbiased on the natural scale"),
    "bidirectional": (
        "nats",
        "lower",
        "annealed importance sampling; unbiased on the natural scale",
    ),
    "bridge": ("nats", "none", "bridge sampling; consistent, neither bound"),
    "quadrature": ("nats", "exact", "log p(x) by quadrature, to the error stated"),
}


def labelled_evidence(
    found: Mapping[str, Tensor],
    structure: ProgramStructure,
    x: Any,
    config: Mapping[str, Any],
    num_particles: int | None,
    seed: int,
    notes: list[str],
) -> Result:
    """The columns with their labels.

    Args:
        found: Of all data.
        structure: Of the pair.
        x: The data.
        config: What was chosen: `method`, `joint` and the method's settings.
        num_particles: Behind a value, if it is a number of them.
        seed: Of the draws.
        notes: What must not be parted from the numbers.
    """
    joint, method = config["joint"], config["method"]
    texts = {**_TEXTS, "log_evidence": _OF_EVIDENCE[method]}
    if method == "quadrature" and not is_exact(found):
        texts["log_evidence"] = ("nats", "none", "log p(x) by quadrature that has not converged")
    variables: dict[str, Any] = {}
    for name, values in found.items():
        dims = "simulation" if name.startswith("simulated_") else () if joint else "datum"
        if values.dtype == torch.bool:
            variables[name] = (dims, values if dims else values[0], {})
            continue
        unit, bound, description = texts[name.removesuffix("_se").removesuffix("_bias")]
        rated = "error_reliable" in found and name in ("log_evidence", "gap")
        attrs = label(
            unit=unit,
            bound=bound,
            reduction=("total" if joint else "per datum")
            if unit == "nats"
            else "none"
            if joint
            else "per datum",
            measure=structure.measure if unit == "nats" else None,
            num_particles=num_particles,
            description=description,
            reliable_by="error_reliable" if rated else None,
        )
        variables[name] = (dims, values if dims else values[0], attrs)
    if "simulated_upper" in found:
        variables |= _over_simulations(found, joint, num_particles)
    return make_result(
        variables,
        function="log_evidence",
        config=config,
        seed=seed,
        data_sha256=sha256_of(*tensors_of(x)),
        notes=notes,
    )


def _over_simulations(
    found: Mapping[str, Tensor], joint: bool, num_particles: int | None
) -> dict[str, Any]:
    """What all simulated data say together."""
    texts = {
        "error_bound": ("simulated_lower", "upper", "error of the estimate on simulated data"),
        "symmetric_kl": ("simulated_elbo", "none", "KL(q || p) + KL(p || q) on simulated data"),
    }
    variables: dict[str, Any] = {}
    for name, (lower, bound, description) in texts.items():
        if lower not in found:
            continue
        distance = found["simulated_upper"] - found[lower]
        attrs = label(
            bound=bound,
            reduction="total" if joint else "per datum",
            num_particles=num_particles,
            description=description,
        )
        mean = float(distance.mean())
        error = spread_error(distance.numpy(), mean)
        error = math.nan if error is None else error
        variables |= {name: ((), mean, attrs), f"{name}_se": ((), error, attrs)}
    if "simulated_elbo" in found:
        ratio = found["simulated_upper"] - found["simulated_lower"]
        share = (math.log(len(ratio)) - ratio.logsumexp(0)).exp().clamp_max(1.0)
        attrs = label(
            unit="none", bound="none", description="1 / E_p[p(z | x) / q(z | x)] on simulated data"
        )
        variables["forward_ess"] = ((), share, attrs)
    return variables
