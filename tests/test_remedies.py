"""What a message tells the user to pass, type or call exists."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae
from pyro_vae import log_evidence
from pyro_vae.diagnostics.evidence.log_evidence import METHODS
from pyro_vae.diagnostics.gap import elbo_surgery
from pyro_vae.inference.programs import ProgramError
from pyro_vae.inference.svi import METHODS as FITTING_METHODS

ROOT = Path(pyro_vae.__file__).parent
# Arguments of Python, torch and Pyro that messages name, and words before an equals sign that
# stand for no argument.
ELSEWHERE = {
    "expose",
    "infer",
    "init_loc_fn",
    "lr",
    "obs",
    "requires_grad",
    "track_running_stats",
    "z",
}


@cache
def sources() -> list[tuple[Path, ast.Module]]:
    paths = sorted(ROOT.rglob("*.py"))
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


def text_of(node: ast.AST) -> str:
    """The fixed words of a message, however it is put together."""
    words = [
        part.value
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]
    return " ".join(words)


def messages(tree: ast.AST) -> Iterator[str]:
    """Texts of everything raised or warned of in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            yield text_of(node.exc)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("warnings.warn"):
            yield text_of(node)


def parameters(of: Path | None = None) -> set[str]:
    """Names of all parameters of functions, and of all fields, in the package or in one file."""
    names = set()
    for path, tree in sources():
        if of not in (None, path):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.arg):
                names.add(node.arg)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
    return names


def unreal(text: str, known: set[str], flags: set[str], targets: set[str]) -> list[str]:
    """What a message names that is no argument, method, flag or target."""
    found = [f"{n}=" for n in re.findall(r"\b([a-z_]+)=(?!=)", text) if n not in known]
    found += [
        f"method={m}" for m in re.findall(r"\bmethod='(\w+)'", text) if m not in KNOWN_METHODS
    ]
    found += [flag for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text) if flag not in flags]
    found += [f"make {t}" for t in re.findall(r"`make (\w+)`", text) if t not in targets]
    return found


KNOWN_METHODS = {*METHODS, *FITTING_METHODS, "exact", "generalized", "variational_bayes", "em"}


def test_what_a_message_names_exists() -> None:
    known = parameters() | ELSEWHERE
    commands = (ROOT / "app").glob("*.py")  # typer makes an option of each parameter
    flags = {f"--{name.replace('_', '-')}" for path in commands for name in parameters(path)}
    makefile = (ROOT.parent / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z_-]+):", makefile, re.MULTILINE))
    found = [
        f"{path.relative_to(ROOT)}: {name} in {text!r}"
        for path, tree in sources()
        for text in messages(tree)
        for name in unreal(text, known, flags, targets)
    ]
    assert found == []
    told = "pass nonesuch=3, method='magic' or --magic, or `make magic`"
    assert len(unreal(told, known, flags, targets)) == 4


# --- remedies that are followed -------------------------------------------------------------------


@pytest.fixture
def x() -> torch.Tensor:
    return torch.tensor([-1.0, 0.3, 1.2])


def test_a_guide_without_a_density_is_told_of_an_argument_of_the_method(x: torch.Tensor) -> None:
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):  # through a site of its own, from which nobody knows the way back
        with pyro.plate("data", len(x)):
            free = pyro.sample("free", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(free / 2, log_density=torch.tensor(2.0).log()))

    fast = {"num_warmup": 2, "num_samples": 16, "num_leapfrog": 1, "num_chains": 2}
    slow = {"num_temperatures": 1, "num_chains": 2}
    options = {"joint": True, "progress": False}
    with pytest.raises(ProgramError, match=r"\(proposal='normal'\)") as told:
        log_evidence(model, guide, x, method="bridge", **fast, **options)
    assert "start=" not in str(told.value)
    log_evidence(model, guide, x, method="bridge", proposal="normal", **fast, **options)
    with pytest.raises(ProgramError, match=r"\(start='prior'\)") as told:
        log_evidence(model, guide, x, method="annealed", start="guide", **slow, **options)
    assert "proposal=" not in str(told.value)
    log_evidence(model, guide, x, method="annealed", start="prior", **slow, **options)


def test_tools_without_an_argument_joint_name_none(x: torch.Tensor) -> None:
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(x.sum() / 4, 0.5))

    with pytest.raises(ProgramError, match="outside the batch plate") as told:
        elbo_surgery(model, guide, x)
    assert "joint" not in str(told.value)
