"""Memory that gradients need: what autograd keeps for the backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["peak_bytes"]


def peak_bytes(run: Callable[[], Any]) -> int:
    """Peak of the bytes that autograd keeps for backward passes while `run` runs.

    Parameters and data that it keeps are counted as well, each storage once.
    """
    ledger = _Ledger()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: _Held(tensor, ledger), lambda held: held.tensor
    ):
        run()
    return ledger.peak


class _Held:
    """A tensor that is kept for the backward pass, counted for as long as it is."""

    def __init__(self, tensor: Tensor, ledger: "_Ledger") -> None:
        self.tensor, self.ledger = tensor, ledger
        ledger.take(tensor)

    def __del__(self) -> None:
        self.ledger.give(self.tensor)


class _Ledger:
    """Bytes of the storages that are held, each counted once, and their peak."""

    def __init__(self) -> None:
        self.holders: dict[int, int] = {}
        self.now = self.peak = 0

    def take(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        count = self.holders.get(storage.data_ptr(), 0)
        self.holders[storage.data_ptr()] = count + 1
        if not count:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def give(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.holders[storage.data_ptr()] -= 1
        if not self.holders[storage.data_ptr()]:
            self.now -= storage.nbytes()
