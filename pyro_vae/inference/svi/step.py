"""What runs around a step of SVI: no infinite loss, KL warm-up, fewer checks, a late Ctrl-C."""

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.poutine.messenger import Messenger

from pyro_vae.inference.svi.optimizer import TrainingError

__all__ = ["ScaledLatents", "deferred_interrupt", "refuse_infinite", "without_validation"]


def refuse_infinite(loss_and_grads: Callable[..., Any]) -> Callable[..., Any]:
    """Raises `TrainingError` for a loss that is not finite, before the optimizer moves anything."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        loss = loss_and_grads(*args, **kwargs)
        for part in loss if isinstance(loss, tuple) else (loss,):
            if not math.isfinite(part):
                raise TrainingError(
                    f"the loss is {float(part)}; the parameters are those of the last good step. "
                    "Lower the learning rate, look for a scale that goes to 0, or for missing "
                    "values in the data"
                )
        return loss

    return guarded


class ScaledLatents(Messenger):
    """Scales the latent sites of model and guide alike: the beta-ELBO E log p(x|z) - beta KL."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.beta


@contextmanager
def without_validation() -> Iterator[None]:
    """Leaves out Pyro's checks: they cost a quarter of a small step."""
    names = (
        "validate_distributions_pyro",
        "validate_distributions_torch",
        "validate_infer",
        "validate_poutine",
    )
    with pyro.settings.context(**dict.fromkeys(names, False)):
        yield


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Lets the step at hand end when Ctrl-C comes; a second Ctrl-C interrupts at once."""
    pressed = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    ours = threading.current_thread() is threading.main_thread()
    if not ours or before in (None, signal.SIG_IGN):  # a job in the background ignores Ctrl-C
        yield pressed.is_set
        return

    def handler(number: int, frame: Any) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    signal.signal(signal.SIGINT, handler)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
