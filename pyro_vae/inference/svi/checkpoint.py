r"""A run folder: what it holds, in which order it is written, how it is read safely.

- ``training.safetensors``: everything that going on needs, in one file: parameters, buffers,
  optimizer, random states, the epoch's shuffling order, history, configuration.
- ``model.safetensors``: the weights alone, as the model hubs have them. Of programs that are not
  methods of one module, the parameters by name, as an optimizer moves them (unconstrained).
- ``config.json``: how the model is built, how it was trained, on which data.
- ``history.jsonl``: one line an evaluation; numbers that are not finite are left out.
- ``README.md``: a model card.

`training.safetensors` is written first and alone decides where a resumed run goes on, so a crash
between two files cannot mix two states, and the others can be made from it again. Each safetensors
file carries the sha256 of its own tensors, as safetensors does not notice a flipped bit.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from pyro_vae.inference.programs import keep_random_state
from pyro_vae.inference.svi.history import is_bound
from pyro_vae.results import atomic_path, leftovers, write_text

__all__ = [
    "FORMAT",
    "CheckpointError",
    "LoadedProgram",
    "SavedParameters",
    "check_same_run",
    "check_same_settings",
    "complete_run",
    "holds_run",
    "load_tensors",
    "model_card",
    "part_of",
    "read_json",
    "read_rows",
    "remove_leftovers",
    "save_tensors",
    "tensor_type",
    "write_run",
]

FORMAT = 1
"""The layout of a run folder, which config.json names."""

_FILES = (
    "training.safetensors",
    "model.safetensors",
    "config.json",
    "history.jsonl",
    "README.md",
)
_MUST_AGREE = (  # what a resumed run may not change, as config.json has it
    "loss",
    "loss_options",
    "num_particles",
    "optimizer",
    "learning_rate",
    "optimizer_arguments",
    "batch_size",
    "seed",
    "warmup_epochs",
    "num_data",
    "data_sha256",
    "dtype",
    "method",
    "num_draws",
    "num_paths",
)


class CheckpointError(RuntimeError):
    """A run folder or one of its files cannot be read; the message says what to do."""


class SavedParameters:
    """The parameters of a run, for programs that ask for them by name.

    Args:
        folder: The run folder, for messages.
        values: By name, as an optimizer moves them: a constrained value would come back rounded.
        loaded: Parameters of modules that have their values already.
    """

    def __init__(
        self, folder: Path, values: Mapping[str, Tensor], loaded: Iterable[nn.Parameter] = ()
    ) -> None:
        self.folder, self.values = folder, dict(values)
        self._loaded = {id(parameter) for parameter in loaded}
        self._given: set[str] = set()
        self._ran: set[str] = set()
        self._asked: set[str] = set()

    def give(self, name: str, parameter: nn.Parameter) -> None:
        """Puts a value into a module's parameter, the first time: the module keeps it."""
        if name not in self._given and id(parameter) not in self._loaded:
            value = self._value(name, parameter)
            with torch.no_grad():
                parameter.copy_(value)
            self._given.add(name)

    def add(self, name: str, given: Any, constraint: Any) -> None:
        """Puts a value into the parameter store."""
        with keep_random_state():
            given = given() if callable(given) else given
        transform = transform_to(constraint)
        value = self._value(name, transform.inv(given)).to(given.device)
        store = pyro.get_param_store()
        store._constraints[name] = constraint
        store[name] = transform(value)
        with torch.no_grad():
            store._params[name].copy_(value)  # to the bit

    def _value(self, name: str, like: Tensor) -> Tensor:
        if name not in self.values:
            raise CheckpointError(
                f"the program asks for the parameter '{name}', which the run in {self.folder} does "
                f"not have (it has {', '.join(sorted(self.values))}): pass the programs that it "
                "was trained with"
            )
        value = self.values[name]
        if (value.shape, value.dtype) != (like.shape, like.dtype):
            raise CheckpointError(
                f"the parameter '{name}' is {tensor_type(value)} in {self.folder} and "
                f"{tensor_type(like)} in the program: pass the programs that it was trained with"
            )
        return value

    def check_all_taken(self, role: str) -> None:
        """Refuses, once both programs have run, a run that has parameters for others."""
        self._ran.add(role)
        self._asked |= pyro.get_param_store().keys()
        left = sorted(self.values.keys() - self._asked)
        if len(self._ran) == 2 and left:
            raise CheckpointError(
                f"the run in {self.folder} has the parameter '{left[0]}', which neither program "
                f"asks for ({len(left)} such): pass the programs that it was trained with"
            )


def tensor_type(tensor: Tensor) -> str:
    """Shape and dtype of a tensor, for messages."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


class LoadedProgram:
    """A program whose parameters start where a saved run ended.

    Values are given when the program first asks: only then is known what constrains them.
    """

    def __init__(self, program: Callable[..., Any], role: str, saved: SavedParameters) -> None:
        self.__wrapped__, self.role, self.saved = program, role, saved

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the program."""
        store, saved = pyro.get_param_store(), self.saved
        own = store.setdefault

        def setdefault(name: str, given: Any, constraint: Any = constraints.real) -> Tensor:
            if name not in store.keys():
                if isinstance(given, nn.Parameter):
                    saved.give(name, given)
                else:
                    saved.add(name, given, constraint)
            return own(name, given, constraint)

        # No handler would do: Pyro's autoguides hide from it the model that they look at.
        store.setdefault = setdefault
        try:
            result = self.__wrapped__(*args, **kwargs)
        finally:
            store.setdefault = own
        saved.check_all_taken(self.role)
        return result

    def __getattr__(self, name: str) -> Any:
        if "__wrapped__" not in self.__dict__:  # while copying or unpickling
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes tensors, their sha256 and JSON metadata to one safetensors file, atomically.

    Args:
        path: The file.
        tensors: By name; copies are written, from whatever device.
        metadata: Anything JSON can hold.
    """
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(metadata or {})
    header = {"format": "pt", "sha256": _digest(copies, text), "metadata": text}
    with atomic_path(path) as temporary:
        save_file(copies, temporary, metadata=header)


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `save_tensors` wrote.

    Raises:
        CheckpointError: If the file is missing, is no safetensors file, or its tensors do not
            match their sha256.
    """
    path = Path(path)
    if not path.is_file():
        raise _missing(path)
    try:
        content = path.read_bytes()  # once: another process may replace the file at any moment
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length]).get("__metadata__", {})
        text = header.get("metadata", "{}")
        metadata = json.loads(text)
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); restore it from a copy, or train again"
        ) from error
    if header.get("sha256") != _digest(tensors, text):
        raise CheckpointError(
            f"{path} is damaged: its tensors do not match their sha256; restore it or train again"
        )
    return tensors, metadata


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin so, by the rest of the name."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _digest(tensors: Mapping[str, Tensor], metadata: str) -> str:
    digest = hashlib.sha256(metadata.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: If the file is missing or is not a JSON object.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _missing(path) from None
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({error}); restore it from a copy"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; restore it from a copy")
    return content


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Reads history.jsonl: a row an evaluation.

    Raises:
        CheckpointError: If the file is missing, or a line is no row.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        if not all(isinstance(row, dict) and "epoch" in row for row in rows):
            raise ValueError("a line is not a row of a history")
    except FileNotFoundError:
        raise _missing(path) from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore it from a copy") from error
    return rows


def _missing(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} does not exist; is {path.parent} a run folder?")


def check_same_run(folder: str | Path, saved: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuses to go on with a run of other settings; warns of other last bits.

    Args:
        folder: The run folder.
        saved: The metadata of its training.safetensors.
        config: What `config.json` would say of the run that is to go on.

    Raises:
        CheckpointError: If the run is of another version, or a setting differs; says which.
    """
    theirs, mine = saved.get("config", {}), json.loads(json.dumps(config))
    if theirs.get("format") != mine["format"] or "state" not in saved:
        raise CheckpointError(
            f"{folder}/training.safetensors is not of a run that this version of pyro_vae can go "
            "on with; start a new run in another folder"
        )
    check_same_settings(folder, theirs, mine)
    before, now = theirs["fit"], mine["fit"]
    for key, what in (("num_threads", "threads"), ("float32_precision", "precision")):
        if before.get(key) != now[key]:
            warnings.warn(
                f"resuming with {now[key]} {what} what was begun with {before.get(key)}: the last "
                "bits of the result will differ from an uninterrupted run",
                stacklevel=5,  # the caller of fit
            )


def check_same_settings(
    folder: str | Path, begun: Mapping[str, Any], asked: Mapping[str, Any]
) -> None:
    """Refuses two configurations of one run that differ in the training, the model or the data.

    Raises:
        CheckpointError: If a setting differs; says which.
    """
    theirs, mine = _fixed_settings(begun), _fixed_settings(asked)
    for key in mine:
        if key in theirs and theirs[key] != mine[key]:
            raise CheckpointError(
                f"{folder} was trained with {key} {theirs[key]!r}, not {mine[key]!r}; resume with "
                "the same setting, or start a new run in another folder"
            )


def _fixed_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    model, trained = config.get("model", {}), config.get("fit", {})
    return {
        **model.get("arguments", {}),
        **{f"data {name}": value for name, value in config.get("data", {}).items()},
        **({"model": model["class"]} if "class" in model else {}),
        **{name: trained.get(name) for name in _MUST_AGREE},
    }


def holds_run(folder: str | Path) -> str | None:
    """The first file of a run that `folder` holds, or None: `write_run` would replace it."""
    return next((name for name in _FILES if (Path(folder) / name).exists()), None)


def write_run(
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    training: Mapping[str, Tensor],
    state: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    reached: Mapping[str, Any] | None,
) -> None:
    """Writes a run folder; the state to resume from comes first, what is derived from it after.

    Args:
        folder: Made if need be.
        config: What `config.json` says.
        weights: For `model.safetensors`.
        training: Tensors of the training state.
        state: The rest of the training state, as JSON.
        history: One row an evaluation.
        reached: The row that speaks of `weights`, if there is one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "training.safetensors", training, {"state": state, "config": config})
    save_tensors(folder / "model.safetensors", weights)
    for name, text in _texts(config, weights, history, reached).items():
        write_text(folder / name, text)


def complete_run(
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    history: Sequence[Mapping[str, Any]],
    reached: Mapping[str, Any] | None,
) -> None:
    """Writes what a process that was killed left old or missing beside the training state.

    Args:
        folder: One whose training.safetensors is of a run that has ended.
        config: As for `write_run`, and so are the others.
        weights: For `model.safetensors`.
        history: One row an evaluation.
        reached: The row that speaks of `weights`, if there is one.
    """
    folder = Path(folder)
    if not _holds(folder / "model.safetensors", weights):
        save_tensors(folder / "model.safetensors", weights)
    for name, text in _texts(config, weights, history, reached).items():
        if not (folder / name).is_file() or (folder / name).read_bytes() != text.encode():
            write_text(folder / name, text)


def _holds(path: Path, weights: Mapping[str, Tensor]) -> bool:
    try:
        found, _ = load_tensors(path)
    except CheckpointError:
        return False
    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    return _digest(found, "") == _digest(copies, "")


def _texts(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    history: Sequence[Mapping[str, Any]],
    reached: Mapping[str, Any] | None,
) -> dict[str, str]:
    """The files to be read, by name."""
    return {
        "config.json": json.dumps(config, indent=2) + "\n",
        "history.jsonl": "".join(_strict_json(row) + "\n" for row in history),
        "README.md": model_card(config, weights, reached),
    }


def remove_leftovers(folder: str | Path) -> None:
    """Removes the temporary files of a process that was killed while it wrote a run."""
    for name in _FILES:
        for path in leftovers(Path(folder) / name):
            path.unlink(missing_ok=True)


def _strict_json(row: Mapping[str, Any]) -> str:
    """JSON has no NaN and no infinity: such numbers are left out."""
    infinite = {k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    return json.dumps({k: v for k, v in row.items() if k not in infinite}, allow_nan=False)


def model_card(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], reached: Mapping[str, Any] | None
) -> str:
    """The README.md of a run folder: what the model is, what it reached, how to load it."""
    described = config.get("model") or {}
    name = described.get("class", "Pyro program")
    arguments = ", ".join(f"{k}={v!r}" for k, v in described.get("arguments", {}).items())
    data = config.get("data", {})
    count = sum(tensor.numel() for tensor in weights.values())
    lines = [
        "---",
        "library_name: pyro-vae",
        "tags: [pyro, variational-inference]",
        "---",
        f"# {name} on {data.get('name', 'data of the caller')}",
        "",
        f"`{name}({arguments})`, {count:,} numbers in `model.safetensors`.",
        "",
    ]
    if reached is not None:
        held_out = "validation_bound" in reached
        prefix = "validation_" if held_out else ""
        bound, error = reached[f"{prefix}bound"], reached.get(f"{prefix}bound_se")
        spread = f" +- {error:.2f}" if error is not None else ""
        bounded = is_bound(reached)
        what = "ELBO" if bounded else "negative loss"
        meaning = "a lower bound of log p(x); " if bounded else ""
        lines += [
            f"After epoch {reached['epoch']}: {what} {bound:.2f}{spread} nats per datum on "
            f"{'held-out' if held_out else 'training'} data ({meaning}measure: "
            f"{reached.get('measure', 'unknown')}).",
            "",
        ]
    given = "" if "class" in described else ", model=model, guide=guide"
    lines += [
        "```python",
        "from pyro_vae import load_run",
        f'run = load_run("this folder"{given})  # run.model, run.guide',
        "```",
        "",
    ]
    return "\n".join(lines)
