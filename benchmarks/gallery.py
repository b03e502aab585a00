"""The gallery of models: each fitted, checked against HMC, and compared with a simpler one.

python -m benchmarks.gallery --out docs/gallery.md
python -m benchmarks.gallery logistic_regression item_response
"""

import argparse
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_vae.diagnostics.comparison import loo
from pyro_vae.diagnostics.posterior import posterior_quality
from pyro_vae.inference.estimators import StickingTheLanding
from pyro_vae.inference.programs import Program
from pyro_vae.inference.svi import Fit, fit
from pyro_vae.models.statistics import GALLERY, Simulated
from pyro_vae.results import Result, paired_difference

_HMC: dict[str, Any] = {"num_chains": 8, "num_warmup": 300, "num_samples": 600}
_EPOCHS = 100
_HEAD = (
    "model",
    "data",
    "mini-batch",
    "fit, s",
    "mean error, sds",
    "ratio of sds",
    "k-hat",
    "R-hat of HMC",
    "elpd over the simpler model",
    "in all, s",
)


@dataclass(frozen=True)
class Row:
    """What was measured of one model.

    Attributes:
        name: Its key.
        fitted: The training.
        fit_seconds: Processor time of it.
        quality: `posterior_quality` against HMC; None if it was left out.
        difference: elpd less that of the simpler model, in nats, in all.
        difference_error: Its standard error, as an estimate for further data.
        khat: The worst of the data left out.
        seconds: Processor time of all.
    """

    name: str
    fitted: Fit
    fit_seconds: float
    quality: Result | None
    difference: float
    difference_error: float
    khat: float
    seconds: float

    def cells(self) -> list[str]:
        """In the order of the table's head."""
        example, quality = GALLERY[self.name], self.quality
        means = ratios = weights = rhat = "-"
        if quality is not None:
            weights, rhat = f"{float(quality.khat):.2f}", f"{float(quality.rhat):.3f}"
            error, ratio = quality.mean_error.values, np.exp(quality.scale_error.values)
            if bool(quality.reference_converged):
                means, ratios = (
                    f"{np.abs(error).max():.2f}",
                    f"{ratio.min():.2f} to {ratio.max():.2f}",
                )
        return [
            example.title,
            data_text(example.simulate(0)),
            "all" if example.batch_size is None else str(example.batch_size),
            f"{self.fit_seconds:.1f}",
            means,
            ratios,
            weights,
            rhat,
            f"{self.difference:.1f} ± {self.difference_error:.1f} (without {example.lacks})",
            f"{self.seconds:.0f}",
        ]


def fit_gallery(model: Program, guide: Program, x: Any, batch_size: int | None) -> Fit:
    """On mini-batches, with a rate that falls."""
    return fit(
        model,
        guide,
        x,
        loss=StickingTheLanding(4),
        batch_size=batch_size,
        epochs=_EPOCHS,
        learning_rate=lambda epoch: 0.1 * 0.02 ** (epoch / _EPOCHS),
        progress=False,
    ).require_finished()


def measure(name: str, *, seed: int = 0, hmc: bool = True) -> Row:
    """Fits one model of the gallery, checks its posterior and leaves data out."""
    example = GALLERY[name]
    data = example.simulate(seed)
    started = time.process_time()
    fitted = fit_gallery(example.model, example.make_guide(), data.x, example.batch_size)
    fit_seconds = time.process_time() - started
    quality = None
    if hmc:
        quality = posterior_quality(
            fitted.model, fitted.guide, data.x, reference="hmc", checks=[], progress=False, **_HMC
        )
    full = loo(fitted.model, fitted.guide, data.x, num_draws=1000, progress=False)
    simpler = fit_gallery(example.simpler, example.make_simpler_guide(), data.x, example.batch_size)
    other = loo(simpler.model, simpler.guide, data.x, num_draws=1000, progress=False)
    apart, num_data = paired_difference(full, other, "log_predictive"), full.sizes["datum"]
    return Row(
        name,
        fitted,
        fit_seconds,
        quality,
        apart.value * num_data,
        (apart.data_standard_error or 0.0) * num_data,
        float(full.khat.max()),
        time.process_time() - started,
    )


def data_text(data: Simulated) -> str:
    """Shapes of the arguments."""
    given = data.x if isinstance(data.x, tuple) else (data.x,)
    return ", ".join(" x ".join(map(str, tensor.shape)) for tensor in given)


def processor() -> str:
    """Its name, where the machine tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((n.split(":")[1].strip() for n in lines if n.startswith("model name")), "?")


def document(rows: Iterable[Row]) -> str:
    """The page."""
    cells = [_HEAD, ["---"] * len(_HEAD), *(row.cells() for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    return f"""# A gallery of models

`pyro_vae.models.statistics.GALLERY` has eight models that statisticians write. Each is a short
Pyro program with a `simulate(seed)` of known parameters, a guide, and a simpler model that the same
data should speak against:

```python
from pyro_vae import fit, loo, posterior_quality
from pyro_vae.models.statistics import GALLERY

example = GALLERY["poisson_effects"]
data = example.simulate(0)  # data.x, and data.truth by site
fitted = fit(example.model, example.make_guide(), data.x, batch_size=example.batch_size)
posterior_quality(fitted.model, fitted.guide, data.x, reference="hmc")
loo(fitted.model, fitted.guide, data.x)
```

{table}

Seconds are processor time on one core ({processor()}). The mean error is the largest over all
latents, those of each datum too, in sds of the HMC reference ({_HMC["num_chains"]} chains of
{_HMC["num_samples"]} draws, whose own error is part of it), and stands where R-hat says that the
chains converged; the ratio of sds is the guide's to the reference's. k-hat is that of one weight on
all data. The last column but one is the sum over all data of log p(datum | the others), in nats,
less that of the simpler model, with its standard error as an estimate for further data.

Components have an order in the prior, topics a word of their own, and loadings a zero: without
that, the posterior has as many equal modes as there are orders, and neither a normal guide nor
chains that agree describe it.

`python -m benchmarks.gallery --out docs/gallery.md` writes this page.
"""


def main(arguments: list[str] | None = None) -> int:
    """Measures, and writes the page or prints it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="of models; all if left out")
    parser.add_argument("--out", type=Path, help="Markdown file to write; printed if left out")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in GALLERY]:
        parser.error(f"no model is called {unknown[0]}; there are {', '.join(GALLERY)}")
    torch.set_default_dtype(torch.float64)
    rows = []
    for name in options.names or GALLERY:
        rows.append(measure(name))
        print(" | ".join(rows[-1].cells()), flush=True)
    text = document(rows)
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
