"""`calibrate`: simulation-based ranks, coverage and TARP of a guide."""

from pyro_vae.diagnostics.calibration.calibrate import calibrate
from pyro_vae.diagnostics.calibration.ecdf import ecdf, ecdf_band, ecdf_p_value
from pyro_vae.diagnostics.calibration.ranks import coverage

__all__ = [
    "calibrate",
    "coverage",
    "ecdf",
    "ecdf_band",
    "ecdf_p_value",
]
