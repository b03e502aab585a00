"""pyproject.toml, requirements.lock, environment.yml and the papers of the package agree."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Set
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import pyro_vae

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = SETTINGS["project"]
DECLARED = PROJECT["dependencies"] + SETTINGS["dependency-groups"]["dev"]
# What the lock is held to beside them.
HELD = SETTINGS["tool"]["uv"]["constraint-dependencies"]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
ENVIRONMENT = (ROOT / "environment.yml").read_text(encoding="utf-8")
PYTHONS = ("3.11", "3.12", "3.13")


def locked(lock: str, python: str, platform: str = "linux") -> dict[str, Version]:
    """The versions that a lock file installs under one Python, by normalised name."""
    environment: dict[str, str | Set[str]] = {
        **{name: str(value) for name, value in default_environment().items()},
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": platform,
    }
    lines = [line for line in lock.splitlines() if re.match(r"\w", line)]
    pins = [Requirement(line) for line in lines]
    return {
        canonicalize_name(pin.name): Version(str(pin.specifier).removeprefix("=="))
        for pin in pins
        if pin.marker is None or pin.marker.evaluate(environment)
    }


def lock_faults(lock: str, declared: list[str], python: str) -> list[str]:
    """Why a lock file does not install what is declared, one phrase a fault."""
    versions = locked(lock, python)
    faults = []
    for requirement in map(Requirement, declared):
        version = versions.get(canonicalize_name(requirement.name))
        if version is None:
            faults.append(f"{requirement.name} is missing")
        elif version not in requirement.specifier:
            faults.append(f"{requirement.name} {version} is outside {requirement.specifier}")
    if "://" in lock:
        faults.append("it names an address")
    faults += [
        f"{name} {version} is a local build" for name, version in versions.items() if version.local
    ]
    return faults


def environment_faults(environment: str, declared: list[str], python: str) -> list[str]:
    """Why a conda environment is not what is declared, one phrase a fault."""
    entries = yaml.safe_load(environment)["dependencies"]
    (pip,) = [entry["pip"] for entry in entries if isinstance(entry, dict)]
    faults = [f"{name} is missing" for name in declared if name not in pip]
    faults += [f"{name} is not declared" for name in pip if name not in [*declared, "-e ."]]
    if f"python{python}" not in entries:
        faults.append(f"its Python is not {python}")
    return faults


def pair_faults(lock: str, vision_requires: list[str], python: str) -> list[str]:
    """Why the locked torch is not one that the locked torchvision says it works with."""
    torch = locked(lock, python)["torch"]
    asked = [r for r in map(Requirement, vision_requires) if r.name == "torch"]
    if not asked:
        return ["torchvision says nothing about torch"]
    return [f"torchvision wants {r}, not {torch}" for r in asked if torch not in r.specifier]


def admits(declared: list[str], name: str, version: str) -> bool:
    (requirement,) = [r for r in map(Requirement, declared) if r.name == name]
    return Version(version) in requirement.specifier


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_installs_what_is_declared(python: str) -> None:
    assert lock_faults(LOCK, [*DECLARED, *HELD], python) == [], "run `make lock`"


@pytest.mark.parametrize(
    ("lock", "says"),
    [
        ("tqdm==4.70.1", "numpy is missing"),
        ("numpy==2.4.6\ntqdm==4.60", "tqdm 4.60 is outside >=4.66"),
        ("numpy==2.4.6 ; python_full_version >= '3.12'\ntqdm==4.70.1", "numpy is missing"),
        ("numpy==2.4.6+local\ntqdm==4.70.1", "numpy 2.4.6+local is a local build"),
        ("--index-url https://example.org\nnumpy==2.4.6\ntqdm==4.70.1", "it names an address"),
    ],
)
def test_a_wrong_lock_is_refused(lock: str, says: str) -> None:
    assert lock_faults(lock, ["numpy>=2", "tqdm>=4.66"], "3.11") == [says]


def test_a_right_lock_passes() -> None:
    lock = (
        "# by make lock\nnumpy==2.4.6 ; python_full_version < '3.12'\n    # via x\ntqdm==4.70.1\n"
    )
    assert lock_faults(lock, ["NumPy>=2", "tqdm>=4.66"], "3.11") == []


def test_the_conda_environment_is_what_is_declared() -> None:
    assert environment_faults(ENVIRONMENT, DECLARED, PROJECT["requires-python"]) == [], (
        "run `make lock`"
    )


@pytest.mark.parametrize(
    ("pip", "says"),
    [
        (["-e .", "tqdm>=4.66"], ["numpy>=2 is missing"]),
        (["numpy>=1", "tqdm>=4.66"], ["numpy>=2 is missing", "numpy>=1 is not declared"]),
        (["numpy>=2", "tqdm>=4.66", "scipy"], ["scipy is not declared"]),
    ],
)
def test_a_wrong_conda_environment_is_refused(pip: list[str], says: list[str]) -> None:
    text = yaml.safe_dump({"dependencies": ["python>=3.11", {"pip": pip}]})
    assert environment_faults(text, ["numpy>=2", "tqdm>=4.66"], ">=3.11") == says
    assert environment_faults(text, ["numpy>=2", "tqdm>=4.66"], ">=3.12")[-1:] == [
        "its Python is not >=3.12"
    ]


@pytest.mark.parametrize("python", PYTHONS)
def test_torch_and_torchvision_are_a_pair(python: str) -> None:
    installed = importlib.metadata.distribution("torchvision")
    if locked(LOCK, python)["torchvision"] != Version(installed.version):
        pytest.fail("the torchvision installed is not the locked one: run `make venv`")
    assert pair_faults(LOCK, installed.requires or [], python) == []


def test_a_wrong_pair_is_refused() -> None:
    lock = "torch==2.15.0\ntorchvision==0.28.0"
    assert pair_faults(lock, ["torch==2.13.0", "numpy"], "3.11") == [
        "torchvision wants torch==2.13.0, not 2.15.0"
    ]
    assert pair_faults(lock, ["numpy"], "3.11") == ["torchvision says nothing about torch"]
    assert pair_faults(lock, ["torch>=2.14.0"], "3.11") == []


def test_the_lock_cannot_take_a_cpu_only_build() -> None:
    # 2.13.0+cpu with torchvision 0.28.0 satisfies each other's metadata, and does not import.
    assert not admits(HELD, "torch", "2.13.0+cpu")
    assert not admits(HELD, "torchvision", "0.28.0")
    # Whenever the lock moves on, pip would prefer a CPU build of that version to the public one.
    torch = locked(LOCK, "3.11")["torch"]
    assert admits(HELD, "torch", str(torch))
    assert not admits(HELD, "torch", f"{torch}+cpu"), f"exclude {torch}+cpu in pyproject.toml"


def test_the_library_takes_the_torch_that_is_there() -> None:
    for version in ("2.10.0", "2.13.0+cpu", "2.15.0+cu126", "2.99.0"):
        assert admits(DECLARED, "torch", version)
    assert not admits(DECLARED, "torch", "2.9.1"), "weights_only loading has holes before 2.10"
    assert "<" not in PROJECT["requires-python"]


def test_one_version_everywhere() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changed = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert changed
    versions = {
        "pyproject.toml": PROJECT["version"],
        "pyro_vae": pyro_vae.__version__,
        "CITATION.cff": cited["version"],
        "CHANGELOG.md": changed[1],
    }
    assert len(set(versions.values())) == 1, versions


def test_the_licence_is_the_one_declared() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["license"] == cited["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_package_is_typed_and_its_check_runs() -> None:
    assert (ROOT / "pyro_vae" / "py.typed").is_file()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize(
    "name",
    [
        *("Makefile", ".ci/run", "environment.yml", "requirements.lock"),
        *(str(path.relative_to(ROOT)) for path in sorted((ROOT / ".github").rglob("*.yml"))),
    ],
)
def test_tooling_names_no_address(name: str) -> None:
    assert "://" not in (ROOT / name).read_text(encoding="utf-8")


DISORDERLY = """
import pyro, pytest, torch, warnings

def test_starts_clean():
    assert torch.get_default_dtype() == torch.float64
    assert torch.get_num_threads() == 1
    assert len(pyro.get_param_store()) == 0
    pyro.param("left_over", torch.ones(2))

@pytest.mark.float32
def test_single_precision_starts_clean():
    assert torch.get_default_dtype() == torch.float32
    assert len(pyro.get_param_store()) == 0

def test_leaves_dtype():
    torch.set_default_dtype(torch.float32)

def test_leaves_validation():
    torch.distributions.Distribution.set_default_validate_args(False)

def test_leaves_threads():
    torch.set_num_threads(2)

def test_is_restored():
    assert torch.distributions.Distribution._validate_args
    assert torch.get_num_threads() == 1

def test_warns():
    warnings.warn("something")

DRAWS = set()

@pytest.mark.parametrize("case", range(5))
def test_has_its_own_seed(case):
    DRAWS.add(float(torch.rand(())))
    assert len(DRAWS) == case + 1

@pytest.mark.gpu
def test_needs_a_device():
    assert torch.cuda.is_available()
"""


def test_the_suite_refuses_disorderly_tests(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_disorderly.py").write_text(DISORDERLY, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "--tb=line"]
    settings = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, check=False)
    refused = set(re.findall(r"^(?:ERROR|FAILED) \S+::(\w+)", done.stdout, re.M))
    assert refused == {
        "test_leaves_dtype",
        "test_leaves_validation",
        "test_leaves_threads",
        "test_warns",
    }, done.stdout


def make(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Runs make as a user would, not as a part of the make that may run the tests."""
    outside = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    command = ["make", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=outside, capture_output=True, text=True, check=False
    )


def test_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.M)
    listed = re.findall(r"^make (\S+) +\S", make("help").stdout, re.M)
    assert sorted(listed) == sorted(phony.split())


def test_the_matrix_has_the_oldest_and_the_newest_python() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (default,) = re.findall(r"^PYTHONS \?= (.*)$", makefile, re.M)
    assert default.split() == [PYTHONS[0], PYTHONS[-1]]


def test_the_matrix_says_which_python_is_missing() -> None:
    done = make("test-matrix", "PYTHONS=3.99")
    assert done.returncode != 0
    assert "No Python 3.99 that can make virtual environments was found" in done.stderr
