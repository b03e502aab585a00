r"""Can this posterior be trusted? The diagnostics of a guide's q(z | x), per datum, in one call."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from pyro_vae.data import Seed, as_seed
from pyro_vae.diagnostics.calibration import calibrate
from pyro_vae.diagnostics.evidence import plan_chunks
from pyro_vae.diagnostics.posterior.assess import Thresholds, assess
from pyro_vae.diagnostics.posterior.labels import labelled_variables
from pyro_vae.diagnostics.posterior.measure import Measured, QualityWork
from pyro_vae.diagnostics.posterior.settings import (
    CHECKS,
    QualityOptions,
    chosen_checks,
    hmc_settings,
)
from pyro_vae.diagnostics.posterior.summary import blind_spots, verdict_notes, worst_data
from pyro_vae.diagnostics.predictive_check import predictive_check
from pyro_vae.inference.log_weights import khat_threshold, pareto_khat
from pyro_vae.inference.programs import (
    Pair,
    Program,
    ProgramError,
    program_scope,
    tensors_of,
    tool,
)
from pyro_vae.results import Result, make_result, sha256_of

__all__ = ["CHECKS", "khat_threshold", "pareto_khat", "posterior_quality", "worst_data"]

_CHUNK = 200  # data compared with a reference at once


@tool
def posterior_quality(
    model: Program,
    guide: Program,
    x: Any,
    *,
    num_particles: int = 1000,
    reference: Any = None,
    checks: Sequence[str] | None = None,
    num_simulations: int = 0,
    joint: bool | None = None,
    seed: Seed = 0,
    max_memory: float = 0.5,
    progress: bool = True,
    thresholds: Thresholds | None = None,
    num_test_draws: int = 500,
    num_permutations: int = 500,
    **settings: Any,
) -> Result:
    r"""Measures the guide's posterior of each datum, and says whether it can be trusted.

    Two questions are kept apart. `trust_guide`: may the guide's draws be used as they are? Yes,
    unless a mean, a spread or the total variation is off by more than `thresholds` allow, by the
    evidence of importance weights (where these are usable) or of a reference that converged; no,
    too, where neither is at hand. `trust_weights`: may importance-weighted draws be used? Yes,
    where k-hat is at most min(1 - 1/log10 S, 0.7), that of weight x squared deviation too is
    within its limit, enough draws are effective, the weights do not widen the guide by more than
    their limit, and no reference contradicts. `trustworthy` is
    both, and `reason` says in words what speaks against a datum.

    Args:
        model: The generative program.
        guide: The program of the approximate posterior.
        x: The data; a tuple for several arguments, a dict for keywords.
        num_particles: Draws S of the guide for each datum.
        reference: What to compare with: `"hmc"` for batched Hamiltonian Monte Carlo that starts
            from the prior; what `sample_posterior` returned for the same data; a tensor `[draws,
            batch, dim]` of independent draws (constrained values in the order of the coordinate
            `latent`; batch 1 if joint); or None.
        checks: Some of `CHECKS`: `"stein"`, the kernel Stein discrepancy in unconstrained space;
            with a reference `"energy"`, `"mmd"` and `"classifier"`, which compare draws; and
            `"predictive"`, the posterior predictive check of model and guide. None for all that can
            be run but the last.
        num_simulations: Data sets to draw from the model for its calibration; 0 for none.
        joint: True for one posterior on the full data; None for that where latents are global.
        seed: Seeds everything; the caller's random state is left alone.
        max_memory: Roughly the memory that one chunk of data and draws may take, in GiB.
        progress: Shows a bar on stderr where that is a terminal.
        thresholds: What counts as good enough; `Thresholds()` if None.
        num_test_draws: Draws of each side for the checks, at most.
        num_permutations: Behind the p-values of energy distance and MMD, and signs behind that of
            the Stein discrepancy. Data that none of them reaches get as many more as it takes to
            find them among all, up to 100,000.
        **settings: Of `reference.HmcReference`, with `reference="hmc"`.

    Returns:
        Latents are in constrained space. With `joint` there is no dimension `datum`.

        ====================  =============  ===============  ======================================
        name                  dims           unit, bound      meaning
        ====================  =============  ===============  ======================================
        `trustworthy`         datum          bool             both of the next two
        `trust_guide`         datum          bool             whether the guide's draws may be used
                                                              as they are
        `trust_weights`       datum          bool             whether importance-weighted draws may
                                                              be used
        `reason`              datum          text             what speaks against the datum
        `khat`                datum          none, none       Pareto k-hat of the importance weights
        `khat_moments`        datum          none, none       no less: that of weight x squared
                                                              deviation, on which corrected sds rest
        `widening`            datum          none, none       largest ratio of a weighted sd to the
                                                              guide's, over latents and directions
        `ess`                 datum          particles, none  effective sample size of the weights
        `kl_guide_posterior`  datum          nats, lower      KL(q || p(z | x)), by importance
                                                              weights
        `kl_posterior_guide`  datum          nats, none       KL(p(z | x) || q), the same; at most
                                                              log S
        `total_variation`     datum          none, none       between q and p(z | x), the same
        `mean`                datum, latent  none, unbiased   mean of the guide, in units of the
                                                              latent
        `sd`                  datum, latent  none, none       sd of the guide, the same
        `corrected_mean`      datum, latent  none, none       posterior mean by Pareto-smoothed
                                                              weights
        `corrected_sd`        datum, latent  none, none       posterior sd by these
        `mean_correction`     datum, latent  none, none       guide's mean - corrected mean, in
                                                              corrected sds
        `scale_correction`    datum, latent  none, none       log(sd of the guide / corrected sd)
        ====================  =============  ===============  ======================================

        Standard errors are `*_se` (and `kl_guide_posterior_bias` the part of that error that is
        bias); they are not to be relied upon where `error_reliable`, a bool over `datum` as the
        next two, is False, those of corrected sds and of `scale_correction` where
        `moments_reliable` is, and that of `kl_posterior_guide` where `kl_posterior_guide_reliable`
        is: the upper 90 % limit of a k-hat is then too high, and the number has a question mark in
        tables. The Stein check adds the first two of the following, a reference the others,
        labelled with bound none and, but for `reference_ess` (particles), unit none:

        =======================  =============  ====================================================
        name                     dims           meaning
        =======================  =============  ====================================================
        `ksd`                    datum          squared kernel Stein discrepancy, unconstrained, in
                                                the guide's sds
        `ksd_p_value`            datum          its p-value
        `rhat`                   datum          largest split R-hat of the reference
        `reference_ess`          datum          smallest effective sample size of the reference
        `reference_converged`    datum          bool: whether the reference converged (see
                                                `Thresholds`)
        `reference_mean`         datum, latent  posterior mean by the reference
        `reference_sd`           datum, latent  posterior sd by the reference
        `mean_error`             datum, latent  guide's mean - the reference's, in reference sds
        `scale_error`            datum, latent  log(sd of the guide / sd of the reference)
        `corrected_mean_error`   datum, latent  `mean_error` of the weighted draws
        `corrected_scale_error`  datum, latent  `scale_error` of the weighted draws
        `covariance_error`       datum          relative error of the guide's covariance matrix
        `wasserstein_1`          datum, latent  1-Wasserstein distance of a margin, in units of the
                                                latent
        `wasserstein_2`          datum, latent  2-Wasserstein distance of the same
        `energy`                 datum          energy distance of guide and reference, latents in
                                                pooled sds
        `mmd`                    datum          squared MMD of the same
        `c2st_accuracy`          datum          accuracy of a classifier between guide and reference
        `energy_p_value`         datum          p-value of the energy distance
        `mmd_p_value`            datum          p-value of the MMD
        `c2st_p_value`           datum          p-value of the accuracy
        =======================  =============  ====================================================

        What compares with the reference is nan for a datum whose reference did not converge,
        `covariance_error` also where latents are bound to one another, as on a simplex. Simulations
        add the variables of `calibrate`, the predictive check those of `predictive_check` as
        ``predictive_...``.

        `summary()` says all of it in words, `worst_data` selects the worst.

    Raises:
        ProgramError: If the pair has no log weights (see `log_weights`), the model has no latents,
            or `"hmc"` or `"stein"` was asked for and a latent is discrete (names it).
        ValueError: If an argument is out of its range, or the reference is of other data.

    Note: k-hat, ESS, divergences and the Stein discrepancy are blind to a mode that the guide never
        visits. A reference whose chains start from the prior may see it; where chains stay in
        different modes R-hat is large, and the datum is not trusted.

    References:
        Yao, Vehtari, Simpson & Gelman (2018), Yes, but did it work? Evaluating variational
        inference; Vehtari et al. (2024), Pareto smoothed importance sampling; Vehtari, Gelman,
        Simpson, Carpenter & Bürkner (2021), Rank-normalization, folding, and localization (R-hat).

    Example:
        >>> import torch
        >>> from pyro_vae import LinearGaussian
        >>> model = LinearGaussian(data_dim=3, latent_dim=2).double()
        >>> found = posterior_quality(model.model, model.exact_guide, torch.zeros(5, 3).double())
        >>> found.trustworthy.values.all()
        np.True_
    """
    seed = as_seed(seed)
    if thresholds is not None and not isinstance(thresholds, Thresholds):
        raise TypeError(f"thresholds is {thresholds!r}; pass Thresholds(mean=...), or leave it out")
    options = QualityOptions(
        num_particles,
        chosen_checks(checks, reference),
        bool(joint),
        max_memory,
        progress,
        num_test_draws,
        num_permutations,
        thresholds or Thresholds(),
        hmc_settings(reference, settings),
    )
    with torch.no_grad(), program_scope(seed):
        pair = Pair.inspect(model, guide, x, joint=joint, num_particles=num_particles)
        options = replace(options, joint=pair.joint)
        plan = plan_chunks(
            pair,
            num_particles=num_particles,
            max_memory=max_memory,
            max_data=_CHUNK,
        )
        if not plan.structure.latents:
            raise ProgramError("the model has no latent site, so there is no posterior to judge")
        found = QualityWork(plan, options, reference).run()
    beside = _beside(model, guide, x, options, num_simulations, seed)
    found = replace(found, notes=[*pair.structure.notes, *found.notes])
    return _result(found, beside, options, x, reference, num_simulations, seed)


# --- checks of the whole model --------------------------------------------------------------------


def _beside(
    model: Program, guide: Program, x: Any, options: QualityOptions, num_simulations: int, seed: int
) -> dict[str, Result]:
    """Results of the checks that are not of one datum, by what they are called."""
    found = {}
    shared: dict[str, Any] = {
        "joint": options.joint,
        "seed": seed,
        "max_memory": options.max_memory,
    }
    if num_simulations:
        found["calibration"] = calibrate(
            model,
            guide,
            x,
            num_simulations=num_simulations,
            progress=options.progress,
            **shared,
        )
    if options.runs("predictive"):
        checked = predictive_check(model, guide, x, **shared)
        renamed = {name: f"predictive_{name}" for name in checked.data_vars}
        found["predictive check"] = checked.rename(renamed)
    return found


# --- the result -----------------------------------------------------------------------------------


def _result(
    found: Measured,
    beside: Mapping[str, Result],
    options: QualityOptions,
    x: Any,
    reference: Any,
    num_simulations: int,
    seed: int,
) -> Result:
    columns, joint, size = found.columns, options.joint, options.num_particles
    verdict = assess(columns, found.names, size, options.thresholds)
    answers = {
        "trustworthy": verdict.trustworthy,
        "trust_guide": verdict.trust_guide,
        "trust_weights": verdict.trust_weights,
    }
    variables: dict[str, Any] = labelled_variables(
        {**answers, **columns},
        joint=joint,
        num_particles=size,
        num_test_draws=options.num_test_draws,
    )
    reasons = verdict.reasons()
    variables["reason"] = ((), reasons[0], {}) if joint else ("datum", reasons, {})
    coords: dict[str, Any] = {"latent": found.names}
    notes, words = list(found.notes), []
    for title, result in beside.items():
        for name, variable in result.data_vars.items():
            variables[str(name)] = (variable.dims, variable.values, variable.attrs)
        coords = {str(n): c.values for n, c in result.coords.items()} | coords
        words += [f"{title}: {said}" for said in result.provenance["verdict"]]
        notes += [f"{title}: {note}" for note in result.provenance["notes"]]
    notes += blind_spots(columns, options.left_out(reference, num_simulations))
    tensors = tensors_of(x)
    kind = reference if reference is None or isinstance(reference, str) else "given"
    return make_result(
        variables,
        function="posterior_quality",
        config={
            "num_particles": size,
            "reference": kind,
            **({"hmc": asdict(options.hmc)} if kind == "hmc" else {}),
            "checks": options.checks,
            "num_simulations": num_simulations,
            "num_test_draws": options.num_test_draws,
            "num_permutations": options.num_permutations,
            "joint": joint,
            "thresholds": asdict(options.thresholds),
        },
        seed=seed,
        data_sha256=sha256_of(*tensors) if tensors else None,
        coords=coords,
        notes=notes,
        verdict=verdict_notes(columns, verdict, options.thresholds, size, joint=joint) + words,
    )
