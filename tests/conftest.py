"""What every test starts from, and what no test may leave changed."""

import hashlib
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyro
import pytest
import torch
from threadpoolctl import threadpool_limits

USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}


def pytest_configure() -> None:
    # Neither results nor times then depend on how many cores the machine has free.
    torch.set_num_threads(1)
    # NumPy's and SciPy's own threads wait on one another when the cores are busy.
    threadpool_limits(1, user_api="blas")
    # A shell that starts this in the background has these ignored, as would all that tests start.
    for signum, usual in USUAL.items():
        if signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, usual)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def seed_of(test_id: str) -> int:
    """A seed that is the same on every machine, in every folder, and another one for every test."""
    path, *rest = test_id.split("::")
    name = "::".join([f"tests/{path.rpartition('/')[2]}", *rest])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def _set_in_pyro(name: str, value: Any) -> None:
    pyro.settings.set(**{name: value})


# The process-wide switches that the package and its tests leave alone: how to read and to set each.
# Among Pyro's settings is torch.distributions' validation default.
SWITCHES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's thread count": (torch.get_num_threads, torch.set_num_threads),
    "torch's gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    **{
        f"torch's precision of {name}": (
            partial(getattr, product, "fp32_precision"),
            partial(setattr, product, "fp32_precision"),
        )
        for name, product in {
            "CPU products": torch.backends.mkldnn.matmul,
            "CUDA products": torch.backends.cuda.matmul,
            "CUDA convolutions": torch.backends.cudnn.conv,
        }.items()
    },
    "torch's deterministic mode": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    **{
        f"Pyro's setting {name}": (partial(pyro.settings.get, name), partial(_set_in_pyro, name))
        for name in pyro.settings.get()
    },
}


@pytest.fixture(autouse=True)
def _isolated(request: pytest.FixtureRequest) -> Iterator[None]:
    """Starts a test in double precision, from its seed, without parameters; checks its end."""
    outside = torch.get_default_dtype()
    single = request.node.get_closest_marker("float32") is not None
    torch.set_default_dtype(torch.float32 if single else torch.float64)
    pyro.clear_param_store()
    if (loaded := sys.modules.get("pyro_vae.inference.programs.tool")) is not None:
        loaded.LAST_FITS.clear()
    pyro.set_rng_seed(seed_of(request.node.nodeid))
    before = {name: get() for name, (get, _) in SWITCHES.items()}
    yield
    changed = []
    for name, (get, put) in SWITCHES.items():
        if (now := get()) != before[name]:
            changed.append(f"{name} ({before[name]} -> {now})")
            put(before[name])
    torch.set_default_dtype(outside)
    pyro.clear_param_store()
    if changed:
        pytest.fail(
            f"the test left changed: {', '.join(changed)}. What other tests find would depend on "
            "their order: restore it in the code under test, or in the test if it did this itself."
        )
