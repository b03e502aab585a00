"""Work over many data in chunks that fit in memory, which a file lets go on where it stopped."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae.inference.programs import (
    Pair,
    Program,
    ProgramStructure,
    modules_of,
    split_count,
    tensors_of,
)
from pyro_vae.inference.svi import CheckpointError, load_tensors, save_tensors
from pyro_vae.progress import progress_bar
from pyro_vae.results import sha256_of

__all__ = ["ChunkPlan", "identity_of", "plan_chunks", "run_chunks"]

Columns = dict[str, Tensor]


@dataclass(frozen=True)
class ChunkPlan:
    """How data and particles are cut so that a chunk fits in memory."""

    pair: Pair
    data_chunk: int
    particle_chunk: int

    @property
    def num_data(self) -> int:
        """Number of data; 1 if joint."""
        return self.pair.num_data

    @property
    def structure(self) -> ProgramStructure:
        """Of the pair with all data."""
        return self.pair.structure

    def parts(self) -> Iterator[tuple[int, Pair]]:
        """The pair with chunks of the data, each with the number of its first datum."""
        if self.data_chunk == self.num_data:
            yield 0, self.pair
            return
        for start in range(0, self.num_data, self.data_chunk):
            yield start, self.pair.rows(slice(start, start + self.data_chunk))

    def particles(self, num_particles: int) -> list[int]:
        """Chunks of the particles."""
        return split_count(num_particles, self.particle_chunk)


def plan_chunks(
    pair: Pair, *, num_particles: int, max_memory: float, max_data: int | None = None
) -> ChunkPlan:
    """Cuts the data of a pair; with joint weights they make one chunk.

    Args:
        pair: Of model and guide.
        num_particles: Draws that one datum takes at once.
        max_memory: Of one chunk, in GiB.
        max_data: The longest chunk, so that a stop loses little.
    """
    num_data = pair.num_data
    per_particle = max(pair.bytes_of_particle / num_data, 64.0)
    room = max_memory * 2**30 / per_particle  # particles times data
    particles = int(min(num_particles, max(room, 1)))
    data = int(min(num_data, max(room // particles, 1), max_data or num_data))
    if data < num_data and (cut := pair.sliceable(data)) is not None:
        return ChunkPlan(cut, data, particles)
    if data < num_data:
        particles = int(min(num_particles, max(room / num_data, 1)))
    return ChunkPlan(pair, num_data, particles)


def identity_of(
    model: Program, guide: Program, x: Any, config: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """What a half-finished run must share with the one that goes on with it."""
    modules = [m for program in (model, guide) for m in modules_of(program)]
    values = [p.detach() for m in modules for p in (*m.parameters(), *m.buffers())]
    values += [value.detach() for _, value in sorted(pyro.get_param_store().items())]
    data = tensors_of(x)
    return {
        "config": dict(config),
        "seed": seed,
        "data_sha256": sha256_of(*data) if data else None,
        "parameters_sha256": sha256_of(*values) if values else None,
    }


def run_chunks(
    plan: ChunkPlan,
    work: Callable[[Pair], Columns],
    *,
    seed: int,
    identity: Mapping[str, Any],
    checkpoint: str | Path | None,
    progress: bool,
) -> Columns:
    """Runs `work` on every chunk, each with a random stream of its own, and joins the columns.

    A chunk's stream follows from the seed and its first datum, so a run that goes on from a file
    gives what one without a stop gives.

    Args:
        plan: The chunks.
        work: Columns of one chunk, each as long as the chunk.
        seed: The seed of the first chunk; the others' are derived from it.
        identity: From `identity_of`; with `checkpoint`.
        checkpoint: A file that keeps the finished chunks.
        progress: Shows a bar on stderr where that is a terminal.

    Raises:
        CheckpointError: If the file was written by a run with other settings, data or parameters.
    """
    own = {**identity, "chunk": plan.data_chunk}
    finished = _read(checkpoint, own)
    shown = progress_bar(plan.num_data, "datum", show=progress, what="measuring")
    with shown:
        for start, part in plan.parts():
            if start not in finished:
                pyro.set_rng_seed(_seed_of(seed, start))
                finished[start] = {n: v.detach().cpu() for n, v in work(part).items()}
                if checkpoint is not None:
                    tensors = {
                        f"{first}/{name}": value
                        for first, columns in finished.items()
                        for name, value in columns.items()
                    }
                    save_tensors(checkpoint, tensors, own)
            shown.update(min(plan.data_chunk, plan.num_data - start))
    order = sorted(finished)
    return {name: torch.cat([finished[n][name] for n in order]) for name in finished[order[0]]}


def _seed_of(seed: int, start: int) -> int:
    if start == 0:
        return seed
    return int.from_bytes(sha256(f"{seed} {start}".encode()).digest()[:4], "big")


def _read(checkpoint: str | Path | None, own: Mapping[str, Any]) -> dict[int, Columns]:
    if checkpoint is None or not Path(checkpoint).exists():
        return {}
    tensors, found = load_tensors(checkpoint)
    differs = sorted(key for key in {*own, *found} if own.get(key) != found.get(key))
    if differs:
        raise CheckpointError(
            f"{checkpoint} holds chunks of another run (it differs in {', '.join(differs)}); give "
            "this run another file, or repeat the call that began that one"
        )
    finished: dict[int, Columns] = {}
    for key, value in tensors.items():
        start, _, name = key.partition("/")
        finished.setdefault(int(start), {})[name] = value
    return finished
