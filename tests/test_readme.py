"""The README's example runs, and prints what the README says."""

import re
from pathlib import Path

import pytest
import torch

from pyro_vae import plots

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.float32
def test_the_example_prints_what_is_shown_and_agrees_with_the_exact_evidence(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    shown = {name: float(re.search(rf"{name} +(-?[0-9.]+)", README)[1]) for name in ("elbo", "gap")}
    for name, value in shown.items():  # other threads and processors change the last digits
        assert float(re.search(rf"{name} +(-?[0-9.]+)", printed)[1]) == pytest.approx(
            value, abs=0.01
        )
    rate = names["reached"].parameters["rate"]
    exact = torch.distributions.NegativeBinomial(2.0, probs=1 / (1 + rate)).log_prob(names["x"])
    assert float(re.search(r"exact value is known: (-[0-9.]+)", README)[1]) == pytest.approx(
        float(exact.mean()), abs=0.005
    )


def test_every_make_target_it_names_exists():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z_-]+)`", README):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_every_plot_has_a_line():
    page = (Path(__file__).parents[1] / "docs" / "plots.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", page, re.M)
    assert sorted(listed) == sorted(name for name in plots.__all__ if name.startswith("plot_"))
