"""Which files of a folder are the model, and which weights are refused."""

import json
import os
import random

import jax
import numpy as np
import pytest
from test_families import GPT2, LLAMA2, noisy_params

from models import huggingface, safetensors
from models.weights import INDEX, WHOLE

NEW = noisy_params(LLAMA2)
OLD = jax.tree.map(lambda x: x + 1, NEW)


@pytest.fixture
def folder(tmp_path):
    """Has config.json, and the function that writes a model in n parts."""
    huggingface.save(NEW, LLAMA2, tmp_path)
    (tmp_path / WHOLE).unlink()
    return tmp_path


def tensors_of(params, tmp):
    huggingface.save(params, LLAMA2, tmp / "whole")
    return {k: np.array(x) for k, x in safetensors.read(tmp / "whole" / WHOLE).items()}


def write_parts(folder, params, count, *, name="model-{:05}-of-{:05}.safetensors", index=True):
    """The parts of a model, and what the index says of them."""
    tensors, places = tensors_of(params, folder), {}
    for number in range(count):
        file = name.format(number + 1, count)
        part = {key: tensors[key] for key in sorted(tensors)[number::count]}
        safetensors.write(folder / file, part)
        places |= dict.fromkeys(part, file)
    if index:
        write_index(folder, places)
    return places


def write_index(folder, places):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def loads(folder, params):
    jax.tree.map(np.testing.assert_array_equal, huggingface.load(folder)[1], params)


def refuses(folder, message):
    with pytest.raises(ValueError, match=message):
        huggingface.load(folder)


def test_the_index_decides_beside_an_older_save_in_parts_or_whole(folder):
    write_parts(folder, OLD, 3)
    write_parts(folder, NEW, 2)
    loads(folder, NEW)
    safetensors.write(folder / WHOLE, tensors_of(OLD, folder))
    loads(folder, NEW)


def test_parts_may_have_any_name_that_the_index_has(folder):
    write_parts(folder, NEW, 2, name="model.safetensors-{:05}-of-{:05}.safetensors")
    loads(folder, NEW)
    (folder / "sub").mkdir()
    write_parts(folder, NEW, 2, name="sub/{}-{}.safetensors")
    loads(folder, NEW)


def test_a_tensor_comes_from_the_file_that_the_index_names(folder):
    """Although the other file has one of that name too."""
    places = write_parts(folder, NEW, 2)
    old, moved = tensors_of(OLD, folder), next(iter(places))
    other = "model-00002-of-00002.safetensors"
    part = {k: np.array(x) for k, x in safetensors.read(folder / other).items()}
    safetensors.write(folder / other, part | {moved: old[moved]})
    loads(folder, NEW)
    write_index(folder, places | {moved: other})
    changed = huggingface.load(folder)[1]
    assert sum(map(np.array_equal, jax.tree.leaves(changed), jax.tree.leaves(NEW))) == (
        len(jax.tree.leaves(NEW)) - 1
    )


def test_without_an_index_the_whole_file_counts_and_then_complete_parts(folder):
    write_parts(folder, NEW, 3, index=False)
    loads(folder, NEW)
    safetensors.write(folder / WHOLE, tensors_of(OLD, folder))
    loads(folder, OLD)  # as transformers does


def test_parts_without_an_index_that_are_not_one_model_are_refused(folder):
    write_parts(folder, NEW, 2, index=False)
    second = folder / "model-00002-of-00002.safetensors"
    kept = second.read_bytes()
    second.unlink()
    refuses(folder, r"has 1 parts of 2, without model-00002-of-00002.safetensors: fetch all")
    second.write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    refuses(folder, "both have the tensor '.*': they are of two saves")
    second.write_bytes(kept)
    loads(folder, NEW)
    (folder / "model-00000-of-00002.safetensors").write_bytes(kept)
    refuses(folder, "has 3 parts of 2")
    second.rename(folder / "kept")
    refuses(folder, "has 2 parts of 2, without model-00002-of-00002")
    (folder / "kept").rename(second)
    (folder / "model-00000-of-00002.safetensors").rename(
        folder / "model-00001-of-00003.safetensors"
    )
    refuses(folder, "has parts of two saves, .*-of-00002.* and .*-of-00003.*fetch the index")


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/tmp/x.safetensors", "link.safetensors", "a\0b", "sub/../../x"]
)
def test_an_index_that_leads_out_of_the_folder_is_refused(file, folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "x.safetensors"
    safetensors.write(outside, tensors_of(NEW, folder))
    (folder / "link.safetensors").symlink_to(outside)
    write_index(folder, dict.fromkeys(tensors_of(NEW, folder), file))
    refuses(folder, "leads out of the folder .*: copy the file")


def test_links_into_the_store_of_the_hub_are_followed(folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("models--a--b")
    write_parts(folder, NEW, 2)
    snapshot, blobs = cache / "snapshots" / "0123", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            os.rename(file, blobs / file.name)
            (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    loads(snapshot, NEW)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": []}, "has no weight_map"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": {"x": "gone.safetensors"}}, "lacks 'gone.safetensors', which .* names"),
        ({"weight_map": {"x": 1}}, "has 1 as a file name"),
        ({"weight_map": {"x": None}}, "has None as a file name"),
        ({"weight_map": {"x": ["a"]}}, r"has \['a'\] as a file name"),
        ({"weight_map": {"x": ""}}, "lacks '', which"),
        ({"weight_map": {"x": "\ud800"}}, "is not JSON .*surrogates not allowed"),
        ({"weight_map": {"x": "x" * 300}}, "which leads out of the folder or is not a file name"),
        ({"weight_map": {"x": WHOLE}}, "says that 'x' is in 'model.safetensors', which lacks it"),
        (["x"], r"model\.safetensors\.index\.json holds \['x'\], not an object"),
    ],
)
def test_a_malformed_index_is_refused(index, message, folder):
    safetensors.write(folder / WHOLE, tensors_of(NEW, folder))
    (folder / INDEX).write_text(json.dumps(index))
    refuses(folder, message)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_weights_that_are_not_finite_are_named(value, folder):
    tensors = tensors_of(NEW, folder)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float64)
    tensors[name][1, 2] = value
    safetensors.write(folder / WHOLE, tensors)
    refuses(folder, rf"{WHOLE} has 1 numbers that are not finite .* in {name}.*Fetch it again")


def test_weights_of_integers_are_no_weights(folder):
    tensors = tensors_of(NEW, folder)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    safetensors.write(folder / WHOLE, tensors)
    refuses(folder, r"has model\.norm\.weight as int8, but weights are floats: load the quant")


def test_both_an_old_and_a_new_name_of_a_tensor_are_refused(tmp_path):
    huggingface.save(noisy_params(GPT2), GPT2, tmp_path)
    tensors = {k: np.array(x) for k, x in safetensors.read(tmp_path / WHOLE).items()}
    tensors["transformer.ln_f.gamma"] = tensors["transformer.ln_f.weight"] + 1
    safetensors.write(tmp_path / WHOLE, tensors)
    refuses(tmp_path, r"has 'transformer\.ln_f\.weight' under an older name too: remove one")


def test_a_save_replaces_a_model_in_parts(folder):
    write_parts(folder, OLD, 3)
    huggingface.save(NEW, LLAMA2, folder)
    assert not list(folder.glob("model-*")) and not (folder / INDEX).exists()
    loads(folder, NEW)


def test_a_save_follows_no_link_out_of_its_folder(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "precious"
    outside.write_text("mine")
    for name in ("config.json", WHOLE, "config.tmp", "model.tmp"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(outside)
    huggingface.save(NEW, LLAMA2, folder)
    assert outside.read_text() == "mine"
    loads(folder, NEW)


# ---------------------------------------------------------------- sizes and malformed JSON

SIZES = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
SIZES += ["num_key_value_heads", "head_dim", "intermediate_size"]
WRONG = [True, "2", [2], {"a": 2}, 2.5, -1, float("nan"), float("inf"), 1e300]


@pytest.mark.parametrize("value", [10**6, 2**31 - 1, 2**40, 2**63, 10**30])
@pytest.mark.parametrize("key", SIZES)
def test_a_size_beyond_the_files_is_refused_before_anything_is_built(
    key, value, folder, monkeypatch
):
    safetensors.write(folder / WHOLE, tensors_of(NEW, folder))
    edit_config(folder, {key: value})
    monkeypatch.setattr(huggingface, "split", None)
    refuses(folder, rf"{folder}/config\.json: .*({key}={value}|cannot)")


def edit_config(folder, fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("key", [*SIZES, "rms_norm_eps", "max_position_embeddings"])
def test_a_size_of_a_wrong_type_is_refused(key, folder):
    safetensors.write(folder / WHOLE, tensors_of(NEW, folder))
    for value in WRONG:
        if (key, value) == ("rms_norm_eps", 2.5):
            continue  # which is right
        edit_config(folder, {key: value})
        refuses(folder, rf"{folder}/config\.json: ")


def mutants(fields, stream, count):
    """Copies of a JSON object, each with one value replaced or removed, or one byte changed."""
    values = [
        *WRONG,
        0,
        None,
        2**63,
        10**30,
        "\ud800",
        "a\0",
        {"a": {}},
        [[]],
        ["a"] * 3,
        "x" * 300,
    ]
    for _ in range(count):
        copy = json.loads(json.dumps(fields))
        key = stream.choice(sorted(copy))
        deeper = isinstance(copy[key], dict) and copy[key] and stream.random() < 0.7
        inner = copy[key] if deeper else copy
        key = stream.choice(sorted(inner))
        inner[key] = stream.choice(values)
        if stream.random() < 0.2:
            del inner[key]
        text = bytearray(json.dumps(copy).encode())
        if stream.random() < 0.3:
            text[stream.randrange(len(text))] = stream.randrange(256)
        yield bytes(text)


@pytest.mark.parametrize("part", ["config.json", INDEX, "header"])
def test_malformed_json_ends_in_an_error_that_names_the_file_or_in_a_model(part, folder):
    places = write_parts(folder, NEW, 1, index=False)
    file = folder / places["model.norm.weight"]
    write_index(folder, places)
    data, name = file.read_bytes(), file.name if part == "header" else part
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length] if part == "header" else (folder / part).read_bytes()
    told = []
    for mutant in mutants(json.loads(text), random.Random(part), 150):
        if part == "header":
            mutant = len(mutant).to_bytes(8, "little") + mutant + data[8 + length :]
        (folder / name).write_bytes(mutant)
        try:
            huggingface.load(folder)
        except ValueError as error:
            told.append(str(error))
    assert len(told) > 50
    assert all(str(folder) in text and len(text.encode()) < 800 for text in told)
