"""One thin script a question: load, run, save, plot."""

import sys

if sys.argv[0] == "-m":  # as Python has it while it looks for the script of `python -m`
    print("importing torch ...", file=sys.stderr, flush=True)
