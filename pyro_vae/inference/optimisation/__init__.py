"""Methods that optimise where SVI would sample gradients: L-BFGS, Pathfinder, trust regions."""

from pyro_vae.inference.optimisation.lbfgs import InverseHessian, climb
from pyro_vae.inference.optimisation.pathfinder import PathNormals, find_paths, starting_points
from pyro_vae.inference.optimisation.trust_region import trust_region_step

__all__ = [
    "InverseHessian",
    "PathNormals",
    "climb",
    "find_paths",
    "starting_points",
    "trust_region_step",
]
