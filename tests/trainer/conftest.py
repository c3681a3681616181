"""Programs that are compiled once, and a run that several tests look at."""

import pytest
from small_run import kept_programs, small

import train


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A folder of compiled programs, which tests of whole runs share."""
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="module")
def quick(compiled):
    """Uses that folder in all tests of a module."""
    with kept_programs(compiled):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick):
    """(folder, history) of a run of twelve steps with Sophia-G."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, train.train(small(folder))
