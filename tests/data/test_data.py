"""Data sets: exact contents, splits, binarisation in distribution, every way a file can fail."""

# mypy: no-check-untyped-defs
# (optional fields are used here without a check for None: a test may fail on one)

import dataclasses
import hashlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch

from pyro_vae.data import (
    DataFile,
    Dataset,
    DatasetError,
    check_dataset,
    dataset_names,
    describe_dataset,
    load_dataset,
)
from pyro_vae.data import catalogue as table
from pyro_vae.data import files as on_disk

FAILURE_RATE = 2e-5  # of each statistical check, over all its pixels
REAL_DATA = os.environ.get("PYRO_VAE_DATA")
needs_data = pytest.mark.skipif(
    not REAL_DATA, reason="reads the real files: set PYRO_VAE_DATA to the folder that holds them"
)
NAMES = (
    "digits",
    "iris",
    "mnist",
    "fashion_mnist",
    "binarized_mnist",
    "omniglot",
    "frey_face",
    "faithful",
)


@pytest.fixture(autouse=True)
def _no_network_and_no_folder(monkeypatch, tmp_path):
    """Nothing may open a socket; only tests that ask for it see the real data."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("a test of pyro_vae.data.datasets opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.delenv("PYRO_VAE_DATA", raising=False)
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def file_of(path, folder):
    content = (folder / path).read_bytes()
    return DataFile(path, len(content), hashlib.sha256(content).hexdigest())


def with_files(monkeypatch, name, *files):
    """Puts other files under the name of a data set."""
    info = dataclasses.replace(describe_dataset(name), files=tuple(files))
    monkeypatch.setitem(table._catalogue(), name, info)


def contents_of(arrays):
    """The documented hash of named arrays, written out again."""
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode() + array.tobytes())
    return digest.hexdigest()


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


RAW = "MNIST/raw/"
TINY_IDX = {
    RAW + "train-images-idx3-ubyte": np.arange(7 * 784).reshape(7, 28, 28) % 256,
    RAW + "train-labels-idx1-ubyte": np.array([5, 0, 4, 1, 9, 2, 1]),
    RAW + "t10k-images-idx3-ubyte": np.arange(3 * 784).reshape(3, 28, 28) * 7 % 256,
    RAW + "t10k-labels-idx1-ubyte": np.array([7, 2, 1]),
}


def write_tiny_mnist(folder):
    for path, array in TINY_IDX.items():
        write_idx(folder / path, array)


@pytest.fixture
def tiny_mnist(tmp_path, monkeypatch):
    """A folder with an MNIST of 7 + 3 images, known to the catalogue."""
    folder = tmp_path / "data"
    write_tiny_mnist(folder)
    with_files(monkeypatch, "mnist", *(file_of(path, folder) for path in TINY_IDX))
    return folder


def tree(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Data sets that come with scikit-learn


def sorted_rows(x):
    x = np.asarray(x)
    return x[np.lexsort(x.T[::-1])]


def test_digits_are_scikit_learns_split_in_two():
    from sklearn.datasets import load_digits

    raw = load_digits()
    digits = load_dataset("digits")
    assert digits.train.shape == (1437, 64)
    assert digits.test.shape == (360, 64)
    assert digits.train.dtype == digits.test.dtype == torch.float32
    assert digits.train_labels.dtype == torch.int64
    assert digits.image_shape == (8, 8)
    assert digits.measure == "grey"
    assert digits.label_names == tuple("0123456789")
    both = torch.cat([digits.train, digits.test])
    assert both.double().sum().item() * 16 == 561718  # sixteenths are exact in float32
    assert torch.cat([digits.train_labels, digits.test_labels]).sum().item() == 8070
    assert both.min() == 0
    assert both.max() == 1
    # All 1797 rows differ, so equal multisets mean that no image is in both parts.
    assert len(np.unique(raw.data, axis=0)) == 1797
    np.testing.assert_array_equal(sorted_rows(both * 16), sorted_rows(raw.data))
    # The classes have 178, 182, 177, 183, 181, 182, 181, 179, 174 and 180 images. In order of class
    # they start at 0, 178, 360, 537, 720, 901, ...; multiples of five go to test: a 0, a 2 and a 4.
    np.testing.assert_array_equal(digits.test[:3] * 16, raw.data[[0, 2, 4]])
    np.testing.assert_array_equal(digits.train[:7] * 16, raw.data[[1, 3, 5, 6, 7, 8, 9]])
    assert digits.test_labels[:3].tolist() == [0, 2, 4]
    assert digits.train_labels[:7].tolist() == [1, 3, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(("name", "num_classes"), [("digits", 10), ("iris", 3)])
def test_labels_stay_with_their_rows_and_classes_are_split_evenly(name, num_classes):
    import sklearn.datasets

    raw = getattr(sklearn.datasets, f"load_{name}")()
    scale = raw.data.max() if name == "digits" else 1.0
    expected = {}
    for row, label in zip(raw.data, raw.target, strict=True):
        expected.setdefault((np.float32(row / scale)).tobytes(), set()).add(int(label))
    dataset = load_dataset(name)
    for x, labels in (
        (dataset.train, dataset.train_labels),
        (dataset.test, dataset.test_labels),
    ):
        for row, label in zip(x.numpy(), labels.tolist(), strict=True):
            assert label in expected[row.tobytes()]
    counts = np.bincount(raw.target, minlength=num_classes)
    test_counts = np.bincount(dataset.test_labels, minlength=num_classes)
    assert np.all(np.abs(test_counts - counts / 5) < 1)


def test_iris_is_scikit_learns_in_centimetres():
    iris = load_dataset("iris")
    assert iris.train.shape == (120, 4)
    assert iris.test.shape == (30, 4)
    assert iris.measure == "real"
    assert iris.image_shape is None
    assert iris.label_names == ("setosa", "versicolor", "virginica")
    sums = torch.cat([iris.train, iris.test]).double().sum(0)
    # Column sums of Fisher's table; float32 rounds each of 150 values by at most 2^-22.
    np.testing.assert_allclose(sums, [876.5, 458.6, 563.7, 179.9], rtol=0, atol=150 * 2**-22)
    assert torch.bincount(iris.test_labels).tolist() == [10, 10, 10]
    np.testing.assert_array_equal(iris.test[0], np.float32([5.1, 3.5, 1.4, 0.2]))


def test_each_load_gives_fresh_tensors():
    first = load_dataset("digits")
    before = first.sha256()
    first.train.fill_(0.5)
    first.test_labels.zero_()
    assert first.sha256() != before
    assert load_dataset("digits").sha256() == before


# The Dataset itself


def tiny(**changes):
    fields = {
        "name": "tiny",
        "train": torch.linspace(0, 1, 30, dtype=torch.float32).reshape(5, 6),
        "test": torch.full((3, 6), 0.25, dtype=torch.float32),
        "validation": torch.full((2, 6), 0.75, dtype=torch.float32),
        "train_labels": torch.arange(5),
        "measure": "grey",
        "image_shape": (2, 3),
    }
    return Dataset(**{**fields, **changes})


def test_sha256_covers_names_dtypes_shapes_and_bytes():
    x = tiny()
    parts = {
        "train": x.train.numpy(),
        "validation": x.validation.numpy(),
        "test": x.test.numpy(),
        "train_labels": x.train_labels.numpy(),
    }
    assert x.sha256() == contents_of(parts)
    changed = x.train.clone()
    changed[4, 5] = torch.nextafter(changed[4, 5], torch.tensor(0.0, dtype=torch.float32))
    others = [
        tiny(train=changed),
        tiny(train_labels=None),
        tiny(train_labels=None, test_labels=torch.arange(3)),
        tiny(validation=None),
        tiny(validation=x.validation.reshape(-1)[:6].reshape(1, 6)),
        tiny(validation=x.test, test=x.validation),
    ]
    assert len({other.sha256() for other in (x, *others)}) == 7


def test_printing_names_sizes_and_measure_but_no_tensor():
    text = repr(tiny())
    assert text == str(tiny())
    assert text == (
        "Dataset('tiny': train 5, validation 2, test 3; 6 features (2 x 3 pixels); measure grey)"
    )
    drawn = repr(tiny().binarize("static", seeded()))
    assert drawn.endswith("measure binary (static binarization))")
    assert "tensor" not in repr(load_dataset("iris"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measure": "colour"}, "measure must be one of"),
        ({"train": torch.zeros(5, 6, dtype=torch.float64)}, "train .* must be float32"),
        ({"test": torch.zeros(3, 7, dtype=torch.float32)}, r"test .* shape \[3, 7\]"),
        ({"train": torch.zeros(5, 2, 3, dtype=torch.float32)}, r"train .* shape \[5, 2, 3\]"),
        ({"train_labels": torch.arange(4)}, r"train_labels .* shape \[5\]"),
        ({"test_labels": torch.zeros(3)}, "test_labels .* must be int64"),
        ({"image_shape": (3, 3)}, "does not have the 6 pixels"),
    ],
)
def test_inconsistent_fields_are_refused(changes, message):
    dataset = tiny()
    for field, value in changes.items():
        object.__setattr__(dataset, field, value)  # past beartype, which tests run with
    with pytest.raises(ValueError, match=message):
        dataset.__post_init__()
    with pytest.raises((ValueError, TypeError)):  # beartype's error is a TypeError
        tiny(**changes)


# Binarisation

LEVELS = torch.tensor([0.0, 0.05, 0.3, 0.5, 0.8, 1.0], dtype=torch.float32)


def means_agree(draws, levels):
    """Whether the mean of each column is its Bernoulli probability, at `FAILURE_RATE` in all."""
    levels = levels.double()
    z = NormalDist().inv_cdf(1 - FAILURE_RATE / (2 * len(levels)))
    standard_error = (levels * (1 - levels) / len(draws)).sqrt()
    return bool(((draws.double().mean(0) - levels).abs() <= z * standard_error).all())


def test_dynamic_pixels_have_the_grey_levels_as_means():
    grey = tiny(train=LEVELS.repeat(5, 1))
    dynamic = grey.binarize("dynamic", seeded(1))
    assert dynamic.measure == "binary"
    assert dynamic.binarization == "dynamic"
    assert dynamic.train is grey.train
    assert set(dynamic.test.unique().tolist()) <= {0.0, 1.0}
    assert set(dynamic.validation.unique().tolist()) <= {0.0, 1.0}
    generator = seeded(2)
    minibatch = LEVELS.repeat(20_000, 1)
    draws = dynamic.transform(minibatch, generator)
    assert draws.dtype == torch.float32
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert means_agree(draws, LEVELS)
    assert not means_agree(draws, (LEVELS + 0.03).clamp(max=1))  # the check can fail
    assert not means_agree((minibatch > 0.5).float(), LEVELS)
    again = dynamic.transform(minibatch, generator)
    assert not torch.equal(draws, again)
    assert torch.equal(draws, dynamic.transform(minibatch, seeded(2)))


def test_static_pixels_are_drawn_once_and_reproducibly():
    grey = tiny(train=LEVELS.repeat(20_000, 1), train_labels=None)
    state = torch.random.get_rng_state()
    static = grey.binarize("static", seeded(3))
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is left alone
    assert static.measure == "binary"
    assert static.transform is None
    assert means_agree(static.train, LEVELS)
    assert static.sha256() == grey.binarize("static", seeded(3)).sha256()
    assert static.sha256() != grey.binarize("static", seeded(4)).sha256()
    dynamic = grey.binarize("dynamic", seeded(3))
    assert torch.equal(static.test, dynamic.test)  # one seed, one test set
    assert torch.equal(static.validation, dynamic.validation)


def test_threshold_is_strict_and_needs_no_randomness():
    hard = tiny(train=LEVELS.repeat(5, 1)).binarize("threshold")
    assert hard.train[0].tolist() == [0, 0, 0, 0, 1, 1]
    assert hard.train.dtype == torch.float32
    assert hard.test.sum() == 0
    assert hard.validation.sum() == 12
    assert hard.transform is None
    assert hard.binarization == "threshold"


def test_no_method_returns_the_data_set_itself():
    grey = tiny()
    assert grey.binarize(None) is grey


@pytest.mark.parametrize(
    ("dataset", "method", "generator", "message"),
    [
        (tiny(), "dynamic", None, r"torch\.Generator\(\)\.manual_seed\(0\)"),
        (tiny(), "static", None, r"torch\.Generator\(\)\.manual_seed\(0\)"),
        (tiny(), "threshold", seeded(), "leave out the generator"),
        (tiny(), None, seeded(), "leave out the generator"),
        (tiny(), "sometimes", None, "must be one of"),
        (tiny(measure="real"), "threshold", None, "only grey levels"),
        (tiny(measure="counts"), "static", seeded(), "only grey levels"),
        (tiny().binarize("threshold"), "threshold", None, "already binary"),
        (tiny(train=LEVELS.repeat(5, 1) * 255), "threshold", None, r"outside \[0, 1\]"),
        (
            tiny(validation=torch.full((2, 6), -0.1, dtype=torch.float32)),
            "static",
            seeded(),
            "validation .*outside",
        ),
        (
            tiny(test=torch.full((3, 6), torch.nan, dtype=torch.float32)),
            "threshold",
            None,
            "test .*outside",
        ),
    ],
)
def test_what_cannot_be_binarised_is_refused(dataset, method, generator, message):
    with pytest.raises(ValueError, match=message):
        dataset.binarize(method, generator)


def test_loading_binarises_and_refuses_before_reading(tiny_mnist):
    loaded = load_dataset("mnist", tiny_mnist, binarize="static", generator=seeded())
    assert loaded.measure == "binary"
    with pytest.raises(ValueError, match="'iris' is of measure 'real'"):
        load_dataset("iris", binarize="dynamic", generator=seeded())
    with pytest.raises(ValueError, match="manual_seed"):
        load_dataset("mnist", tiny_mnist / "nowhere", binarize="dynamic")
    with pytest.raises(ValueError, match="already binary"):
        load_dataset("binarized_mnist", tiny_mnist / "nowhere", binarize="threshold")


# The catalogue


def test_the_catalogue_describes_every_data_set():
    assert dataset_names() == NAMES
    for name in NAMES:
        info = describe_dataset(name)
        assert info.name == name
        assert info.title
        assert info.citation
        assert info.license
        assert info.obtain
        assert len({file.path for file in info.files}) == len(info.files)
        for file in info.files:
            assert file.bytes > 0
            assert len(bytes.fromhex(file.sha256)) == 32
    assert describe_dataset("frey_face").shape == (28, 20)
    assert describe_dataset("binarized_mnist").sizes == (50000, 10000, 10000)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("MNIST", "'mnist'"), ("fashion-mnist", "'fashion_mnist'"), ("irs", "'iris'")],
)
def test_an_unknown_name_gets_the_nearest_one(wrong, right):
    for function in (load_dataset, describe_dataset, check_dataset):
        with pytest.raises(ValueError, match=f"Did you mean {right}"):
            function(wrong)


def test_a_name_near_to_nothing_gets_the_list_alone():
    with pytest.raises(ValueError, match="there are digits, iris, mnist") as caught:
        load_dataset("wxyz")
    assert "Did you mean" not in str(caught.value)


def test_importing_the_module_imports_no_heavy_reader():
    code = (
        "import sys, pyro_vae.data.datasets\n"
        "print([m for m in ('sklearn', 'torchvision', 'scipy', 'pooch') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# Readers


def test_idx_files_become_grey_rows(tiny_mnist):
    mnist = load_dataset("mnist", tiny_mnist)
    expected = TINY_IDX[RAW + "train-images-idx3-ubyte"].reshape(7, 784) / 255
    np.testing.assert_array_equal(mnist.train, expected.astype(np.float32))
    assert mnist.test.shape == (3, 784)
    assert mnist.train_labels.tolist() == [5, 0, 4, 1, 9, 2, 1]
    assert mnist.test_labels.tolist() == [7, 2, 1]
    assert mnist.measure == "grey"
    assert mnist.image_shape == (28, 28)


def test_a_stray_processed_folder_is_not_read(tiny_mnist):
    # torchvision's own class would prefer these two files, which no sha256 covers.
    processed = tiny_mnist / "MNIST" / "processed"
    processed.mkdir()
    for part in ("training.pt", "test.pt"):
        torch.save((torch.zeros(2, 28, 28, dtype=torch.uint8), torch.zeros(2)), processed / part)
    assert load_dataset("mnist", tiny_mnist).train.shape == (7, 784)


def test_omniglot_is_split_by_alphabet(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28)).astype(np.uint8)
    np.savez(
        tmp_path / "omniglot_28x28.npz",
        images=images,
        alphabet=np.array([2, 0, 1, 0, 2], np.uint8),
        alphabet_names=np.array(["Alpha", "Beta", "Gamma"]),
        background=np.array([True, False, True, False, True]),
    )
    with_files(monkeypatch, "omniglot", file_of("omniglot_28x28.npz", tmp_path))
    omniglot = load_dataset("omniglot", tmp_path)
    rows = (images.reshape(5, 784) / 255).astype(np.float32)
    np.testing.assert_array_equal(omniglot.train, rows[[0, 2, 4]])
    np.testing.assert_array_equal(omniglot.test, rows[[1, 3]])
    assert omniglot.train_labels.tolist() == [2, 1, 2]
    assert omniglot.test_labels.tolist() == [0, 0]
    assert omniglot.label_names == ("Alpha", "Beta", "Gamma")


def fake_frames():
    frames = np.random.default_rng(1).integers(8, 239, (1965, 560)).astype(np.uint8)
    return frames, np.ascontiguousarray(frames.T)


def test_frey_face_is_three_consecutive_blocks(tmp_path, monkeypatch):
    from scipy.io import savemat

    frames, ff = fake_frames()
    savemat(tmp_path / "frey_rawface.mat", {"ff": ff, "other": np.zeros(3)})
    # Bytes that nobody registered are accepted since the array in them is the registered one.
    size = (tmp_path / "frey_rawface.mat").stat().st_size
    file = DataFile("frey_rawface.mat", size - 1, "0" * 64, contents_of({"ff": ff}))
    with_files(monkeypatch, "frey_face", file)
    frey = load_dataset("frey_face", tmp_path)
    rows = (frames / 255).astype(np.float32)
    np.testing.assert_array_equal(frey.train, rows[:1565])
    np.testing.assert_array_equal(frey.validation, rows[1565:1765])
    np.testing.assert_array_equal(frey.test, rows[1765:])
    assert frey.image_shape == (28, 20)
    assert frey.train_labels is None
    savemat(tmp_path / "frey_rawface.mat", {"ff": 255 - ff})
    with pytest.raises(DatasetError, match=r"frey_rawface\.mat .* is damaged"):
        load_dataset("frey_face", tmp_path)


def test_faithful_is_one_whole(tmp_path, monkeypatch):
    (tmp_path / "faithful.csv").write_text("eruptions,waiting\n3.6,79\n1.8,54\n3.333,74\n")
    with_files(monkeypatch, "faithful", file_of("faithful.csv", tmp_path))
    faithful = load_dataset("faithful", tmp_path)
    np.testing.assert_array_equal(faithful.train, np.float32([[3.6, 79], [1.8, 54], [3.333, 74]]))
    assert faithful.test.shape == (0, 2)
    assert faithful.test.dtype == torch.float32
    assert faithful.measure == "real"
    assert len(faithful.sha256()) == 64


# Files that are missing or damaged


def test_missing_files_name_the_folder_and_who_chose_it(tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DatasetError, match=r"train-images.*empty \(given as root\).*download=True"):
        load_dataset("mnist", empty)
    monkeypatch.setenv("PYRO_VAE_DATA", str(empty))
    with pytest.raises(DatasetError, match=r"faithful\.csv.*empty \(given by \$PYRO_VAE_DATA\)"):
        load_dataset("faithful")
    monkeypatch.setenv("PYRO_VAE_DATA", "")
    with pytest.raises(DatasetError, match=r"omniglot.*the user's cache folder.*no public address"):
        load_dataset("omniglot")
    assert [status for _, status in check_dataset("mnist")] == ["missing"] * 4
    assert tree(tmp_path) == {}
    assert not (tmp_path / "cache").exists()


def test_a_root_that_is_no_folder_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    for root in (file, tmp_path / "nowhere"):
        for function in (load_dataset, check_dataset):
            with pytest.raises(DatasetError, match="given as root, is not a folder"):
                function("mnist", root)
    with pytest.raises(DatasetError, match="is not a folder"):
        load_dataset("mnist", file, download=True)
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DatasetError, match=r"given by \$PYRO_VAE_DATA, is not a folder"):
        load_dataset("faithful")
    assert load_dataset("iris", tmp_path / "nowhere").train.shape == (120, 4)  # needs no folder


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])
    return "wrong size"


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return "wrong sha256"


def empty_out(path):
    path.write_bytes(b"")
    return "wrong size"


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty_out])
@pytest.mark.parametrize("path", TINY_IDX)
def test_damaged_files_are_named_and_left_as_they_are(tiny_mnist, path, damage):
    status = damage(tiny_mnist / path)
    before = tree(tiny_mnist)
    with pytest.raises(DatasetError, match=rf"{path} .* is damaged \({status}.*delete it"):
        load_dataset("mnist", tiny_mnist)
    with pytest.raises(DatasetError, match="is damaged"):  # download replaces nothing that is there
        load_dataset("mnist", tiny_mnist, download=True)
    assert dict(check_dataset("mnist", tiny_mnist)) == {
        other: status if other == path else "ok" for other in TINY_IDX
    }
    assert tree(tiny_mnist) == before


def test_a_file_that_cannot_be_opened_is_named(tiny_mnist, monkeypatch):
    def refuse(self, *_args, **_kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DatasetError, match=r"cannot be opened .* change its permissions"):
        load_dataset("mnist", tiny_mnist)
    assert check_dataset("mnist", tiny_mnist)[0][1] == "unreadable"


def test_a_reader_that_fails_does_not_leak(tiny_mnist, monkeypatch):
    # A registered file of the wrong kind: torchvision fails an assertion on it.
    (tiny_mnist / RAW / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x08\x09" + bytes(60))
    with_files(monkeypatch, "mnist", *(file_of(path, tiny_mnist) for path in TINY_IDX))
    with pytest.raises(DatasetError, match="could not be read"):
        load_dataset("mnist", tiny_mnist)


class Payload:
    """Runs a command of the attacker's when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("name", ["omniglot", "binarized_mnist"])
def test_a_pickle_in_an_archive_is_never_run(tmp_path, name):
    path = describe_dataset(name).files[0].path
    payload = np.array([Payload(tmp_path / "owned")], dtype=object)
    np.savez(tmp_path / path, images=payload, train=payload)
    with np.load(tmp_path / path, allow_pickle=True) as archive:
        archive["train"]
    (tmp_path / "owned").rmdir()  # so it does run where pickles are allowed
    with pytest.raises(DatasetError, match="is damaged"):
        load_dataset(name, tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"MATLAB 5.0 MAT-file".ljust(124, b" ") + b"\x00\x01IM" + b"\xff" * 64,
        b"MATLAB 7.3 MAT-file".ljust(124, b" ") + b"\x00\x02IM" + bytes(600),
        bytes(range(256)) * 4,
    ],
)
def test_crafted_mat_files_give_our_error(tmp_path, content):
    (tmp_path / "frey_rawface.mat").write_bytes(content)
    with pytest.raises(DatasetError, match="is damaged"):
        load_dataset("frey_face", tmp_path)


@pytest.mark.parametrize("kind", ["array", "text", "cut"])
def test_crafted_archives_give_our_error(tmp_path, kind):
    path = tmp_path / "omniglot_28x28.npz"
    if kind == "array":
        with path.open("wb") as stream:
            np.save(stream, np.zeros(3))  # a lone array under an archive's name
    elif kind == "text":
        path.write_text("not an archive")
    else:
        np.savez(path, images=np.zeros((2, 28, 28), np.uint8))
        truncate(path)
    with pytest.raises(DatasetError, match="is damaged"):
        load_dataset("omniglot", tmp_path)


# Downloads


def fake_torchvision(monkeypatch, write, name="MNIST"):
    calls = []

    def downloader(root, download):
        assert download is True
        calls.append(Path(root))
        write(Path(root))

    monkeypatch.setattr(f"torchvision.datasets.{name}", downloader)
    return calls


def test_download_fetches_only_what_is_missing(tiny_mnist, monkeypatch):
    calls = fake_torchvision(monkeypatch, write_tiny_mnist)
    expected = tree(tiny_mnist)
    load_dataset("mnist", tiny_mnist, download=True)
    assert calls == []
    (tiny_mnist / RAW / "t10k-labels-idx1-ubyte").unlink()
    kept = (tiny_mnist / RAW / "train-images-idx3-ubyte").stat().st_ino
    assert load_dataset("mnist", tiny_mnist, download=True).test.shape == (3, 784)
    assert len(calls) == 1
    assert (
        calls[0].parent == tiny_mnist
    )  # a temporary folder on the same disk, so renames are atomic
    assert (tiny_mnist / RAW / "train-images-idx3-ubyte").stat().st_ino == kept
    assert tree(tiny_mnist) == expected
    assert sorted(p.name for p in tiny_mnist.iterdir()) == ["MNIST"]


def test_download_makes_its_folder(tiny_mnist, monkeypatch, tmp_path):
    fake_torchvision(monkeypatch, write_tiny_mnist)
    for root in (tmp_path / "new" / "folder", None):
        assert load_dataset("mnist", root, download=True).train.shape == (7, 784)
    assert (tmp_path / "cache" / "pyro_vae" / RAW).is_dir()


def test_a_bad_download_is_not_kept(tiny_mnist, monkeypatch, tmp_path):
    def write_damaged(folder):
        write_tiny_mnist(folder)
        flip_a_bit(folder / RAW / "train-images-idx3-ubyte")

    fake_torchvision(monkeypatch, write_damaged)
    with pytest.raises(DatasetError, match=r"wrong sha256.*was not kept"):
        load_dataset("mnist", tmp_path / "new", download=True)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError("Error downloading"), OSError("disk full")])
def test_what_a_downloader_raises_does_not_leak(monkeypatch, tmp_path, error):
    def fail(_folder):
        raise error

    fake_torchvision(monkeypatch, fail, "FashionMNIST")
    with pytest.raises(DatasetError, match=rf"'fashion_mnist' could not be downloaded.*{error}"):
        load_dataset("fashion_mnist", tmp_path, download=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "origin"), [("omniglot", "brendenlake/omniglot"), ("frey_face", "roweis")]
)
def test_files_without_an_address_are_refused_with_their_origin(tmp_path, name, origin):
    with pytest.raises(DatasetError, match=f"cannot be downloaded.*no public address.*{origin}"):
        load_dataset(name, tmp_path / "new", download=True)
    assert not (tmp_path / "new").exists()


def fake_pooch(monkeypatch, contents):
    """`pooch.retrieve` from a dictionary by the address's last part; checks the hash if given."""

    def retrieve(url, known_hash, fname, path):
        content = contents[url.rpartition("/")[2]]
        if known_hash is not None and known_hash != "sha256:" + hashlib.sha256(content).hexdigest():
            raise ValueError(f"hash of {url} does not match")
        (Path(path) / fname).write_bytes(content)
        return str(Path(path) / fname)

    monkeypatch.setattr("pooch.retrieve", retrieve)


def as_amat(pixels):
    return b"".join(b" ".join(b"%d" % pixel for pixel in row) + b"\n" for row in pixels)


def test_larochelles_text_becomes_packed_bits(tmp_path, monkeypatch):
    rng = np.random.default_rng(2)
    pixels = {p: rng.integers(0, 2, (n, 784)) for p, n in (("test", 2), ("train", 5), ("valid", 3))}
    texts = {f"binarized_mnist_{part}.amat": as_amat(x) for part, x in pixels.items()}
    fake_pooch(monkeypatch, texts)
    with pytest.raises(DatasetError, match=r"could not be downloaded.*hash"):
        load_dataset("binarized_mnist", tmp_path, download=True)  # not the published texts
    for part in pixels:
        digest = hashlib.sha256(texts[f"binarized_mnist_{part}.amat"]).hexdigest()
        monkeypatch.setitem(on_disk._AMAT_SHA256, part, f"sha256:{digest}")
    packed = {part: np.packbits(x.astype(np.uint8), axis=1) for part, x in pixels.items()}
    file = DataFile("binarized_mnist.npz", 2000, "0" * 64, contents_of(packed))
    with_files(monkeypatch, "binarized_mnist", file)
    loaded = load_dataset("binarized_mnist", tmp_path, download=True)
    np.testing.assert_array_equal(loaded.train, pixels["train"])
    np.testing.assert_array_equal(loaded.validation, pixels["valid"])
    np.testing.assert_array_equal(loaded.test, pixels["test"])
    assert loaded.measure == "binary"
    assert loaded.binarization == "static"
    assert [p.name for p in tmp_path.iterdir()] == ["binarized_mnist.npz"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_rs_table_loses_its_row_numbers(tmp_path, monkeypatch, newline):
    table = "eruptions,waiting\n3.6,79\n1.8,54\n"
    file = DataFile("faithful.csv", len(table), hashlib.sha256(table.encode()).hexdigest())
    with_files(monkeypatch, "faithful", file)
    numbered = newline.join(["rownames,eruptions,waiting", "1,3.6,79", "2,1.8,54", ""])
    fake_pooch(monkeypatch, {"faithful.csv": numbered.encode()})
    assert load_dataset("faithful", tmp_path, download=True).train.shape == (2, 2)
    assert (tmp_path / "faithful.csv").read_bytes() == table.encode()
    (tmp_path / "faithful.csv").unlink()
    fake_pooch(monkeypatch, {"faithful.csv": numbered.replace("79", "78").encode()})
    with pytest.raises(DatasetError, match="was not kept"):
        load_dataset("faithful", tmp_path, download=True)
    assert list(tmp_path.iterdir()) == []


# The real files

REAL_FACTS = {  # means to the digits that they are published with
    "mnist": {
        "mean": 0.1307,  # the constants of torchvision's and PyTorch's examples
        "labels": [5, 0, 4, 1, 9],
        "test_counts": [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
    },
    "fashion_mnist": {"mean": 0.2860, "labels": [9, 0, 0, 3, 0], "test_counts": [1000] * 10},
    "faithful": {"mean": (3.487783 + 70.897059) / 2},  # the two means that R prints
}


@needs_data
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("digits", "iris")])
def test_real_data_sets_have_the_published_sizes(name):
    dataset = load_dataset(name, REAL_DATA)
    train, validation, test = describe_dataset(name).sizes
    assert len(dataset.train) == train
    assert len(dataset.test) == test
    assert (0 if dataset.validation is None else len(dataset.validation)) == validation
    assert dataset.measure == describe_dataset(name).measure
    assert all(status == "ok" for _, status in check_dataset(name, REAL_DATA))
    facts = REAL_FACTS.get(name, {})
    if "mean" in facts:
        assert dataset.train.double().mean().item() == pytest.approx(facts["mean"], abs=5e-5)
    if "labels" in facts:
        assert dataset.train_labels[: len(facts["labels"])].tolist() == facts["labels"]
        assert torch.bincount(dataset.test_labels).tolist() == facts["test_counts"]


@needs_data
def test_real_omniglot_alphabets_do_not_overlap():
    omniglot = load_dataset("omniglot", REAL_DATA)
    train, test = set(omniglot.train_labels.tolist()), set(omniglot.test_labels.tolist())
    assert len(train) == 30
    assert len(test) == 20
    assert not train & test
    assert omniglot.label_names[0] == "Alphabet_of_the_Magi"


@needs_data
def test_real_pixels_are_in_their_range():
    assert load_dataset("binarized_mnist", REAL_DATA).train.unique().tolist() == [0, 1]
    frey = load_dataset("frey_face", REAL_DATA)
    frames = torch.cat([frey.train, frey.validation, frey.test]) * 255
    assert frames.min().item() == pytest.approx(8)
    assert frames.max().item() == pytest.approx(238)


@needs_data
@pytest.mark.parametrize("name", ["frey_face", "faithful", "binarized_mnist"])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_damaged_copies_of_real_files_are_refused(tmp_path, name, damage):
    path = describe_dataset(name).files[0].path
    shutil.copyfile(Path(REAL_DATA, path), tmp_path / path)
    assert check_dataset(name, tmp_path) == [(path, "ok")]
    status = damage(tmp_path / path)
    assert check_dataset(name, tmp_path) == [(path, status)]
    with pytest.raises(DatasetError, match="is damaged"):
        load_dataset(name, tmp_path)


@needs_data
def test_another_packing_of_the_real_bits_is_accepted(tmp_path):
    with np.load(Path(REAL_DATA, "binarized_mnist.npz")) as archive:
        np.savez(tmp_path / "binarized_mnist.npz", **archive)
    assert check_dataset("binarized_mnist", tmp_path) == [("binarized_mnist.npz", "ok")]


@needs_data
def test_rs_real_table_becomes_the_real_file(tmp_path, monkeypatch):
    real = Path(REAL_DATA, "faithful.csv").read_bytes()
    rows = real.decode().splitlines()
    numbered = [f"rownames,{rows[0]}", *(f"{n},{row}" for n, row in enumerate(rows[1:], 1)), ""]
    fake_pooch(monkeypatch, {"faithful.csv": "\n".join(numbered).encode()})
    load_dataset("faithful", tmp_path, download=True)
    assert (tmp_path / "faithful.csv").read_bytes() == real


def test_photographs_are_told_from_ink() -> None:
    light = {name for name in dataset_names() if describe_dataset(name).pixels == "light"}
    assert light == {"frey_face"}
    assert load_dataset("digits").pixels == "ink"
