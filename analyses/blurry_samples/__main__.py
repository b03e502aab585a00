"""Runs the analysis from the command line."""

import sys

from analyses.blurry_samples import main

sys.exit(main())
