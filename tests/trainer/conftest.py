"""A run that several tests look at."""

import pytest
from small_run import small

import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, history) of a run of twelve steps with Sophia-G."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, train.train(small(folder))
