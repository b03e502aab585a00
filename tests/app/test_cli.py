"""The command line: what it prints, what it refuses, and how it ends."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pyro.infer import SVI
from typer.testing import CliRunner, Result

from pyro_vae import load_run
from pyro_vae.app import cli
from pyro_vae.app.demo import run_demo
from pyro_vae.app.reproduce import reproduce_commands
from pyro_vae.data import dataset_names
from pyro_vae.inference.estimators import objective_names
from pyro_vae.inference.svi import load_tensors
from pyro_vae.models.choices import MODELS
from pyro_vae.models.parts import (
    ACTIVATIONS,
    make_likelihood,
    make_network,
    make_posterior,
    make_prior,
    parse_part,
)
from pyro_vae.results import load_result

SMALL = "--data digits --latent-dim 2 --hidden 6 --batch-size 700 --threads 1 --quiet"


def call(line: str) -> Result:
    return CliRunner().invoke(cli.app, shlex.split(line))


def refused(line: str) -> str:
    """The one line that a refused command says."""
    done = call(line)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.stderr.endswith(f"{said}\n")
    return said


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_tensors(folder / "model.safetensors")[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    done = call(f"fit {SMALL} --epochs 2 --out {folder}")
    assert done.exit_code == 0, done.output
    return folder


# --- help


def test_help_is_quick_and_light() -> None:
    code = (
        "import sys; sys.argv = ['pyro-vae', '--help']\n"
        "from pyro_vae.app.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n"
        "    print(sorted({'torch', 'numpy', 'pyro', 'rich', 'matplotlib'} & set(sys.modules)))\n"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - start)
        assert done.stdout.splitlines()[-1] == "[]"
    assert "pyro-vae fit --data mnist" in done.stdout
    # 0.1 s of processor time where nothing else runs; the least of three, on a machine that does.
    assert min(seconds) < 1.5


@pytest.mark.parametrize(
    "command",
    [
        *("demo", "fit", "evaluate", "sample", "report", "doctor", "data list", "data check"),
        *("evidence", "gap", "quality", "estimators", "compare", "em"),
    ],
)
def test_every_command_has_help_that_teaches(command: str) -> None:
    done = call(f"{command} --help")
    assert done.exit_code == 0
    assert f"pyro-vae {command}" in done.stdout.split("Example")[-1]
    assert "--debug" in done.stdout


def test_help_names_what_there_is() -> None:
    text = " ".join(call("fit --help").stdout.split())
    assert f"One of {', '.join(dataset_names())}." in text
    named = re.search(r"--activation NAME (.*?)\. ", text)
    assert named
    assert set(re.split(r", | or ", named[1])) == set(ACTIVATIONS)
    for name in (*MODELS, *objective_names()):
        assert re.search(rf"\b{name}\b", text), name


@pytest.mark.parametrize(
    ("option", "make"),
    [
        ("likelihood", make_likelihood),
        ("prior", lambda part: make_prior(part, 2, data_dim=4)),
        ("posterior", lambda part: make_posterior(part, 2)),
        ("network", make_network),
    ],
)
def test_help_names_every_part_and_its_arguments(option: str, make: Callable[[Any], Any]) -> None:
    """What its own error message lists, and what the configs hold but for the data's shape."""
    text = " ".join(call("fit --help").stdout.split())
    said = text.split(f"--{option} PART")[1].split(" --")[0]
    with pytest.raises(ValueError, match="choose one of") as refused:
        make("no such part")
    names = re.findall(r"'(\w+)'", str(refused.value).split("choose one of")[1])
    assert len(names) >= 3
    for name in names:
        assert re.search(rf"\b{name}\b", said), name
        for argument in set(make(name).config) - {"name", "levels", "image_shape", "bounded"}:
            assert re.search(rf"\b{argument}\b", said), (name, argument)


def test_the_examples_of_parts_in_help_are_parts() -> None:
    text = call("fit --help").stdout
    words = re.findall(r"--(?:model|prior|posterior|network|objective|likelihood) (\S+)", text)
    for word in {word for word in words if word != "PART"}:
        assert parse_part(word)
    assert any(":" in word for word in words)


def test_the_version_is_printed() -> None:
    assert call("--version").stdout.startswith("pyro_vae ")


# --- fit


def test_fit_keeps_a_run(run: Path) -> None:
    loaded = load_run(run)
    assert loaded.config["data"]["binarization"] == "dynamic"
    assert loaded.config["model"]["arguments"]["hidden"] == [6]
    assert loaded.config["fit"]["epochs"] == 2
    assert loaded.history.sizes["epoch"] >= 1


def test_the_lecture_is_the_default() -> None:
    parameters = {p.name: p for p in cli.typer.main.get_command(cli.app).commands["fit"].params}  # type: ignore[attr-defined]
    assert parameters["latent_dim"].default == 20
    assert parameters["hidden"].default == "400"


def test_the_reports_commands_make_the_same_weights(run: Path, tmp_path: Path) -> None:
    fit_command = reproduce_commands(load_run(run)).split("\npyro-vae")[0].replace("\\\n", " ")
    words = shlex.split(fit_command)
    assert words[:2] == ["pyro-vae", "fit"]
    words[words.index("--out") + 1] = str(tmp_path / "again")
    done = CliRunner().invoke(cli.app, words[1:])
    assert done.exit_code == 0, done.output
    first, second = weights(run), weights(tmp_path / "again")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(bool(value.abs().sum() > 0) for value in first.values())


def test_the_reports_commands_make_the_same_numbers(run: Path) -> None:
    call(f"evaluate {run} --num-particles 11 --num-data 6 --seed 5 --threads 1 --quiet")
    before = load_result(run / "evaluation.nc")
    commands = reproduce_commands(load_run(run), before).replace("\\\n", " ").splitlines()
    assert [shlex.split(command)[1] for command in commands] == ["fit", "evaluate", "report"]
    assert CliRunner().invoke(cli.app, shlex.split(commands[1])[1:]).exit_code == 0
    after = load_result(run / "evaluation.nc")
    assert after.drop_attrs(deep=False).identical(before.drop_attrs(deep=False))
    assert after.provenance["seed"] == 5


def test_fit_goes_on(run: Path, tmp_path: Path) -> None:
    call(f"fit {SMALL} --epochs 1 --patience 0 --out {tmp_path / 'a'}")
    before = weights(tmp_path / "a")
    done = call(f"fit --resume {tmp_path / 'a'} --epochs 2 --threads 1 --quiet")
    assert done.exit_code == 0, done.output
    assert "finished after 2 epochs" in done.stdout
    after = weights(tmp_path / "a")
    assert not torch.equal(before["decoder.0.weight"], after["decoder.0.weight"])


def test_fit_does_not_replace_a_run_unasked(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    call(f"fit {SMALL} --epochs 1 --out {folder}")
    (folder / "notes.txt").write_text("mine")
    before = (folder / "model.safetensors").read_bytes()
    said = refused(f"fit {SMALL} --epochs 1 --out {folder}")
    assert f"--resume {folder}" in said
    assert "--overwrite" in said
    assert (folder / "model.safetensors").read_bytes() == before
    assert call(f"fit {SMALL} --seed 1 --epochs 1 --out {folder} --overwrite").exit_code == 0
    assert (folder / "model.safetensors").read_bytes() != before
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("fit", "name a data set, as in --data mnist"),
        ("fit --data mnits", "Did you mean 'mnist'?"),
        ("fit --data digits --hidden ten", "whole numbers with commas"),
        ("fit --data digits --likelihood gaussian --binarize static", "use 'bernoulli'"),
        ("fit --data digits --binarize none --likelihood bernoulli", "binarise the data"),
        ("fit --data digits --binarize sometimes", "binarize must be one of"),
        ("fit --data digits --likelihood categorical --binarize static", "or leave them grey"),
        ("fit --data digits --likelihood categorical:levels=5", "not on its 5 grey levels"),
        ("fit --data iris --likelihood categorical", "use 'gaussian'"),
        ("fit --data iris --network conv", "no pictures to convolve"),
        ("fit --data digits --model vea", "Did you mean 'vae'?"),
        ("fit --data digits --model two-layer --prior vamp", "'mixture' or 'flow' prior"),
        ("fit --data digits --model sparse --prior flow", "use the model 'vae'"),
        ("fit --data digits --model sparse --objective DReG", "MAP objective"),
        ("fit --data digits --prior mixture:size=3", "it has num_components"),
        ("fit --data digits --prior mixture:", "--prior: 'mixture:' is not NAME or NAME:KEY"),
        ("fit --data digits --posterior iaf --latent-dim 1", "posterior='diagonal'"),
        ("fit --data digits --posterior full --objective FreeBits", "pass groups='site'"),
        ("fit --data digits --objective BetaELBO:gamma=2", "it has beta"),
        ("fit --data digits --objective VIMCO --num-particles 1", "num_particles >= 2"),
        ("fit --data digits --objective DReG --warmup-epochs 2", "wrong inside DReG"),
        ("fit --data iris --binarize static", "only grey levels in [0, 1] can be binarised"),
        ("fit --data digits --activation cosine", "Unknown activation 'cosine'"),
        ("fit --data mnist --data-root EMPTY", "(On the command line: pyro-vae data get NAME"),
        ("fit --resume EMPTY", "holds no run to go on with"),
        ("fit --resume RUN --epochs 3 --seed 1", "leave out --seed"),
        ("fit --resume RUN --epochs 3 --overwrite --data digits", "leave out --overwrite"),
        ("fit --resume RUN --data digits", "goes on with that run: leave out --out"),
        ("evaluate EMPTY", "is EMPTY a run folder?"),
        ("evaluate RUN/config.json", "is not a folder"),
        ("sample RUN --out x.jpg", "name it FILE.png"),
        ("report RUN RUN", "--out FILE.html"),
        ("report RUN --out EMPTY/no/r.html", "make it first"),
        ("data check nothing", "no data set 'nothing'"),
        ("data check mnist --data-root EMPTY", "mnist: missing or damaged files"),
        ("data check --data-root NONE", "is not a folder"),
    ],
)
def test_errors_are_one_line(line: str, says: str, run: Path, tmp_path: Path) -> None:
    places = {"EMPTY": str(tmp_path), "NONE": str(tmp_path / "none"), "RUN": str(run)}
    for word, place in places.items():
        line, says = line.replace(word, place), says.replace(word, place)
    assert says in refused(f"{line} --out {tmp_path / 'o'}" if "--data " in line else line)


def test_a_wrong_number_is_refused() -> None:
    done = call("fit --data digits --latent-dim 0")
    assert done.exit_code == 2
    assert "'--latent-dim'" in done.stderr


def test_debug_shows_where_an_error_comes_from() -> None:
    done = call("fit --data mnits --debug")
    assert isinstance(done.exception, ValueError)


def test_a_fault_of_ours_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise KeyError("inside")

    monkeypatch.setattr("pyro_vae.data.describe_dataset", broken)
    done = call("fit --data digits")
    assert done.exit_code == 1
    assert "this is a fault of pyro_vae" in done.stderr
    assert "Traceback" not in done.stderr


# --- what is made of a run


def test_evaluate_sample_and_report(run: Path) -> None:
    done = call(f"evaluate {run} --num-particles 20 --num-data 15 --threads 1 --quiet")
    assert done.exit_code == 0, done.output
    assert "the upper 90 % limit of k-hat is above" in done.stdout
    found = load_result(run / "evaluation.nc")
    assert found.sizes["datum"] == 15
    assert found.quantity("elbo").num_particles == 20
    assert found.table() in done.stdout
    done = call(f"sample {run} --num-images 5")
    assert done.exit_code == 0, done.output
    assert (run / "samples.png").read_bytes().startswith(b"\x89PNG")
    done = call(f"report {run}")
    assert done.exit_code == 0, done.output
    assert "VAE 64-6-2 on digits" in (run / "report.html").read_text()


PARTS = {
    "levels": (
        "--likelihood discretized-logistic:components=2,scale=shared --binarize none "
        "--prior vamp:num_pseudo_inputs=3 --posterior iaf:num_steps=1,hidden=4 "
        "--network conv:channels=2"
    ),
    "two layers": "--model two_layer:upper_hidden=3 --posterior full --objective BetaELBO:beta=2",
    "sparse": "--model sparse:strength=0.5 --likelihood gaussian:scale=0.3 --network residual",
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_fitted_and_a_report_gives_the_command_back(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = call(f"fit {SMALL} --epochs 1 {PARTS[name]} --out {folder}")
    assert done.exit_code == 0, done.output
    first, second = done.stdout.splitlines()
    following = "report" if name == "sparse" else "evaluate"
    assert second.endswith(f"next: pyro-vae {following} {folder}")
    assert ("objective " in first) == (name == "sparse")
    commands = reproduce_commands(load_run(folder)).replace("\\\n", " ").splitlines()
    assert any(" evaluate " in command for command in commands) == (name != "sparse")
    words = shlex.split(commands[0])
    words[words.index("--out") + 1] = str(tmp_path / "again")
    done = CliRunner().invoke(cli.app, words[1:])
    assert done.exit_code == 0, done.output
    before, after = weights(folder), weights(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_autoencoder_says_what_it_has_not(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert call(f"fit {SMALL} --epochs 1 --model undercomplete --out {folder}").exit_code == 0
    assert "so its objective is a MAP objective" in refused(f"evaluate {folder} --quiet")
    assert "no prior to draw from" in refused(f"sample {folder}")
    assert call(f"report {folder}").exit_code == 0


def test_data_that_are_no_images(tmp_path: Path) -> None:
    folder = tmp_path / "iris"
    line = f"fit --data iris --latent-dim 2 --hidden 4 --epochs 1 --threads 1 --out {folder}"
    assert call(line).exit_code == 0
    assert load_run(folder).config["model"]["arguments"]["likelihood"]["name"] == "gaussian"
    assert "are not images" in refused(f"sample {folder}")
    assert call(f"report {folder}").exit_code == 0


def test_data_are_listed_and_checked(tmp_path: Path) -> None:
    done = call(f"data list --data-root {tmp_path}")
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == list(dataset_names())
    assert done.stdout.splitlines()[1].endswith("yes (comes with scikit-learn)")
    assert done.stdout.splitlines()[3].endswith("  no")
    assert call("data check digits").exit_code == 0
    assert call(f"data check --data-root {tmp_path}").exit_code == 0
    assert call("data get iris").stdout.startswith("Dataset('iris'")


def test_the_doctor_says_what_is_installed() -> None:
    done = call("doctor")
    assert done.exit_code == 0, done.output
    said = dict(line.split(":", 1) for line in done.stdout.splitlines())
    assert said["torch"].split()[0] == torch.__version__
    assert "matches torch" in said["torchvision"]
    assert said["threads"].split()[0] == str(torch.get_num_threads())
    assert {"pyro_vae", "python", "others", "BLAS", "processor", "data"} < set(said)


def test_a_torchvision_of_another_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it then raises
    assert "does NOT match this torch" in call("doctor").stdout


# --- demo


@pytest.mark.long
def test_the_demo_makes_runs_and_a_report_twice(tmp_path: Path) -> None:
    lines: list[str] = []
    tables = []
    for _ in range(2):
        made = run_demo(
            tmp_path / "demo",
            hidden=(5,),
            epochs=1,
            num_particles=3,
            progress=False,
            say=lines.append,
        )
        tables.append(made.table())
        assert made.report.is_file()
        for run, found in zip(made.runs, made.evaluations, strict=True):
            assert load_result(run.path / "evaluation.nc").identical(found)
            assert (run.path / "figures" / "bound.png").is_file()
    assert [run.path.name for run in made.runs] == ["vae-2", "vae-10"]
    assert tables[0] == tables[1]
    assert len(lines) == 2 * 5  # two trainings, two measurements, the report
    first = made.evaluations[0].quantity("elbo").value
    assert f"{first:.1f}"[:-1] in tables[0].splitlines()[1]


# --- how it ends


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Has a signal sent to this process in the n-th step of SVI from now on."""

    def send(number: int, at: int) -> None:
        steps, real = iter(range(1, at + 1)), SVI.step

        def step(self: SVI, *args: Any, **kwargs: Any) -> Any:
            if next(steps, 0) == at:
                os.kill(os.getpid(), number)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(SVI, "step", step)

    return send


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_a_training_after_its_step_and_the_same_line_goes_on(
    name: str, status: int, run: Path, tmp_path: Path, sent: Callable[[int, int], None]
) -> None:
    folder, number = tmp_path / "run", getattr(signal, name)
    before = signal.getsignal(number)
    sent(number, 3)  # of two a epoch
    line = f"fit {SMALL} --epochs 2"
    done = call(f"{line} --out {folder}")
    assert done.exit_code == status, done.output
    assert f"pyro-vae fit --resume {folder}\n" in done.stderr
    assert signal.getsignal(number) is before
    _, metadata = load_tensors(folder / "training.safetensors")
    assert (metadata["state"]["epoch"], metadata["state"]["position"]) == (1, 1)
    assert call(f"{line} --resume {folder}").exit_code == 0
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(folder).items())


def test_a_line_with_resume_starts_a_run_and_leaves_a_finished_one(
    run: Path, tmp_path: Path
) -> None:
    line = f"fit {SMALL} --epochs 2 --resume {tmp_path / 'run'}"
    assert call(line).exit_code == 0
    assert all(torch.equal(v, weights(run)[n]) for n, v in weights(tmp_path / "run").items())
    again = call(line.replace("--quiet", ""))
    assert again.exit_code == 0
    assert "nothing is left to train: 2 epochs were made before" in again.stderr
    assert "trained with latent_dim 2, not 3" in refused(line.replace("dim 2", "dim 3"))


def test_an_interrupted_demo_measures_nothing_and_leaves_no_report(
    tmp_path: Path, sent: Callable[[int, int], None]
) -> None:
    (tmp_path / "report.html").write_text("of an earlier demo")
    sent(signal.SIGINT, 2)
    done = call(f"demo --out {tmp_path}")
    assert done.exit_code == 130
    assert "Test set" not in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["vae-2"]


def test_without_a_terminal_a_stage_is_a_line(run: Path, tmp_path: Path) -> None:
    line = f"fit {SMALL} --epochs 2 --out"
    quiet = call(f"{line} {tmp_path / 'a'}").stderr.splitlines()
    told = call(f"{line} {tmp_path / 'b'}".replace("--quiet", "")).stderr.splitlines()
    assert len(quiet) == 1  # what is trained
    assert told == [
        "reading digits ...",
        *quiet,
        "training: 2 epochs of 2 steps on 1 thread",
    ]


@pytest.mark.long
def test_ctrl_c_keeps_what_was_reached(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    line = f"fit {SMALL} --epochs 100000 --batch-size 40"
    command = [sys.executable, "-m", "pyro_vae", *shlex.split(line)]
    process = subprocess.Popen(
        [*command, "--patience", "0", "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "importing torch ...\n"  # at once, as that takes long
    lines = iter(process.stderr.readline, "")
    assert any(line.startswith("VAE 64-6-2, bernoulli likelihood, on Dataset(") for line in lines)
    history, deadline = folder / "history.jsonl", time.monotonic() + 60
    while not (history.exists() and history.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)  # training is under way once an epoch lies there
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"pyro-vae fit --resume {folder}" in stderr
    assert "Traceback" not in stderr
    _, metadata = load_tensors(folder / "training.safetensors")
    done = metadata["state"]["epoch"]
    assert 0 < done < 100_000
    again = call(f"fit --resume {folder} --epochs {done + 1} --threads 1 --quiet")
    assert again.exit_code == 0, again.output
    assert f"finished after {done + 1} epochs" in again.stdout
