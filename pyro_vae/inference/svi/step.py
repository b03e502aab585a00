"""What runs around a step of SVI: no infinite loss, KL warm-up, fewer checks, a late Ctrl-C."""

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pyro
from pyro.poutine.messenger import Messenger

from pyro_vae.inference.svi.optimizer import TrainingError

__all__ = [
    "Interruptible",
    "ScaledLatents",
    "deferred_interrupt",
    "refuse_infinite",
    "without_validation",
]

Trained = TypeVar("Trained", bound="Interruptible")


class Interruptible:
    """What a training reached that Ctrl-C may have ended."""

    status: str

    def summary(self) -> str:
        """One sentence: how long it trained and what it reached."""
        raise NotImplementedError

    def require_finished(self: Trained) -> Trained:
        """This, for whoever goes on to measure it.

        Raises:
            KeyboardInterrupt: If Ctrl-C ended the training early: numbers of such a fit are not
                those of the training that was asked for.
        """
        if self.status == "interrupted":
            raise KeyboardInterrupt(self.summary())
        return self


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
def deferred_interrupt(*, saves: bool = False) -> Iterator[Callable[[], bool]]:
    """Lets the step at hand end when Ctrl-C comes; a second Ctrl-C interrupts at once.

    Args:
        saves: Whether the block keeps what was reached. Signals that end the process (SIGTERM,
            SIGHUP) then wait as well, and do what they would have done when the block has ended.

    Yields:
        Whether a signal came.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP") if saves else ("SIGINT",)
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    ours = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in numbers if ours}
    # A job in the background ignores Ctrl-C, and one under nohup the end of its terminal.
    before = {n: found for n, found in before.items() if found not in (None, signal.SIG_IGN)}
    came: list[int] = []

    def handler(number: int, _frame: Any) -> None:
        if number in came:
            raise KeyboardInterrupt
        came.append(number)

    for number in before:
        signal.signal(number, handler)
    try:
        yield lambda: bool(came)
    finally:
        for number, found in before.items():
            signal.signal(number, found)
        for number in came:
            if number != signal.SIGINT:
                signal.raise_signal(number)
