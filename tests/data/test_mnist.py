"""One epoch on the real MNIST, through the command line, as a user would."""

import os
import re

import pytest
from typer.testing import CliRunner

from pyro_vae.app.cli import app
from pyro_vae.data import check_dataset
from pyro_vae.runs import load_run


def has_mnist():
    return bool(os.environ.get("PYRO_VAE_DATA")) and all(
        status == "ok" for _, status in check_dataset("mnist")
    )


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.float32
@pytest.mark.skipif(not has_mnist(), reason="MNIST is not in the folder that PYRO_VAE_DATA names")
def test_one_epoch_on_mnist_learns_something(tmp_path):
    folder = str(tmp_path / "run")
    command = ["fit", "--data", "mnist", "--epochs", "1", "--threads", "1", "--out", folder]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    history = load_run(folder).history
    held_out = float(history.validation_bound[-1])
    # Independent pixels at their mean reach -206 nats; the VAE of 20 epochs reaches -103.
    assert -150 < held_out < -110
    few = ["evaluate", folder, "--num-data", "50", "--num-particles", "20", "--threads", "1"]
    done = CliRunner().invoke(app, few)
    assert done.exit_code == 0, done.output
    found = {
        n: float(re.search(rf"{n} +(-[0-9.]+)", done.output)[1]) for n in ("elbo", "log_evidence")
    }
    assert found["log_evidence"] > found["elbo"]
