"""Random programs against their truth: a hundred of the thousand of `make gauntlet`."""

import pytest
import torch
from gauntlet.checks import run
from gauntlet.generator import FAULTS, draw_pair, draw_wrong
from gauntlet.oracles import Oracle, axis
from gauntlet.programs import FAMILIES, Pair, Site


@pytest.mark.parametrize("first", range(0, 100, 10))
def test_programs_are_right_or_refused(first: int) -> None:
    counts, failures = run(range(first, first + 10))
    assert not failures, "\n\n".join(failures)
    assert counts["log_weights: right"] == 10


def conjugate(prior: tuple[str, ...], likelihood: tuple[str, ...], x: list[float]) -> Pair:
    z = Site("z", "latent", prior[0], prior[1:])
    seen = Site("x", "observed", likelihood[0], likelihood[1:])
    data = {"x": torch.tensor(x), "c": torch.zeros(len(x))}
    return Pair(0, (z, seen), (), {}, {"data": -1}, data, {}, len(x), {})


def test_the_oracle_itself_knows_conjugate_evidence() -> None:
    """Closed forms: normal-normal, gamma-Poisson (negative binomial), uniform over counts."""
    x = torch.tensor([-0.7, 2.0])
    normal = Oracle(conjugate(("normal", "0.3", "1.2"), ("normal", "z", "0.5"), x.tolist()))
    variance = 1.2**2 + 0.5**2
    expected = -0.5 * ((x - 0.3) ** 2 / variance + torch.log(2 * torch.pi * torch.tensor(variance)))
    torch.testing.assert_close(normal.log_evidence(), expected, rtol=1e-10, atol=0)
    counts = torch.tensor([0.0, 4.0])
    poisson = Oracle(conjugate(("gamma", "2.5", "1.5"), ("poisson", "z"), counts.tolist()))
    a, chance = torch.tensor(2.5), torch.tensor(1 / 2.5)
    expected = torch.lgamma(a + counts) - torch.lgamma(a) - torch.lgamma(counts + 1)
    expected = expected + a * torch.log1p(-chance) + counts * chance.log()
    torch.testing.assert_close(poisson.log_evidence(), expected, rtol=1e-10, atol=0)
    successes = Oracle(conjugate(("beta", "1.0", "1.0"), ("successes", "z"), [0.0, 2.0]))
    expected = torch.full((2,), 0.25).log()
    torch.testing.assert_close(successes.log_evidence(), expected, rtol=1e-9, atol=0)


NO_AXIS = ("successes", "student", "poisson", "zeros", "negative")  # other states, heavy tails


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(NO_AXIS)))
def test_the_oracle_s_densities_sum_to_one(family: str) -> None:
    pair = conjugate(("normal", "0.0", "1.0"), ("normal", "z", "1.0"), [0.0])
    kinds = {"r": "0.3", "p": "0.8", "q": "1.7", "u": "torch.tensor(0.4)"}
    site = Site("x", "latent", family, tuple(kinds[k] for k in FAMILIES[family].arguments))
    values, weight = axis(site, 0.1)
    total = (Oracle(pair).site(0, site, (), {("x", ()): values}) + weight).logsumexp(0)
    assert abs(float(total)) < 1e-7


def test_every_fault_is_drawn_and_shows_in_the_source() -> None:
    for fault in FAULTS:
        assert f"fault {fault}" in draw_wrong(0, fault).build().describe()
    assert draw_pair(5).build().source == draw_pair(5).build().source
