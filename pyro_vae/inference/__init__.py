"""What moves the bound, and what draws from posteriors. A folder a room; enter by its door.

==================  ===============================================================================
room                what is in it
==================  ===============================================================================
`supports`          the support of a distribution, and the transform onto it
`programs`          running and inspecting a pair of Pyro programs; every refusal
`log_weights`       the one idea, and what is read off the weights' tail
`estimators`        the table of estimators, and objectives beside it
`svi`               `fit`, its history, checkpoints and resume
`em`                `fit_em` and its methods
`mcmc`              `sample_posterior`: batched HMC, tempering, convergence
`refit`             the best guide of a family for each datum; normal distributions fitted by scores
`draws`             `draw_posterior`
`predictive`        `draw_prior`, `draw_predictive`
==================  ===============================================================================
"""
