"""Parity with `transformers` on stored logits (golden/make_golden.py); its files, both ways."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.make_golden import CASES, weights
from places import GOLDEN
from test_families import GPT2, LLAMA2, QWEN, noisy_params, tokens_of

import models
from models import (
    PRESETS,
    DecoderConfig,
    EncoderConfig,
    huggingface,
    safetensors,
    split,
)


@pytest.fixture
def folder(tmp_path):
    """Writes a golden model as `transformers` does; returns (folder, what the file holds)."""

    def write(name, rename=lambda name: name, **fields):
        golden = np.load(GOLDEN / f"{name}.npz")
        tensors = weights(json.loads(str(golden["shapes"])))
        (tmp_path / "config.json").write_text(
            json.dumps(json.loads(str(golden["config"])) | fields)
        )
        safetensors.write(
            tmp_path / "model.safetensors", {rename(key): x for key, x in tensors.items()}
        )
        return tmp_path, golden

    return write


def logits_of(config, params, golden):
    types = {"types_BxT": golden["types"]} if isinstance(config, EncoderConfig) else {}
    apply = jax.jit(split(config).apply)
    return apply(params, golden["tokens"], segments_BxT=golden["mask"], **types)


def tensors_of(path):
    return safetensors.read(path / "model.safetensors")


def edit(path, change):
    """Writes the tensors again as `change` leaves them."""
    tensors = {name: np.array(x) for name, x in tensors_of(path).items()}
    change(tensors)
    safetensors.write(path / "model.safetensors", tensors)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name, folder):
    path, golden = folder(name)
    config, params = huggingface.load(path)
    ours, theirs = logits_of(config, params, golden), golden["logits"]
    assert ours.shape == theirs.shape and np.abs(theirs).max() > 1
    if theirs.ndim == 3:  # those of padding mean nothing
        ours, theirs = ours[golden["mask"] == 1], theirs[golden["mask"] == 1]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_what_is_loaded_is_saved_bit_for_bit(name, folder, tmp_path):
    path, _ = folder(name)
    config, params = huggingface.load(path)
    huggingface.save(params, config, tmp_path / "again")
    before, after = tensors_of(path), tensors_of(tmp_path / "again")
    assert set(before) == set(after)
    for key, x in before.items():
        np.testing.assert_array_equal(x, after[key], key)
    loaded, again = huggingface.load(tmp_path / "again")
    assert loaded == config
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("name", CASES)
def test_config_json_has_what_transformers_wrote(name, folder):
    path, golden = folder(name)
    theirs = json.loads(str(golden["config"]))
    theirs |= theirs.get("rope_parameters") or {}
    ours = huggingface.write_config(huggingface.load(path)[0])
    if name == "gpt2":
        assert theirs["n_inner"] is None and ours.pop("n_inner") == 4 * theirs["n_embd"]
    assert ours == {key: theirs.get(key, value) for key, value in ours.items()}
    # Of the package's earlier versions.
    assert ours.keys() - theirs.keys() <= {"position_embedding_type"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_its_config_json(name):
    config = PRESETS[name]
    kept = dataclasses.replace(config, bias=True) if name in models.GPT2 else config
    fields = json.loads(json.dumps(huggingface.write_config(config)))
    assert huggingface.read_config(fields)[0] == kept


def test_gpt2_without_biases_is_saved_with_biases_of_zero(tmp_path, folder):
    config = dataclasses.replace(GPT2, bias=False)
    params, tokens = noisy_params(config), tokens_of(config)
    huggingface.save(params, config, tmp_path / "zeros")
    loaded, again = huggingface.load(tmp_path / "zeros")
    assert loaded == GPT2
    np.testing.assert_allclose(
        split(loaded).apply(again, tokens), split(config).apply(params, tokens), rtol=1e-6
    )
    assert set(tensors_of(tmp_path / "zeros")) == set(tensors_of(folder("gpt2")[0]))


def test_what_is_loaded_is_float32_in_host_memory(folder):
    path, _ = folder("llama")
    for leaf in jax.tree.leaves(huggingface.load(path)[1]):
        assert type(leaf) is np.ndarray and leaf.dtype == np.float32 and leaf.flags.writeable


def test_half_precision_is_widened(folder):
    path, _ = folder("qwen3")
    exact = huggingface.load(path)[1]

    def halve(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(jnp.bfloat16)

    edit(path, halve)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(np.float32), exact)
    jax.tree.map(np.testing.assert_array_equal, huggingface.load(path)[1], rounded)


def test_names_of_older_files_are_understood(folder):
    path, golden = folder("gpt2", rename=lambda name: name.removeprefix("transformer."))
    edit(path, lambda t: t.update({"h.0.attn.bias": np.ones((1, 1, 16, 16), np.float32)}))
    config, params = huggingface.load(path)
    np.testing.assert_allclose(
        logits_of(config, params, golden)[golden["mask"] == 1],
        golden["logits"][golden["mask"] == 1],
        rtol=0,
        atol=1e-4,
    )


def test_a_bert_of_two_tasks_and_old_names_loads_as_a_masked_one(folder):
    def old(name):
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        return name.replace("LayerNorm.bias", "LayerNorm.beta")

    path, golden = folder("bert", rename=old, architectures=["BertForPreTraining"])
    extra = {
        "bert.pooler.dense.weight": np.ones((24, 24), np.float32),
        "cls.seq_relationship.bias": np.ones(2, np.float32),
    }
    edit(path, lambda tensors: tensors.update(extra))
    config, params = huggingface.load(path)
    np.testing.assert_allclose(
        logits_of(config, params, golden)[golden["mask"] == 1],
        golden["logits"][golden["mask"] == 1],
        rtol=0,
        atol=1e-4,
    )


def test_a_second_copy_of_tied_embeddings_is_left_out(folder):
    path, _ = folder("qwen3")
    once = huggingface.load(path)[1]
    edit(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    jax.tree.map(np.testing.assert_array_equal, huggingface.load(path)[1], once)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gpt2", {"model_type": "mamba"}, "model_type is 'mamba', but only gpt2, llama"),
        ("gpt2", {"activation_function": "relu"}, "activation_function='relu', but our gpt2 sup"),
        ("gpt2", {"n_embd": None}, "n_embd=None: it needs a value of type int"),
        ("gpt2", {"n_embd": 24.5}, "n_embd=24.5: it needs a value of type int"),
        ("gpt2", {"n_layer": "2"}, "n_layer='2': it needs a value of type int"),
        ("gpt2", {"n_layer": 3}, r"config\.json: n_layer=3, but the weights have 2 blocks"),
        ("gpt2", {"n_layer": 1}, r"config\.json: n_layer=1, but the weights have 2 blocks"),
        ("gpt2", {"n_positions": 8}, r"transformer\.wpe\.weight is \(16, 24\), not \(8, 24\)"),
        (
            "llama",
            {"attention_bias": True},
            "attention_bias=True, but our llama supports only False",
        ),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn', but our llama"),
        ("llama", {"rope_scaling": {"type": "linear"}, "rope_parameters": None}, "rope_type='lin"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen3", {"num_key_value_heads": 4}, "6 heads cannot share 4 key/value heads"),
        ("bert", {"architectures": ["BertModel"]}, "'BertModel', but only BertForMask"),
    ],
)
def test_a_model_that_ours_are_not_is_refused(name, fields, message, folder):
    with pytest.raises(ValueError, match=message):
        huggingface.load(folder(name, **fields)[0])


def test_an_empty_folder_and_one_of_pickles_are_refused(tmp_path, folder):
    with pytest.raises(ValueError, match=r"has no config\.json: give a folder"):
        huggingface.load(tmp_path / "missing")
    path, _ = folder("gpt2")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no model\.safetensors.*load it with transf"):
        huggingface.load(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dataclasses.replace(LLAMA2, bias=True), "no LlamaForCausalLM has bias=True"),
        (dataclasses.replace(QWEN, attention_layer_scale=True), "Qwen3.*has attention_layer_scale"),
        (dataclasses.replace(LLAMA2, positions="learned"), "no GPT2LMHeadModel has .*norm='rms"),
        (dataclasses.replace(LLAMA2, mlp="gelu"), "no LlamaForCausalLM has mlp='gelu'"),
    ],
)
def test_a_config_that_transformers_cannot_compute_is_refused(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        huggingface.save({}, config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_params_of_another_config_are_refused(tmp_path):
    other = dataclasses.replace(LLAMA2, ffn_width=20)
    with pytest.raises(ValueError, match=r"mlp/down is \(20, 16\), not \(24, 16\)\. Pass"):
        huggingface.save(noisy_params(other), LLAMA2, tmp_path)


def test_how_to_compute_is_no_part_of_a_file(tmp_path):
    config = DecoderConfig(
        vocab_size=8, context=4, width=8, layers=1, heads=2, bias=True, dtype="bfloat16"
    )
    huggingface.save(noisy_params(config), config, tmp_path)
    assert huggingface.load(tmp_path)[0] == dataclasses.replace(config, dtype="float32")


# ---------------------------------------------------------------- the file format


def test_a_file_of_the_package_is_read_in_every_dtype():
    arrays = safetensors.read(GOLDEN / "dtypes.safetensors")
    assert arrays.pop("scalar").shape == () and arrays.pop("empty").shape == (0, 3)
    assert {name: x.dtype.name for name, x in arrays.items()} == {name: name for name in arrays}
    assert len(arrays) == len(safetensors.DTYPES)
    for array in arrays.values():
        expected = np.arange(6).reshape(2, 3).astype(array.dtype)
        np.testing.assert_array_equal(array, expected)


def test_what_is_written_is_read(tmp_path):
    arrays = safetensors.read(GOLDEN / "dtypes.safetensors")
    arrays["turned"] = np.arange(6.0).reshape(2, 3).T
    for content in (arrays, {}, {"empty": np.zeros((3, 0), np.int8)}):
        safetensors.write(tmp_path / "file.safetensors", content)
        again = safetensors.read(tmp_path / "file.safetensors")
        assert set(again) == set(content)
        for name, array in content.items():
            assert again[name].dtype == array.dtype
            np.testing.assert_array_equal(again[name], array)
    assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"]


def test_arrays_are_aligned(tmp_path):
    for length in range(8):
        safetensors.write(tmp_path / "file.safetensors", {"x" * length: np.ones(3, np.float32)})
        header = int.from_bytes((tmp_path / "file.safetensors").read_bytes()[:8], "little")
        assert header % 8 == 0


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = (GOLDEN / "dtypes.safetensors").read_bytes()
    for length in [0, 7, 8, 9, 100, *range(len(whole) - 30, len(whole))]:
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"is not a whole safetensors file.*Fetch it again"):
            safetensors.read(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="file not fully covered"):
        safetensors.read(tmp_path / "cut")


def entry(dtype="U8", shape=(4,), begin=0, end=4):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


INVALID = "invalid shape, data type, or offset"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"x": entry(end=3), "y": entry(shape=(1,), begin=3)}, INVALID),
        ({"x": entry(), "y": entry()}, "invalid offset for tensor `[xy]`"),
        ({"x": entry(shape=(3,), begin=1)}, "invalid offset for tensor `x`"),
        ({"x": entry(shape=(-2, -2))}, "integer `-2`, expected usize"),
        ({"x": entry(shape=(4.0,))}, "floating point `4.0`, expected usize"),
        ({"x": entry(shape=(True, 4))}, "boolean `true`, expected usize"),
        ({"x": entry(begin=-4, end=0)}, "integer `-4`, expected usize"),
        ({"x": entry(end=4.0)}, "floating point `4.0`, expected usize"),
        ({"x": entry(shape=(4,) + (1,) * 40)}, "'x' has shape"),
        ({"x": entry(shape=(2**62, 8))}, "overflow computing buffer size"),
        ({"x": entry(shape=(0, 2**62, 8), end=0), "y": entry()}, "'x' has shape"),
        ({"x": entry(shape=(10**4000,))}, "number out of range"),
        ({"x": entry(dtype="F8_E4M3")}, "the dtype of 'x' is F8_E4M3, but only F64.*save it"),
        ({"x": entry(dtype=["U8"])}, "invalid JSON in header"),
        ({"x": {"dtype": "U8"}}, "missing field `shape`"),
        ({"x": 4}, "integer `4`, expected struct TensorInfo"),
        ({"x": entry(shape=2)}, "integer `2`, expected a sequence"),
        ({"x": {"dtype": "U8", "shape": [4], "data_offsets": [0]}}, "invalid length 1"),
        ([1, 2], "invalid type: sequence"),
        ("{", "EOF while parsing"),
        ("[" * 100_000, "invalid type: sequence"),
        ('{"x": 1, "x": 2}', "integer `1`, expected struct"),
    ],
)
def test_a_header_that_lies_is_refused(header, message, tmp_path):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (tmp_path / "a.file").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ValueError, match=rf"a\.file.*{message}.* again\."):
        safetensors.read(tmp_path / "a.file")


def test_a_header_longer_than_the_file_is_refused(tmp_path):
    (tmp_path / "file").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="header too large"):
        safetensors.read(tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "message"), [("[]", "holds \\[\\], not an object"), ("{", "not JSON")]
)
def test_a_config_json_that_is_none_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        huggingface.load(tmp_path)
