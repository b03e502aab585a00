"""Training at equal cost: what is counted and recorded, and which differences are called real."""

import numpy as np
import pytest
import torch
from scipy import stats

from pyro_vae import LinearGaussian
from pyro_vae.diagnostics.gradients import train_at_equal_cost, training_rows
from pyro_vae.results import label, make_result


def make(seed):
    torch.manual_seed(seed)
    return LinearGaussian(data_dim=3, latent_dim=2)


def test_each_estimator_gets_its_epochs_and_its_evidence():
    x = make(9).sample(20).detach()
    lines: list[str] = []
    trained = train_at_equal_cost(
        make,
        x[:13],
        x[13:],
        [("PathwiseELBO", 1), ("DReG", 3)],
        epochs=4,
        num_seeds=2,
        evidence_particles=2000,
        learning_rate=1e-9,
        config={"latent_dim": 2},
        say=lines.append,
        progress=False,
    )
    assert trained["estimator"].values.tolist() == ["PathwiseELBO K=1", "DReG K=3"]
    assert dict(trained.sizes) == {"estimator": 2, "budget": 2, "training_seed": 2}
    # DReG runs the programs twice, with three particles each time.
    assert trained["passes"].values.tolist() == [1, 6]
    assert trained["epochs"].sel(budget="steps").values.tolist() == [[4, 4], [4, 4]]
    assert trained["epochs"].sel(budget="passes").values.tolist() == [[4, 4], [2, 2]]
    # At this learning rate nothing moves, so the evidence is that of the start, in closed form.
    for seed in range(2):
        with torch.no_grad():
            want = make(seed).log_evidence(x[13:]).mean().item()
        for name in trained["estimator"].values:
            row = trained.sel(estimator=name, training_seed=seed, budget="passes")
            assert abs(float(row.log_evidence) - want) < 4.5 * float(row.log_evidence_se)
            assert abs(float(row.log_evidence) - want - 1) > 4.5 * float(row.log_evidence_se)
            assert float(row.elbo) < want
    assert (trained["seconds"].values > 0).all()
    assert trained["log_evidence"].attrs["bound"] == "lower"
    assert trained["log_evidence"].attrs["measure"] == "real"
    assert trained.provenance["config"]["latent_dim"] == 2
    assert [line.split(":")[0] for line in lines] == ["PathwiseELBO K=1", "DReG K=3"]
    assert np.isfinite(trained["elbo_se"].values).all()
    assert "Seconds are those of one thread of" in trained.provenance["notes"][1]


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="no estimator 'Nonsense'"):
        train_at_equal_cost(make, torch.zeros(4, 3), torch.zeros(2, 3), [("Nonsense", 1)], epochs=1)


def synthetic(evidence):
    dims = ("budget", "estimator", "training_seed")
    evidence = np.asarray(evidence)[None]
    pure = label(unit="none", reduction="none", bound="none")
    return make_result(
        {
            "log_evidence": (dims, evidence, label(bound="lower")),
            "log_evidence_se": (dims, np.full_like(evidence, 0.01), {}),
            "elbo": (dims, evidence - 1, label(bound="lower")),
            "epochs": (dims, np.full_like(evidence, 5.0), pure),
            "seconds": (dims, np.ones_like(evidence), pure),
            "passes": ("estimator", np.arange(1.0, evidence.shape[1] + 1), pure),
        },
        function="made up",
        config={},
        seed=0,
        data_sha256=None,
        coords={"budget": ["passes"], "estimator": [*"abcd"[: evidence.shape[1]]]},
    )


def test_training_rows_rank_by_evidence_with_errors_over_trainings():
    rows = training_rows(synthetic([[-3.0, -3.2], [-2.0, -2.4]]))
    assert [row["trained with"] for row in rows] == ["b", "a"]
    # Standard deviations over two seeds: 0.4 / sqrt 2 and 0.2 / sqrt 2; of their difference as b's
    # minus a's, 1.0 and 0.8, 0.2 / sqrt 2. The draws' own error, 0.01, is a part of the spread.
    assert rows[0]["test log evidence"] == "-2.20 ± 0.20"
    assert rows[1]["test log evidence"] == "-3.10 ± 0.10"
    assert rows[1]["behind the best"] == "0.90 ± 0.10"
    assert rows[1]["passes a datum"] == "5"
    assert training_rows(synthetic([[-3.0], [-2.0]]))[1]["difference"] == "may be chance"


def test_differences_are_called_real_by_a_paired_test_of_all_pairs():
    rng = np.random.default_rng(2)
    shared = rng.normal(size=8)  # what a start does to every estimator
    noise = 0.1 * rng.normal(size=(4, 8))
    rows = training_rows(synthetic(shared + noise + [[0.0], [-0.01], [-0.6], [-0.5]]))
    words = {row["trained with"]: row["difference"] for row in rows}
    first = rows[0]["trained with"]
    values = shared + noise + [[0.0], [-0.01], [-0.6], [-0.5]]
    for name in set("abcd") - {first}:
        paired = stats.ttest_rel(values["abcd".index(first)], values["abcd".index(name)])
        assert words[name] == ("real" if paired.pvalue < 0.05 / 6 else "may be chance")
    assert set(words.values()) == {"-", "real", "may be chance"}
    # Without the pairing the spread over starts would hide all of it.
    assert min(stats.ttest_ind(values[0], other).pvalue for other in values[1:]) > 0.05


def test_equal_estimators_are_hardly_ever_told_apart():
    rng = np.random.default_rng(1)
    called = sum(
        any(
            row["difference"] == "real" for row in training_rows(synthetic(rng.normal(size=(4, 8))))
        )
        for _ in range(200)
    )
    assert called <= 24  # at a rate of 0.05: 2e-4
