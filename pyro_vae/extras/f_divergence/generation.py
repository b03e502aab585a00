"""Data drawn from a model so that gradients pass through the draws."""

from typing import Any

from jaxtyping import Float
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.inference.programs import Program, ProgramError, program_scope, warn_of_unfitted
from pyro_vae.inference.svi import without_validation

__all__ = ["prior_predictive", "prior_predictive_draw"]


def prior_predictive(
    model: Program, x: Float[Tensor, "batch *event"], *, mean: bool | None = None
) -> Float[Tensor, "batch *event"]:
    """Draws from a model as many data as x has rows, through which gradients pass.

    The program runs as it stands, its latents drawn from their priors and its one observed site
    drawn too. Of x only the shape is used. Random numbers come from torch's global stream.

    Args:
        model: The generative program, called as `model(x)`.
        x: Data, for their number and shape.
        mean: Whether the mean of the observed site, given the latents, stands in place of a draw.
            None takes a draw where one can be differentiated (a normal), and the mean otherwise
            (binary pixels).

    Returns:
        The draws or the means, in the shape of x.

    Raises:
        ProgramError: If a latent cannot be drawn differentiably (a mixture prior, a discrete
            latent), there is not one observed site of the shape of x, or neither draw nor mean of
            it can be had; names the site.

    Example:
        >>> import torch
        >>> from pyro_vae import VAE
        >>> vae = VAE(data_dim=6, latent_dim=2, hidden=(5,))
        >>> prior_predictive(vae.model, torch.zeros(4, 6)).shape
        torch.Size([4, 6])
    """
    with program_scope():
        warn_of_unfitted(model)
        return prior_predictive_draw(model, x, mean)[0]


class _DrawObserved(Messenger):
    """Draws the observed sites, or takes their means, and remembers what it took."""

    def __init__(self, mean: bool | None) -> None:
        super().__init__()
        self.mean = mean
        self.values: dict[str, tuple[Tensor, bool]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or msg["infer"].get("_deterministic"):
            return
        name, fn = msg["name"], msg["fn"]
        if not msg["is_observed"]:
            if not getattr(fn, "has_rsample", False):
                raise ProgramError(
                    f"the draw of latent site '{name}' cannot be differentiated, so no gradient "
                    "reaches what made it; use a reparameterised prior, such as a normal or a flow"
                )
            return
        if type(fn).__name__ == "Unit":
            raise ProgramError(
                f"the model's site '{name}' is a pyro.factor, from which nothing can be drawn; "
                "write it as a distribution"
            )
        takes_mean = not fn.has_rsample if self.mean is None else self.mean
        msg.update(is_observed=False, value=None, done=False)
        if takes_mean:
            try:
                msg.update(value=fn.mean, done=True)
            except (NotImplementedError, AttributeError) as error:
                raise ProgramError(
                    f"the mean of site '{name}' is not known, and no draw of it can be "
                    "differentiated; use another likelihood"
                ) from error
        elif not fn.has_rsample:
            raise ProgramError(
                f"a draw of site '{name}' cannot be differentiated; pass mean=True or mean=None"
            )
        self.values[name] = (msg["value"], takes_mean)

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            self.values[msg["name"]] = (msg["value"], self.values[msg["name"]][1])


def prior_predictive_draw(model: Program, x: Tensor, mean: bool | None) -> tuple[Tensor, bool]:
    """What `prior_predictive` returns, with the parameters at hand, and whether it is the mean."""
    drawn = _DrawObserved(mean)
    with without_validation(), drawn:  # x is not scored, so it need not lie on the support
        model(x)
    if len(drawn.values) != 1:
        raise ProgramError(
            f"a generator has one observed site, its data; this one has {len(drawn.values)} "
            f"({', '.join(drawn.values) or 'none'})"
        )
    ((name, (value, is_mean)),) = drawn.values.items()
    if value.shape != x.shape:
        raise ProgramError(
            f"the model draws {tuple(value.shape)} at site '{name}' where x is {tuple(x.shape)}; "
            "its plate must have the length of x, without subsampling"
        )
    return value, is_mean
