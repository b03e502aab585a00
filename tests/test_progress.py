"""What takes long shows that it lives, and is silent where nobody listens."""

import io
import logging
import sys

import pytest

from pyro_vae import progress
from pyro_vae.progress import announced, lines_on_stderr, progress_bar, say


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def test_elsewhere_than_on_a_terminal_a_line_comes_every_ten_seconds(clock, capfd):
    with lines_on_stderr(), progress_bar(7, "step", show=True, what="training", initial=2) as bar:
        for seconds in (4.0, 4.0, 4.0, 4.0, 5.0):
            clock.now += seconds
            bar.set_postfix(bound="-1.5")
            bar.update()
        assert bar.n == 7
    assert capfd.readouterr().err.splitlines() == ["training: 5 of 7 steps, 12 s; bound -1.5"]


def test_nothing_is_said_where_nobody_listens_or_it_was_not_asked_for(clock, capfd):
    with progress_bar(3, "step", show=True) as bar:
        clock.now += 60
        bar.update()
    with lines_on_stderr(), progress_bar(3, "step", show=False) as bar:
        clock.now += 60
        bar.update()
    say("unheard")
    assert capfd.readouterr() == ("", "")
    assert not logging.getLogger("pyro_vae").handlers


def test_a_terminal_has_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with lines_on_stderr(), progress_bar(3, "step", show=True, what="training") as bar:
        bar.update(2)
        bar.refresh()
    assert "training:  67%" in sys.stderr.getvalue()
    assert "\n" not in sys.stderr.getvalue().strip()


def test_what_goes_on_for_long_is_told_again(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_OF_SILENCE", 0.01)
    told = []
    with announced("importing", told.append):
        while len(told) < 3:
            pass
    assert told[0] == "importing ..."
    assert told[1] == "importing ... 0 s"
