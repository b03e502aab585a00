r"""Standard errors of parameters, from what EM has at hand: the complete-data likelihood.

With :math:`s_{nk} = \nabla_\theta \log p(x_n, z_n = k \mid \theta)` and the responsibilities q, the
observed information at :math:`\theta` is

.. math:: I = -\nabla^2_{\theta'} Q(\theta' \mid \theta) - \sum_n \mathrm{Cov}_{q_n}(s_{n \cdot})
            = -\bigl[\nabla^2_{\theta'} Q + \nabla_\theta \nabla_{\theta'} Q\bigr](\theta'
              \mid \theta) \Big|_{\theta' = \theta}

by Louis (1982) and by Oakes (1999): what complete data would tell, less what is missing. How much
of it is left in the worst direction is `information_fraction`; EM gains on its distance from the
maximum by the factor 1 - `information_fraction` an iteration (Dempster, Laird & Rubin 1977).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from pyro_vae.data import as_tensor
from pyro_vae.inference.em.protocol import NaturalModel
from pyro_vae.results import Result, label, make_result, sha256_of

__all__ = ["standard_errors"]

_LEAST_FRACTION = 1e-6  # of the complete information; below it rounding and flat directions rule
_OVERLAPPING = 0.05  # below it a quadratic seldom describes the likelihood an error away
_FROM_ZERO = 2.0  # errors that a weight should lie above 0
_AT_MAXIMUM = 0.05  # standard errors between the parameters and the maximum
_NUMBERS = 1 << 23  # scores held at once


class _Information(NamedTuple):
    """Of complete data, of those observed, and the gradient of log p(x); totals."""

    complete: Tensor
    observed: Tensor
    gradient: Tensor


def _expected_log_joint(form: Any, q: Tensor, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Q(theta | q), a total in nats."""
    return lambda theta: (q * form.log_joint(theta, x)).sum()


def _louis(form: Any, x: Tensor, q: Tensor, weights: Tensor) -> _Information:
    """The complete information less the covariance of the scores."""
    weighted = weights[:, None] * q
    complete = -jacrev(grad(_expected_log_joint(form, weighted, x)))(form.theta)
    each = jacrev(lambda theta, row: form.log_joint(theta, row[None])[0])
    scores = vmap(each, (None, 0))(form.theta, x)  # [data, components, theta]
    mean = torch.einsum("nk,nkp->np", q, scores)
    missing = torch.einsum("nk,nkp,nkr->pr", weighted, scores, scores)
    missing = missing - torch.einsum("n,np,nr->pr", weights, mean, mean)
    return _Information(complete, complete - missing, weights @ mean)


def _oakes(form: Any, x: Tensor, q: Tensor, weights: Tensor) -> _Information:
    """The derivative of the gradient of Q, by the parameters and by those of the posterior."""
    weighted = weights[:, None] * q
    complete = -jacrev(grad(_expected_log_joint(form, weighted, x)))(form.theta)

    def gradient(theta: Tensor) -> Tensor:
        """That of Q(. | theta) at the parameters."""
        posterior = weights[:, None] * form.log_joint(theta, x).softmax(1)
        return grad(_expected_log_joint(form, posterior, x))(form.theta)

    mixed = jacrev(gradient)(form.theta)
    observed = complete - 0.5 * (mixed + mixed.mT)
    return _Information(complete, observed, gradient(form.theta))


METHODS: dict[str, Callable[..., _Information]] = {"louis": _louis, "oakes": _oakes}
"""From a form, data, responsibilities and weights to the information that these data hold."""


def standard_errors(
    model: Any, x: Any, *, sample_weights: Any = None, method: str = "oakes"
) -> Result:
    r"""Standard errors of the parameters of a fitted mixture, by Oakes or by Louis.

    Args:
        model: A mixture of this package (a `NaturalModel`), not its `.model`, at its maximum:
            after `fit_em` with a small `tolerance`.
        x: The data it was fitted to, shape (batch, features).
        sample_weights: How often each datum counts, shape (batch,).
        method: "oakes", or "louis", the same matrix by another way, which takes longer.

    Returns:
        ======================  ==========================  ========================================
        name                    dims                        meaning
        ======================  ==========================  ========================================
        `natural`               parameter                   log odds of the weights against the last
                                                            component, and natural parameters; of
                                                            Gaussians precision times loc, and
                                                            precisions
        `natural_covariance`    parameter, other_parameter  covariance of their errors
        `fitted`                fitted_parameter            weights, locs, covariances, probs or
                                                            rates
        `information_fraction`  none                        least share of the complete information
                                                            that is left
        `distance_to_maximum`   none                        of the next Newton step, in standard
                                                            errors
        ======================  ==========================  ========================================

        Units are those of the parameters, and none is a bound. `natural` and `fitted` have standard
        errors `*_se`, those of `fitted` by the delta method. Where the information is as good as
        singular all errors are nan, and the verdict says so. Components may trade places as a
        whole: errors are of one labelling.

    Raises:
        ValueError: If the model has no natural form, data or weights cannot be used, or `method` is
            unknown.

    References:
        Louis (1982), Finding the observed information matrix when using the EM algorithm, JRSS B
        44, 226-233. Oakes (1999), Direct calculation of the information matrix via the EM
        algorithm, JRSS B 61, 479-482.
    """
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}, not {method!r}")
    if not isinstance(model, NaturalModel):
        raise ValueError(
            f"standard errors need a mixture (not its .model), and {type(model).__name__} has no "
            "natural parameters: take the Hessian of its log_evidence instead"
        )
    x = as_tensor(x)
    form = model.natural_form(x)
    weights = form.x.new_ones(len(form.x))
    if sample_weights is not None:
        weights = as_tensor(sample_weights).to(weights)
        if weights.shape != (len(form.x),) or not bool((weights >= 0).all()):
            raise ValueError(f"sample_weights must have shape ({len(form.x)},), none negative")
    information = _summed(form, weights, METHODS[method])
    covariance, fraction, distance = _inverted(information)
    config = {"model": type(model).__name__, "method": method}
    variables, coords = _variables(form, covariance)
    weight = variables["fitted"][1] / variables["fitted_se"][1]
    weight = weight[: len(form.fitted(form.theta)["weights"])].min()
    sentences = _verdict(fraction, distance, float(weight))
    for name, value, text in (
        ("information_fraction", fraction, "least share of the complete-data information"),
        ("distance_to_maximum", distance, "length of the next Newton step, in standard errors"),
    ):
        about = label(unit="none", reduction="none", bound="none", description=text)
        variables[name] = ((), value, about)
    return make_result(
        variables,
        function="standard_errors",
        config=config,
        seed=None,
        data_sha256=sha256_of(x),
        coords=coords,
        verdict=sentences,
    )


def _summed(form: Any, weights: Tensor, method: Callable[..., _Information]) -> _Information:
    """The information of all data, some at a time."""
    components = form.log_joint(form.theta, form.x[:1]).shape[1]
    size = max(_NUMBERS // (components * len(form.theta)), 1)
    total: _Information | None = None
    for rows in torch.arange(len(form.x), device=form.x.device).split(size):
        x = form.x[rows]
        part = method(form, x, form.log_joint(form.theta, x).softmax(1), weights[rows])
        total = part if total is None else _Information(*map(torch.add, total, part))
    assert total is not None
    return total


def _inverted(information: _Information) -> tuple[Tensor | None, float, float]:
    """The covariance, or None where there is none; the least fraction; the Newton step's length."""
    root, failed = torch.linalg.cholesky_ex(information.complete)
    if bool(failed):
        return None, 0.0, float("nan")
    white = torch.linalg.solve_triangular(root, information.observed, upper=False)
    white = torch.linalg.solve_triangular(root, white.mT, upper=False)
    fraction = float(torch.linalg.eigvalsh(0.5 * (white + white.mT))[0])
    if not fraction > _LEAST_FRACTION:
        return None, fraction, float("nan")
    covariance = torch.linalg.inv(0.5 * (information.observed + information.observed.mT))
    distance = information.gradient @ covariance @ information.gradient
    return covariance, fraction, float(distance.clamp(min=0).sqrt())


def _verdict(fraction: float, distance: float, weight: float) -> list[str]:
    """What is wrong; `weight` is the least one, in its own errors."""
    if not fraction > _LEAST_FRACTION:
        return [
            f"No standard errors: in some direction the data hold {max(fraction, 0):.1g} of the "
            "information of complete data, so the components cannot be told apart or one is empty; "
            "use fewer components, or method='variational_bayes'"
        ]
    said = []
    if distance > _AT_MAXIMUM:
        said.append(
            f"Not at a maximum, which lies {distance:.2g} standard errors away: fit with a smaller "
            "tolerance first"
        )
    if fraction < _OVERLAPPING:
        said.append(
            f"Components overlap ({fraction:.1%} of the information is left in the worst "
            "direction): intervals of twice the error may hold less often than 95 %"
        )
    if weight < _FROM_ZERO:
        said.append(
            f"A weight lies {weight:.2g} errors above 0: its component rests on few data, and "
            "intervals about it do not hold"
        )
    return said


def _variables(form: Any, covariance: Tensor | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters with their errors, natural ones and fitted ones."""

    def flat(theta: Tensor) -> Tensor:
        return torch.cat([value.flatten() for value in form.fitted(theta).values()])

    about = label(unit="none", reduction="none", bound="none")
    variables: dict[str, Any] = {}
    for name, dim, function in (
        ("natural", "parameter", form.values),
        ("fitted", "fitted_parameter", flat),
    ):
        values = function(form.theta)
        matrix = values.new_full((len(values), len(values)), torch.nan)
        if covariance is not None:
            jacobian = jacrev(function)(form.theta)
            matrix = jacobian @ covariance @ jacobian.mT
        variables[name] = (dim, values, about)
        variables[f"{name}_se"] = (dim, matrix.diagonal().clamp(min=0).sqrt(), {})
        if name == "natural":
            variables["natural_covariance"] = ((dim, "other_parameter"), matrix, about)
    names = [
        f"{name}{index.tolist()}"
        for name, value in form.fitted(form.theta).items()
        for index in torch.ones_like(value).nonzero()
    ]
    coords = {"parameter": list(form.labels), "fitted_parameter": names}
    return variables, {**coords, "other_parameter": list(form.labels)}
