"""How many components: what evidence, penalties and held-out data say, side by side."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vae.checks import check_count
from pyro_vae.data import Seed, as_seed, as_tensor
from pyro_vae.inference.em.fit_em import fit_em
from pyro_vae.results import Result, label, make_result, sha256_of

__all__ = ["compare_num_components"]

_CRITERIA = {
    "log_likelihood": ("none", "largest log p(x | theta) found; rises with every component"),
    "bic_evidence": ("none", "-BIC / 2, Schwarz's approximation to the log evidence"),
    "icl_evidence": ("none", "that less the entropy of the components given the data (ICL)"),
    "bound": ("lower", "variational Bayes' bound on the log evidence"),
    "bound_over_labels": ("none", "bound + log K!, for posteriors that do not overlap"),
    "validation_log_evidence": ("exact", "mean log p(x) of held-out data under the parameters"),
}
_CHOOSES = ("bic_evidence", "icl_evidence", "bound", "bound_over_labels", "validation_log_evidence")


def compare_num_components(
    make: Callable[[int], Any],
    x: Any,
    numbers: Iterable[int] = range(1, 7),
    *,
    validation: Any = None,
    prior: Mapping[str, Any] | None = None,
    num_restarts: int = 5,
    max_iterations: int = 500,
    tolerance: float = 1e-6,
    seed: Seed = 0,
) -> Result:
    r"""Fits a mixture with each number of components, by EM and by variational Bayes.

    Args:
        make: From a number of components to a mixture, such as `lambda k: GaussianMixture(k, 2)`.
        x: The data, shape (batch, features).
        numbers: Of components to compare.
        validation: Held-out data, shape (batch, features).
        prior: Of variational Bayes, as in `fit_em`; `concentration` is 1 where it says no other.
        num_restarts: Starts of each fit; the best is kept.
        max_iterations: Of each start.
        tolerance: Of each start, in nats per datum.
        seed: Of the starts.

    Returns:
        All in nats and better where higher, along `num_components`; totals but for the last:

        =========================  =====  =========================================================
        name                       bound  meaning
        =========================  =====  =========================================================
        `log_likelihood`           none   largest log p(x | theta) found
        `bic_evidence`             none   -BIC / 2
        `icl_evidence`             none   that less the entropy of the responsibilities
        `bound`                    lower  variational Bayes' bound of the log evidence
        `bound_over_labels`        none   bound + log K!
        `validation_log_evidence`  exact  mean log p(x) of held-out data, where there are some: per
                                          datum
        =========================  =====  =========================================================

        The K! orders of the labels are one model, and q covers one of them (Bishop 2006, section
        10.2.4), hence `bound_over_labels`. The verdict says which number each of them, but
        `log_likelihood`, chooses.

    Raises:
        ValueError: If there are no numbers, or as `fit_em`.

    References:
        Schwarz (1978), Estimating the dimension of a model. Biernacki, Celeux & Govaert (2000),
        Assessing a mixture model for clustering with the integrated completed likelihood.
    """
    numbers = list(numbers)
    if not numbers:
        raise ValueError("give at least one number of components")
    for number in numbers:
        check_count("numbers", number)
    x = as_tensor(x)
    options: dict[str, Any] = {
        "num_restarts": num_restarts,
        "max_iterations": max_iterations,
        "tolerance": tolerance,
        "seed": as_seed(seed),
    }
    prior = {"concentration": 1.0, **(prior or {})}
    rows = [_criteria(make, number, x, validation, prior, options) for number in numbers]
    variables = {}
    for name in rows[0]:
        bound, text = _CRITERIA[name]
        reduction = "per datum" if name == "validation_log_evidence" else "total"
        about = label(reduction=reduction, bound=bound, description=text)
        variables[name] = ("num_components", [row[name] for row in rows], about)
    best = {
        name: numbers[max(range(len(rows)), key=lambda i: rows[i][name])]
        for name in _CHOOSES
        if name in rows[0]
    }
    return make_result(
        variables,
        function="compare_num_components",
        config={**options, "prior": {n: _listed(v) for n, v in prior.items()}},
        seed=options["seed"],
        data_sha256=sha256_of(x),
        coords={"num_components": numbers},
        verdict=[", ".join(f"{name} chooses {number}" for name, number in best.items())],
    )


def _listed(value: Any) -> Any:
    return as_tensor(value).tolist() if hasattr(value, "__len__") else value


def _criteria(
    make: Callable[[int], Any],
    number: int,
    x: Tensor,
    validation: Any,
    prior: Mapping[str, Any],
    options: dict[str, Any],
) -> dict[str, float]:
    """The row of one number of components."""
    mixture = make(number)
    fitted = fit_em(mixture, x, on_singular="restart", progress=False, **options)
    total = float(fitted.history.log_evidence_total[-1])
    bic = total - 0.5 * math.log(len(x)) * mixture.num_parameters
    q = mixture.predict_proba(x)
    bayesian = fit_em(
        make(number), x, method="variational_bayes", prior=prior, progress=False, **options
    )
    bound = float(bayesian.history.bound_total[-1])
    row = {
        "log_likelihood": total,
        "bic_evidence": bic,
        "icl_evidence": bic + float(torch.special.xlogy(q, q).sum()),
        "bound": bound,
        "bound_over_labels": bound + math.lgamma(number + 1),
    }
    if validation is not None:
        row["validation_log_evidence"] = mixture.score(validation)
    return row
