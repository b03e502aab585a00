"""A file is the old one or the new one, whatever happens while it is written."""

import os
import stat
import subprocess
import sys
import textwrap
import time

import pytest

from pyro_vae.results import atomic_path, files, write_text


def test_text_is_written_and_replaced(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("one\n", "zwölf\n"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "ours", "")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours")}
    assert len(modes) == 1


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["block", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_alone(tmp_path, monkeypatch, error, where):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(*_):
        raise error

    if where != "block":
        monkeypatch.setattr(files.os, where, fail)

    def write():
        with atomic_path(path) as temporary:
            temporary.write_text("new")
            if where == "block":
                fail()

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_file_then_rename_then_folder_reach_the_disk(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        spy = lambda *a, real=real, name=name: (calls.append(name), real(*a))  # noqa: E731
        monkeypatch.setattr(files.os, name, spy)
    write_text(tmp_path / "a.txt", "x")
    assert calls == ["fsync", "replace", "fsync"]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "none" / "a.txt", "x")


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    """Kill -9 at random moments: the file is all a's or all b's, never a part."""
    path = tmp_path / "a.txt"
    write_text(path, "a" * 200_000)
    program = textwrap.dedent(
        """
        import sys, itertools
        from pyro_vae.results.files import write_text
        print("ready", flush=True)
        for letter in itertools.cycle("ba"):
            write_text(sys.argv[1], letter * 200_000)
        """
    )
    for wait in (0.0, 0.013, 0.029):
        writer = subprocess.Popen(
            [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        with writer.stdout:
            writer.stdout.readline()
            time.sleep(wait)
            writer.kill()
            writer.wait()
        text = path.read_text()
        assert text in ("a" * 200_000, "b" * 200_000)
