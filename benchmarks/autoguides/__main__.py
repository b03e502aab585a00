"""`python -m benchmarks.autoguides`."""

import sys

from benchmarks.autoguides.table import main

sys.exit(main())
