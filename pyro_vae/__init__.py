"""From EM on Gaussian mixtures to variational autoencoders, on Pyro.

Everything is a reduction of log weights: their mean over particles is the ELBO, their log-mean-exp
the importance bound, their tail the Pareto k-hat. Every tool takes any Pyro `model` and `guide`.

The public names are imported when they are first used, so that ``import pyro_vae`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyro_vae.data import load_dataset
    from pyro_vae.diagnostics.calibration import calibrate
    from pyro_vae.diagnostics.comparison import held_out, kfold, loo
    from pyro_vae.diagnostics.evidence import log_evidence
    from pyro_vae.diagnostics.gap import elbo_gap
    from pyro_vae.diagnostics.gradients import compare_estimators
    from pyro_vae.diagnostics.posterior import posterior_quality
    from pyro_vae.diagnostics.predictive_check import predictive_check
    from pyro_vae.diagnostics.resolve import resolve
    from pyro_vae.diagnostics.split_check import split_check
    from pyro_vae.inference.draws import draw_posterior
    from pyro_vae.inference.em import fit_em
    from pyro_vae.inference.log_weights import log_weights
    from pyro_vae.inference.mcmc import sample_posterior
    from pyro_vae.inference.programs import all_data
    from pyro_vae.inference.svi import fit
    from pyro_vae.models import (
        VAE,
        Autoencoder,
        GaussianMixture,
        LinearGaussian,
        TwoLayerVAE,
        TwoStageVAE,
    )
    from pyro_vae.results import load_result, to_arviz
    from pyro_vae.runs import load_run

__version__ = "0.1.0"

__all__ = [
    "VAE",
    "Autoencoder",
    "GaussianMixture",
    "LinearGaussian",
    "TwoLayerVAE",
    "TwoStageVAE",
    "all_data",
    "calibrate",
    "compare_estimators",
    "draw_posterior",
    "elbo_gap",
    "fit",
    "fit_em",
    "held_out",
    "kfold",
    "load_dataset",
    "load_result",
    "load_run",
    "log_evidence",
    "log_weights",
    "loo",
    "posterior_quality",
    "predictive_check",
    "resolve",
    "sample_posterior",
    "split_check",
    "to_arviz",
]

_HOME = {
    "VAE": "pyro_vae.models",
    "Autoencoder": "pyro_vae.models",
    "GaussianMixture": "pyro_vae.models",
    "LinearGaussian": "pyro_vae.models",
    "TwoLayerVAE": "pyro_vae.models",
    "TwoStageVAE": "pyro_vae.models",
    "all_data": "pyro_vae.inference.programs",
    "calibrate": "pyro_vae.diagnostics.calibration",
    "compare_estimators": "pyro_vae.diagnostics.gradients",
    "draw_posterior": "pyro_vae.inference.draws",
    "elbo_gap": "pyro_vae.diagnostics.gap",
    "fit": "pyro_vae.inference.svi",
    "fit_em": "pyro_vae.inference.em",
    "held_out": "pyro_vae.diagnostics.comparison",
    "kfold": "pyro_vae.diagnostics.comparison",
    "load_dataset": "pyro_vae.data",
    "load_result": "pyro_vae.results",
    "load_run": "pyro_vae.runs",
    "log_evidence": "pyro_vae.diagnostics.evidence",
    "log_weights": "pyro_vae.inference.log_weights",
    "loo": "pyro_vae.diagnostics.comparison",
    "posterior_quality": "pyro_vae.diagnostics.posterior",
    "predictive_check": "pyro_vae.diagnostics.predictive_check",
    "resolve": "pyro_vae.diagnostics.resolve",
    "sample_posterior": "pyro_vae.inference.mcmc",
    "split_check": "pyro_vae.diagnostics.split_check",
    "to_arviz": "pyro_vae.results",
}

if (
    not TYPE_CHECKING
):  # type checkers read the imports above, and report a name that is not among them

    def __getattr__(name: str) -> object:
        """Imports a public name from its module when it is first asked for (PEP 562)."""
        if name not in _HOME:
            message = (
                f"module 'pyro_vae' has no attribute {name!r}; public are {', '.join(__all__)}"
            )
            raise AttributeError(message, name=name)
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """Lists the public names, also those not imported yet, and the modules that were imported."""
    return sorted({*globals(), *__all__} - {"TYPE_CHECKING", "import_module"})
