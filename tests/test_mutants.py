"""The list of mutants stays alive; `make mutants` runs it."""

from pathlib import Path

import pytest

from benchmarks.mutants import Mutant, read_mutants, spoil


def test_every_mutant_changes_one_place_and_names_tests_that_are_there() -> None:
    mutants = read_mutants()
    assert len(mutants) >= 200
    for mutant in mutants:
        spoil(mutant, Path(mutant.path).read_text())
        assert Path(mutant.tests.split()[0]).exists(), mutant.tests
    assert len({(m.path, m.old, m.new) for m in mutants}) == len(mutants)


def test_a_text_that_is_gone_or_stands_twice_is_refused() -> None:
    for source in ("b", "a a"):
        with pytest.raises(ValueError, match=r"write the mutant anew"):
            spoil(Mutant("file.py", "a", "c", ""), source)
