"""Runs the analysis from the command line."""

import sys

from analyses.em_to_vae import main

sys.exit(main())
