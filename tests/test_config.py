import dataclasses
import json

import optax
import pytest

from train import config
from train.config import preset
from train.optimizers import OPTIMIZERS


@pytest.mark.parametrize(
    ("names", "nearest"),
    [(("tinny",), "tiny"), (("gpt2-120m",), "gpt2-125m"), (("tiny", "sofia-g"), "sophia-g")],
)
def test_an_unknown_name_suggests_the_nearest(names, nearest):
    with pytest.raises(ValueError, match=f"Did you mean {nearest}"):
        preset(*names)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", ["tiny", "gpt2-355m"])
def test_a_config_survives_json(model, optimizer, tmp_path):
    run = preset(model, optimizer)
    config.save(run, tmp_path)
    assert config.load(tmp_path) == run


def test_a_changed_model_keeps_its_name():
    run = preset("gpt2-125m", "adamw")
    changed = dataclasses.replace(run, model=dataclasses.replace(run.model, dtype="bfloat16"))
    assert changed.name == "gpt2-125m-adamw"


@pytest.mark.parametrize("field", ["log_every", "checkpoint_every", "keep_checkpoints"])
def test_an_interval_of_zero_is_refused_by_name(field):
    with pytest.raises(ValueError, match=rf"run\.{field}=0 must be at least 1"):
        config.RunConfig(**{field: 0})


def test_published_sizes_have_the_published_hyperparameters():
    sizes = [preset(f"gpt2-{size}", "sophia-g").optim for size in ("125m", "355m", "770m")]
    assert [(o.learning_rate, o.gamma) for o in sizes] == [(6e-4, 0.05), (7e-4, 0.08), (3e-4, 0.05)]
    adamw = [preset(f"gpt2-{size}", "adamw").optim for size in ("125m", "355m", "770m")]
    assert [o.learning_rate for o in adamw] == [6e-4, 3e-4, 2e-4]


def test_the_schedule_warms_up_to_the_peak_and_ends_at_the_final_share():
    run = dataclasses.replace(preset("tiny", "adamw"), steps=100, warmup_steps=10)
    rates = [float(run.schedule(step)) for step in (0, 10, 100)]
    peak = run.optim.learning_rate
    assert rates == pytest.approx([0, peak, 0.05 * peak])


def test_the_hash_follows_what_changes_the_result_and_nothing_else():
    run = preset()
    elsewhere = dataclasses.replace(
        run,
        run=dataclasses.replace(run.run, folder="elsewhere"),
        mesh=dataclasses.replace(run.mesh, fsdp=4),
    )
    assert elsewhere.hash == run.hash
    assert dataclasses.replace(run, seed=1).hash != run.hash
    gamma = dataclasses.replace(run, optim=dataclasses.replace(run.optim, gamma=0.7))
    assert gamma.hash != run.hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"sequence_length": 65}, "longer than the model's context of 64"),
        ({"steps": 50}, "warmup_steps=100 must be at least 0 and less than steps=50"),
        ({"gradient_clip": -1.0}, "gradient_clip=-1.0"),
    ],
)
def test_a_config_that_cannot_run_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(preset(), **change)


def test_a_folder_without_a_run_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        config.load(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        config.load(tmp_path / "missing")


def test_an_unreadable_config_says_where_and_why(tmp_path):
    (tmp_path / "config.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        config.load(tmp_path)
    fields = config.to_json(preset()) | {"colour": 3}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="colour"):
        config.load(tmp_path)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weight_decay_moves_matrices_only(optimizer):
    import jax.numpy as jnp

    params = {"matrix": jnp.ones((4, 4)), "vector": jnp.ones(4)}
    optim = dataclasses.replace(preset("tiny", optimizer).optim, weight_decay=0.5)
    tx = optax.with_extra_args_support(optim.make(lambda _: 1.0, shards=1, seed=0))
    zeros = {"matrix": jnp.zeros((4, 4)), "vector": jnp.zeros(4)}
    updates, _ = tx.update(zeros, tx.init(params), params, hessian=params, refresh=True)
    assert jnp.allclose(updates["matrix"], -0.5)
    assert jnp.all(updates["vector"] == 0)
