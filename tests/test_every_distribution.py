"""Every distribution of torch and Pyro with a density goes through every tool, as prior and guide.

Prior and guide are the same, and the data say nothing of the latent: then every weight is the
likelihood, and every method has to give its logarithm, whatever the support and its transform.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import every
from pyro.distributions import transforms
from scipy import integrate
from torch.distributions import transform_to

from pyro_vae import elbo_gap, fit, log_evidence, log_weights, posterior_quality, resolve
from pyro_vae.inference.draws import draw_posterior
from pyro_vae.inference.programs import ProgramError, program_scope, unconstrained_model
from pyro_vae.inference.refit.parameters import _free_names, constraint_of, rebuild
from pyro_vae.inference.refit.refit_guide import refit_guide
from pyro_vae.inference.refit.transport import from_noise, noise_shape

N = 3


def t(*values):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


def of(*transformations):
    return dist.TransformedDistribution(dist.Normal(0.2, 0.7), list(transformations))


def unit_normal():
    return dist.MultivariateNormal(torch.zeros(1), torch.eye(1))


exp, affine = transforms.ExpTransform, transforms.AffineTransform
factor = t([1.0, 0.0], [0.5, 1.2])
wide = factor @ factor.T
singular = pytest.mark.filterwarnings("ignore:Singular sample")  # torch's Wishart, of its own draws

UNIVARIATE = {
    "AffineBeta": lambda: dist.AffineBeta(2.0, 3.0, -1.0, 4.0),
    "AsymmetricLaplace": lambda: dist.AsymmetricLaplace(0.0, 1.0, 1.5),
    "Beta": lambda: dist.Beta(2.0, 0.7),
    "Cauchy": lambda: dist.Cauchy(0.0, 1.0),
    "Chi2": lambda: dist.Chi2(3.0),
    "ContinuousBernoulli": lambda: dist.ContinuousBernoulli(0.3),
    "Exponential": lambda: dist.Exponential(1.5),
    "FisherSnedecor": lambda: dist.FisherSnedecor(4.0, 6.0),
    "FoldedDistribution": lambda: dist.FoldedDistribution(dist.Normal(0.5, 1.0)),
    "Gamma": lambda: dist.Gamma(0.5, 1.5),
    "GeneralizedPareto": lambda: dist.GeneralizedPareto(0.5, 1.0, 0.3),
    "GeneralizedPareto, bounded": lambda: dist.GeneralizedPareto(0.5, 1.0, -0.3),
    "Gumbel": lambda: dist.Gumbel(0.0, 1.0),
    "HalfCauchy": lambda: dist.HalfCauchy(1.0),
    "HalfNormal": lambda: dist.HalfNormal(1.0),
    "InverseGamma": lambda: dist.InverseGamma(3.0, 2.0),
    "Kumaraswamy": lambda: dist.Kumaraswamy(2.0, 3.0),
    "Laplace": lambda: dist.Laplace(0.0, 1.0),
    "LogNormal": lambda: dist.LogNormal(0.0, 1.0),
    "Logistic": lambda: dist.Logistic(0.0, 1.0),
    "MaskedDistribution": lambda: dist.Normal(0.0, 1.0).mask(True),
    "MaskedMixture": lambda: dist.MaskedMixture(
        t(True).bool(), dist.Normal(0.0, 1.0), dist.Normal(1.0, 2.0)
    ),
    "MixtureSameFamily": lambda: dist.MixtureSameFamily(
        dist.Categorical(t(0.3, 0.7)), dist.Normal(t(-1.0, 2.0), t(0.5, 1.0))
    ),
    "NanMaskedNormal": lambda: dist.NanMaskedNormal(0.0, 1.0),
    "Normal": lambda: dist.Normal(0.0, 1.0),
    "Pareto": lambda: dist.Pareto(1.0, 3.0),
    "RelaxedBernoulli": lambda: dist.RelaxedBernoulli(t(0.7), logits=t(0.3)),
    "SkewLogistic": lambda: dist.SkewLogistic(0.0, 1.0, 1.5),
    "SoftLaplace": lambda: dist.SoftLaplace(0.0, 1.0),
    "StudentT": lambda: dist.StudentT(3.0, 0.0, 1.0),
    "exp": lambda: of(exp()),
    "exp, then moved": lambda: of(exp(), affine(1.0, 2.0)),
    "exp, then turned round": lambda: of(exp(), affine(1.0, -2.0)),
    "sigmoid": lambda: of(transforms.SigmoidTransform()),
    "softplus": lambda: of(transforms.SoftplusTransform()),
    "tanh": lambda: of(transforms.TanhTransform()),
    "power": lambda: dist.TransformedDistribution(
        dist.Exponential(1.0), [transforms.PowerTransform(t(2.0))]
    ),
    "Uniform": lambda: dist.Uniform(-1.0, 2.0),
    "VonMises": lambda: dist.VonMises(2.5, 2.0),
    "Weibull": lambda: dist.Weibull(1.0, 1.5),
}

MULTIVARIATE = {
    "Dirichlet": lambda: dist.Dirichlet(t(0.5, 2.0, 3.0)),
    "DiscreteHMM": lambda: dist.DiscreteHMM(
        torch.zeros(2), torch.zeros(2, 2), dist.Normal(t(0.0, 1.0), 1.0), duration=2
    ),
    "GaussianHMM": lambda: dist.GaussianHMM(
        unit_normal(), torch.eye(1), unit_normal(), torch.eye(1), unit_normal(), duration=2
    ),
    "Independent": lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1),
    "LKJCholesky, uniform": lambda: dist.LKJCholesky(2),
    "LKJCholesky": lambda: dist.LKJCholesky(3, 1.5),
    "LogisticNormal": lambda: dist.LogisticNormal(torch.zeros(2), torch.ones(2)),
    "LowRankMultivariateNormal": lambda: dist.LowRankMultivariateNormal(
        torch.zeros(2), t([1.0], [0.5]), torch.ones(2)
    ),
    "MixtureOfDiagNormals": lambda: dist.MixtureOfDiagNormals(
        t([0.0, 0.0], [2.0, 2.0]), torch.ones(2, 2), t(0.0, 0.5)
    ),
    "MixtureOfDiagNormalsSharedCovariance": lambda: dist.MixtureOfDiagNormalsSharedCovariance(
        t([0.0, 0.0], [2.0, 2.0]), torch.ones(2), t(0.0, 0.5)
    ),
    "MultivariateNormal": lambda: dist.MultivariateNormal(torch.zeros(2), wide),
    "MultivariateStudentT": lambda: dist.MultivariateStudentT(t(5.0), torch.zeros(2), factor),
    "NanMaskedMultivariateNormal": lambda: dist.NanMaskedMultivariateNormal(torch.zeros(2), wide),
    "ProjectedNormal, circle": lambda: dist.ProjectedNormal(t(1.0, 0.5)),
    "ProjectedNormal": lambda: dist.ProjectedNormal(t(1.0, 0.5, 0.2)),
    "RelaxedOneHotCategorical": lambda: dist.RelaxedOneHotCategorical(
        t(0.7), logits=t(0.3, 0.0, -0.2)
    ),
    "SineBivariateVonMises": lambda: dist.SineBivariateVonMises(
        0.0, 2.0, 2.0, 2.0, correlation=0.5
    ),
    "SineSkewed": lambda: dist.SineSkewed(dist.VonMises(t([0.0]), t([2.0])).to_event(1), t([0.3])),
    "Wishart": lambda: dist.Wishart(t(4.0), torch.eye(2)),
    "ordered": lambda: dist.TransformedDistribution(
        dist.Normal(torch.zeros(2), 1.0).to_event(1), [transforms.OrderedTransform()]
    ),
}


@pytest.fixture
def x():
    return t(-1.0, 0.3, 1.2)


CONTINUOUS = UNIVARIATE | MULTIVARIATE
NAMES = list(CONTINUOUS)
COMPANIES = [NAMES[start : start + 8] for start in range(0, len(NAMES), 8)]
THREE_DIMENSIONS = ("LKJCholesky", "ProjectedNormal", "Wishart")
# Of the tools that run chains: nothing needs to be learnt, for the guide is the posterior.
CHAINS = {
    "annealed": {"num_temperatures": 1, "num_chains": 3},
    "bridge": {"num_warmup": 2, "num_samples": 6, "num_chains": 2, "num_leapfrog": 1},
}


def programs(*fns, mean=torch.zeros_like):
    """Latents with the same prior and guide, and data about a function of the last."""

    def latents():
        return [pyro.sample(f"z{k}" if k else "z", fn) for k, fn in enumerate(fns)]

    def model(x):
        shift = pyro.param("shift", torch.zeros(()))
        with pyro.plate("data", len(x)):
            z = torch.as_tensor(latents()[-1])
            size = z.reshape(*z.shape[: z.dim() - len(fns[-1].event_shape)], -1).sum(-1)
            pyro.sample("x", dist.Normal(mean(size) + shift, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            latents()

    return model, guide


def check_weights(model, guide, x, exact, joint=False):
    """Every weight is the likelihood, and so is their mean."""
    weights = log_weights(model, guide, x, 3, joint=joint, seed=0)
    found = log_evidence(model, guide, x, num_particles=5, joint=joint, seed=0, progress=False)
    assert weights.detach().numpy() == pytest.approx(
        exact.reshape(1, -1).expand(3, -1).numpy(), abs=1e-9
    )
    assert found.log_evidence.values == pytest.approx(exact.numpy(), abs=1e-9)


def check_chains(model, guide, x, exact, joint=False):
    for method, settings in CHAINS.items():
        found = log_evidence(
            model, guide, x, method=method, **settings, joint=joint, seed=0, progress=False
        )
        assert found.log_evidence.values == pytest.approx(exact.numpy(), abs=1e-6), method


@pytest.mark.parametrize("name", CONTINUOUS)
@singular
def test_every_weight_is_the_likelihood(name, x):
    model, guide = programs(CONTINUOUS[name]())
    check_weights(model, guide, x, dist.Normal(0.0, 1.0).log_prob(x))


@pytest.mark.parametrize("names", COMPANIES, ids=lambda names: f"{names[0]} to {names[-1]}")
@singular
def test_every_tool_takes_them_in_company(names, x):
    model, guide = programs(*(CONTINUOUS[name]() for name in names))
    exact = dist.Normal(0.0, 1.0).log_prob(x)
    check_chains(model, guide, x, exact)
    draws = draw_posterior(model, guide, x, num_draws=3, seed=0)
    assert draws.log_weights.detach().numpy() == pytest.approx(
        exact.expand(3, -1).numpy(), abs=1e-9
    )
    quality = posterior_quality(
        model, guide, x, num_particles=20, checks=(), seed=0, progress=False
    )
    assert quality.ess.values == pytest.approx(20.0)
    fitted = fit(model, guide, x, epochs=1, learning_rate=0.1, progress=False)
    # Adam's first step is the learning rate, towards the mean of the data, which is positive.
    moved = dist.Normal(0.1, 1.0).log_prob(x).mean()
    assert float(fitted.history["bound"][-1]) == pytest.approx(float(moved), abs=1e-6)


@pytest.mark.parametrize("name", [name for name in MULTIVARIATE if name not in THREE_DIMENSIONS])
def test_quadrature_of_several_latents(name, x):
    model, _ = programs(MULTIVARIATE[name]())
    found = log_evidence(model, None, x[:1], method="quadrature", progress=False)
    exact = dist.Normal(0.0, 1.0).log_prob(x[:1])
    assert found.log_evidence.values == pytest.approx(exact.numpy(), abs=1e-6)


def test_resolve_keeps_a_guide_that_is_the_posterior(x):
    names = ["LogNormal", "Gamma", "ProjectedNormal", "VonMises"]
    model, guide = programs(*(CONTINUOUS[name]() for name in names))
    found = resolve(model, guide, x, num_draws=1000, progress=False)
    exact = dist.Normal(0.0, 1.0).log_prob(x).numpy()
    assert found.rung.tolist() == [0, 0, 0]
    assert found.result.log_evidence.values == pytest.approx(exact, abs=1e-9)


WITHOUT_PLATES = {  # Pyro can expand or draw these by themselves only
    "AVFMultivariateNormal": lambda: dist.AVFMultivariateNormal(
        torch.zeros(2), factor, 0.3 * torch.ones(2, 1, 2)
    ),
    "GaussianScaleMixture": lambda: dist.GaussianScaleMixture(
        t(1.0, 2.0), t(0.0, 0.5), t(1.0, 2.0)
    ),
    "LKJ": lambda: dist.LKJ(2, 1.5),
    "OMTMultivariateNormal": lambda: dist.OMTMultivariateNormal(torch.zeros(2), factor),
    "SoftAsymmetricLaplace": lambda: dist.SoftAsymmetricLaplace(0.0, 1.0, 1.5),
    "TruncatedPolyaGamma": lambda: dist.TruncatedPolyaGamma(t(0.0)),
}


@pytest.mark.parametrize("name", WITHOUT_PLATES)
def test_every_tool_without_a_plate(name, x):
    fn = WITHOUT_PLATES[name]()

    def model(x):
        pyro.sample("z", fn)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", fn)

    exact = dist.Normal(0.0, 1.0).log_prob(x).sum()
    check_weights(model, guide, x, exact, joint=True)
    if name != "GaussianScaleMixture":  # Pyro's states no support, and gives no gradient
        check_chains(model, guide, x, exact, joint=True)


@pytest.mark.parametrize("name", every(3, UNIVARIATE))
def test_quadrature_is_the_integral_of_the_density(name, x):
    fn = UNIVARIATE[name]()
    model, _ = programs(fn, mean=torch.tanh)
    found = log_evidence(model, None, x[:1], method="quadrature", progress=False)

    def integrand(z):
        z = torch.as_tensor(z)
        likelihood = dist.Normal(z.tanh(), 1.0).log_prob(x[0])
        value = (fn.log_prob(z) + likelihood).exp()
        return torch.where(fn.support.check(z) & value.isfinite(), value, 0.0).numpy()

    end = math.pi if name == "VonMises" else math.inf
    marks = [-end, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 0.5 + 1 / 0.3, end]
    with pyro.validation_enabled(False):
        parts = integrate.tanhsinh(integrand, marks[:-1], marks[1:]).integral
    assert float(found.log_evidence[0]) == pytest.approx(math.log(parts.sum()), abs=1e-5)


STRAIGHT_THROUGH = {
    "RelaxedBernoulliStraightThrough": lambda: dist.RelaxedBernoulliStraightThrough(
        t(0.7), logits=t(0.3)
    ),
    "RelaxedOneHotCategoricalStraightThrough": lambda: dist.RelaxedOneHotCategoricalStraightThrough(
        t(0.7), logits=t(0.3, 0.0, -0.2)
    ),
}
DISCRETE = {
    "Bernoulli": lambda: dist.Bernoulli(0.3),
    "BetaBinomial": lambda: dist.BetaBinomial(2.0, 3.0, 4),
    "Binomial": lambda: dist.Binomial(4, t(0.3)),
    "Categorical": lambda: dist.Categorical(t(0.2, 0.3, 0.5)),
    "DirichletMultinomial": lambda: dist.DirichletMultinomial(t(1.0, 2.0), 3),
    "ExtendedBetaBinomial": lambda: dist.ExtendedBetaBinomial(2.0, 3.0, 4),
    "ExtendedBinomial": lambda: dist.ExtendedBinomial(4, t(0.3)),
    "GammaPoisson": lambda: dist.GammaPoisson(2.0, 1.0),
    "Geometric": lambda: dist.Geometric(0.4),
    "Multinomial": lambda: dist.Multinomial(3, t(0.2, 0.3, 0.5)),
    "NegativeBinomial": lambda: dist.NegativeBinomial(3.0, t(0.4)),
    "OneHotCategorical": lambda: dist.OneHotCategorical(t(0.2, 0.3, 0.5)),
    "OneHotCategoricalStraightThrough": lambda: dist.OneHotCategoricalStraightThrough(
        t(0.2, 0.3, 0.5)
    ),
    "OneOneMatching": lambda: dist.OneOneMatching(torch.eye(3)),
    "OneTwoMatching": lambda: dist.OneTwoMatching(torch.ones(4, 2)),
    "OrderedLogistic": lambda: dist.OrderedLogistic(t(0.3), t(-1.0, 0.0, 1.0)),
    "Poisson": lambda: dist.Poisson(2.0),
    "ZeroInflatedDistribution": lambda: dist.ZeroInflatedDistribution(
        dist.Poisson(3.0), gate=t(0.3)
    ),
    "ZeroInflatedNegativeBinomial": lambda: dist.ZeroInflatedNegativeBinomial(
        3.0, probs=t(0.4), gate=t(0.2)
    ),
    "ZeroInflatedPoisson": lambda: dist.ZeroInflatedPoisson(2.0, gate=t(0.2)),
}
# Their support is not stated, or nobody knows a transform onto it.
WITHOUT_TRANSFORM = {
    "CoalescentTimes": lambda: dist.CoalescentTimes(t(0.0, 0.0, 0.5)),
    "Rejector": lambda: dist.Rejector(dist.Exponential(1.0), lambda z: -z, t(-math.log(2.0))),
}


NOT_FREED = (
    *("DiscreteHMM", "GaussianHMM", "LKJCholesky", "OneOneMatching", "OneTwoMatching"),
    *("RelaxedBernoulliStraightThrough", "RelaxedOneHotCategoricalStraightThrough"),
    "Rejector",
)
FREED = [name for name in (*CONTINUOUS, *DISCRETE, "CoalescentTimes") if name not in NOT_FREED]


def without_ends(name):
    """Neither those that leave the prior's support when they move, nor one base over and over."""
    ends = ("GeneralizedPareto", "Pareto", "Uniform")
    return not name.startswith((*ends, "Extended", "exp, then", "sigmoid", "softplus", "tanh"))


def parted(fn):
    """The same distribution elsewhere: each parameter in its own unconstrained space."""

    def change(_path, part):
        moved = {}
        for number, name in enumerate(_free_names(part)):
            onto = transform_to(constraint_of(part, name))
            start = onto.inv(getattr(part, name))
            step = torch.linspace(0.5, 1.0, start.numel()).reshape(start.shape) * (-1) ** number
            moved[name] = onto(start + 0.8 * step)
        return moved

    return rebuild(fn, change)


@singular
def test_the_gap_of_what_can_be_refitted(x):
    model, guide = programs(*(CONTINUOUS[name]() for name in FREED if name in CONTINUOUS))
    decomposition = elbo_gap(
        model, guide, x, num_particles=2, richer=(), max_steps=1, progress=False
    )
    exact = dist.Normal(0.0, 1.0).log_prob(x).numpy()
    assert decomposition.elbo.values == pytest.approx(exact, abs=1e-9)
    assert decomposition.gap.values == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("name", every(30, filter(without_ends, FREED)))
@singular
def test_a_wrong_member_of_the_family_is_refitted_to_the_posterior(name, x):
    fn = (CONTINUOUS | DISCRETE | WITHOUT_TRANSFORM)[name]()
    (model, right), (_, wrong) = programs(fn), programs(parted(fn))
    exact = dist.Normal(0.0, 1.0).log_prob(x)
    refitted = refit_guide(model, wrong, x, max_steps=140, step_size=0.2, progress=False)

    def gaps(guide):
        return exact - log_weights(model, guide, x, 2000, seed=1).detach().mean(0)

    before, after = gaps(wrong).mean(), gaps(refitted).median()
    assert float(gaps(right).abs().max()) < 1e-9
    assert float(after) < 0.1 * float(before) + 1e-4


@pytest.mark.parametrize("name", NOT_FREED)
def test_what_cannot_be_refitted_is_named(name, x):
    model, guide = programs((CONTINUOUS | DISCRETE | STRAIGHT_THROUGH | WITHOUT_TRANSFORM)[name]())
    with pytest.raises(ProgramError, match=r"site 'z' has a \w+, whose (parameters|draws)"):
        elbo_gap(model, guide, x, num_particles=2, richer=(), max_steps=1)


def test_normal_noise_gives_each_its_density():
    """The density at the draw times the slope of the map is that of the noise."""
    noise = torch.linspace(-3.0, 3.0, 12, requires_grad=True)
    known = []
    for name, make in UNIVARIATE.items():
        fn = make().expand(torch.Size((12,)))
        if noise_shape(fn, torch.Size((12,))) is None:
            continue
        known.append(name)
        value = from_noise(fn, noise)
        (slope,) = torch.autograd.grad(value.sum(), noise)
        found = slope.abs().log() + fn.log_prob(value)
        expected = dist.Normal(0.0, 1.0).log_prob(noise)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0, msg=name)
        assert bool((value.diff().sign() == value.diff()[0].sign()).all()), name
    unknown = {"AsymmetricLaplace", "FoldedDistribution", "MaskedMixture"}
    assert set(UNIVARIATE) - set(known) == unknown | {"MixtureSameFamily", "VonMises"}


def test_normal_noise_gives_shares_their_density():
    fn, noise = CONTINUOUS["Dirichlet"](), t(0.3, -1.1)
    slope = torch.autograd.functional.jacobian(lambda e: from_noise(fn, e)[:-1], noise)
    found = slope.det().abs().log() + fn.log_prob(from_noise(fn, noise))
    torch.testing.assert_close(found, dist.Normal(0.0, 1.0).log_prob(noise).sum())


@pytest.mark.parametrize("name", [*DISCRETE, *STRAIGHT_THROUGH, *WITHOUT_TRANSFORM])
def test_what_has_no_gradient_goes_through_what_draws_and_is_refused_by_the_rest(name, x):
    model, guide = programs((DISCRETE | STRAIGHT_THROUGH | WITHOUT_TRANSFORM)[name]())
    exact = dist.Normal(0.0, 1.0).log_prob(x)
    check_weights(model, guide, x, exact)
    refused = rf"site 'z' (is discrete )?\({name}\)"
    with program_scope(0), pytest.raises(ProgramError, match=refused):
        unconstrained_model(model, guide, x)
    if name in ("Bernoulli", "Rejector", "RelaxedBernoulliStraightThrough"):
        for method in ("annealed", "bridge", "quadrature"):
            with pytest.raises(ProgramError, match=refused):
                log_evidence(model, guide, x, method=method)


REFUSED = {
    "Empirical": lambda: dist.Empirical(t(0.0, 1.0, 2.0), torch.zeros(3)),
    "GroupedNormalNormal": lambda: dist.GroupedNormalNormal(
        torch.zeros(2), torch.ones(2), torch.ones(3), torch.tensor([0, 0, 1])
    ),
    "ImproperUniform": lambda: dist.ImproperUniform(dist.constraints.real, (), ()),
    "LinearHMM": lambda: dist.LinearHMM(
        unit_normal(), torch.eye(1), unit_normal(), torch.eye(1), unit_normal(), duration=2
    ),
    "LogNormalNegativeBinomial": lambda: dist.LogNormalNegativeBinomial(
        t(3.0), logits=t(0.2), multiplicative_noise_scale=t(0.3)
    ),
    "SpanningTree": lambda: dist.SpanningTree(torch.zeros(3)),
    "VonMises3D": lambda: dist.VonMises3D(t(1.0, 0.5, 0.2)),
    **WITHOUT_PLATES,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_pyro_cannot_draw_or_weigh_is_named(name, x):
    model, guide = programs(REFUSED[name]())
    for tool in (log_weights, log_evidence, posterior_quality, draw_posterior):
        with pytest.raises(ProgramError, match=rf"the site 'z' \({name}\) (cannot|has no)"):
            tool(model, guide, x)


def test_a_guide_off_the_support_of_the_prior_is_told_so(x):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.1, 1.0))

    with pytest.raises(ProgramError, match=r"site 'z' lies outside the support of its Gamma"):
        log_weights(model, guide, x, 20, seed=0)
