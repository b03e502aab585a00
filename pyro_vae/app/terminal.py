"""What every command shares: options, errors in one line, signals, and telling what goes on."""

import functools
import inspect
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

__all__ = [
    "DATA",
    "EXIT_INTERRUPTED",
    "Quiet",
    "Root",
    "RunFolder",
    "Threads",
    "command",
    "import_slowly",
    "one_line",
    "say",
    "set_threads",
]

DATA = "digits, iris, mnist, fashion_mnist, binarized_mnist, omniglot, frey_face, faithful"
EXIT_INTERRUPTED = 130
_EXIT_REFUSED = 2
_EXIT_FAULT = 1

Command = TypeVar("Command", bound=Callable[..., None])

Root = Annotated[
    Path | None,
    typer.Option(
        "--data-root",
        metavar="FOLDER",
        help="Folder of the data files. Default: $PYRO_VAE_DATA, else the user's cache folder.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Processor threads for torch. More help large models on processors that nobody else "
        "uses; the number changes the last digits of a result.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No bars, and no lines of progress.")]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, as fit wrote it.", show_default=False)
]


def command(parent: typer.Typer, name: str, epilog: str) -> Callable[[Command], Command]:
    """Registers a command that speaks one line where it fails, and takes --debug."""

    def register(function: Command) -> Command:
        @functools.wraps(function)
        def guarded(*args: Any, debug: bool = False, **kwargs: Any) -> None:
            with _plain_errors(debug), _ended_by_signals(), _telling(kwargs):
                function(*args, **kwargs)

        option = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
        _add_parameter(guarded, function, "debug", option)
        parent.command(name, epilog=epilog)(guarded)
        return function

    return register


def _add_parameter(guarded: Any, function: Callable[..., Any], name: str, kind: Any) -> None:
    signature = inspect.signature(function)
    extra = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
    guarded.__signature__ = signature.replace(parameters=[*signature.parameters.values(), extra])
    guarded.__annotations__ = {**function.__annotations__, name: kind}


@contextmanager
def _plain_errors(debug: bool) -> Iterator[None]:
    """One line on stderr instead of a traceback; warnings in one line as well."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
        try:
            yield
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            if debug:
                raise
            say("interrupted: nothing more was written.")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except (ValueError, RuntimeError, OSError, ImportError, MemoryError) as error:
            if debug:
                raise
            say(f"error: {one_line(error)}{_hint(error)}")
            raise typer.Exit(_EXIT_REFUSED) from None
        except Exception as error:
            if debug or type(error).__module__.startswith("typer"):
                raise
            say(
                f"error: {type(error).__name__}: {one_line(error)} (this is a fault of pyro_vae: "
                "run it again with --debug, and report what that shows)"
            )
            raise typer.Exit(_EXIT_FAULT) from None


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP end a command as Ctrl-C does: no half file, and an exit status."""

    def end(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, n) for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n)]
    ours = threading.current_thread() is threading.main_thread()
    # One that is ignored, as under nohup, stays ignored.
    taken = [n for n in numbers if ours and signal.getsignal(n) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _telling(given: dict[str, Any]) -> Iterator[None]:
    """Shows what the package tells of its progress, unless asked not to."""
    from pyro_vae.progress import lines_on_stderr

    with nullcontext() if given.get("quiet") else lines_on_stderr():
        yield


def import_slowly(module: str) -> None:
    """Imports what takes long, and says so."""
    if module not in sys.modules:
        from pyro_vae.progress import announced

        with announced("importing torch", say):
            import_module(module)


def say(line: str) -> None:
    """Writes a line to stderr."""
    with suppress(OSError):  # the terminal may be gone
        typer.echo(line, err=True)


def _hint(error: BaseException) -> str:
    """What the command line calls the remedies that the library names."""
    if type(error).__name__ != "DatasetError":
        return ""
    return " (On the command line: pyro-vae data get NAME, or --data-root FOLDER.)"


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def set_threads(threads: int) -> None:
    """What only the program may set, never the library."""
    import torch

    torch.set_num_threads(threads)
    say(f"{threads} thread{'s' * (threads > 1)} (--threads N changes it)")
