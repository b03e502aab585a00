"""What contradicts what when estimates stand side by side."""

import pytest
import torch

from pyro_vae import log_evidence
from pyro_vae.diagnostics.evidence.table import evidence_table
from pyro_vae.models import LinearGaussian
from pyro_vae.results import IncomparableError, label, make_result

N = 5


def estimate(value, bound, error=0.1, method="importance", data="same", **more):
    attrs = label(bound=bound, measure="real")
    variables = {"log_evidence": ("datum", torch.full((N,), value), attrs)}
    if error is not None:
        variables["log_evidence_se"] = ("datum", torch.full((N,), error), attrs)
    return make_result(
        variables,
        function="log_evidence",
        config={"method": method},
        seed=3,
        data_sha256=data,
        **more,
    )


# The mean over five data has an error of 0.1/sqrt(5) = 0.045, a difference of two 0.063.
@pytest.mark.parametrize(
    ("first", "second", "contradictory"),
    [
        (("lower", -9.0), ("upper", -10.0), True),
        (("lower", -10.0), ("upper", -9.0), False),
        (("lower", -9.9), ("upper", -10.0), False),  # within errors
        (("lower", -9.0), ("exact", -10.0), True),
        (("lower", -11.0), ("exact", -10.0), False),
        (("upper", -11.0), ("exact", -10.0), True),
        (("upper", -9.0), ("exact", -10.0), False),
        (("lower", -9.0), ("none", -10.0), True),
        (("lower", -11.0), ("none", -10.0), False),
        (("none", -9.0), ("none", -10.0), True),
        (("none", -9.9), ("none", -10.0), False),
        (("lower", -9.0), ("lower", -10.0), False),
        (("upper", -9.0), ("upper", -10.0), False),
    ],
)
def test_contradictions(first, second, contradictory):
    one, two = (estimate(value, bound) for bound, value in (first, second))
    for pair in ({"a": one, "b": two}, {"b": two, "a": one}):
        table = evidence_table(**pair)
        assert ("contradiction" in table.summary()) == contradictory
    if contradictory:
        assert "standard errors: one of them is wrong" in table.summary()


def test_exact_numbers_need_no_error_and_unknown_errors_contradict_nothing():
    exact = estimate(-10.0, "exact", error=None, method="exact")
    quadrature = estimate(-10.0 + 1e-9, "exact", error=None, method="quadrature")
    assert "contradiction" not in evidence_table(exact, quadrature).summary()
    off = estimate(-10.0 + 1e-3, "exact", error=None, method="quadrature")
    assert "contradiction" in evidence_table(exact, off).summary()
    unknown = estimate(-9.0, "lower", error=None)
    assert "contradiction" not in evidence_table(exact, unknown).summary()
    impossible = estimate(-float("inf"), "lower")
    assert "contradiction" not in evidence_table(exact, impossible).summary()


def test_real_results_keep_their_labels_and_notes():
    linear = LinearGaussian(4, 2)
    x = linear.sample(N)
    results = [
        log_evidence(linear.model, linear.best_diagonal_guide, x, method=method, progress=False)
        for method in ("exact", "quadrature", "importance", "importance")
    ]
    table = evidence_table(*results, mine=results[2])
    assert list(table.data_vars) == [
        "exact",
        "quadrature",
        "importance",
        "importance_se",
        "importance_2",
        "importance_2_se",
        "mine",
        "mine_se",
    ]
    assert table.quantity("quadrature").bound == "exact"
    assert table.quantity("importance").num_particles == 1000
    (blind,) = (note for note in table.provenance["notes"] if "blind to a mode" in note)
    assert blind.startswith("importance, importance_2, mine: k-hat")
    assert "contradiction" not in table.summary()


def test_unlike_results_are_refused():
    one = estimate(-10.0, "lower")
    with pytest.raises(IncomparableError, match="data_sha256"):
        evidence_table(one, estimate(-10.0, "exact", method="exact", data="other"))
    with pytest.raises(ValueError, match="at least one"):
        evidence_table()
    with pytest.raises(ValueError, match="holds no variable log_evidence"):
        evidence_table(one.rename(log_evidence="elbo", log_evidence_se="elbo_se"))
