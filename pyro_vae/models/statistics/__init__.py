"""Eight models that statisticians write, each with data of known parameters and a guide."""

from pyro_vae.models.statistics.entry import Example, Simulated
from pyro_vae.models.statistics.regressions import HIERARCHICAL, LOGISTIC, POISSON
from pyro_vae.models.statistics.states import HIDDEN_MARKOV, MIXTURE, TOPICS
from pyro_vae.models.statistics.traits import BAYESIAN_PPCA, ITEM_RESPONSE

__all__ = ["GALLERY", "Example", "Simulated"]

GALLERY: dict[str, Example] = {
    "hierarchical_regression": HIERARCHICAL,
    "logistic_regression": LOGISTIC,
    "poisson_effects": POISSON,
    "bayesian_mixture": MIXTURE,
    "topic_model": TOPICS,
    "bayesian_ppca": BAYESIAN_PPCA,
    "hidden_markov": HIDDEN_MARKOV,
    "item_response": ITEM_RESPONSE,
}
"""By name."""
