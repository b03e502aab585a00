"""Pyro's autoguides and handlers in every tool: right by a known answer, or refused in words.

A normal location with a normal prior, whose posterior, evidence and predictions are known in closed
form. Each guide is set to the posterior (or, in the column of `fit`, trained), and each tool's
number compared with the known one.

    python -m benchmarks.autoguides --out docs/autoguides.md
"""
