"""What lies in a run folder can be read back to the bit, or is refused."""

import ast
import json
from pathlib import Path

import pytest
import torch

import pyro_vae
from pyro_vae.inference.svi import CheckpointError, holds_run, load_tensors, read_json, save_tensors
from pyro_vae.inference.svi.checkpoint import model_card, write_run

TENSORS = {
    "matrix": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "turned": torch.arange(6, dtype=torch.float64).reshape(2, 3).T,
    "number": torch.tensor(1.5, dtype=torch.bfloat16),
    "none": torch.zeros(0, 3, dtype=torch.float64),
    "flags": torch.tensor([True, False]),
    "$$$ ü": torch.tensor([2**62]),
    "special": torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.float64),
}
METADATA = {"a": [1, 2.5, None, "é"], "nested": {10: 1, 9: 2}, "tuple": (1, 2)}


def test_tensors_come_back_to_the_bit(tmp_path):
    path = tmp_path / "t.safetensors"
    save_tensors(path, TENSORS, METADATA)
    back, metadata = load_tensors(path)
    assert metadata == json.loads(json.dumps(METADATA))
    assert back.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (back[name], tensor)]
        assert torch.equal(*bits)


def test_tensors_that_share_memory_are_written(tmp_path):
    tied = torch.ones(3)
    save_tensors(tmp_path / "t.safetensors", {"a": tied, "b": tied})
    assert load_tensors(tmp_path / "t.safetensors")[0].keys() == {"a", "b"}


def test_a_file_replaced_while_it_is_read_is_one_or_the_other(tmp_path, monkeypatch):
    """A reader that opened the file twice would mix the two, and call it damaged."""
    path, real = tmp_path / "t.safetensors", Path.read_bytes
    save_tensors(path, {"a": torch.zeros(3)}, {"epoch": 1})

    def replaced_at_once(self):
        content = real(self)
        save_tensors(path, {"a": torch.ones(3)}, {"epoch": 2})
        return content

    monkeypatch.setattr(Path, "read_bytes", replaced_at_once)
    tensors, metadata = load_tensors(path)
    assert (tensors["a"].sum(), metadata["epoch"]) == (0, 1)
    monkeypatch.undo()
    assert load_tensors(path)[1]["epoch"] == 2


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.arange(4.0), "b": torch.ones(2)}, {"epoch": 3})
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            tensors, metadata = load_tensors(path)
        except CheckpointError:
            continue
        # What is left are bits that say nothing, as in the name of the header's "format".
        assert metadata == {"epoch": 3}
        assert torch.equal(tensors["a"], torch.arange(4.0))
        assert torch.equal(tensors["b"], torch.ones(2))
    path.write_bytes(whole)
    load_tensors(path)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "t.safetensors"
    save_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged"):
        load_tensors(path)


def test_missing_files_are_named(tmp_path):
    for read in (load_tensors, read_json):
        with pytest.raises(CheckpointError, match=r"x does not exist; is .* a run folder\?"):
            read(tmp_path / "x")


@pytest.mark.parametrize("text", ["", "{", "[1]", '"a"', "\udc80"])
def test_json_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "c.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match="restore it from a copy"):
        read_json(tmp_path / "c.json")


ROWS = [
    {"epoch": 1, "bound": float("nan"), "loss": float("inf"), "kl": 2.0},
    {"epoch": 2, "bound": -3.25, "bound_se": 0.5, "kl": 1.0, "measure": "binary"},
]


def refuse(token):
    raise AssertionError(f"{token} is no JSON")


def write(folder, **changes):
    given = {
        "config": {"format": 1, "model": {"class": "VAE", "arguments": {"data_dim": 4}}},
        "weights": {"w": torch.ones(2, 3)},
        "training": {"parameter.w": torch.ones(2, 3)},
        "state": {"epoch": 2},
        "history": ROWS,
        "reached": ROWS[1],
    }
    write_run(folder, **given | changes)


def test_a_run_folder_holds_what_it_should(tmp_path):
    folder = tmp_path / "new" / "run"
    assert holds_run(folder) is None
    write(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "history.jsonl",
        "model.safetensors",
        "training.safetensors",
    ]
    assert holds_run(folder) == "training.safetensors"
    lines = (folder / "history.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert rows == [{"epoch": 1, "kl": 2.0}, ROWS[1]]
    assert load_tensors(folder / "training.safetensors")[1]["state"] == {"epoch": 2}
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: pyro-vae\n")
    assert "6 numbers" in card
    assert "epoch 2: ELBO -3.25 +- 0.50 nats per datum on training data" in card


def test_the_state_to_go_on_from_is_written_first(tmp_path, monkeypatch):
    """A crash before any later file leaves a state that is whole and new."""
    from pyro_vae.results import files

    write(tmp_path)
    written = []
    real = files.os.replace

    def spy(source, target):
        written.append(Path(target).name)
        real(source, target)

    monkeypatch.setattr(files.os, "replace", spy)
    write(tmp_path)
    assert written[0] == "training.safetensors"
    assert len(written) == 5
    for survivors in range(5):

        def crash(source, target, left=[survivors]):  # noqa: B006 - counts down
            if left[0] == 0:
                raise OSError("crash")
            left[0] -= 1
            real(source, target)

        monkeypatch.setattr(files.os, "replace", crash)
        with pytest.raises(OSError, match="crash"):
            write(tmp_path, state={"epoch": 10 + survivors})
        state = load_tensors(tmp_path / "training.safetensors")[1]["state"]
        assert state["epoch"] == (2 if survivors == 0 else 10 + survivors)
        load_tensors(tmp_path / "model.safetensors")
        read_json(tmp_path / "config.json")


def test_the_card_calls_a_bound_a_bound_and_nothing_else():
    config = {"model": {"program": "model"}}
    row = {"epoch": 4, "bound": -2.0, "validation_bound": -3.0, "measure": "real"}
    card = model_card(config, {}, row)
    assert "negative loss -3.00 nats per datum on held-out data (measure: real)" in card
    assert "lower bound" not in card
    assert "lower bound of log p(x)" in model_card(config, {}, row | {"kl": 1.0})
    assert "After epoch" not in model_card(config, {}, None)
    assert 'load_run("this folder", model=model, guide=guide)' in card


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield f"allow_pickle={getattr(node.value, 'value', node.value)}"


FORBIDDEN = {"pickle", "dill", "joblib", "shelve", "torch.load", "torch.save"}
FORBIDDEN |= {"cloudpickle", "marshal", "allow_pickle=True"}


def test_nothing_is_ever_unpickled():
    package = Path(pyro_vae.__file__).parent
    for path in package.rglob("*.py"):
        found = FORBIDDEN.intersection(imported(ast.parse(path.read_text(encoding="utf-8"))))
        assert not found, f"{path.name} uses {found}"


@pytest.mark.parametrize(
    "source", ["import pickle", "from pickle import loads", "torch.load(f)", "f(allow_pickle=True)"]
)
def test_the_search_for_pickles_finds_them(source):
    assert FORBIDDEN.intersection(imported(ast.parse(source)))
