"""Labelled numbers: what every tool returns, and the rules that its numbers obey.

A number here says its unit, whether it is per datum or a total, what it bounds, how many particles
and which seed made it, how surely it is known, and what the data are (the probability of binary
pixels and the density of grey ones are different things). Numbers that differ in these are not
compared: `IncomparableError` says what differs.

Three names carry the conventions. A variable that has one value per datum has the dimension
``datum``. The Monte-Carlo standard error of the variable ``foo`` is the variable ``foo_se``, which
takes in the bias ``foo_bias`` where there is one. `label` makes a variable's attributes; one more,
``reliable_by``, may name a variable that says for which data the standard error holds. Where it
does not hold for all, the table shows it with a question mark.

A `Result` is an `xarray.Dataset`. Selecting from one (``sel``, ``isel``, ``result[["elbo"]]``,
``rename``) keeps the type and the labels. Computing with one (arithmetic, ``mean``, ``map``) gives
a plain dataset that makes no quantities, for a label belongs to the number that was measured: a
standard deviation of nats per datum is no longer a bound.
"""

from pyro_vae.results.arviz import ArvizGroups, to_arviz
from pyro_vae.results.building import make_result
from pyro_vae.results.digits import ShortRepr, data_text, shapes_text
from pyro_vae.results.files import atomic_path, leftovers, write_text
from pyro_vae.results.labelled import spread_error
from pyro_vae.results.labels import BOUNDS, MEASURES, REDUCTIONS, UNITS, label
from pyro_vae.results.provenance import float32_precision, processor_name, sha256_of
from pyro_vae.results.quantity import IncomparableError, Quantity, difference_text
from pyro_vae.results.result import Result, load_result, paired_difference
from pyro_vae.results.table import rows_html, summary_html

__all__ = [
    "BOUNDS",
    "MEASURES",
    "REDUCTIONS",
    "UNITS",
    "ArvizGroups",
    "IncomparableError",
    "Quantity",
    "Result",
    "ShortRepr",
    "atomic_path",
    "data_text",
    "difference_text",
    "float32_precision",
    "label",
    "leftovers",
    "load_result",
    "make_result",
    "paired_difference",
    "processor_name",
    "rows_html",
    "sha256_of",
    "shapes_text",
    "spread_error",
    "summary_html",
    "to_arviz",
    "write_text",
]
