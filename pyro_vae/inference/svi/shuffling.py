"""The training data, shuffled and cut into mini-batches."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.inference.programs import Axes, batch_axes, batch_length, map_batch, take, tensors_of
from pyro_vae.results import sha256_of

__all__ = ["TrainingData", "move_data"]


class TrainingData:
    """Data held in memory, shuffled by a generator of its own.

    Args:
        x: The data, in one of the forms of `as_arguments`.
        transform: As for `fit`.
        seed: Seeds shuffling, the draws of `transform` and the streams of `generator`.

    Attributes:
        axes: The axes that data lie along, as `batch_axes` has them: the first one until the
            programs have said otherwise; None throughout where no part can be taken.
        length: Number of data.
        whole: Whether the programs are given all data at every step, and take the rows of their
            plate out of them.

    Raises:
        ValueError: If there are no data.
    """

    def __init__(
        self, x: Any, transform: Callable[[Tensor, torch.Generator], Tensor] | None, seed: int
    ) -> None:
        self.x, self.transform = x, transform
        self.axes: Axes = next(iter(batch_axes(x)), ())
        self.length = batch_length(x, self.axes)
        self.whole = False
        if self.length == 0:
            raise ValueError("there are no data to fit: the first tensor of x has length 0")
        self.seed = seed
        self.shuffler = torch.Generator().manual_seed(_stream_seed(seed, 0))
        self.noise = self.generator(1)

    def sha256(self) -> str:
        """The hash of the data; that of an empty tensor where programs bring their own."""
        return sha256_of(*tensors_of(self.x) or [torch.empty(0)])

    def generator(self, stream: int) -> torch.Generator:
        """A source of randomness where the data lie, independent of the others of this run."""
        tensors = tensors_of(self.x)
        device = tensors[0].device if tensors else "cpu"
        return torch.Generator(device=device).manual_seed(_stream_seed(self.seed, stream))

    def random_states(self) -> dict[str, Tensor]:
        """The states of shuffler and noise, and of the device where the data lie, by name."""
        states = {"shuffler": self.shuffler.get_state(), "noise": self.noise.get_state()}
        if self.noise.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.noise.device)
        return states

    def set_random_states(self, states: Mapping[str, Tensor]) -> None:
        """Puts back what `random_states` gave, as far as it is of the same kind of device."""
        self.shuffler.set_state(states["shuffler"])
        on_cuda = self.noise.device.type == "cuda"
        if on_cuda and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.noise.device)
        if on_cuda == ("cuda" in states):
            self.noise.set_state(states["noise"])

    def first(self, rows: int, stream: int) -> Any:
        """The first rows, with draws of their own that are the same each time."""
        index = torch.arange(rows) if rows < self.length else None
        return self.batch(index, self.generator(stream))

    def batch(self, index: Tensor | None, noise: torch.Generator | None = None) -> Any:
        """The data at `index` (all if None), in the form of `x`, transformed; see `whole`."""
        x = self.x if index is None or self.whole else map_batch(self.x, take(index), self.axes)
        if self.transform is None:
            return x
        todo = [self.transform]  # for the first tensor alone
        return map_batch(
            x, lambda a, _: todo.pop()(a, noise or self.noise) if todo else a, self.axes
        )


def _stream_seed(seed: int, stream: int) -> int:
    return int(np.random.SeedSequence((seed, stream)).generate_state(1)[0])


def move_data(x: Any, device: str | torch.device) -> Any:
    """The data with all their tensors on a device; what is no tensor is passed on."""
    if isinstance(x, tuple):
        return tuple(move_data(a, device) for a in x)
    if isinstance(x, Mapping):
        return {name: move_data(a, device) for name, a in x.items()}
    return x.to(device) if isinstance(x, Tensor) else x
