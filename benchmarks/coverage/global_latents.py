"""The gap of a pair with global latents, beside closed forms."""

from benchmarks.coverage.kinds import Checked, Row, Study, interval, joined, watched
from benchmarks.coverage.planted import Hierarchy
from pyro_vae.diagnostics.gap import elbo_gap

__all__ = ["STUDIES"]


def _global_gap(count: int, seed: int) -> dict[str, Checked]:
    pair, parts = Hierarchy(), []
    above, each = pair.kls()
    for i in range(count):
        x = pair.data(5, seed + i)
        found = watched(elbo_gap(pair.model, pair.guide, x, num_particles=200, seed=seed + i))
        log_p = pair.log_evidence(x)
        truths = {
            "log_evidence": log_p,
            "elbo": log_p - above - 5 * each,
            "gap": above + 5 * each,
            "global_gap": above,
            "local_gap": each,
        }
        parts.append(
            {f"{n}_se": interval(found[n], found[f"{n}_se"], t) for n, t in truths.items()}
        )
    return joined(parts)


STUDIES = [
    Study(
        "gap of a pair with global latents",
        "elbo_gap",
        _global_gap,
        tuple(
            Row(
                f"{name}_se",
                most=0.08,
                breaks="k-hat of the datum's weights near 0.5" if name == "local_gap" else "k-hat",
                guard="`khat`, `error_reliable`",
            )
            for name in ("log_evidence", "elbo", "gap", "global_gap", "local_gap")
        ),
        quick=40,
        longest=400,
    ),
]
