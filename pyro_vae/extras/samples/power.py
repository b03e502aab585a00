"""The power of pictures at high spatial frequencies, which blur takes away."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from pyro_vae.extras.samples.features import check_rows
from pyro_vae.results import ShortRepr

__all__ = ["PowerSpectrum", "high_frequency_power"]

_CUTOFF = 0.25  # cycles per pixel, half of the highest along a row


@dataclass(frozen=True, repr=False)
class PowerSpectrum(ShortRepr):
    """How the variance of pixels within images spreads over spatial frequencies.

    Attributes:
        frequency: Centres of rings of frequencies, in cycles per pixel; 0, the mean, is left out.
        power: The mean over images and over the frequencies of a ring; that of white noise is its
            variance at every frequency.
        high: Of each image, the variance of its pixels that lies above the cutoff.
        total: Of each image, the variance of its pixels.
        cutoff: In cycles per pixel.
    """

    frequency: Float64[Tensor, " rings"]
    power: Float64[Tensor, " rings"]
    high: Float64[Tensor, " images"]
    total: Float64[Tensor, " images"]
    cutoff: float

    @property
    def fraction(self) -> float:
        """The share of all power that lies above the cutoff; nan if there is no power."""
        total = float(self.total.sum())
        return float(self.high.sum()) / total if total > 0 else math.nan


def high_frequency_power(
    images: Float[Tensor, "images pixels"],
    image_shape: Sequence[int],
    *,
    cutoff: float = _CUTOFF,
) -> PowerSpectrum:
    r"""Power spectrum of images, averaged over directions, and the power above a frequency.

    .. math:: P(f) = \frac{1}{HW} \Bigl\lvert \sum_{r, c} x_{rc}\,
              e^{-2 \pi i (f_1 r + f_2 c)} \Bigr\rvert^2, \qquad
              \mathrm{high} = \frac{1}{HW} \sum_{\lvert f \rvert > \mathrm{cutoff}} P(f)

    Blurred samples lack power above the cutoff, noisy ones have too much.

    Args:
        images: One flattened image a row.
        image_shape: (height, width) or (channels, height, width); channels are averaged.
        cutoff: In cycles per pixel, above 0; along a row or a column the highest is 0.5.

    Raises:
        ValueError: If the shape does not fit the rows, no frequency lies above the cutoff, or a
            value is not finite.

    Note: Images are taken as periodic: a picture whose opposite borders differ has power at high
        frequencies from the seam, samples and data alike.

    Example:
        >>> import torch
        >>> row = torch.tensor([1.0, -1.0, 1.0, -1.0])  # half a cycle per pixel
        >>> high_frequency_power(row.repeat(1, 3), (3, 4)).fraction
        1.0
    """
    rows = check_rows("images", images)
    if len(image_shape) not in (2, 3) or math.prod(image_shape) != rows.shape[1]:
        raise ValueError(
            f"image_shape {tuple(image_shape)} does not have the {rows.shape[1]} pixels of a row: "
            "give (height, width) or (channels, height, width)"
        )
    channels, height, width = (1, *image_shape)[-3:]
    pixels = height * width
    radius = torch.hypot(
        torch.fft.fftfreq(height, dtype=torch.float64)[:, None],
        torch.fft.fftfreq(width, dtype=torch.float64),
    ).flatten()
    if not 0 < cutoff < float(radius.max()):
        raise ValueError(
            f"cutoff is {cutoff}, but must lie between 0 and {float(radius.max()):.3f} cycles per "
            "pixel, the highest frequency of these images"
        )
    stacked = rows.reshape(-1, channels, height, width)
    power = torch.cat(
        [torch.fft.fft2(part).abs().square().mean(1).flatten(1) for part in stacked.split(4096)]
    )
    power /= pixels
    rings = (radius * max(height, width)).round().long()
    members = torch.bincount(rings, minlength=int(rings.max()) + 1)
    sums = torch.zeros(len(members), dtype=torch.float64).index_add_(0, rings, power.mean(0))
    used = torch.nonzero(members)[:, 0]
    used = used[used > 0]
    return PowerSpectrum(
        frequency=used.double() / max(height, width),
        power=sums[used] / members[used],
        high=power[:, radius > cutoff].sum(1) / pixels,
        total=power[:, radius > 0].sum(1) / pixels,
        cutoff=cutoff,
    )
