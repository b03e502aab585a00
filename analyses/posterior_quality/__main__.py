"""Runs the analysis from the command line."""

import sys

from analyses.posterior_quality import main

sys.exit(main())
