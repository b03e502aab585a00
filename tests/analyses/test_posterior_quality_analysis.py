"""The analysis of posteriors runs from its command line and writes what it says."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from analyses.posterior_quality import CASES, TINY, extend, main, train_guide, with_compared
from analyses.posterior_quality.figures import Grid, chosen_data, on_grid
from analyses.posterior_quality.verdict import (
    Case,
    Measured,
    of_base,
    of_best,
    of_change,
    row_of,
    verdicts,
)
from pyro_vae import VAE
from pyro_vae.results import Result, label, load_result, make_result

FIGURES = ("table", "khat", "posteriors", "mended", "calibration", "coverage", "worst")


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.float32
def test_main_writes_numbers_figures_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "quality"
    assert main(["--tiny", "--no-progress", "--case", "full covariance", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.count("## ") == len(FIGURES) + 1
    assert "held-out data the base's draws may be used as they are for" in said
    names = {path.name for path in out.iterdir()}
    results = {"base.nc", "longer.nc", "full_covariance.nc", "reference.nc"}
    assert names == {*(f"{name}.png" for name in FIGURES), *results, "report.html"}
    found = load_result(out / "base.nc")
    assert {"khat", "trust_guide", "mean_error", "c2st_accuracy", "ranks"} <= set(found.data_vars)
    assert (out / "report.html").read_text().count("<figure>") == len(FIGURES)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "--data {digits,mnist}" in said
    assert "not whether the guide is" in said


def test_an_unknown_guide_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--case", "no such"]) == 2
    assert "there is no guide 'no such'; choose from 'longer'" in capsys.readouterr().err


def test_every_change_is_against_a_guide_that_is_there() -> None:
    titles = ["base", *(case.title for case in CASES)]
    for place, case in enumerate(CASES):
        assert case.against in titles[: place + 1]
    assert with_compared(["importance-weighted"]) == {
        "importance-weighted",
        "less noise",
        "longer",
        "base",
    }


# --- guides and grids


def test_a_full_covariance_starts_as_the_diagonal_guide() -> None:
    base, full = VAE(6, 2, (5,)), VAE(6, 2, (5,), posterior="full")
    extend(full.encoder, base.encoder)
    x = torch.bernoulli(torch.full((3, 6), 0.5))
    ours, theirs = full.encode(x), base.encode(x)
    torch.testing.assert_close(ours.mean, theirs.mean)
    torch.testing.assert_close(ours.variance, theirs.variance)
    assert any(bool((p != 0).any()) for p in full.encoder.parameters())


def test_only_the_guide_is_trained_further() -> None:
    base = VAE(6, 2, (5,))
    x = torch.bernoulli(torch.full((30, 6), 0.5))
    before = [p.clone() for p in base.parameters()]
    case = Case("all", "base", "all", posterior="full", estimator="DReG", simulated=True)
    vae = train_guide(case, base, x, TINY, False)
    for own, other in zip(vae.decoder.parameters(), base.decoder.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)
        assert own.requires_grad
    for now, then in zip(base.parameters(), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)
    moved = zip(vae.encoder.parameters(), base.encoder.parameters(), strict=True)
    assert all(bool((own[: len(other)] != other).any()) for own, other in moved)


def test_a_grid_holds_the_exact_posterior() -> None:
    """A linear decoder of real data: the posterior is normal, in closed form."""
    vae = VAE(4, 2, (), likelihood={"name": "gaussian", "scale": 0.8})
    x = torch.randn(3, 4)
    with torch.no_grad():
        shift = vae.decoder(torch.zeros(1, 2))[0]
        weight = (vae.decoder(torch.eye(2)) - shift).T
        precision = torch.eye(2) + weight.T @ weight / 0.64
        wanted = torch.linalg.solve(precision, weight.T @ (x[1] - shift) / 0.64)
        spread = torch.linalg.cholesky(torch.linalg.inv(precision))
        draws = wanted + torch.randn(2, 500, 1, 2) @ spread.T
        # All that it takes of a reference are its draws; those of the first datum are elsewhere.
        reference: Any = SimpleNamespace(unconstrained=torch.cat([draws + 9, draws], 2))
        found = on_grid(vae, x, 1, reference, 81)
        q = vae.encode(x[1:2])
        points = torch.stack([found.across[[7, 60]], found.up[[11, 30]]], -1)
        values = q.log_prob(points[:, None])[:, 0]
    torch.testing.assert_close(found.log_guide[[11, 30], [7, 60]], values)
    assert found.log_joint.shape == found.log_guide.shape == (81, 81)
    # The box reaches 1.3 times as far as the 99.6 % of the draws, beyond 3.7 sds.
    mean, sd = found.moments()
    torch.testing.assert_close(mean, wanted, atol=2e-3, rtol=0)
    torch.testing.assert_close(sd, torch.linalg.inv(precision).diagonal().sqrt(), rtol=0.01, atol=0)


def test_an_error_of_draws_is_in_posterior_sds() -> None:
    across, up = torch.linspace(-8.0, 12.0, 201), torch.linspace(-5.0, 5.0, 101)
    log_joint = -((across - 2) ** 2 / 8 + up[:, None] ** 2 / 0.5)
    draws = torch.tensor([[2.0, 0.0], [5.0, 0.0]])
    grid = Grid(across, up, log_joint, log_joint, draws)
    assert grid.error_of_draws() == pytest.approx(1.5 / 2, rel=1e-3)


# --- words


def made(
    title: str,
    *,
    trust: list[bool],
    kl: list[float],
    khat: list[float],
    p: float = 0.5,
    **case: Any,
) -> Measured:
    size = len(kl)
    pure = label(unit="none", reduction="per datum", bound="none", num_particles=1000)
    nats = label(unit="nats", reduction="per datum", bound="lower", num_particles=1000)
    other = label(unit="none", reduction="none", bound="exact")
    steady = np.full((size, 2), 0.125)
    variables: dict[str, Any] = {
        "khat": ("datum", khat, pure),
        "kl_guide_posterior": ("datum", kl, nats),
        "trust_guide": ("datum", trust, {}),
        "trust_weights": ("datum", [True] * size, {}),
        "trustworthy": ("datum", trust, {}),
        "reference_converged": ("datum", [True] * (size - 1) + [False], {}),
        "c2st_accuracy": ("datum", np.full(size, 0.5), pure),
        "mean_error": (("datum", "latent"), -2 * steady, pure),
        "scale_error": (("datum", "latent"), steady, pure),
        "coverage": (("level", "latent"), [[0.5, 0.4], [0.91, 0.84]], other),
        "ecdf_p_value": ("latent", [0.123, 1e-12], other),
        "log_joint_p_value": ((), 0.04, other),
        "tarp_p_value": ((), 0.6, other),
        "overall_p_value": ((), p, other),
    }
    quality: Result = make_result(
        variables,
        function="posterior_quality",
        config={},
        seed=0,
        data_sha256=None,
        coords={"latent": ["z[0]", "z[1]"], "level": [0.5, 0.9], "datum": range(size)},
    )
    given = {"against": "base", "change": "a change", **case}
    return Measured(Case(title, **given), VAE(4, 2, (3,)), quality, 1.0)


@pytest.fixture
def base() -> Measured:
    kl = [1.0, 1.1, 0.9, 1.0, 1.2, 0.8]
    return made("base", trust=[False] * 5 + [True], kl=kl, khat=[0.1, 0.2, 0.9, 0.3, 0.2, 0.1])


def test_a_row_has_the_numbers(base: Measured) -> None:
    row = row_of(base)
    assert row["as is, %"] == "17 ± 15"
    assert row["KL(q || p)"] == "1.000 ± 0.058"  # sd of the six is 0.1414
    assert row["mean error"] == "0.25 ± 0.00"
    assert row["sd ratio"] == f"{math.exp(0.125):.2f}"
    assert row["90 % covers"] == "91, 84"
    assert row["p, latents"] == "0.12, <1e-9"


def test_a_change_mends_what_moves_beyond_its_error(base: Measured) -> None:
    kl = [0.5, 0.61, 0.4, 0.5, 0.71, 0.3]  # lower by half for each datum
    khat = [0.1, 0.9, 0.1, 0.3, 0.1, 0.2]  # here and there
    after = made("after", trust=[True] * 6, kl=kl, khat=khat)
    said = of_change(after, base, 3.0)
    assert said.startswith("A change (against base): improves ")
    mended, rest = said.split(". It does not clearly move ")
    assert "KL(q || p) (1.000 to 0.503)" in mended
    assert "the share of data whose draws may be used as they are (17% to 100%)" in mended
    assert "k-hat" in rest
    said = of_change(base, after, 3.0)
    assert "worsens" in said
    assert "improves" not in said


def test_khat_is_held_against_what_it_lets_through(base: Measured) -> None:
    # Five data pass by k-hat; the reference of one did not converge; none of the other four is
    # trusted.
    said = " ".join(of_base(base.quality))
    assert "17%, importance-weighted draws for 100%" in said
    assert "at most 0.67 for 83% of the data; of these, where HMC converged, 100% have" in said


def test_the_verdict_names_the_calibrated_and_the_best(base: Measured) -> None:
    bad = made("bad", trust=[True] * 6, kl=[1.0] * 6, khat=[0.1] * 6, p=1e-5)
    said = verdicts([base, bad])
    assert any("miscalibrated: bad (p = 1e-05); no miscalibration found: base" in s for s in said)
    assert of_best([base, bad])[0] == (
        "For draws as they are, most data can be trusted under bad (100%); under the base it was "
        "17%."
    )
    assert any("HMC did not converge for 1 of 6" in s for s in said)


def test_best_median_and_worst_are_by_their_number(base: Measured) -> None:
    chosen = chosen_data(base.quality)
    assert chosen["KL(q || p)"] == {"best": 5, "median": 0, "worst": 4}
    assert chosen["k-hat"] == {"best": 0, "median": 1, "worst": 2}
