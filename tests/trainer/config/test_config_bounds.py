"""Numbers of a config that no model and no optimizer can have."""

import dataclasses
import json

import pytest

from train import preset
from train.config import serialize


@pytest.mark.parametrize(
    "size", [("layers", 10**9), ("context", 10**9), ("vocab_multiple", 10**9), ("ffn_width", 2**31)]
)
def test_sizes_that_no_model_has_are_refused_before_anything_is_traced(size, tmp_path):
    fields = serialize.to_json(preset())
    fields["model"] = dict([*fields["model"].items(), size])
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"config.json cannot be read .*{size[0]} is {size[1]}"):
        serialize.load(tmp_path)


@pytest.mark.parametrize(
    ("optimizer", "name", "value", "words"),
    [
        ("adamw", "eps", -1.0, "--optim.eps -1.0 is negative"),
        ("adamw", "weight_decay", -0.1, "--optim.weight-decay -0.1 is negative"),
        ("adamw", "b2", 1 - 1e-10, "is 1 in float32"),
        ("sgd", "momentum", -0.9, "--optim.momentum -0.9 is negative"),
        ("galore", "rank", -4, "--optim.rank -4 is negative"),
        ("sophia-g", "num_samples", 10**9, "choose at most 1024"),
    ],
)
def test_numbers_that_no_optimizer_takes_are_refused_by_their_flag(optimizer, name, value, words):
    run = preset("tiny", optimizer)
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(run, optim=dataclasses.replace(run.optim, **{name: value}))
