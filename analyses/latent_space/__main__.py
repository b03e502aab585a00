"""Runs the analysis from the command line."""

import sys

from analyses.latent_space import main

sys.exit(main())
