"""The analyses of EM run from their command lines, and their figures show what they say."""

import math
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.patches import Circle, Ellipse
from scipy import special, stats

from analyses import em_gmm, em_to_vae, standardised
from analyses.em_to_vae import methods
from pyro_vae import VAE, GaussianMixture, fit_em
from pyro_vae.plots import (
    plot_bounds,
    plot_decoder,
    plot_evidence_parts,
    plot_half_steps,
    plot_mixture,
    plot_model_choice,
    plot_restarts,
)
from pyro_vae.results import label, load_result, make_result


@pytest.fixture(autouse=True)
def _no_pyplot_session():
    yield
    assert plt.get_fignums() == []


def mixture():
    """Two components of three features; the first is stretched along (1, 1) in features 0 and 2."""
    covariances = torch.stack([torch.eye(3), torch.diag(torch.tensor([4.0, 1.0, 0.25]))])
    covariances[0, 0, 2] = covariances[0, 2, 0] = 0.5
    locs = torch.tensor([[0.0, 9.0, 1.0], [5.0, 9.0, -1.0]])
    return GaussianMixture.from_parameters(torch.tensor([0.3, 0.7]), locs, covariances)


def made(variables, **coords):
    return make_result(
        variables, function="made up", config={}, seed=0, data_sha256=None, coords=coords
    )


# --- figures --------------------------------------------------------------------------------------


def test_ellipses_are_those_of_the_chosen_features():
    fitted = mixture()
    x, _ = fitted.sample(17)
    ax = plot_mixture(fitted, x, features=(0, 2), names=("a", "b", "c"))
    ellipses = [patch for patch in ax.patches if isinstance(patch, Ellipse)]
    assert len(ellipses) == 4
    # Eigenvalues 1.5 and 0.5 of [[1, 0.5], [0.5, 1]]: along the diagonal, in diameters.
    assert ellipses[0].width == pytest.approx(2 * math.sqrt(1.5))
    assert ellipses[0].height == pytest.approx(2 * math.sqrt(0.5))
    assert ellipses[0].angle % 180 == pytest.approx(45)
    assert ellipses[1].width == pytest.approx(2 * ellipses[0].width)
    assert ellipses[2].get_center() == (5.0, -1.0)
    assert (ellipses[2].width, ellipses[2].height) == pytest.approx((4.0, 1.0))
    assert ellipses[2].angle % 180 == pytest.approx(0)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("a", "c")


def test_data_have_the_mixed_colours_of_their_components():
    fitted = mixture()
    x = torch.cat([fitted.locs.detach(), torch.tensor([[2.0, 9.0, 0.0]])])
    ax = plot_mixture(fitted, x)
    colours = np.asarray(ax.collections[0].get_facecolor())[:, :3]
    edges = np.array([to_rgb(patch.get_edgecolor()) for patch in ax.patches[::2]])
    joint = np.log([0.3, 0.7]) + np.stack(
        [
            stats.multivariate_normal(m, c).logpdf(x.numpy())
            for m, c in zip(
                fitted.locs.detach().numpy(), fitted.covariances.detach().numpy(), strict=True
            )
        ],
        1,
    )
    np.testing.assert_allclose(colours, special.softmax(joint, 1) @ edges, atol=1e-12)
    assert np.abs(colours[2] - edges).min(1).max() > 0  # neither of the pure ones
    plain = plot_mixture(fitted, x, responsibilities=False).collections[0].get_facecolor()
    assert len(np.unique(plain, axis=0)) == 1


def test_the_staircase_has_a_line_for_each_half_step():
    x, _ = mixture().sample(40)
    history = fit_em(GaussianMixture(2, 3), x, max_iterations=5, tolerance=0).history
    ax = plot_half_steps(history, first=2, num_steps=5)
    evidence, *rest = ax.lines
    np.testing.assert_array_equal(evidence.get_ydata(), history.log_evidence[2:7])
    steps = rest[:4]
    for i, line in enumerate(steps):
        np.testing.assert_array_equal(line.get_ydata(), history.bound[2 + i : 4 + i])
    assert [line.get_linestyle() for line in steps] == ["--", "-", "--", "-"]  # M, E, M, E
    assert [text.get_text() for text in ax.get_xticklabels()] == [
        f"{phase}\n{iteration}" for phase, iteration in ("E1", "M2", "E2", "M3", "E3")
    ]


def parts(bound="exact"):
    nats = label(bound=bound)
    return made(
        {
            "log_evidence": ("stage", [-1.0, -1.0, -2.0], nats),
            "bound": ("stage", [-1.5, -1.0, -4.0], label(bound="lower")),
            "gap": ("stage", [0.5, 0.0, 2.0], nats),
        }
    )


def test_bars_add_up():
    ax = plot_evidence_parts(parts(), ["a", "b", "c"])
    elbo, kl = ax.containers
    ends = [bar.get_x() + bar.get_width() for bar in elbo]
    assert ends == pytest.approx([-1.5, -1.0, -4.0])
    assert [bar.get_x() for bar in kl] == pytest.approx(ends)
    assert [bar.get_x() + bar.get_width() for bar in kl] == pytest.approx([-1.0, -1.0, -2.0])
    assert len({bar.get_x() for bar in elbo}) == 1
    assert elbo[0].get_x() < -4.0
    texts = [text.get_text() for text in ax.texts]
    assert texts == ["-1.5000", "KL 0.5000", "-1.0000", "KL 0", "-4.0000", "KL 2.0000"]
    assert "KL ≥ 0.5000" in [
        text.get_text() for text in plot_evidence_parts(parts("lower"), ["a", "b", "c"]).texts
    ]


def bounds():
    plain = label(unit="none", reduction="none", bound="none")
    return made(
        {
            "bound": ("row", [-3.0, -2.0, -5.0, -4.0, -1.0], label(bound="lower")),
            "log_evidence": ("row", [-3.0, -2.0, -4.0, -3.0, -1.0], label(bound="exact")),
            "data_passes": ("row", [1.0, 2.0, 1.0, 2.0, 3.0], plain),
            "seconds": (
                "row",
                [0.1, 0.2, 0.3, 0.4, 0.5],
                label(unit="seconds", reduction="none", bound="none"),
            ),
        },
        method=("row", ["a", "a", "b", "b", "b"]),
    )


def test_bounds_have_a_line_for_each_method():
    ax = plot_bounds(bounds(), against="seconds")
    lines = {str(line.get_label()): line for line in ax.lines}
    lines = {name: line for name, line in lines.items() if not name.startswith("_")}
    assert set(lines) == {"a", "b"}
    np.testing.assert_array_equal(lines["b"].get_xdata(), [0.3, 0.4, 0.5])
    np.testing.assert_array_equal(lines["b"].get_ydata(), [-5.0, -4.0, -1.0])
    assert len(ax.lines) == 4  # log p(x) of each as well
    below = plot_bounds(bounds(), best=-1.0, legend=False)
    np.testing.assert_allclose(np.asarray(below.lines[0].get_ydata()), np.array([2.0, 1.0]))
    assert (
        np.asarray(below.lines[1].get_ydata())[-1] == 1e-10
    )  # the best itself, on a logarithmic axis
    assert below.get_legend() is None


def test_a_method_keeps_its_sign_in_every_figure():
    def sign(ax, name):
        (line,) = [line for line in ax.lines if line.get_label() == name]
        return line.get_color(), line.get_marker(), line.get_linestyle()

    both = plot_bounds(bounds())
    alone = bounds().isel(row=[2, 3, 4])
    assert sign(plot_bounds(alone, among=("a", "b")), "b") == sign(both, "b") != sign(both, "a")
    assert sign(plot_bounds(alone), "b") == sign(both, "a")


def test_starts_that_ended_alike_are_one_entry():
    paths = [[-5.0, -2.0, -1.0], [-4.0, -3.0, -1.0005], [-6.0, -2.5, -1.2], [-5.5, -2.0, -1.0001]]
    result = made(
        {"log_evidence": (("start", "iteration"), paths, label(bound="exact"))},
        iteration=[0, 1, 2],
    )
    ax = plot_restarts(result)
    legend = ax.get_legend()
    assert legend is not None
    assert [t.get_text() for t in legend.get_texts()] == ["-1.0000: 3 of 4", "-1.2000: 1 of 4"]
    assert len(ax.lines) == 4


def test_only_so_many_ends_have_a_name():
    ends = -np.arange(9.0)
    paths = np.stack([ends - 2, ends - 1, ends], 1)
    result = made({"log_evidence": (("start", "iteration"), paths, label(bound="exact"))})
    result = result.assign_coords(iteration=[0, 1, 2])
    legend = plot_restarts(result).get_legend()
    assert legend is not None
    texts = [t.get_text() for t in legend.get_texts()]
    assert len(texts) == 7
    assert texts[-1] == "lower: 3 of 9"


def test_the_lowest_criterion_is_ringed():
    values = [[900.0, 800.0, 810.0], [950.0, 790.0, 805.0]]
    result = made(
        {
            "bic": (
                ("covariance", "num_components"),
                values,
                label(reduction="total", bound="none"),
            )
        },
        covariance=["full", "tied"],
        num_components=[1, 2, 3],
    )
    ax = plot_model_choice(result)
    assert ax.get_title() == "Lowest: tied, K = 2"
    ring = ax.lines[-1]
    assert np.asarray(ring.get_xydata()).tolist() == [[2, 790.0]]


def test_circles_of_a_decoder_are_even_in_prior_probability():
    vae = VAE(2, 1, (3,), {"name": "gaussian", "scale": 0.25})
    ax = plot_decoder(vae, torch.randn(7, 2), num_components=5)
    circles = [patch for patch in ax.patches if isinstance(patch, Circle)]
    z = torch.as_tensor(stats.norm.ppf([0.1, 0.3, 0.5, 0.7, 0.9]))[:, None]
    np.testing.assert_allclose(
        [circle.get_center() for circle in circles], vae.decode(z).detach(), atol=1e-12
    )
    assert {circle.get_radius() for circle in circles} == {0.25}
    with pytest.raises(ValueError, match="1 latent"):
        plot_decoder(VAE(2, 2, (3,), "gaussian"), torch.randn(7, 2))


# --- analyses -------------------------------------------------------------------------------------


@pytest.mark.float32
def test_em_gmm_writes_results_figures_and_a_page(tmp_path, capsys):
    out = tmp_path / "gmm"
    arguments = ["--tiny", "--no-progress", "--data", "iris", "--out", str(out)]
    assert em_gmm.main(arguments) == 0
    said = capsys.readouterr().out
    assert "agreement with scikit-learn" in said
    assert {path.name for path in out.iterdir()} == {
        *(f"{name}.nc" for name in ("history", "restarts", "choice", "agreement")),
        *(f"{name}.png" for name in ("fit", "staircase", "optima", "choice")),
        "report.html",
    }
    agreement = load_result(out / "agreement.nc")
    np.testing.assert_allclose(agreement["ours"], agreement["scikit_learn"], rtol=1e-10)
    page = (out / "report.html").read_text()
    assert page.count('class="scroll formula"') == 5
    assert page.count("<figure") == 4


@pytest.mark.long
@pytest.mark.float32
def test_em_to_vae_writes_results_figures_and_a_page(tmp_path, capsys):
    out = tmp_path / "vae"
    arguments = ["--tiny", "--no-progress", "--data", "iris", "--out", str(out)]
    assert em_to_vae.main(arguments) == 0
    said = capsys.readouterr().out
    assert "amortised SVI" in said
    assert {path.name for path in out.iterdir()} == {
        *(f"{name}.nc" for name in ("bounds", "vae_bounds", "vae_ends")),
        *(f"{name}.png" for name in ("bounds", "models", "vae_bounds", "parts")),
        "report.html",
    }
    found = load_result(out / "bounds.nc")
    assert np.abs(found.log_evidence - found.bound - found.gap).max() < 1e-12
    assert list(dict.fromkeys(found["method"].values.tolist())) == [
        "exact EM", "generalised EM", "Monte-Carlo EM", "online EM", "enumerated gradient",
        "per-datum variational", "amortised SVI",
    ]  # fmt: skip
    starts = found.isel(row=found["method"].values == "exact EM").log_evidence[0]
    others = found.isel(row=found["method"].values == "generalised EM").log_evidence[0]
    assert float(starts) == pytest.approx(float(others), abs=1e-12)
    page = (out / "report.html").read_text()
    assert page.count("<figure") == 4


def test_iris_stands_in_for_a_missing_file(tmp_path):
    said: list[str] = []
    sample = standardised.load("faithful", str(tmp_path), said.append)
    assert sample.name == "iris"
    assert "so this is iris" in said[0]
    np.testing.assert_allclose(sample.x.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(sample.x.var(0, correction=0), 1, atol=1e-12)


@pytest.mark.parametrize("module", [em_gmm, em_to_vae])
def test_what_stands_in_replaces_no_results(module, tmp_path, monkeypatch, capsys):
    def run(sample, settings, out):
        out.folder.mkdir()
        (out.folder / "report.html").write_text(sample.name)
        return out.folder / "report.html"

    monkeypatch.setattr(module, "run", run)
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("Old Faithful")
    assert module.main(["--root", str(tmp_path), "--out", str(out)]) == 0
    assert (out / "report.html").read_text() == "Old Faithful"
    assert (tmp_path / "out-iris" / "report.html").read_text() == "iris"
    assert f"go to {out}-iris; results of Old Faithful stay" in capsys.readouterr().out
    assert module.main(["--data", "iris", "--out", str(out)]) == 0  # asked for
    assert (out / "report.html").read_text() == "iris"


def test_a_resumed_ascent_is_one_training():
    """Measured on the way or not, it ends at the same parameters."""
    x, _ = mixture().sample(23)
    ends = []
    for epochs in ((1, 2, 5), (5,)):
        own = methods.PerDatumComponents(len(x), 2)
        fitted = mixture()
        rows = methods.maximize_by_gradient(
            fitted.model,
            own.guide,
            x,
            partial(methods.measure_mixture, fitted, x, partial(own.logits.softmax, 1)),
            epochs,
            batch_size=23,
            loss=methods.TraceEnum_ELBO(max_plate_nesting=1),
            learning_rate=0.1,
        )
        assert [row["data_passes"] for row in rows] == list(epochs)
        ends.append(rows[-1]["bound"])
    assert ends[0] == pytest.approx(ends[1], abs=1e-13)
    assert rows[-1]["bound"] < rows[-1]["log_evidence"]


@pytest.mark.parametrize("analysis", [em_gmm, em_to_vae])
def test_help_says_what_it_is_for(analysis, capsys):
    with pytest.raises(SystemExit) as stopped:
        analysis.main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "--data {faithful,iris}" in said
    assert "report.html (read this one)" in said
