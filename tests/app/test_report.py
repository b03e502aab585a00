"""A report says what was measured, needs nothing from outside, and lets nothing in."""

import base64
import json
import re
import shutil
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pyro_vae import LinearGaussian, fit
from pyro_vae.app.report import (
    comparison_rows,
    run_figures,
    save_figures,
    write_report,
)
from pyro_vae.app.reproduce import reproduce_commands
from pyro_vae.models import ModelSpec
from pyro_vae.runs import (
    Run,
    RunSettings,
    evaluate_run,
    load_evaluation,
    load_run,
    load_run_data,
    load_training_data,
    start_run,
)

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small runs on digits, evaluated with different numbers of particles."""
    folder = tmp_path_factory.mktemp("runs")
    digits = load_training_data("digits", binarization="dynamic")
    for latent_dim in (2, 3):
        start_run(
            folder / f"vae-{latent_dim}",
            digits,
            ModelSpec(latent_dim=latent_dim, hidden=(6,)),
            RunSettings(epochs=1, batch_size=700),
            progress=False,
        )
        run = load_run(folder / f"vae-{latent_dim}")
        evaluate_run(run, num_particles=30, num_data=20, progress=False)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Run:
    """A copy, which a test may spoil."""
    return load_run(shutil.copytree(made / "vae-2", tmp_path / "vae-2"))


class Page(HTMLParser):
    """The tags of a page, its text, and what it would load."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "br", "link"):
            self.opened.append(tag)
        self.references += [
            v or "" for k, v in attrs if k in ("src", "href", "srcset", "action", "data", "poster")
        ]

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_report_holds_all_it_shows(made: Path, tmp_path: Path) -> None:
    path = write_report([made / "vae-2", made / "vae-3"], tmp_path / "both.html")
    page = Page(path)
    assert page.opened == []
    assert not re.search(
        r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[^\"]+", "", page.source)
    )
    assert "script" not in page.tags
    assert "link" not in page.tags
    # Bound, evidence, reconstructions, latents and samples; a manifold for two latents only.
    assert len(page.references) == 5 + 6
    for reference in page.references:
        kind, _, content = reference.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content).startswith(PNG)
    assert all(image.count('alt="') == 1 for image in re.findall(r"<img [^>]*>", page.source))


def test_a_report_says_what_was_measured(run: Run) -> None:
    found = load_evaluation(run)
    assert found is not None
    path = write_report(run)
    assert path == run.path / "report.html"
    text = " ".join(Page(path).text.split())
    elbo = found.quantity("elbo")
    assert f"{elbo.value:.2f}"[:-1] in text
    for sentence in found.summary().splitlines():
        assert sentence.removeprefix("Note: ") in text
    for part in ("VAE 64-6-2", "binary pixels", "20 binary", "every 10th training datum"):
        assert part in text
    assert run.config["data"]["sha256"][:16] in text


def test_runs_are_compared_on_the_same_data(made: Path, tmp_path: Path) -> None:
    runs = [load_run(made / f"vae-{k}") for k in (2, 3)]
    results = [load_evaluation(run) for run in runs]
    assert results[0] is not None
    assert results[1] is not None
    difference = float(results[1].elbo.mean() - results[0].elbo.mean())
    text = " ".join(Page(write_report(runs, tmp_path / "r.html")).text.split())
    (said,) = re.findall(r"ELBO: vae-3 minus vae-2 is (\S+) ± (\S+) nats per datum", text)
    assert float(said[0]) == pytest.approx(difference, abs=float(said[1]))
    paired = float((results[1].elbo - results[0].elbo).std(ddof=1)) / 20**0.5
    # Of 20 data: Student's t at least, and no more than a fifth above it for their skewness.
    student = paired * 2.093 / 1.960
    assert 0.95 * student <= float(said[1]) <= 1.2 * student
    assert "standard error over the 20 data, paired" in text
    assert "training seeds are not in it" in text
    # What every run would say again is said once, with their names.
    assert text.count("are blind to a mode that the guide never visits. vae") == 0
    blind = "vae-2, vae-3: k-hat, ESS and every importance estimate are blind"
    assert text.count(blind) == text.count("ESS and every importance estimate are blind") == 1
    rows = comparison_rows([(runs[0], results[0]), (runs[1], results[1])])
    assert [row["name"] for row in rows] == ["vae-2", "vae-3"]
    bad = int((~results[0].error_reliable.values).sum())
    assert bad > 0
    assert rows[0]["log_evidence"].endswith("?")
    assert not rows[0]["elbo"].endswith("?")
    assert rows[0]["unreliable"] == f"{bad} of 20 data"


def test_unlike_numbers_are_not_subtracted(made: Path, run: Run, tmp_path: Path) -> None:
    evaluate_run(run, num_particles=30, num_data=7, progress=False)
    text = Page(write_report([made / "vae-3", run], tmp_path / "r.html")).text
    assert "vae-2 minus vae-3" not in text
    assert "evaluate both on the same data" in text


def test_markup_in_names_is_text(made: Path, tmp_path: Path) -> None:
    evil = tmp_path / "<script>alert(1)<"
    shutil.copytree(made / "vae-2", evil)
    path = evil / "config.json"
    config = json.loads(path.read_text())
    config["data"]["name"] = '"><img src="http://example.org/x" onerror=alert(2)>'
    path.write_text(json.dumps(config))
    target = write_report(evil, tmp_path / "r.html", title="<b>bold</b> & more")
    page = Page(target)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert unescape("&lt;b&gt;bold&lt;/b&gt; &amp; more") in page.text
    assert "<script>alert(1)<" in page.text


def test_what_is_missing_is_said(run: Run) -> None:
    (run.path / "evaluation.nc").unlink()
    text = Page(write_report(run)).text
    assert "for this run: it was not evaluated. Run pyro-vae evaluate" in " ".join(text.split())
    assert "Nothing was measured on test data yet" in text


def test_numbers_of_other_weights_are_left_out(made: Path, run: Run) -> None:
    shutil.copy(made / "vae-3" / "evaluation.nc", run.path / "evaluation.nc")
    assert "the weights have changed since" in Page(write_report(run)).text


def test_figures_of_missing_data_are_left_out(run: Run) -> None:
    path = run.path / "config.json"
    config = json.loads(path.read_text())
    config["data"]["sha256"] = "0" * 64
    path.write_text(json.dumps(config))
    page = Page(write_report(run.path))
    assert "Figures that show data are left out" in page.text
    assert len(page.references) == 4  # bound, evidence, manifold, samples


def test_classes_are_named_only_where_there_are_some(run: Run) -> None:
    data = load_run_data(run)
    unlabelled = replace(data, train_labels=None, test_labels=None, label_names=None)
    for dataset, named in ((data, True), (unlabelled, False)):
        captions = {f.name: f.caption for f in run_figures(run, dataset)}
        assert ("The model did not see the classes" in captions["latent"]) == named
        for name in ("reconstructions", "manifold", "samples"):
            assert captions[name].endswith("0 is white and 1 is black.")


def test_no_line_of_the_commands_is_wider_than_its_longest_option(run: Run) -> None:
    path = run.path / "config.json"
    config = json.loads(path.read_text())
    config["fit"]["epochs"] = "9" * 100
    path.write_text(json.dumps(config))
    command = reproduce_commands(load_run(run.path)).split("\npyro-vae")[0]
    lines = command.split(" \\\n    ")
    assert [line for line in lines if len(line) > 95] == [f"--epochs {'9' * 100}"]
    assert len(lines) < 12  # several options share a line


def test_a_run_of_the_callers_data_is_reported(tmp_path: Path) -> None:
    model = LinearGaussian(data_dim=5, latent_dim=2).double()
    x = model.sample(40)
    fit(model.model, model.guide, x, epochs=1, checkpoint=tmp_path / "run", progress=False)
    page = Page(write_report(tmp_path / "run"))
    assert "LinearGaussian 5-2 on data of the caller" in page.text
    assert "trained by a script on data of its own" in page.text
    assert len(page.references) == 1
    assert reproduce_commands(load_run(tmp_path / "run")) == ""


def test_an_autoencoder_is_reported_as_what_it_is(made: Path, tmp_path: Path) -> None:
    digits = load_training_data("digits")
    spec = ModelSpec("contractive", latent_dim=2, hidden=(5,))
    start_run(tmp_path / "run", digits, spec, RunSettings(epochs=1))
    page = Page(write_report(tmp_path / "run"))
    text = " ".join(page.text.split())
    assert "contractive Autoencoder 64-5-2" in text
    assert "MAP objective, no bound" in text
    assert "held-out MAP objective was best" in text
    assert "kind contractive:strength=0.1" in text
    assert "neither an ELBO nor an evidence estimate exists" in text
    assert "pyro-vae evaluate" not in text
    assert "Gap" not in text
    assert "standard normal" not in text
    names = [shown.name for shown in run_figures(load_run(tmp_path / "run"), digits)]
    assert names == ["bound", "reconstructions", "latent"]
    both = Page(write_report([tmp_path / "run", made / "vae-2"], tmp_path / "both.html"))
    assert "A variational autoencoder describes" in both.text
    assert "An autoencoder squeezes" in both.text


def test_parts_and_objective_are_named(tmp_path: Path) -> None:
    digits = load_training_data("digits")
    start_run(
        tmp_path / "run",
        digits,
        ModelSpec(
            "two_layer",
            latent_dim=4,
            hidden=(6,),
            likelihood="categorical",
            prior={"name": "mixture", "num_components": 3},
        ),
        RunSettings(objective={"name": "BetaELBO", "beta": 2.0}, epochs=1),
        progress=False,
    )
    text = " ".join(Page(write_report(tmp_path / "run")).text.split())
    assert "TwoLayerVAE 64-6-4-3-2" in text
    assert "likelihood categorical:levels=17; prior mixture:num_components=3; posterior" in text
    assert "BetaELBO(beta=2.0), an objective that is not a bound" in text
    assert "grey levels on a grid, so the numbers are log probabilities" in text
    assert "standard normal around" not in text  # is not the prior of what the encoder gives


def test_a_report_needs_a_run_and_a_place(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run to report on"):
        write_report([])
    with pytest.raises(ValueError, match=r"pass path=FILE\.html"):
        write_report([run, run])
    with pytest.raises(FileNotFoundError, match="make it first"):
        write_report(run, tmp_path / "no" / "r.html")


def test_figures_are_saved_under_their_names(run: Run, tmp_path: Path) -> None:
    figures = run_figures(run, load_run_data(run), load_evaluation(run))
    paths = save_figures(figures, tmp_path / "figures")
    names = ["bound", "evidence", "reconstructions", "latent", "manifold", "samples"]
    assert [path.name for path in paths] == [f"{name}.png" for name in names]
    assert all(path.read_bytes().startswith(PNG) for path in paths)
    assert all(shown.caption for shown in figures)


@pytest.mark.parametrize("part", ["config", "nothing"])
def test_the_template_is_strict(run: Run, part: str) -> None:
    kept: Any = dict(run.config)
    if part == "config":
        kept.pop("fit")
        (run.path / "config.json").write_text(json.dumps(kept))
        assert Page(write_report(run.path)).opened == []
    else:
        assert Page(write_report(run)).opened == []
