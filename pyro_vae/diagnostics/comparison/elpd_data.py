"""Cross-validation in ArviZ's own container, whichever of its two majors is installed."""

from typing import Any

import numpy as np

from pyro_vae.inference.log_weights import khat_threshold
from pyro_vae.results import Result

__all__ = ["elpd_data"]


def elpd_data(result: Result) -> Any:
    """What `arviz.compare` takes of each model.

    ``az.compare({"one": elpd_data(loo(...)), "other": elpd_data(loo(...))})`` ranks two of them.

    Args:
        result: From `loo` of all data, or `kfold`.

    Returns:
        `arviz.ELPDData`, on the log scale. Its error over data is ArviZ's: the root of N times the
        variance, without the correction for few data.

    Raises:
        ValueError: If the result is of another function, or of a part of the data.
    """
    function = str(result.provenance.get("function"))
    if function not in ("loo", "kfold"):
        raise ValueError(f"elpd_data takes what loo or kfold returned, not a result of {function}")
    if result.provenance["config"].get("subsample"):
        raise ValueError(
            "the result is of a part of the data, and arviz.compare needs each datum: call loo "
            "without subsample"
        )
    each = result["log_predictive"]
    count, num_draws = each.size, int(each.attrs["num_particles"])
    common = {
        "se": float(np.sqrt(count * each.values.var())),
        "n_samples": num_draws,
        "n_data_points": count,
        "scale": "log",
        "warning": bool((~result["reliable"].values).any()),
        "good_k": khat_threshold(num_draws),
    }
    parameters = float(result["p_loo"]) if "p_loo" in result else float("nan")
    return _container(float(result["elpd"]), parameters, each, result["khat"], common)


def _container(elpd: float, p: float, each: Any, khat: Any, common: dict[str, Any]) -> Any:
    try:
        from arviz.stats.stats_utils import ELPDData
    except ImportError:  # ArviZ 1
        from arviz_stats import utils

        made = getattr(utils, "ELPDDataLOO", utils.ELPDData)
        return made(kind="loo", elpd=elpd, p=p, elpd_i=each, pareto_k=khat, **common)
    values = {"elpd_loo": elpd, "se": common["se"], "p_loo": p} | common
    values |= {"loo_i": each, "pareto_k": khat}
    order = (
        "elpd_loo", "se", "p_loo", "n_samples", "n_data_points", "warning", "loo_i", "pareto_k",
        "scale", "good_k",
    )  # fmt: skip
    return ELPDData(data=[values[name] for name in order], index=list(order))
