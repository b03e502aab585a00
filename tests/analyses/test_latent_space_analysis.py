"""The analysis of latent spaces runs from its command line and writes what it says."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pyro import poutine

from analyses import latent_space
from analyses.latent_space import connection, main
from analyses.latent_space.connection import LINES, STEPS, programs, sample_rows
from analyses.latent_space.uses import features_verdict, patches
from analyses.latent_space.work import compared, percent
from pyro_vae import VAE, log_evidence
from pyro_vae.data import DatasetError
from pyro_vae.extras.latents import feature_quality
from pyro_vae.extras.samples import precision_recall
from pyro_vae.extras.samples.neighbours import PrecisionRecall
from pyro_vae.inference.programs import ProgramError
from pyro_vae.results import load_result

FIGURES = (
    "manifold",
    "paths",
    "attributes",
    "units",
    "features",
    "compression",
    "connection",
)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.float32
def test_main_writes_numbers_figures_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "latent"
    assert main(["--tiny", "--no-progress", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.count("## ") == len(FIGURES)
    assert "a point has no density" in said
    names = {path.name for path in out.iterdir()}
    assert {f"{name}.png" for name in FIGURES} <= names
    assert {path.stem for path in out.glob("*.nc")} == {
        "attribute_1",
        "attribute_2",
        "attribute_3",
        "compression",
        "features",
        "history_VAE",
        "history_autoencoder",
        "history_with_the_prior_N_I",
        "paths_VAE_2_latents",
        "paths_VAE_3_latents",
        "paths_autoencoder_3_codes",
        "surgery",
        "units",
    }
    bounds = [
        load_result(out / f"history_{name}.nc")["bound"].attrs["bound"]
        for name in ("autoencoder", "with_the_prior_N_I", "VAE")
    ]
    assert bounds == ["objective", "objective", "lower"]
    paths = load_result(out / "paths_VAE_2_latents.nc")
    assert bool((paths["length"] <= paths["straight_length"]).all())
    page = (out / "report.html").read_text()
    assert page.count("<figure>") == len(FIGURES)
    assert "prior.mask(False) if flat else prior" in page


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "--data {digits,mnist,fashion_mnist,frey_face}" in said
    assert "attribute vectors" in said


@pytest.mark.parametrize("missing", ["mnist", "fashion_mnist"])
def test_missing_files_are_told_before_anything_is_trained(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(name: str, root: str | None) -> SimpleNamespace:
        if name == missing:
            raise DatasetError(f"file of data set {name!r} is missing.")
        return SimpleNamespace(name=name)

    monkeypatch.setattr(latent_space, "load_dataset", load)
    monkeypatch.setattr(latent_space, "run", pytest.fail)
    assert main(["--data", "mnist", "--tiny"]) == 2  # compared with fashion_mnist at the end
    said = capsys.readouterr().err
    assert missing in said
    assert "pyro-vae data get NAME, or --root FOLDER" in said


# --- from the autoencoder to the VAE


@pytest.fixture
def networks() -> VAE:
    return VAE(6, 2, (5,), likelihood={"name": "gaussian", "scale": 0.7})


def score(networks: VAE, name: str, x: torch.Tensor) -> torch.Tensor:
    """log p(x, z) - log q(z | x) of the step's own draw."""
    point, flat = STEPS[name]
    model, guide = programs(networks, point=point, flat=flat)
    drawn = poutine.trace(guide).get_trace(x)
    return (
        poutine.trace(poutine.replay(model, trace=drawn)).get_trace(x).log_prob_sum()
        - drawn.log_prob_sum()
    )


def test_the_autoencoder_scores_its_squared_error_alone(networks: VAE) -> None:
    x = torch.randn(4, 6)
    with torch.no_grad():
        error = (x - networks.reconstruct(x)).square().sum()
        constant = 24 * torch.tensor(0.7 * (2 * torch.pi) ** 0.5).log()
        wanted = -error / (2 * 0.7**2) - constant
        torch.testing.assert_close(score(networks, "autoencoder", x), wanted)
        codes = networks.encode(x).mean
        prior = -codes.square().sum() / 2 - 4 * torch.tensor(2 * torch.pi).log()
        torch.testing.assert_close(score(networks, "with the prior N(0, I)", x), wanted + prior)


def test_only_the_vae_has_an_evidence(networks: VAE) -> None:
    x = torch.randn(4, 6)
    for name, (point, flat) in STEPS.items():
        model, guide = programs(networks, point=point, flat=flat)
        if name == "VAE":
            found = log_evidence(model, guide, x, num_particles=10, progress=False)
            assert found.quantity("log_evidence").bound == "lower"
            continue
        with pytest.raises(ProgramError, match="MAP objective"):
            log_evidence(model, guide, x, num_particles=10, progress=False)


def test_the_lines_of_the_table_are_those_of_the_program() -> None:
    source = (Path(__file__).parents[2] / "analyses" / "latent_space" / "connection.py").read_text()
    body = source.split("def programs")[1].split("return model, guide")[0]
    for line in LINES:
        for name in ("autoencoder", "VAE"):
            argument = line[name].split('"z", ')[1].removesuffix(")")
            assert argument in body


def test_pictures_are_counted_against_as_many_data(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def count(pictures: torch.Tensor, data: torch.Tensor) -> PrecisionRecall:
        sizes.append((len(pictures), len(data)))
        return precision_recall(pictures, data)

    monkeypatch.setattr(connection, "precision_recall", count)
    x, test = torch.randn(50, 3), torch.randn(21, 3)
    test[10:] += 30.0  # of another writer
    work: Any = SimpleNamespace(x=x, test=test, settings=SimpleNamespace(num_samples=40))
    rows = sample_rows(work, {"samples": torch.randn(40, 3)})
    assert [row["pictures"] for row in rows] == ["test data", "samples"]
    assert sizes == [(21, 21), (21, 21)]
    work.settings.num_samples = 10
    rows = sample_rows(work, {})
    assert rows[0]["distance from data / test data's"].startswith("0.9")  # half of either writer


# --- words and data


def test_words_follow_the_numbers() -> None:
    words = ("more", "less", "same")
    assert [compared(d, 0.1, *words) for d in (0.3, -0.3, 0.19, -0.19)] == [
        "more",
        "less",
        "same",
        "same",
    ]
    assert percent(0.12345, 0.0123) == "12.3 ± 1.2 %"


def test_a_verdict_names_what_is_better_and_what_is_worse() -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(90) % 3
    good = 9 * np.eye(3)[labels] + generator.normal(size=(90, 3))
    poor = 3 * np.eye(3)[labels] + generator.normal(size=(90, 3))
    none = generator.normal(size=(90, 3))
    sets = {"PCA": poor, "raw pixels": good, "fine": good, "useless": none}
    found = feature_quality(
        {name: [(codes, codes)] for name, codes in sets.items()}, labels, labels, num_bootstrap=50
    )
    first, second = features_verdict(found, 3).split("; ")
    for text in (first, second):
        assert "fine is better than PCA's" in text
        assert "useless worse" in text
        assert "all pixels are better than PCA's" in text


def test_patches_for_training_and_test_come_from_other_places() -> None:
    train, test = patches((4, 3), 7, False, 0), patches((4, 3), 6, True, 0)
    assert train.shape == (7, 12)
    assert test.shape == (6, 12)
    assert train.dtype == torch.float32
    assert float(torch.cat([train, test]).min()) >= 0
    assert float(torch.cat([train, test]).max()) <= 1
    torch.testing.assert_close(train, patches((4, 3), 7, False, 0), rtol=0, atol=0)
    assert not torch.equal(train[:6], test)
