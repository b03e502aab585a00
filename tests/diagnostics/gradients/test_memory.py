"""Memory kept for backward passes, against sizes counted by hand."""

import torch

from pyro_vae.diagnostics.gradients.memory import peak_bytes


def test_peak_bytes_count_what_is_kept_for_the_backward_pass():
    a, b = (torch.ones(100, requires_grad=True) for _ in range(2))
    assert peak_bytes(lambda: (a * b).sum().backward()) == 1600
    assert peak_bytes(lambda: (a + b).sum().backward()) == 0

    def twice():
        for _ in range(2):  # freed in between, so the peak is that of one
            (a * b).sum().backward()

    assert peak_bytes(twice) == 1600
