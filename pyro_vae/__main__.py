"""Runs the command line as ``python -m pyro_vae``."""

from pyro_vae.app.cli import main

if __name__ == "__main__":
    main()
