"""The models as scikit-learn estimators: for pipelines, searches and cross-validation."""

from pyro_vae.sklearn.autoencoder import VAETransformer
from pyro_vae.sklearn.linear import FactorAnalyzer, ProbabilisticPCA
from pyro_vae.sklearn.mixture import GaussianMixtureEM

__all__ = ["FactorAnalyzer", "GaussianMixtureEM", "ProbabilisticPCA", "VAETransformer"]
