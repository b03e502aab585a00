"""`sample_quality`: generated samples beside held-out data."""

from pyro_vae.extras.samples.features import Features, make_features
from pyro_vae.extras.samples.neighbours import nearest_training_distance, precision_recall
from pyro_vae.extras.samples.power import PowerSpectrum, high_frequency_power
from pyro_vae.extras.samples.quality import sample_quality

__all__ = [
    "Features",
    "PowerSpectrum",
    "high_frequency_power",
    "make_features",
    "nearest_training_distance",
    "precision_recall",
    "sample_quality",
]
