"""What takes long shows that it lives, and is silent where nobody listens."""

import io
import logging
import sys
import time

import pytest

from pyro_vae import progress
from pyro_vae.progress import announced, lines_on_stderr, progress_bar, say


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def _impatient(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.01)
    monkeypatch.setattr(progress, "_SECONDS_OF_SILENCE", 0.01)


def wait_for(number, lines):
    while len(lines) < number:
        time.sleep(0.001)


@pytest.mark.usefixtures("_impatient")
def test_elsewhere_than_on_a_terminal_lines_come_whether_it_moves_or_not(monkeypatch):
    lines = []
    monkeypatch.setattr(progress, "say", lines.append)
    with lines_on_stderr(), progress_bar(7, "datum", show=True, what="measuring", initial=2) as bar:
        wait_for(2, lines)
        bar.set_postfix(bound="-1.5")
        bar.update(3)
        wait_for(len(lines) + 2, lines)
    assert bar.n == 5
    assert lines[1] == "measuring: 2 of 7 data, 0 s"
    assert lines[-1] == "measuring: 5 of 7 data, 0 s; bound -1.5"
    told = len(lines)
    time.sleep(0.05)
    assert len(lines) == told


@pytest.mark.usefixtures("_impatient")
def test_nothing_is_said_where_nobody_listens_or_it_was_not_asked_for(capfd):
    with progress_bar(3, "step", show=True):
        time.sleep(0.05)
    with lines_on_stderr(), progress_bar(3, "step", show=False):
        time.sleep(0.05)
    say("unheard")
    assert capfd.readouterr() == ("", "")
    with lines_on_stderr():
        say("heard")
    assert capfd.readouterr() == ("", "heard\n")
    assert not logging.getLogger("pyro_vae").handlers


def test_a_terminal_has_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with lines_on_stderr(), progress_bar(3, "step", show=True, what="training") as bar:
        bar.update(2)
        bar.refresh()
    assert "training:  67%" in sys.stderr.getvalue()
    assert "\n" not in sys.stderr.getvalue().strip()


@pytest.mark.usefixtures("_impatient")
def test_what_goes_on_for_long_is_told_again():
    told = []
    with announced("importing", told.append):
        wait_for(3, told)
    assert told[:2] == ["importing ...", "importing ... 0 s"]
