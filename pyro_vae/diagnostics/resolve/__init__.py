"""`resolve`: for every datum a posterior that may be used, and the evidence that says so."""

from pyro_vae.diagnostics.resolve.ladder import RUNGS, Rung
from pyro_vae.diagnostics.resolve.resolve import ResolvedDraws, resolve

__all__ = ["RUNGS", "ResolvedDraws", "Rung", "resolve"]
