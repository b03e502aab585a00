"""What measures the bound, the posterior, the model and its samples.

==========================  =======================================================================
question                    modules, the one to call first
==========================  =======================================================================
how tight is the bound?     `evidence` (importance, annealing, bridge, quadrature, modes, proper,
                            chunks), `evidence_table`, `gap`
which estimator?            `gradients` (gradient_*, enumeration, memory), `equal_time`,
                            `recommendations`
can I trust the posterior?  `posterior` (pareto, weighted, reference, two_sample, classifier, pairs,
                            stein, verdict, verdict_words, quality_*), `calibration` (ranks,
                            rank_ecdf, simulated_pairs, calibration_notes)
does the model fit?         `predictive` (replicates)
are its samples good?       `samples` (features)
what do its latents say?    `latent_space`, `paths`, `probes`
==========================  =======================================================================
"""
