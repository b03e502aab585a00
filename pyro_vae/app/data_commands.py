"""The commands ``pyro-vae data ...``: what data sets there are and where they lie."""

from typing import Annotated

import typer

from pyro_vae.app.terminal import DATA, Root, command, import_slowly
from pyro_vae.text import rows_text

__all__ = ["data_app", "state"]

data_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="What data sets there are and where they lie."
)


@command(data_app, "list", epilog="\b\nExample:\n  pyro-vae data list")
def data_list(data_root: Root = None) -> None:
    """Lists the data sets, and whether their files are here."""
    import_slowly("pyro_vae.data")
    from pyro_vae.data import check_dataset, dataset_names, describe_dataset

    rows = []
    for name in dataset_names():
        info = describe_dataset(name)
        sizes = " / ".join(str(size) if size else "-" for size in info.sizes)
        shape = " x ".join(map(str, info.shape))
        rows.append(
            {
                "name": name,
                "train / validation / test": sizes,
                "datum": shape,
                "measure": info.measure,
                "here": state(check_dataset(name, data_root)),
            }
        )
    typer.echo(rows_text(rows))


@command(data_app, "get", epilog="\b\nExample:\n  pyro-vae data get mnist")
def data_get(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {DATA}.")],
    data_root: Root = None,
) -> None:
    """Fetches the files of a data set that are missing, and checks them. Uses the network."""
    import_slowly("pyro_vae.data")
    from pyro_vae.data import describe_dataset, load_dataset

    dataset = load_dataset(name, data_root, download=True)
    info = describe_dataset(name)
    typer.echo(f"{dataset}\nsource: {info.citation}\nlicence: {info.license}")


@command(
    data_app, "check", epilog="\b\nExamples:\n  pyro-vae data check\n  pyro-vae data check mnist"
)
def data_check(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Default: all of them.")
    ] = None,
    data_root: Root = None,
) -> None:
    """Checks the files of data sets by size and sha256.

    Exits with 2 if a file of a data set that was named is missing, or any file is damaged.
    """
    import_slowly("pyro_vae.data")
    from pyro_vae.data import check_dataset, dataset_names

    found = {name: check_dataset(name, data_root) for name in names or dataset_names()}
    rows = [
        {"data set": name, "file": path, "state": state}
        for name, files in found.items()
        for path, state in files or [("-", "ok (comes with scikit-learn)")]
    ]
    typer.echo(rows_text(rows))
    allowed = {"ok"} if names else {"ok", "missing"}
    bad = sorted({n for n, files in found.items() for _, state in files if state not in allowed})
    if bad:
        raise ValueError(
            f"{', '.join(bad)}: missing or damaged files. Delete damaged ones, then run "
            f"pyro-vae data get {bad[0]}, or name the folder with --data-root"
        )


def state(files: list[tuple[str, str]]) -> str:
    """Whether the files of a data set are here, in a word."""
    if not files:
        return "yes (comes with scikit-learn)"
    faults = sorted({state for _, state in files if state != "ok"})
    if not faults:
        return "yes"
    return "no" if faults == ["missing"] else f"damaged ({', '.join(faults)})"
