"""The models as scikit-learn estimators: for pipelines, searches and cross-validation."""

from pyro_vae.sklearn.autoencoder import VAETransformer
from pyro_vae.sklearn.bayesian_mixture import BayesianMixture
from pyro_vae.sklearn.linear import FactorAnalyzer, ProbabilisticPCA
from pyro_vae.sklearn.mixture import GaussianMixtureEM

__all__ = [
    "BayesianMixture",
    "FactorAnalyzer",
    "GaussianMixtureEM",
    "ProbabilisticPCA",
    "VAETransformer",
]
