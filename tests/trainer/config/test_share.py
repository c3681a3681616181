"""A batch that the preset's share does not divide gets the nearest share that does."""

import pytest

from train.cli.train import parse
from train.config.command_line import command
from train.optimizers.sophia import SophiaG


@pytest.mark.parametrize(
    ("words", "share", "groups"),
    [
        ("gpt2-125m sophia-g", 1 / 10, 0),
        ("qwen3-134m sophia-g --batch-size 512", 1 / 8, 0),
        ("qwen3-134m sophia-h --batch-size=512", 1 / 16, 4),
        ("gpt2-125m sophia-h --batch_size 500", 1 / 25, 4),
        ("gpt2-125m sophia-h --batch-size 8", 1 / 8, 0),
        ("gpt2-125m sophia-h --batch-size 512 --optim.groups 8", 1 / 16, 8),
        ("gpt2-125m sophia-g --accumulation 4", 1 / 12, 0),
        ("gpt2-125m sophia-g --batch-size 7", 1 / 7, 0),
        ("tiny sophia-g --batch-size 17", 1, 0),
    ],
)
def test_the_share_of_a_preset_is_the_nearest_that_its_batch_has(words, share, groups, capsys):
    run = parse(words.split())
    assert (run.optim.batch_fraction, run.optim.groups) == (pytest.approx(share), groups)
    said = capsys.readouterr().err
    if share in (1, 1 / 10):  # the preset's
        assert said == ""
    else:
        assert said.startswith(f"--optim.batch-fraction {share:.4g}") and said.count("\n") == 1
    assert parse(command(run).split()[3:]) == run  # what is said to repeat it, does


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--batch-size 512 --optim.batch-fraction .1", "every 10-th row, which does not divide"),
        ("--batch-size 512 --optim.amortize", "every 100-th row, which does not divide"),
        ("--batch-size 512 --accumulation 3", "does not divide into accumulation=3"),
        ("--batch-size 0", "batch_size=0 must be at least 1"),
    ],
)
def test_a_share_that_was_named_is_not_fitted(words, message):
    with pytest.raises(ValueError, match=message):
        parse(["gpt2-125m", "sophia-g", *words.split()])


def test_a_fitting_share_is_left_where_it_is_fixed():
    optim = SophiaG(batch_fraction=0.1)
    assert optim.fitted(512, 1, fixed={"batch_fraction"}) is optim
    assert optim.fitted(512).batch_fraction == 1 / 8
    assert optim.fitted(480) == optim
