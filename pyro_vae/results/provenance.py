"""Where numbers came from: hashes of the data, the settings in JSON's types, the software."""

import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "float32_precision",
    "git_state",
    "processor_name",
    "sha256_of",
    "sha256_of_index",
    "software",
    "to_json",
]


def sha256_of(*arrays: Any) -> str:
    """Hashes the dtype, the shape and the bytes of arrays or tensors, in order.

    A tensor and a numpy array of the same dtype, shape and values have the same hash, on every
    device and machine.

    Raises:
        ValueError: If there is nothing to hash.
        TypeError: If an array holds Python objects.
    """
    if not arrays:
        raise ValueError("sha256_of needs at least one array")
    digest = sha256()
    for array in arrays:
        dtype, shape, content = _contents(array)
        digest.update(json.dumps([dtype, shape]).encode())
        digest.update(content)
    return digest.hexdigest()


def _contents(array: Any) -> tuple[str, list[int], memoryview]:
    if hasattr(array, "detach"):
        import torch

        tensor = array.detach().cpu().resolve_conj().resolve_neg().contiguous()
        raw = tensor.reshape(-1).view(torch.uint8).numpy()  # also takes types that numpy lacks
        return str(tensor.dtype).removeprefix("torch."), list(tensor.shape), raw.data
    values = np.asarray(array)
    if values.dtype.hasobject:
        raise TypeError(
            "an array of Python objects has no bytes to hash: make it numeric or text first"
        )
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    raw = np.ascontiguousarray(little).reshape(-1).view(np.uint8)
    return values.dtype.name, list(values.shape), raw.data


def sha256_of_index(values: np.ndarray) -> str:
    """Hash of which data these are, in any order."""
    return sha256_of(np.sort(_without_objects(np.atleast_1d(values))))


def _without_objects(values: np.ndarray) -> np.ndarray:
    return np.array([str(v) for v in values.tolist()]) if values.dtype.kind in "OTU" else values


def to_json(value: Any, where: str) -> Any:
    """The value in JSON's types, or an error that names the entry that has none."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(
                f"{where} has a key that is not text, which JSON would change: use text keys"
            )
        return {key: to_json(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(
        f"{where} is of type {type(value).__name__}, which cannot be recorded: give its name or "
        "its numbers instead"
    )


def software() -> dict[str, Any]:
    """Versions, commit, and what else changes the last bits of a run."""
    import torch

    commit, dirty = git_state()
    return {
        "version": _version("pyro-vae"),
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": _version("pyro-ppl"),
        "num_threads": torch.get_num_threads(),
        **_arithmetic(),
    }


@functools.cache
def _arithmetic() -> dict[str, Any]:
    """What computes: the library for matrices, and what the processor can do with many numbers."""
    import torch

    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    able = torch.cpu.get_capabilities()
    return {
        "blas": blas and blas[1],
        "processor": able.get("cpu_name", platform.machine()),
        "processor_flags": [
            name
            for name, has in sorted(able.items())
            if has is True and name.startswith(("amx", "avx", "bf16", "fma", "neon", "sve"))
        ],
    }


def float32_precision() -> str:
    """The precision that products of float32 matrices have at the moment.

    Returns:
        Such as "ieee", or "bf16 (CPU), tf32 (CUDA)" where `torch.set_float32_matmul_precision` or
        `torch.backends` allow less.
    """
    import torch

    backends: Any = torch.backends
    allowed = {"CPU": backends.mkldnn.matmul, "CUDA": backends.cuda.matmul}
    less = {
        place: product.fp32_precision
        for place, product in allowed.items()
        if product.fp32_precision not in ("none", "ieee")
    }
    return ", ".join(f"{precision} ({place})" for place, precision in less.items()) or "ieee"


@functools.cache
def processor_name() -> str:
    """The processor that seconds were taken on, as the system calls it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine() or "an unknown processor"


@functools.cache
def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def git_state() -> tuple[str | None, bool | None]:
    """The commit the package runs from and whether its code differs; None, None if no checkout."""
    package = Path(__file__).resolve().parents[1]
    if not (package.parent / ".git").exists():
        return None, None
    # A hook's GIT_DIR would point git elsewhere, and the optional locks would get in the way of a
    # commit.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = [
        "git",
        "--no-optional-locks",
        "status",
        "--porcelain=v2",
        "--branch",
        "--",
        package.name,
    ]
    try:
        answer = subprocess.run(
            command,
            cwd=package.parent,
            env=environment,
            capture_output=True,
            text=True,
            timeout=1,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None, None
    lines = answer.stdout.splitlines()
    commit = next((line.split()[-1] for line in lines if line.startswith("# branch.oid")), None)
    if commit is None or commit == "(initial)":
        return None, None
    return commit, any(not line.startswith("#") for line in lines)
