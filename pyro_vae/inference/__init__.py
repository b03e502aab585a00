"""What moves the bound, and what draws from posteriors.

==========================  =======================================================================
part                        modules, the one to call first
==========================  =======================================================================
the primitive               `log_weights` (programs, inspection)
estimators of the bound     `estimators` (surrogate), `beside_the_table`, `objectives`
                            (objective_choice)
the training loop           `svi` (settings, preparation, step, optimizer, history, checkpoint)
EM                          `em` (em_*, enumerated)
draws                       `draws`, `predictive`, `simulation`, `hmc` (potential, tempered,
                            convergence, posterior_sample, labelled_sites)
richer guides per datum     `refit`
other divergences           `variational_divergence` (f_divergences, generation)
==========================  =======================================================================
"""
