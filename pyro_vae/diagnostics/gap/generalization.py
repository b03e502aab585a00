"""The gap on training and on test data, side by side."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyro_vae.diagnostics.gap.elbo_gap import elbo_gap
from pyro_vae.inference.programs import (
    Program,
    ProgramError,
    tool,
)
from pyro_vae.results import Result, label, make_result

__all__ = ["GapOnBoth", "gap_on_both"]


@dataclass(frozen=True, repr=False)
class GapOnBoth:
    """The gaps of training and test data, and how they differ.

    Attributes:
        training: Of the training data, from `elbo_gap`.
        test: Of the test data.
        summary: Means over the data along `split` ("training", "test"), and the differences
            `encoder_generalization`, the rise of the amortisation gap from training to test data,
            `approximation_generalization`, that of the approximation gap, and
            `model_generalization`, the fall of the log evidence. Together they are the fall of the
            ELBO. Standard errors are those of the population: the spread of the data included.
    """

    training: Result
    test: Result
    summary: Result

    def __repr__(self) -> str:
        data = [f"{part.sizes['datum']:,}" for part in (self.training, self.test)]
        return f"ELBO gaps of {data[0]} training and {data[1]} test data.\n{self.summary!r}"

    def _repr_html_(self) -> str:
        return self.summary._repr_html_()


@tool
def gap_on_both(
    model: Program, guide: Program, training: Any, test: Any, **options: Any
) -> GapOnBoth:
    """Runs `elbo_gap` on training and test data and says what the encoder did not generalise.

    The fall of the ELBO from training to test data has three parts: the model's (its evidence
    falls), the encoder's (the amortisation gap rises) and the family's.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior.
        training: Training data.
        test: Test data.
        options: Those of `elbo_gap`; evidence must be a method, not a `Result`.

    Returns:
        Both decompositions and their summary, in nats per datum; `split` is "training" or "test":

        ==============================  =====  ==================  ================================
        name                            dims   unit, bound         meaning
        ==============================  =====  ==================  ================================
        `log_evidence`                  split  nats, `elbo_gap`'s  mean of log p(x); likewise every
                                                                   variable of `elbo_gap` in nats
        `model_generalization`          none   nats, none          fall of the log evidence from
                                                                   training to test data
        `encoder_generalization`        none   nats, none          rise of the amortisation gap
        `approximation_generalization`  none   nats, none          rise of the approximation gap
        ==============================  =====  ==================  ================================

        Standard errors `*_se` are those of the population: the spread of the data included. The
        last three together are the fall of the ELBO.

    Raises:
        ProgramError: As `elbo_gap`.
        ValueError: As `elbo_gap`, or if evidence is a `Result`, which can be of one of them only.

    Note: both ledgers start from the same seed, so what the draws do to one they do to the other
        and it falls out of the differences. Their errors take the ledgers as independent, for their
        data are, and are too large where draws make up much of them: of 100 halves of one
        population 97 % hold for the evidence, and 100 % for gaps that are the same for all data.

    References:
        Cremer, Li & Duvenaud (2018); Zhang et al. (2022), Generalization gap in
        amortized inference.
    """
    if isinstance(options.get("evidence"), Result):
        raise ValueError(
            "a Result is the evidence of one data set; name a method, or call elbo_gap on each"
        )
    first, second = (elbo_gap(model, guide, data, **options) for data in (training, test))
    if "global_gap" in first:
        raise ProgramError(
            "latents are global, so a gap is of the data that the posterior was fitted to; call "
            "elbo_gap on these"
        )
    return GapOnBoth(first, second, _summary(first, second))


def _summary(training: Result, test: Result) -> Result:
    names = [
        str(name)
        for name in training.data_vars
        if training[name].attrs.get("unit") == "nats" and not str(name).endswith("_se")
    ]
    means, errors = {}, {}
    for name in names:
        both = [decomposition.quantity(name) for decomposition in (training, test)]
        means[name] = np.array([q.value for q in both])
        errors[name] = np.array(
            [math.nan if q.data_standard_error is None else q.data_standard_error for q in both]
        )
    variables: dict[str, Any] = {}
    for name in names:
        attrs = {**training[name].attrs, "reduction": "per datum"}
        variables[name] = ("split", means[name], attrs)
        variables[f"{name}_se"] = ("split", errors[name], attrs)
    for name, source, sign in (
        ("model_generalization", "log_evidence", -1),
        ("encoder_generalization", "amortization_gap", 1),
        ("approximation_generalization", "approximation_gap", 1),
    ):
        attrs = label(
            bound="none",
            measure=training[source].attrs.get("measure"),
            description=f"{'rise' if sign > 0 else 'fall'} of {source} from training to test data",
        )
        variables[name] = ((), sign * (means[source][1] - means[source][0]), attrs)
        variables[f"{name}_se"] = ((), np.hypot(*errors[source]), attrs)
    provenance = [decomposition.provenance for decomposition in (training, test)]
    return make_result(
        variables,
        function="gap_on_both",
        config={
            **provenance[0]["config"],
            "num_data": [p["num_data"] for p in provenance],
            "data_sha256": [p["data_sha256"] for p in provenance],
        },
        seed=provenance[0]["seed"],
        data_sha256=None,
        coords={"split": ["training", "test"]},
        notes=[
            "standard errors here include the spread of the data; those of the differences are too "
            "large rather than too small, for both ledgers share their draws."
        ],
    )
