"""What takes long shows that it lives: a bar on a terminal, elsewhere a line now and then.

Lines go to the logger ``pyro_vae``, at level INFO. It is silent unless somebody listens: the
command line and the analyses do, through `lines_on_stderr`; so may a script, through `logging`.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from tqdm.auto import tqdm

__all__ = ["announced", "lines_on_stderr", "progress_bar", "say"]

_LOGGER = logging.getLogger("pyro_vae")
_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_OF_SILENCE = 5.0


def say(line: str) -> None:
    """Tells a stage, to whoever listens."""
    _LOGGER.info(line)


def progress_bar(
    total: int, unit: str, *, show: bool, what: str = "", initial: int = 0
) -> "tqdm[Any] | _Lines":
    """A bar on stderr where that is a terminal; else a line every 10 s if somebody listens.

    Args:
        total: Of how many units.
        unit: One of them, such as "step".
        show: Whether to show anything.
        what: What goes on.
        initial: Units done before.

    Returns:
        Something with `update`, `set_description`, `set_postfix` and `n`, to be entered.
    """
    terminal = sys.stderr is not None and sys.stderr.isatty()
    if show and not terminal and _LOGGER.isEnabledFor(logging.INFO):
        return _Lines(total, unit, what, initial)
    return tqdm(
        total=total,
        unit=unit,
        desc=what or None,
        initial=initial,
        leave=False,
        mininterval=0.5,
        disable=not (show and terminal),
    )


class _Lines:
    """As much of a bar as its users ask for, told every 10 s, whether it moved or not."""

    disable = False

    def __init__(self, total: int, unit: str, what: str, initial: int) -> None:
        self.total, self.what, self.n, self.postfix = total, what, initial, ""
        self.units = "data" if unit == "datum" else f"{unit}s"
        self.told = ExitStack()

    def update(self, n: int = 1) -> None:
        self.n += n

    def set_description(self, desc: str) -> None:
        self.what = desc

    def set_postfix(self, values: Mapping[str, Any] | None = None, **more: Any) -> None:
        self.postfix = ", ".join(f"{k} {v}" for k, v in {**(values or {}), **more}.items())

    def __enter__(self) -> "_Lines":
        self.told.enter_context(_repeated(self._tell, _SECONDS_BETWEEN_LINES))
        return self

    def __exit__(self, *_: object) -> None:
        self.told.close()

    def _tell(self, seconds: float) -> None:
        what = f"{self.what}: " if self.what else ""
        postfix = f"; {self.postfix}" if self.postfix else ""
        say(f"{what}{self.n} of {self.total} {self.units}, {seconds:.0f} s{postfix}")


@contextmanager
def _repeated(tell: Callable[[float], None], every: float) -> Iterator[None]:
    """Calls with the seconds since the start, from another thread, until the block ends."""
    over, started = threading.Event(), time.monotonic()

    def remind() -> None:
        while not over.wait(every):
            tell(time.monotonic() - started)

    reminder = threading.Thread(target=remind, daemon=True)
    reminder.start()
    try:
        yield
    finally:
        over.set()
        reminder.join()


@contextmanager
def lines_on_stderr() -> Iterator[None]:
    """Writes what the package tells of its progress to stderr."""
    handler, before = logging.StreamHandler(sys.stderr), _LOGGER.level
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        _LOGGER.setLevel(before)
        _LOGGER.removeHandler(handler)


@contextmanager
def announced(what: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Tells what begins, and every 5 s that it still goes on.

    Args:
        what: Such as "importing torch".
        tell: Called with each line, from another thread as well.
    """
    tell(f"{what} ...")
    with _repeated(lambda seconds: tell(f"{what} ... {seconds:.0f} s"), _SECONDS_OF_SILENCE):
        yield
