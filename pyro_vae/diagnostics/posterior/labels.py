"""What each number of `posterior_quality` is, in the words of its label."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyro_vae.results import label

__all__ = ["labelled_variables"]

# Name -> unit, what it bounds, description.
_TEXTS = {
    "khat": ("none", "none", "Pareto k-hat of the importance weights"),
    "khat_moments": ("none", "none", "largest k-hat of weight x squared deviation of a latent"),
    "widening": ("none", "none", "largest ratio of a weighted sd to q's, over directions"),
    "ess": ("particles", "none", "effective sample size of the importance weights"),
    "kl_guide_posterior": ("nats", "lower", "KL(q || p(z | x)), log evidence - ELBO"),
    "kl_posterior_guide": ("nats", "none", "KL(p(z | x) || q), self-normalised; at most log S"),
    "total_variation": ("none", "none", "total variation between q and p(z | x), by weights"),
    "mean": ("none", "unbiased", "mean of q, in units of the latent"),
    "sd": ("none", "none", "standard deviation of q, in units of the latent"),
    "corrected_mean": ("none", "none", "posterior mean by Pareto-smoothed weights"),
    "corrected_sd": ("none", "none", "posterior standard deviation by Pareto-smoothed weights"),
    "mean_correction": ("none", "none", "mean of q - corrected mean, in corrected sds"),
    "scale_correction": ("none", "none", "log(sd of q / corrected sd)"),
    "ksd": ("none", "none", "squared kernel Stein discrepancy of q, unconstrained, in its sds"),
    "ksd_p_value": ("none", "none", "p-value of the kernel Stein discrepancy"),
    "rhat": ("none", "none", "largest split R-hat of the reference"),
    "reference_ess": ("particles", "none", "smallest effective sample size of the reference"),
    "reference_mean": ("none", "none", "posterior mean by the reference"),
    "reference_sd": ("none", "none", "posterior standard deviation by the reference"),
    "mean_error": ("none", "none", "mean of q - that of the reference, in its sds"),
    "scale_error": ("none", "none", "log(sd of q / sd of the reference)"),
    "corrected_mean_error": ("none", "none", "corrected mean - reference mean, in its sds"),
    "corrected_scale_error": ("none", "none", "log(corrected sd / sd of the reference)"),
    "covariance_error": ("none", "none", "relative error of q's covariance matrix"),
    "wasserstein_1": ("none", "none", "1-Wasserstein distance of a margin, in units of the latent"),
    "wasserstein_2": ("none", "none", "2-Wasserstein distance of a margin, in units of the latent"),
    "energy": ("none", "none", "energy distance of q and reference, latents in pooled sds"),
    "energy_p_value": ("none", "none", "p-value of the energy distance, by permutation"),
    "mmd": ("none", "none", "squared MMD of q and reference, latents in pooled sds"),
    "mmd_p_value": ("none", "none", "p-value of the MMD, by permutation"),
    "c2st_accuracy": ("none", "none", "accuracy of a classifier between q and reference"),
    "c2st_p_value": ("none", "none", "p-value of its accuracy"),
}
_OF_TESTS = ("ksd", "energy", "mmd", "c2st")
_OF_REFERENCE = ("rhat", "reference_")
_RATED = {  # who speaks of their errors
    "kl_guide_posterior": "error_reliable",
    "kl_posterior_guide": "kl_posterior_guide_reliable",
    "total_variation": "error_reliable",
    "corrected_mean": "error_reliable",
    "corrected_sd": "moments_reliable",
    "mean_correction": "error_reliable",
    "scale_correction": "moments_reliable",
    "corrected_mean_error": "error_reliable",
    "corrected_scale_error": "moments_reliable",
}


def labelled_variables(
    columns: Mapping[str, Tensor], *, joint: bool, num_particles: int, num_test_draws: int
) -> dict[str, tuple[Any, Any, Mapping[str, Any]]]:
    """The variables of a result from columns `[batch]` and `[batch, latent]`.

    Args:
        columns: By name; those of bool go without a label.
        joint: Whether there is one posterior for all data, and no dimension `datum`.
        num_particles: Draws of the guide.
        num_test_draws: Draws behind the tests.
    """
    variables = {}
    for name, values in columns.items():
        over_latents = ("latent",) if values.dim() == 2 else ()
        dims = over_latents if joint else ("datum", *over_latents)
        attrs: Mapping[str, Any] = {}
        if values.is_floating_point():
            unit, bound, description = _TEXTS[name.removesuffix("_se").removesuffix("_bias")]
            count: int | None = num_particles
            if name.startswith(_OF_TESTS):
                count = num_test_draws
            elif name.startswith(_OF_REFERENCE):
                count = None
            attrs = label(
                unit=unit,
                bound=bound,
                reduction="per datum" if not joint else "total" if unit == "nats" else "none",
                num_particles=count,
                description=description,
                reliable_by=_RATED.get(name),
            )
        variables[name] = (dims, values[0] if joint else values, attrs)
    return variables
