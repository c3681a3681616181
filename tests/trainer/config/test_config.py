import dataclasses
import json
import math

import pytest

from models import PRESETS
from train import baseline
from train.config import schema, serialize
from train.config.presets import preset
from train.config.sizes import GPT2_SIZE
from train.optimizers.adam import AdamW
from train.optimizers.registry import OPTIMIZERS, name_of


@pytest.mark.parametrize(
    ("names", "nearest"),
    [
        (("tinny",), "tiny"),
        (("gpt2-120m",), "gpt2-125m"),
        (("tiny", "sofia-g"), "sophia-g"),
        (("tiny", "sofia"), "sophia-g"),
        (("tiny", "sophia-geo"), "sophia-geometric"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(names, nearest):
    with pytest.raises(ValueError, match=f"Did you mean {nearest}"):
        preset(*names)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", ["tiny", "gpt2-355m"])
def test_a_config_survives_json(model, optimizer, tmp_path):
    run = preset(model, optimizer)
    serialize.save(run, tmp_path)
    assert serialize.load(tmp_path) == run


@pytest.mark.parametrize(
    ("optimizer", "old", "new"),
    [("sophia-g", "spread", "amortize"), ("orthosoph", "b2_numbers", "b2_vector")],
)
def test_a_config_with_the_names_of_older_versions_is_read(optimizer, old, new):
    run = preset("tiny", optimizer)
    fields = serialize.to_json(run)
    fields["run"] = fields.pop("output")
    fields["optim"][old] = fields["optim"].pop(new)
    assert serialize.from_json(fields) == run


def test_a_changed_model_keeps_its_name():
    run = preset("gpt2-125m", "adamw")
    changed = dataclasses.replace(run, model=dataclasses.replace(run.model, dtype="bfloat16"))
    assert changed.name == "gpt2-125m-adamw"


@pytest.mark.parametrize("field", ["log_every", "checkpoint_every", "keep_checkpoints"])
def test_an_interval_of_zero_is_refused_by_name(field):
    with pytest.raises(ValueError, match=rf"output\.{field}=0 must be at least 1"):
        schema.OutputConfig(**{field: 0})


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
        output=dataclasses.replace(run.output, folder="elsewhere"),
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
        ({"steps": 50, "warmup_steps": 50}, "less than steps=50.* give --warmup-steps too"),
        ({"start_from": "gs://bucket/run"}, "--start-from gs://bucket/run is an address"),
        ({"gradient_clip": -1.0}, "gradient_clip=-1.0"),
        ({"gradient_clip": math.nan}, "--gradient-clip nan is not a finite number"),
        ({"final_learning_rate": -3.0}, "final_learning_rate=-3.0 is a share"),
        ({"loss_chunk": -1}, "loss_chunk=-1 is negative"),
        ({"optim": AdamW(b1=1.0)}, "--optim.b1 1.0 is not a valid decay"),
        ({"optim": AdamW(b2=math.nan)}, "--optim.b2 nan is not a finite number"),
        ({"optim": AdamW(weight_decay=math.inf)}, "--optim.weight-decay inf is not a fin"),
        ({"optim": AdamW(learning_rate=-1.0)}, "--optim.learning-rate -1.0 is negative"),
    ],
)
def test_a_config_that_cannot_run_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(preset(), **change)


def test_a_folder_without_a_run_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        serialize.load(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        serialize.load(tmp_path / "missing")


def test_an_unreadable_config_says_where_and_why(tmp_path):
    (tmp_path / "config.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        serialize.load(tmp_path)


def changed(*path, to):
    fields = json.loads(json.dumps(serialize.to_json(preset())))
    inner = fields
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = to
    return fields


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "KeyError: 'base'"),
        ([], "holds \\[\\], not an object"),
        (3, "holds 3, not an object"),
        (changed("colour", to=3), "colour"),
        (changed("model", to=1), "cannot be read as a run's config"),
        (changed("model", "width", to="16"), "model.width is '16'"),
        (changed("model", "width", to=16.0), "model.width is 16.0"),
        (changed("model", "tied", to="no"), "model.tied is 'no'"),
        (changed("optim", to=None), "cannot be read as a run's config"),
        (changed("optim", "b1", to=[0.9]), "optim.b1 is"),
        (changed("optimizer", to="sofia"), "KeyError: 'sofia'"),
        (changed("optimizer", to=["adamw"]), "TypeError"),
        (changed("base", to="big"), "KeyError: 'big'"),
        (changed("steps", to=True), "steps is True"),
        (changed("seed", to=None), "seed is None"),
        (changed("warmup_steps", to="few"), "warmup_steps is 'few'"),
        (changed("precision", to="float8"), "precision is 'float8'"),
        (changed("output", "quiet", to=0), "output.quiet is 0"),
        (changed("output", "folder", to=7), "output.folder is 7"),
        (changed("data", "task", to={"a": 1}), "data.task is"),
    ],
)
def test_a_config_of_another_form_is_named(tmp_path, fields, words):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/config\.json .*{words}"):
        serialize.load(tmp_path)


def test_the_default_warm_up_is_a_share_of_the_steps():
    """A preset's own at its own number of steps; then a tenth of fewer, and no more for longer."""
    for model, steps, want in [
        ("tiny", 1200, 100),
        ("tiny", 60, 6),
        ("tiny", 5, 0),
        ("tiny", 10**6, 100),
        ("gpt2-125m", 100_000, 2000),
        ("gpt2-125m", 4000, 400),
    ]:
        run = dataclasses.replace(preset(model, "adamw"), steps=steps)
        assert run.warmup == want
        assert float(run.schedule(want)) == pytest.approx(run.optim.learning_rate)
        assert serialize.from_json(json.loads(json.dumps(serialize.to_json(run)))) == run
    given = dataclasses.replace(preset(), warmup_steps=100)
    assert given.hash == preset().hash  # it is the same run


@pytest.mark.parametrize("model", PRESETS)
def test_every_model_has_a_preset_of_every_optimizer_under_its_name(model):
    assert [name_of(preset(model, name).optim) for name in OPTIMIZERS] == list(OPTIMIZERS)


@pytest.mark.parametrize(
    ("optim", "change", "message"),
    [
        ({}, {"accumulation": 0}, "accumulation=0 must be at least 1"),
        ({}, {"accumulation": 3}, "batch_size=16 does not divide into accumulation=3"),
        ({"batch_fraction": 1 / 3}, {}, "every 3-th row, which does not divide batch_size=16"),
        (
            {"amortize": True},
            {},
            "amortized over 10 steps .* or --optim.update",
        ),
        ({"batch_fraction": 0.0}, {}, r"batch_fraction=0.0 is outside \(0, 1\]"),
        ({"batch_fraction": 0.25}, {"batch_size": 24, "accumulation": 6}, "one must divide the ot"),
        ({"groups": 3}, {}, "16 rows, sampled on each of 1 micro-batches, do not divide into 3"),
        ({"groups": 16, "batch_fraction": 0.5}, {}, "8 rows, sampled .* lower --optim.groups"),
    ],
)
def test_rows_that_cannot_be_cut_are_refused_where_the_run_is_described(optim, change, message):
    run = preset()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(run, optim=dataclasses.replace(run.optim, **optim), **change)


def test_the_reference_of_a_run_in_micro_batches_is_that_in_one_piece():
    cut = dataclasses.replace(preset("tiny", "sophia-g"), accumulation=2)
    assert baseline.twin(cut) == preset("tiny", "adamw")


def test_every_larger_model_has_a_size_whose_hyperparameters_it_takes():
    assert {name for name in PRESETS if not name.startswith("tiny")} == set(GPT2_SIZE)
