"""Fourteen real posteriors with reference draws, and how well each method does on them."""

from benchmarks.posteriors.models import NAMES, RealPosterior, load_posterior

__all__ = ["NAMES", "RealPosterior", "load_posterior"]
