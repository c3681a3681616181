"""The table of mutants: each has its text once in the sources, and tests that exist."""

import pytest

from tests import mutants

TABLE = mutants.read_table()


def test_every_text_is_in_one_place_and_every_test_exists():
    for mutant in TABLE:
        mutants.source_of(mutant)
        assert mutants.arguments_of(mutant), mutant.name


def test_names_are_unique():
    assert len({mutant.name for mutant in TABLE}) == len(TABLE)


def test_a_text_that_is_not_there_is_named(tmp_path):
    fault = mutants.Mutant("room", "a fault", "is nowhere in these sources", "", "")
    with pytest.raises(ValueError, match="a fault: its text must be in one place"):
        mutants.source_of(fault)


def test_a_test_that_is_not_there_is_named():
    fault = mutants.Mutant("room", "a fault", "", "", "test_mutants.py::test_of_nothing")
    with pytest.raises(ValueError, match="has no such test"):
        mutants.arguments_of(fault)
