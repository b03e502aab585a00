"""How a run was made, and the commands that make it again."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from pyro_vae.inference.estimators import objective_names
from pyro_vae.models import Autoencoder
from pyro_vae.models.parts import part_text
from pyro_vae.results import Result
from pyro_vae.runs import Run

__all__ = ["PARTS", "is_autoencoder", "made_with", "reproduce_commands"]

PARTS = ("likelihood", "prior", "posterior", "network", "kind")


def is_autoencoder(run: Run) -> bool:
    """Whether the guide of a run is a point."""
    return isinstance(run.module, Autoencoder)


def reproduce_commands(run: Run, evaluation: Result | None = None) -> str:
    """The commands that make a run of `start_run` again, its evaluation and this report.

    Args:
        run: The run.
        evaluation: What `evaluate_run` found, or None.

    Returns:
        Shell commands; empty if the run was trained on data of the caller, or in a way the command
        line has no words for.
    """
    config, data = run.config, run.config.get("data", {})
    described, trained = config["model"]["arguments"], config.get("fit", {})
    model, loss = _model_options(run), trained.get("loss")
    rate = trained.get("learning_rate")
    known = loss == "Trace_ELBO" or loss in objective_names()
    if not (model and known and "sha256" in data and isinstance(rate, int | float)):
        return ""
    parts = [part for part in PARTS if part in described and part != "kind"]
    options = {
        "--data": data["name"],
        "--binarize": data["binarization"] or "none",
        **model,
        **{f"--{part}": part_text(described[part]) for part in parts},
        "--activation": described["activation"],
        **_objective_options(trained),
        "--epochs": trained["epochs"],
        "--patience": trained["patience"] or 0,
        "--batch-size": trained["batch_size"],
        "--learning-rate": rate,
        "--warmup-epochs": trained["warmup_epochs"],
        "--seed": trained["seed"],
        "--threads": trained["num_threads"],
        "--out": run.path,
    }
    words = [f"{name} {shlex.quote(str(value))}" for name, value in options.items()]
    lines = _wrapped(words)
    folder = shlex.quote(str(run.path))
    commands = [
        "pyro-vae fit " + " \\\n    ".join(lines),
        f"pyro-vae evaluate {folder}{_evaluate_options(evaluation)}",
        f"pyro-vae report {folder}",
    ]
    return "\n".join(commands[::2] if is_autoencoder(run) else commands)


def _wrapped(words: Sequence[str], width: int = 80) -> list[str]:
    """Options in lines of at most so many letters, where one alone is not longer."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _model_options(run: Run) -> dict[str, Any]:
    """The options that name the model and its sizes; none for a model that they cannot name."""
    name, described = type(run.module).__name__, run.config["model"]["arguments"]
    hidden = described.get("hidden", ())
    if name == "TwoLayerVAE":
        lower, upper = described["latent_dims"]
        part = {"name": "two_layer", "upper_dim": upper, "upper_hidden": hidden[1]}
        return _sizes(part_text(part), lower, hidden[0])
    if name == "Autoencoder":
        return _sizes(part_text(described["kind"]), described["code_dim"], hidden)
    return _sizes("vae", described["latent_dim"], hidden) if name == "VAE" else {}


def _sizes(model: str, latent_dim: int, hidden: Sequence[int]) -> dict[str, Any]:
    sizes = ",".join(map(str, hidden))
    return {"--model": model, "--latent-dim": latent_dim, "--hidden": sizes}


def _objective_options(trained: Mapping[str, Any]) -> dict[str, Any]:
    if trained["loss"] == "Trace_ELBO":
        return {}
    part = {"name": trained["loss"], **trained["loss_options"]}
    return {"--objective": part_text(part), "--num-particles": trained["num_particles"]}


def _evaluate_options(evaluation: Result | None) -> str:
    if evaluation is None:
        return ""
    made = evaluation.provenance
    return (
        f" --num-particles {made['config']['num_particles']}"
        f" --num-data {made['num_data']} --seed {made['seed']}"
    )


def made_with(run: Run, found: Result | None) -> str:
    """Versions, threads and data that the numbers come from, in a sentence or two."""
    made = found.provenance if found is not None else {}
    trained = run.config.get("fit", {})
    threads = trained.get("num_threads", "?")
    plural = "" if threads == 1 else "s"
    parts = [f"Trained with {threads} thread{plural}, {trained.get('dtype')}"]
    if made:
        commit = f", commit {str(made['commit'])[:12]}" if made.get("commit") else ""
        dirty = " with local changes" if made.get("dirty") else ""
        parts.append(
            f"evaluated {made.get('created')} by pyro_vae {made.get('version')}{commit}{dirty}, "
            f"torch {made.get('torch')}, Pyro {made.get('pyro')}, Python {made.get('python')}, "
            f"seed {made.get('seed')}"
        )
    sha256 = run.config.get("data", {}).get("sha256")
    if sha256:
        parts.append(f"data sha256 {sha256[:16]}...")
    return "; ".join(parts) + ". Another thread count or processor changes the last digits."
