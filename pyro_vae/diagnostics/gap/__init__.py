"""`elbo_gap`: log p(x) - ELBO per datum, split into approximation and amortisation."""

from pyro_vae.diagnostics.gap.elbo_gap import GapOnBoth, elbo_gap, elbo_surgery, gap_on_both

__all__ = [
    "GapOnBoth",
    "elbo_gap",
    "elbo_surgery",
    "gap_on_both",
]
