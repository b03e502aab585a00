"""Methods that optimise where SVI would sample gradients: Pathfinder's paths over L-BFGS."""

from pyro_vae.inference.optimisation.lbfgs import InverseHessian, climb
from pyro_vae.inference.optimisation.pathfinder import PathNormals, find_paths

__all__ = ["InverseHessian", "PathNormals", "climb", "find_paths"]
