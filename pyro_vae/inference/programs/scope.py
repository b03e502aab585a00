"""Where programs run: the caller's parameters, random state and switches stay as they were."""

import random
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial, reduce
from types import CellType
from typing import Any

import numpy as np
import pyro
import torch
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor, nn
from torch.distributions import Independent, transform_to

from pyro_vae.inference.programs.arguments import (
    Program,
    ProgramError,
)

__all__ = [
    "FilledGaps",
    "FittedProgram",
    "all_data",
    "common_owner",
    "describe_programs",
    "evaluation_mode",
    "ieee_precision",
    "keep_random_state",
    "modules_of",
    "own_parameters",
    "plate_rows",
    "program_scope",
    "pyro_parameters",
    "shown_value",
    "store_state",
    "unwrap_programs",
]


@contextmanager
def program_scope(seed: int | None = None, *, training: bool = False) -> Iterator[None]:
    """Runs a user's programs so that the caller's world is afterwards what it was.

    Inside, the parameter store starts as a copy of the caller's. Parameters that belong to a
    module are left out: they register themselves when the program runs, so two programs that use
    one name do not meet.

    Args:
        seed: Seeds torch, NumPy and `random` inside; their states are restored at the end. With
            None, random numbers are taken from the caller's streams, as Pyro's own tools do.
        training: Leaves float32 products to the precision that the caller chose for their speed;
            everything else runs in `ieee_precision`.
    """
    store = pyro.get_param_store()
    settings = pyro.settings.get()
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    state = store.get_state()
    inside = {
        part: {
            name: value
            for name, value in state[part].items()
            if not isinstance(state["params"][name], nn.Parameter)
        }
        for part in ("params", "constraints")
    }
    try:
        with ExitStack() as stack:
            stack.enter_context(store.scope(inside))
            stack.enter_context(warnings.catch_warnings())
            # Parameters are held fixed on purpose.
            warnings.filterwarnings("ignore", ".*not registered .* because requires_grad=False")
            stack.enter_context(_OwnNames())
            stack.enter_context(_float32_products(None if training else "ieee"))
            if training:
                stack.enter_context(FilledGaps())
            if seed is not None:
                stack.enter_context(keep_random_state())
                pyro.set_rng_seed(seed)
            yield
    finally:
        pyro.settings.set(**settings)
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def own_parameters(start: dict[str, Any]) -> None:
    """Copies the store's parameters, so that gradients do not reach the caller's tensors.

    Args:
        start: State of the store, as of a `FittedProgram`, that is set on top of them.
    """
    store = pyro.get_param_store()
    state = store.get_state()
    own = {name: value.detach().clone().requires_grad_() for name, value in state["params"].items()}
    store.set_state({"params": own, "constraints": state["constraints"]})
    store.set_state(start)


def store_state(wanted: Callable[[str], bool]) -> dict[str, Any]:
    """The state of the parameter store, of the names that are wanted."""
    return {
        part: {name: value for name, value in values.items() if wanted(name)}
        for part, values in pyro.get_param_store().get_state().items()
    }


@contextmanager
def all_data() -> Iterator[None]:
    """Plates draw no subsample inside: programs that were trained on parts see all their data.

    A plate whose subsample is given (`pyro.plate(..., subsample=...)`) keeps it.

    Example:
        >>> with all_data(), pyro.plate("data", 5, subsample_size=2) as rows:
        ...     len(rows)
        5
    """

    def whole(own: Any, name: str, size: Any, count: Any, rows: Any, *device: Any) -> Any:
        return own(name, size, None if rows is None and size else count, rows, *device)

    with _subsampling(whole):
        yield


@contextmanager
def plate_rows(names: Collection[str], rows: Tensor, num_data: int) -> Iterator[None]:
    """Plates of these names hold these rows inside, and scale them to so many data.

    Whatever size the programs state. A plate whose subsample is given, one for each row, keeps it.

    Example:
        >>> with plate_rows({"data"}, torch.tensor([4, 2]), 5), pyro.plate("data", 2) as rows:
        ...     rows.tolist()
        [4, 2]
    """

    def some(own: Any, name: str, size: Any, count: Any, given: Any, *device: Any) -> Any:
        if name not in names:
            return own(name, size, count, given, *device)
        kept = given is not None and len(given) == len(rows)
        return num_data, len(rows), given if kept else rows

    with _subsampling(some):
        yield


@contextmanager
def _subsampling(change: Callable[..., Any]) -> Iterator[None]:
    """Plates ask this function inside; no handler: Pyro checks the size of what a handler gives."""
    own = SubsampleMessenger._subsample
    SubsampleMessenger._subsample = staticmethod(partial(change, own))
    try:
        yield
    finally:
        SubsampleMessenger._subsample = staticmethod(own)


def ieee_precision() -> AbstractContextManager[None]:
    """Computes float32 products in float32, whatever the caller allows for their speed.

    `torch.set_float32_matmul_precision` and `torch.backends` let products of matrices, convolutions
    and recurrent cells round their factors to bfloat16 or TF32, also on a CPU. Sums over many
    pixels then move by nats.
    """
    return _float32_products("ieee")


@contextmanager
def _float32_products(precision: str | None) -> Iterator[None]:
    """Sets the precision of float32 products, if one is given, and restores it at the end."""
    backends: Any = torch.backends
    cuda, cudnn, cpu = backends.cuda, backends.cudnn, backends.mkldnn
    products = [cpu.matmul, cpu.conv, cpu.rnn, cuda.matmul, cudnn.conv, cudnn.rnn]
    before = [product.fp32_precision for product in products]
    switches: list[tuple[Any, Any, Any]] = [  # older ones
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        (partial(getattr, cudnn, "allow_tf32"), partial(setattr, cudnn, "allow_tf32"), False),
    ]
    older = []
    for read, write, full in switches:
        with suppress(RuntimeError):  # torch refuses to read one that contradicts `products`
            older.append((write, read(), full))
    try:
        if precision is not None:
            for write, _, full in older:
                write(full)
            for product in products:
                product.fp32_precision = precision
        yield
    finally:
        for write, value, _ in older:
            write(value)
        for product, value in zip(products, before, strict=True):
            product.fp32_precision = "none"
            if product.fp32_precision != value:  # else it is inherited, as it was
                product.fp32_precision = value


class _OwnNames(Messenger):
    """Gives a module's parameter another name when another module's holds the one it asks for."""

    def _pyro_param(self, msg: Any) -> None:
        name, *rest = msg["args"]
        if not rest or not isinstance(rest[0], nn.Parameter):
            return
        stored = dict(pyro.get_param_store().named_parameters())
        own, count = name, 1
        while own in stored and stored[own] is not rest[0]:
            count += 1
            own = f"{name}#{count}"
            if count > 2:  # one for the model and one for the guide
                raise ProgramError(
                    f"parameter '{name}' is another nn.Parameter at every call, so no fitted value "
                    "could reach it; give pyro.param a plain tensor, or every module a name of its "
                    "own"
                )
        if own != name:
            msg["name"], msg["args"] = own, (own, *rest)


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Restores the random states of torch (every device), NumPy and `random` at the end."""
    others = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state users' programs use
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(others[0])
            np.random.set_state(others[1])  # noqa: NPY002


def shown_value(site: Any) -> Any:
    """A site's value; of an observed one, with a point of the support under its masks.

    Nothing depends on what is there, but a missing value (NaN) would be refused by torch's checks,
    and 0 times its gradient is NaN.
    """
    value = site["value"]
    if not (site["is_observed"] and isinstance(value, Tensor)):
        return value
    hidden = _hidden(site)
    if hidden is None:
        return value
    try:
        support = site["fn"].support
        point = transform_to(support)(torch.zeros_like(value))
    except (AttributeError, NotImplementedError):  # it states none, or is discrete
        point = torch.zeros_like(value)
    return torch.where(hidden, point.to(value), value)


def _hidden(site: Any) -> Tensor | None:
    """Which entries of a site's value are under a mask, of poutine.mask or of its distribution."""
    fn = site["fn"]
    masks = [(site["mask"], len(fn.event_shape))]
    while isinstance(fn, MaskedDistribution | Independent | ExpandedDistribution):
        masks.append((getattr(fn, "_mask", None), len(fn.event_shape)))
        fn = fn.base_dist
    hidden = [
        ~torch.as_tensor(mask, device=site["value"].device)[(..., *(None,) * events)]
        for mask, events in masks
        if mask is not None and mask is not True
    ]
    return reduce(torch.logical_or, hidden) if hidden else None


class FilledGaps(Messenger):
    """Fills missing values under masks, for losses that ask the distributions themselves."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not msg["infer"].get("_deterministic"):
            value, shown = msg["value"], shown_value(msg)
            if shown is not value:
                msg["value"] = torch.where(value.isnan(), shown, value)


class FittedProgram:
    """A program with fitted parameters in place, whatever the caller's parameter store holds.

    Calling it runs the program in a parameter store that has the fitted values; other attributes
    are those of the program.
    """

    def __init__(self, program: Program, state: dict[str, Any]) -> None:
        self.__wrapped__ = program
        self.state = state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        try:
            with pyro.get_param_store().scope(self.state):
                return self.__wrapped__(*args, **kwargs)
        finally:
            for value in self.state["params"].values():  # leaving a scope strips what SVI looks for
                value.unconstrained = weakref.ref(value)

    def __getattr__(self, name: str) -> Any:
        if "__wrapped__" not in self.__dict__:  # while copying or unpickling
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)

    def __repr__(self) -> str:
        return f"fitted {self.__wrapped__!r}"


def unwrap_programs(model: Program, guide: Program) -> tuple[dict[str, Any], Program, Program]:
    """Programs without fitted parameters around them, and copies of those to start from."""
    start: dict[str, Any] = {"params": {}, "constraints": {}}
    programs = []
    for program in (model, guide):
        while isinstance(program, FittedProgram):
            for name, value in program.state["params"].items():
                if not isinstance(value, nn.Parameter):
                    start["params"].setdefault(name, value.detach().clone().requires_grad_())
                    start["constraints"].setdefault(name, program.state["constraints"][name])
            program = program.__wrapped__
        programs.append(program)
    return start, programs[0], programs[1]


@contextmanager
def evaluation_mode(*programs: Program) -> Iterator[None]:
    """Puts the modules of the programs in evaluation mode, and each back in its own."""
    modules = {
        id(m): m for program in programs for root in modules_of(program) for m in root.modules()
    }.values()
    modes = [(module, module.training) for module in modules]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def modules_of(program: Any) -> Collection[nn.Module]:
    """The modules a program reaches: itself, its owner, those its closure and globals name."""
    while not isinstance(program, nn.Module):  # fitted, partial and decorated programs
        if isinstance(getattr(program, "__self__", None), nn.Module):
            break  # a decorated method's own function knows no module
        inner = getattr(program, "func", getattr(program, "__wrapped__", None))
        if inner is None:
            break
        program = inner
    if isinstance(program, nn.Module):
        return [program]
    owner = getattr(program, "__self__", program)
    if isinstance(owner, nn.Module):
        return [owner]
    function = program if hasattr(program, "__code__") else type(program).__call__
    cells = [cell for cell in getattr(function, "__closure__", None) or () if cell != CellType()]
    names = function.__code__.co_names if hasattr(function, "__code__") else ()
    named = [function.__globals__.get(name) for name in names]
    held = getattr(owner, "__dict__", {}).values()
    reached = (*(cell.cell_contents for cell in cells), *named, *held)
    return [value for value in reached if isinstance(value, nn.Module)]


def pyro_parameters(program: Program) -> Iterator[tuple[str, nn.Parameter]]:
    """The `PyroParam`s of the modules a program reaches, as an optimizer moves them, by name."""
    for root in modules_of(program):
        for module in root.modules() if isinstance(root, PyroModule) else ():
            for name in getattr(module, "_pyro_params", {}):
                full = f"{module._pyro_name}.{name}".lstrip(".")
                yield full, getattr(module, f"{name}_unconstrained")


def common_owner(model: Program, guide: Program) -> nn.Module | None:
    """The one module that model and guide are methods of."""
    owner = getattr(model, "__self__", None)
    shared = isinstance(owner, nn.Module) and owner is getattr(guide, "__self__", None)
    return owner if shared else None


def describe_programs(model: Program, guide: Program) -> dict[str, Any]:
    """What config.json says of them: the class that makes both and its arguments, or a name."""
    owner = common_owner(model, guide)
    if owner is not None and hasattr(owner, "config"):
        return {"class": type(owner).__name__, "arguments": owner.config}
    return {"program": getattr(model, "__qualname__", type(model).__name__)}
