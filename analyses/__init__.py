"""One thin script a question: load, run, save, plot."""

import sys

if sys.argv[0] == "-m":  # as Python has it while it looks for the script of `python -m`
    from importlib import import_module

    from pyro_vae.progress import announced

    with announced("importing torch", lambda line: print(line, file=sys.stderr, flush=True)):
        for name in ("pyro_vae.runs", "pyro_vae.app.pages", "pyro_vae.plots"):
            import_module(name)
