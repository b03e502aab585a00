"""The command ``pyro-vae doctor``: what this installation is."""

import os
from pathlib import Path

import typer

from pyro_vae import __version__
from pyro_vae.app.data_commands import state
from pyro_vae.app.terminal import Root, import_slowly, one_line

__all__ = ["doctor"]


def doctor(data_root: Root = None) -> None:
    """Describes this installation, to paste into a question.

    Versions, threads, BLAS, processor, data found, and whether torch and torchvision work together.
    """
    import platform
    import re
    from importlib.metadata import PackageNotFoundError, version

    import_slowly("torch")
    import torch

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "missing"

    names = ("pyro-ppl", "numpy", "scikit-learn", "xarray", "arviz", "matplotlib", "safetensors")
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    variables = [f"{n}={os.environ[n]}" for n in _THREAD_VARIABLES if n in os.environ]
    lines = {
        "pyro_vae": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__} (CUDA: {cuda})",
        "torchvision": _torchvision(installed("torchvision")),
        "others": ", ".join(f"{name} {installed(name)}" for name in names),
        "threads": f"{torch.get_num_threads()} of {_usable_cores()} cores"
        + (f" ({', '.join(variables)})" if variables else ""),
        "BLAS": f"{blas[1] if blas else 'unknown'}; MKL "
        f"{'yes' if torch.backends.mkl.is_available() else 'no'}, oneDNN "
        f"{'yes' if torch.backends.mkldnn.is_available() else 'no'}",
        "processor": _processor(torch.backends.cpu.get_cpu_capability()),
        "data": _data_here(data_root),
    }
    for name, text in lines.items():
        typer.echo(f"{name + ':':<13}{text}")


_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "asimd", "sve")


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _torchvision(found: str) -> str:
    """Whether torchvision's compiled operators load into this torch."""
    import torch

    try:
        import torchvision

        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        torchvision.ops.nms(boxes, torch.ones(1), 0.5)
    except Exception as error:  # a wrong pair fails in many ways
        return (
            f"{found} does NOT match this torch ({one_line(error)}): install both anew, as "
            "pyro-vae's requirements name them"
        )
    return f"{found}, matches torch (its compiled operators run)"


def _processor(capability: str) -> str:
    from pyro_vae.results import processor_name

    flags: set[str] = set()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    shown = " ".join(flag for flag in _FLAGS if flag in flags) or "flags unknown"
    return f"{processor_name()}; {shown}; torch uses {capability}"


def _data_here(root: Path | None) -> str:
    from pyro_vae.data import DatasetError, check_dataset, dataset_names

    given = "--data-root" if root is not None else "$PYRO_VAE_DATA"
    where = given if root is not None or os.environ.get("PYRO_VAE_DATA") else "the cache folder"
    try:
        states = {name: state(check_dataset(name, root)) for name in dataset_names()}
    except DatasetError as error:
        return f"none: {one_line(error)}"
    here = [name for name, state in states.items() if state.startswith("yes")]
    faulty = [f"{name} {state}" for name, state in states.items() if state.startswith("damaged")]
    missing = [name for name, state in states.items() if state == "no"]
    parts = [f"{', '.join(here)} (files in {where})", *faulty]
    return "; ".join([*parts, f"missing: {', '.join(missing)}"] if missing else parts)
