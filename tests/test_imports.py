"""Imports go one way, and importing the package does nothing."""

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

import pyro_vae

ROOT = Path(pyro_vae.__file__).parent

# A module of the package imports from its own layer and from lower ones.
LAYERS = (
    {"checks", "data", "intervals", "progress", "results", "text"},
    {"models"},
    {"inference"},
    {"diagnostics"},
    {"extras"},
    {"plots", "sklearn"},
    {"runs"},
    {"app"},
    {"__main__"},
)
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
# These take anybody's program, so they know none of ours, although models lie below them.
FREE_OF_MODELS = {"inference", "diagnostics"}
# Folders of rooms: they have no door, and a module that lies in one is a room of its own.
FLOORS = {
    "pyro_vae",
    "pyro_vae.inference",
    "pyro_vae.diagnostics",
    "pyro_vae.extras",
    "pyro_vae.app",
}
MOST_FILES = 12  # in a folder
# These use the package, so the package knows none of them.
USERS = {"analyses", "benchmarks", "tests"}


class Import(NamedTuple):
    """That `source` imports `target`, and whether it does so as soon as it is imported itself."""

    source: str
    target: str
    at_once: bool


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING"


def statements(
    node: ast.AST, at_once: bool = True
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_once
        else:
            later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from statements(child, at_once and not later and not is_for_type_checkers(child))


def module_names(root: Path) -> dict[str, Path]:
    names = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(root: Path, homes: Mapping[str, str], of: Path | None = None) -> list[Import]:
    """Every import in a package, or in a folder `of` scripts; by way of module names of `root`.

    `homes` says from which module a lazy public name really comes.
    """
    modules = module_names(root)
    found = []
    for source, path in module_names(of or root).items():
        for node, at_once in statements(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                here = source.split(".")[: None if path.name == "__init__.py" else -1]
                base = here[: len(here) - node.level + 1] if node.level else []
                origin = ".".join([*base, *([node.module] if node.module else [])])
                targets = [
                    target
                    if (target := f"{origin}.{alias.name}") in modules
                    and not exports(modules[origin], alias.name)
                    else homes.get(alias.name, origin)
                    if origin == root.name
                    else origin
                    for alias in node.names
                ]
            found += [Import(source, target, at_once) for target in targets]
    return found


def exports(door: Path, name: str) -> bool:
    """Whether a door's name is something of that name and not the module of that name behind it."""
    return f'"{name}"' in door.read_text(encoding="utf-8")


def past_the_door(source: str, target: str, modules: Mapping[str, Path]) -> str | None:
    """The door that an import of `target` goes past; None where it enters by it, or is at home."""
    room = target.rpartition(".")[0]
    if target not in modules or modules[target].name == "__init__.py" or room in FLOORS:
        return None
    return None if f"{source}.".startswith(f"{room}.") else room


def violations(root: Path, homes: Mapping[str, str]) -> list[str]:
    """One sentence for each import that goes the wrong way."""
    found = []
    modules = module_names(root)
    graph: dict[str, set[str]] = {}
    for source, target, at_once in imports(root, homes):
        package, _, inner = target.partition(".")
        if package in USERS:
            found.append(f"{source} imports {target}, which lies outside the package")
        if package != root.name or not inner or source == root.name:
            continue
        if at_once and source != target:
            graph.setdefault(source, set()).add(target)
        if door := past_the_door(source, target, modules):
            found.append(f"{source} imports {target} past its door, {door}")
        lower, upper = inner.split(".")[0], source.split(".")[1]
        if lower not in RANK or upper not in RANK:
            found.append(f"{source} imports {target}: give both a place in LAYERS")
        elif RANK[lower] > RANK[upper]:
            found.append(f"{source} imports {target}, which lies above it")
        elif upper in FREE_OF_MODELS and lower == "models":
            found.append(
                f"{source} imports {target}, but takes any program and may know none of ours"
            )
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"import cycle: {' <- '.join(error.args[1])}")
    return found


def write(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in {"__init__.py": "", **files}.items():
        path = root / "pyro_vae" / name
        for folder in [path.parent, *path.parent.parents]:
            if root in folder.parents and not (folder / "__init__.py").exists():
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "__init__.py").write_text("", encoding="utf-8")
        path.write_text(text, encoding="utf-8")
    return root / "pyro_vae"


def test_imports_go_one_way() -> None:
    assert violations(ROOT, pyro_vae._HOME) == []


def test_every_module_has_a_layer() -> None:
    parts = {name.split(".")[1] for name in module_names(ROOT) if "." in name}
    assert parts <= set(RANK), "give each module of the package a place in LAYERS"


@pytest.mark.parametrize("folder", ["analyses", "benchmarks"])
def test_scripts_enter_by_the_doors(folder: str) -> None:
    modules = module_names(ROOT)
    scripts = imports(ROOT, pyro_vae._HOME, ROOT.parent / folder)
    past = [one for one in scripts if past_the_door(one.source, one.target, modules)]
    assert scripts
    assert past == []


def test_rooms_are_small_enough_to_look_through() -> None:
    sizes = {
        str(folder.relative_to(ROOT.parent)): len(list(folder.glob("*.py")))
        for folder in {path.parent for path in ROOT.rglob("*.py")}
    }
    assert {folder: size for folder, size in sizes.items() if size > MOST_FILES} == {}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"data.py": "import pyro_vae.models"}, "pyro_vae.models, which lies above"),
        ({"models/vae.py": "from pyro_vae.inference.svi import fit"}, "which lies above it"),
        ({"models/vae.py": "from pyro_vae import fit"}, "pyro_vae.inference.svi, which lies above"),
        ({"models/vae.py": "from ..inference import svi"}, "pyro_vae.inference, which lies above"),
        ({"models/__init__.py": "from ..runs import load"}, "pyro_vae.runs, which lies above"),
        (
            {"app/__init__.py": "", "data.py": "def f():\n    from pyro_vae import app"},
            "pyro_vae.app, which lies above it",
        ),
        ({"inference/svi.py": "from pyro_vae.models import VAE"}, "may know none of ours"),
        ({"diagnostics/gap.py": "def f():\n    import pyro_vae.models"}, "may know none of ours"),
        ({"diagnostics/gap.py": "import pyro_vae.extras.paths"}, "which lies above it"),
        ({"app/cli.py": "import analyses.compare"}, "which lies outside the package"),
        ({"app/cli.py": "from tests.conftest import seed_of"}, "which lies outside the package"),
        ({"app/cli.py": "from pyro_vae.helpers import f"}, "give both a place in LAYERS"),
        (
            {"data.py": "from . import results", "results.py": "from .data import x"},
            "import cycle: pyro_vae.",
        ),
        (
            {
                "inference/svi/fit.py": "",
                "inference/em.py": "from pyro_vae.inference.svi.fit import f",
            },
            "pyro_vae.inference.svi.fit past its door, pyro_vae.inference.svi",
        ),
        (
            {"inference/svi/step.py": "", "inference/em.py": "from .svi import step"},
            "pyro_vae.inference.svi.step past its door, pyro_vae.inference.svi",
        ),
        (
            {"models/parts/priors.py": "", "models/vae.py": "import pyro_vae.models.parts.priors"},
            "pyro_vae.models.parts.priors past its door, pyro_vae.models.parts",
        ),
    ],
)
def test_wrong_ways_are_found(tmp_path: Path, files: dict[str, str], says: str) -> None:
    root = write(tmp_path, files)
    (sentence,) = violations(root, {"fit": "pyro_vae.inference.svi"})
    assert says in sentence


def test_right_ways_pass(tmp_path: Path) -> None:
    files = {
        "__init__.py": "if TYPE_CHECKING:\n    from .app.cli import f",
        # A cycle of names only, or one closed within a function, is no cycle of modules.
        "data/__init__.py": "from .sets import x",
        "data/sets.py": "import typing\nif typing.TYPE_CHECKING:\n    from ..results import r",
        "results.py": "from . import data\ndef f():\n    from . import data",
        "models/__init__.py": "from .vae import VAE",
        "models/vae.py": "import torch\nfrom pyro_vae import __version__\nfrom . import parts",
        "models/parts/__init__.py": "from .priors import normal",
        "models/parts/priors.py": "def normal(): from pyro_vae.models.vae import VAE",
        "inference/log_weights/__init__.py": 'from .draw import draw\n__all__ = ["draw"]',
        "inference/log_weights/draw.py": "",
        "inference/svi.py": "from ..data import x\nfrom pyro_vae import log_weights",
        "inference/em.py": "from pyro_vae.inference.log_weights import draw\nfrom .svi import fit",
        "app/cli.py": "from pyro_vae.models import VAE\nimport pyro_vae.inference.svi",
        "__main__.py": "from .app.cli import main",
    }
    homes = {"log_weights": "pyro_vae.inference.log_weights"}
    assert violations(write(tmp_path, files), homes) == []


def test_no_module_is_a_drawer() -> None:
    names = {part for name in module_names(ROOT) for part in name.split(".")}
    assert not names & {"utils", "util", "helpers", "misc", "common"}, (
        "name a module by its subject"
    )


def in_new_process(code: str) -> dict[str, object]:
    """Runs code that ends by printing JSON, in an interpreter that has imported nothing yet."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_is_free() -> None:
    code = """
import json, sys, time
start = time.process_time()
import pyro_vae
seconds = time.process_time() - start
dir(pyro_vae)
heavy = [name for name in ("torch", "numpy", "pyro") if name in sys.modules]
print(json.dumps({"seconds": seconds, "heavy": heavy}))
"""
    runs = [in_new_process(code) for _ in range(3)]
    assert all(run["heavy"] == [] for run in runs)
    # Time of this process alone; the least of three, for others lengthen it a little all the same.
    assert min(float(str(run["seconds"])) for run in runs) < 0.05


STATE = """
import torch, random, warnings
import sklearn.mixture  # scikit-learn's own import draws from Python's stream
def state():
    return {
        "validation": torch.distributions.Distribution._validate_args,
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "random": torch.get_rng_state().tolist() == drawn and random.getstate() == python_drawn,
    }
torch.manual_seed(3); torch.set_num_threads(1)
drawn = torch.get_rng_state().tolist(); python_drawn = random.getstate()
before = state()
"""


@pytest.mark.long
def test_importing_every_module_changes_no_state_of_torch() -> None:
    names = [name for name in module_names(ROOT) if not name.endswith("__main__")]
    code = f"""
import importlib, json
{STATE}
for name in {names}:
    importlib.import_module(name)
print(json.dumps([before, state()]))
"""
    before, after = in_new_process(code)
    assert before == after


@pytest.mark.long
def test_a_changed_state_of_torch_is_seen() -> None:
    code = f"""
import json
{STATE}
torch.distributions.Distribution.set_default_validate_args(False)
torch.set_default_dtype(torch.float64)
torch.rand(1)
print(json.dumps([before, state()]))
"""
    before, after = in_new_process(code)
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    assert {key for key in before if before[key] != after[key]} == {"validation", "dtype", "random"}


def test_the_public_names_are_one_list() -> None:
    assert sorted(pyro_vae.__all__) == sorted(pyro_vae._HOME)
    assert set(pyro_vae.__all__) <= set(dir(pyro_vae))
    visible = {
        alias.name
        for node, at_once in statements(ast.parse((ROOT / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom)
        and not at_once
        and (node.module or "") in module_names(ROOT)
        for alias in node.names
    }
    existing = {name for name, home in pyro_vae._HOME.items() if home in module_names(ROOT)}
    assert visible == existing, "the imports for type checkers and _HOME must name the same"


def test_dir_lists_public_names_and_modules_only() -> None:
    shown = {name for name in dir(pyro_vae) if not name.startswith("_")}
    modules = {name for name in shown if {name, f"pyro_vae.{name}"} & set(sys.modules)}
    assert shown - modules == set(pyro_vae.__all__)


@pytest.mark.parametrize("name", pyro_vae.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(pyro_vae, name).__name__ == name


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'fitt'; public are VAE, "):
        _ = pyro_vae.fitt  # type: ignore[attr-defined]
