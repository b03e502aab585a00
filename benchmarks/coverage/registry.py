"""Every uncertainty that the package states, and those that need no row of their own."""

import ast
from collections.abc import Iterator
from pathlib import Path

from benchmarks.coverage import (
    comparison,
    evidence,
    global_latents,
    gradients,
    parameters,
    posterior,
    samples,
)
from benchmarks.coverage.kinds import CLAIMED, Study

__all__ = ["EXCEPTIONS", "GROUPS", "SILENT", "functions", "named_in_source", "unlisted"]

GROUPS: dict[str, list[Study]] = {
    "evidence": evidence.STUDIES,
    "posterior": posterior.STUDIES,
    "gradients": gradients.STUDIES,
    "samples": samples.STUDIES,
    "parameters": parameters.STUDIES,
    "global latents": global_latents.STUDIES,
    "comparison": comparison.STUDIES,
}

_AN_ESTIMATE = "itself an estimate (of how far off something is), with an error of its own"
_COPIED = "copied from a row of another function"
EXCEPTIONS: dict[str, str] = {
    "mean_error": _AN_ESTIMATE,
    "scale_error": _AN_ESTIMATE,
    "corrected_mean_error": _AN_ESTIMATE,
    "corrected_scale_error": _AN_ESTIMATE,
    "relative_error": _AN_ESTIMATE,
    "covariance_error": "a distance, read beside its limit; it claims no error",
    "squared_error": "a mean, beside which relative_error_se stands",
    "seconds_se": "a clock has no planted truth",
    "entropy_residual_se": "sd / sqrt(data) of a mean, the formula of data_standard_error",
    "error_bound_se": "sd / sqrt(data) of a mean, the formula of data_standard_error",
    "simulated_elbo_se": "that of elbo, of simulated data",
    "gain_se": "of a phase of fit: mean_error over draws that both sides share",
    "rise_se": "the same of two halves of a phase",
    "khat_se": "that of pareto_tail, wherever weights are",
    "standard_errors": "Verdict's: how many of them a limit asks for",
    "precision_held_out_se": "that of precision, of other rows",
    "recall_held_out_se": "that of recall, of other rows",
    "nearest_distance_ratio_se": "ratio_se of nearest_training_distance",
    "frechet_distance_held_out_se": "that of frechet_distance, of other rows",
    "frechet_distance_infinity_held_out_se": "that of frechet_distance_infinity, of other rows",
    "high_frequency_fraction_held_out_se": "that of high_frequency_fraction, of other rows",
    "accuracy_se": "c2st_accuracy_se, in the tuple of the classifier",
    "se": "BoundError.se: log_evidence_se of importance_bound_error",
    "bias_z_se": "left out on purpose: a z-score has an error of 1, which its row asks for",
    "precision_se": "that of precision_recall, where results hold it",
    "recall_se": "that of precision_recall, where results hold it",
}
"""Names that match but have no row, with the reason."""

_INSIDE = {
    "unit_effects": "quadrature_error is the change with one node fewer, and claims no more",
    "gap_on_both": "data_standard_error of two gap decompositions, along split",
}
"""Functions whose other errors are those of a row, with the reason."""

SILENT: dict[str, str] = {
    "evidence_table": _COPIED,
    "train_at_equal_cost": "quantities of log_evidence, one training each; the table says so",
    "learning_curves": "quantities of each training, as train_at_equal_cost",
    "gradient_draws": "holds the draws themselves; compare_estimators states their errors",
    "directional_sensitivity": "derivatives, without sampling; it states no error",
    "sample_posterior": "states R-hat and effective draws; their errors are in posterior_quality",
    "compare_num_components": "criteria of maxima and bounds, as fit_em; it states no error",
    "fit_em": "bounds are sums without sampling, or labelled objectives; it states no error",
}
"""Makers of results without a study, with the reason."""


def functions() -> set[str]:
    """Every function that has a study."""
    studies = [study for group in GROUPS.values() for study in group]
    return {name.strip() for study in studies for name in study.function.split(",")}


def unlisted(function: str, name: str) -> bool:
    """Whether an uncertainty in a result has neither a row nor a reason."""
    studies = [study for group in GROUPS.values() for study in group]
    rows = {
        row.quantity
        for study in studies
        if function in study.function.split(", ")
        for row in study.rows
    }
    return name not in rows and name not in EXCEPTIONS and function not in _INSIDE


def named_in_source(root: Path) -> Iterator[tuple[str, str, str]]:
    """What the source names: ("function", ...) of results, ("error", ...) of uncertainties.

    Args:
        root: The package's folder.

    Yields:
        Kind, name and file. Uncertainties are strings and fields with a telling name; lists of
        public names (`__all__`) and ends of names (``_se``) are none, and names that are put
        together are seen in the results of the studies.
    """
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        public = {
            id(part)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            for part in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "function":
                if isinstance(node.value, ast.Constant):
                    yield "function", str(node.value.value), path.name
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                if CLAIMED.search(node.target.id):
                    yield "error", node.target.id, path.name
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
                if (
                    id(node) not in public
                    and text[:1] != "_"
                    and text.isidentifier()
                    and CLAIMED.search(text)
                ):
                    yield "error", text, path.name
