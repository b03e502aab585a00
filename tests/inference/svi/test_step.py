"""What runs around a step: refusals, warm-up, an interrupt that waits."""

import math
import os
import signal

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_vae.inference.svi import TrainingError, deferred_interrupt, without_validation
from pyro_vae.inference.svi.step import ScaledLatents, refuse_infinite


@pytest.mark.parametrize("loss", [1.5, (1.5, -2.0)])
def test_a_finite_loss_passes(loss):
    assert refuse_infinite(lambda factor: loss)(3) == loss


@pytest.mark.parametrize("loss", [math.nan, math.inf, (1.5, -math.inf)])
def test_an_infinite_loss_is_refused(loss):
    with pytest.raises(TrainingError, match=r"the loss is .*Lower the learning rate"):
        refuse_infinite(lambda: loss)()


def test_latents_are_scaled_and_observed_values_are_not():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=2.0):
            pyro.sample("y", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.3))

    with ScaledLatents(0.25):
        sites = poutine.trace(model).get_trace().nodes
    assert [sites[name]["scale"] for name in "zyx"] == [0.25, 0.5, 1.0]


def test_checks_are_left_out_inside_alone():
    before = pyro.settings.get()
    with without_validation():
        assert not pyro.settings.get("validate_poutine")
        dist.Normal(0.0, -1.0)
    assert pyro.settings.get() == before
    with pytest.raises(ValueError, match="scale"):
        dist.Normal(0.0, -1.0)


def test_the_first_interrupt_waits_and_the_second_does_not():
    before = signal.getsignal(signal.SIGINT)
    with deferred_interrupt() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_ends_the_process_waits_for_the_step_and_then_does_what_it_would_have(name):
    number, done = getattr(signal, name), []
    before = signal.signal(number, lambda *_: done.append("the caller's handler"))
    try:
        with deferred_interrupt() as stopped:
            os.kill(os.getpid(), number)
        assert (stopped(), done) == (False, ["the caller's handler"])  # nothing to save: at once
        with deferred_interrupt(saves=True) as stopped:
            os.kill(os.getpid(), number)
            assert stopped()
            done.append("saved")
        assert done[1:] == ["saved", "the caller's handler"]
        signal.signal(number, signal.SIG_IGN)  # as nohup does
        with deferred_interrupt(saves=True) as stopped:
            os.kill(os.getpid(), number)
            assert not stopped()
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def twice():
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("it waited")


def test_a_second_signal_that_ends_the_process_does_not_wait():
    def handler(*_):
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(SystemExit), deferred_interrupt(saves=True):
            twice()
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
