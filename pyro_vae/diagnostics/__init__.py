"""What measures the bound, the posterior and the model. A folder a room; enter by its door.

==================  ===============================================================================
room                its question
==================  ===============================================================================
`evidence`          how tight is the bound? log p(x) from below, above and exactly
`gap`               where does the ELBO fall short, per datum?
`gradients`         which estimator should I train with?
`posterior`         can this posterior be trusted? measures, thresholds, verdict
`resolve`           which draws may be used, then? a ladder from the guide to HMC
`calibration`       is the guide calibrated on data from its model?
`comparison`        which model predicts best? each datum left out, folds, data held out
`predictive_check`  does the model fit?
`split_check`       does it fit data that it has not seen?
==================  ===============================================================================
"""
