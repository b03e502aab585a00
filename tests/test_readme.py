"""The README's example runs, and prints what the README says."""

import re
from pathlib import Path

import pyro
import pytest
import torch

from pyro_vae import fit, plots
from pyro_vae.inference.estimators import estimator_names

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_coin_prints_its_exact_posterior(capsys):
    exec(compile(EXAMPLES[0], "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == "{'alpha_q': 16.0, 'beta_q': 14.0}"
    assert "# {'alpha_q': 16.0, 'beta_q': 14.0}" in EXAMPLES[0]


@pytest.mark.float32
def test_the_example_prints_what_is_shown_and_agrees_with_the_exact_evidence(capsys):
    code = EXAMPLES[1]
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    shown = {name: float(re.search(rf"{name} +(-?[0-9.]+)", README)[1]) for name in ("elbo", "gap")}
    for name, value in shown.items():  # other threads and processors change the last digits
        assert float(re.search(rf"{name} +(-?[0-9.]+)", printed)[1]) == pytest.approx(
            value, abs=0.01
        )
    found = re.search(r"log_evidence +(-[0-9.]+) +([0-9.]+) ", printed)
    value, error = float(found[1]), float(found[2])
    rate = names["reached"].parameters["rate"]
    exact = torch.distributions.NegativeBinomial(2.0, probs=1 / (1 + rate)).log_prob(names["x"])
    assert abs(value - float(exact.mean())) < 4.5 * error < 0.001  # the error holds, and is small
    assert float(re.search(r"exact value is known: (-[0-9.]+)", README)[1]) == pytest.approx(
        float(exact.mean()), abs=0.005
    )


@pytest.mark.float32
def test_the_pair_with_a_global_latent_trains_on_mini_batches():
    code = EXAMPLES[2]
    names = {"pyro": pyro, "torch": torch, "dist": pyro.distributions}
    exec(compile(code, "README.md", "exec"), names)
    reached = fit(names["model"], names["guide"], torch.randn(1000), batch_size=100, epochs=1)
    assert (reached.parameters["locs"].abs() > 5e-4).all()  # Adam's first step is its rate, 1e-3
    assert reached.parameters["locs"].abs().max() < 1.1e-3


@pytest.mark.float32
def test_the_mixture_has_no_gap_but_that_of_its_global_latents():
    names = {}
    code = next(e for e in EXAMPLES if "def mixture" in e).replace("epochs=300", "epochs=3")
    exec(compile(code, "README.md", "exec"), names)
    assert names["gap"].local_gap.values.tolist() == [0.0] * 5
    assert float(names["gap"].global_gap) == pytest.approx(float(names["gap"].gap), abs=1e-5)


def test_the_search_prints_what_is_shown(capsys):
    code = EXAMPLES[-1]
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == re.search(r"^# (.*)$", code, re.M)[1]


def test_every_make_target_it_names_exists():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z_-]+)`", README):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_estimators_are_counted():
    words = {17: "seventeen", 18: "eighteen", 19: "nineteen", 20: "twenty"}
    assert f"bytes of {words[len(estimator_names())]} estimators" in README


def test_every_plot_has_a_line():
    page = (Path(__file__).parents[1] / "docs" / "plots.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", page, re.M)
    assert sorted(listed) == sorted(name for name in plots.__all__ if name.startswith("plot_"))
