"""Training for equal time: what is recorded, and how it is ranked."""

import numpy as np
import pytest
import torch

from pyro_vae import LinearGaussian
from pyro_vae.diagnostics.gradients import train_at_equal_time, training_rows
from pyro_vae.results import label, make_result


def make(seed):
    torch.manual_seed(seed)
    return LinearGaussian(data_dim=3, latent_dim=2)


def test_each_estimator_gets_its_epochs_and_its_evidence():
    x = make(9).sample(20).detach()
    lines: list[str] = []
    trained = train_at_equal_time(
        make,
        x[:13],
        x[13:],
        [("PathwiseELBO", 1), ("DReG", 3)],
        seconds=1e-3,
        num_seeds=2,
        timing_rounds=1,
        evidence_particles=2000,
        learning_rate=1e-9,
        config={"latent_dim": 2},
        say=lines.append,
        progress=False,
    )
    assert trained["estimator"].values.tolist() == ["PathwiseELBO K=1", "DReG K=3"]
    assert dict(trained.sizes) == {"estimator": 2, "training_seed": 2}
    # At this learning rate nothing moves, so the evidence is that of the start, in closed form.
    for seed in range(2):
        with torch.no_grad():
            want = make(seed).log_evidence(x[13:]).mean().item()
        for name in trained["estimator"].values:
            row = trained.sel(estimator=name, training_seed=seed)
            assert abs(float(row.log_evidence) - want) < 4.5 * float(row.log_evidence_se)
            assert abs(float(row.log_evidence) - want - 1) > 4.5 * float(row.log_evidence_se)
            assert float(row.elbo) < want
            assert float(row.epochs) >= 1
    assert (trained["seconds"].values > 0).all()
    assert trained["log_evidence"].attrs["bound"] == "lower"
    assert trained["log_evidence"].attrs["measure"] == "real"
    assert trained.provenance["config"]["latent_dim"] == 2
    assert [line.split(":")[0] for line in lines] == ["PathwiseELBO K=1", "DReG K=3"]
    assert np.isfinite(trained["elbo_se"].values).all()


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="no estimator 'Nonsense'"):
        train_at_equal_time(
            make, torch.zeros(4, 3), torch.zeros(2, 3), [("Nonsense", 1)], seconds=1.0
        )


def test_training_rows_rank_by_evidence_with_an_error_over_seeds():
    dims = ("estimator", "training_seed")
    pure = label(unit="none", reduction="none", bound="none")
    trained = make_result(
        {
            "log_evidence": (dims, [[-3.0, -3.2], [-2.0, -2.4]], label(bound="lower")),
            "log_evidence_se": (dims, [[0.1, 0.1], [0.1, 0.1]], {}),
            "elbo": (dims, [[-4.0, -4.0], [-3.0, -3.0]], label(bound="lower")),
            "epochs": (dims, [[1.0, 1.0], [2.0, 2.0]], pure),
            "seconds": (dims, [[1.0, 1.0], [1.0, 1.0]], pure),
        },
        function="made up",
        config={},
        seed=0,
        data_sha256=None,
        coords={"estimator": ["a", "b"]},
    )
    rows = training_rows(trained)
    assert [row["trained with"] for row in rows] == ["b", "a"]
    # Variances 0.02 and 0.08 over seeds: pooled 0.05, of a mean of two 0.025.
    assert rows[0]["test log evidence"] == "-2.20 ± 0.16"
    assert rows[1]["behind the best"] == "0.90 ± 0.22"
