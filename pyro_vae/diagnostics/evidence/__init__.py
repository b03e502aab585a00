"""`log_evidence`: log p(x) from below, from above and exactly, each number labelled."""

from pyro_vae.diagnostics.evidence.chunks import ChunkPlan, Columns, plan_chunks
from pyro_vae.diagnostics.evidence.log_evidence import log_evidence

__all__ = [
    "ChunkPlan",
    "Columns",
    "log_evidence",
    "plan_chunks",
]
