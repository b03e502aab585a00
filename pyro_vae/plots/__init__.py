"""Figures: every function takes what it shows and, if wanted, the `Axes` to draw on."""

from pyro_vae.plots.autoencoders import plot_code_activity, plot_denoising, plot_sensitivity
from pyro_vae.plots.estimators import (
    plot_estimator_cost,
    plot_evidence_by_estimator,
    plot_signal_to_noise,
)
from pyro_vae.plots.evidence import plot_bound, plot_evidence, plot_gap, plot_widest_gaps
from pyro_vae.plots.images import (
    pixels_text,
    plot_latent,
    plot_manifold,
    plot_reconstructions,
    plot_samples,
)
from pyro_vae.plots.khat import plot_khat, plot_khat_by_class, plot_khat_plane, plot_loo_pit
from pyro_vae.plots.latents import (
    plot_attribute_effects,
    plot_compression,
    plot_feature_quality,
    plot_paths,
    plot_picture_rows,
    plot_units,
)
from pyro_vae.plots.mixture import (
    plot_bounds,
    plot_decoder,
    plot_evidence_parts,
    plot_half_steps,
    plot_mixture,
    plot_model_choice,
    plot_num_components,
    plot_restarts,
)
from pyro_vae.plots.posterior import (
    plot_calibration,
    plot_coverage,
    plot_posterior,
    plot_trust,
    plot_worst,
)
from pyro_vae.plots.samples import plot_power, plot_sample_rows, plot_sharpness
from pyro_vae.plots.training import (
    plot_gradient_draws,
    plot_learning_curves,
    plot_rates,
    plot_sample_grids,
)

__all__ = [
    "pixels_text",
    "plot_attribute_effects",
    "plot_bound",
    "plot_bounds",
    "plot_calibration",
    "plot_code_activity",
    "plot_compression",
    "plot_coverage",
    "plot_decoder",
    "plot_denoising",
    "plot_estimator_cost",
    "plot_evidence",
    "plot_evidence_by_estimator",
    "plot_evidence_parts",
    "plot_feature_quality",
    "plot_gap",
    "plot_gradient_draws",
    "plot_half_steps",
    "plot_khat",
    "plot_khat_by_class",
    "plot_khat_plane",
    "plot_latent",
    "plot_learning_curves",
    "plot_loo_pit",
    "plot_manifold",
    "plot_mixture",
    "plot_model_choice",
    "plot_num_components",
    "plot_paths",
    "plot_picture_rows",
    "plot_posterior",
    "plot_power",
    "plot_rates",
    "plot_reconstructions",
    "plot_restarts",
    "plot_sample_grids",
    "plot_sample_rows",
    "plot_samples",
    "plot_sensitivity",
    "plot_sharpness",
    "plot_signal_to_noise",
    "plot_trust",
    "plot_units",
    "plot_widest_gaps",
    "plot_worst",
]
