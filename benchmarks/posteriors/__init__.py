"""Fourteen real posteriors with reference draws, as Pyro models, and every way to them measured."""

from benchmarks.posteriors.models import NAMES, RealPosterior, load_posterior

__all__ = ["NAMES", "RealPosterior", "load_posterior"]
