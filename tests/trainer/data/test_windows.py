"""Windows of a text: every one once an epoch, in an order that depends on the seed alone."""

import hashlib
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from corpora import assert_same
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from train import data
from train.data.rows import Data
from train.data.tasks.causal import next_token_rows
from train.data.tasks.windows import Windows
from train.data.tokens import Tokens
from train.step.batch import Batch

TEXTS = Path(data.__file__).parent / "texts"


def positions(length=1003, *, stride=16, extra=1, seed=3):
    """Windows of a text whose tokens are their own positions."""
    how = {"stride": stride, "extra": extra, "seed": seed}
    return Windows(np.arange(length), vocab_size=length, where="the text", **how)


def starts_of(epochs, **changes):
    """The first token of each row, epoch by epoch, of 1003 tokens: 61 windows an epoch."""
    return positions(**changes).shuffled(np.arange(61 * epochs))[:, 0].reshape(epochs, 61)


def test_shipped_text_is_the_one_the_provenance_states():
    corpus = data.shakespeare()
    text = corpus.train.tobytes() + corpus.heldout.tobytes()
    stated = re.search(r"decompressed text \| `(\w{64})`", (TEXTS / "PROVENANCE.md").read_text())
    assert stated and hashlib.sha256(text).hexdigest() == stated[1]
    assert text.isascii() and b"\r" not in text
    assert not re.search(rb"gutenberg|copyright|etext|http", text, re.IGNORECASE)


def test_heldout_is_the_last_twentieth():
    corpus = data.shakespeare()
    assert len(corpus.heldout) == round(0.05 * (len(corpus.train) + len(corpus.heldout)))
    assert data.decode(corpus.heldout).rstrip().endswith("Let your indulgence set me free.")
    assert corpus.train.dtype == corpus.heldout.dtype == np.uint8
    assert not corpus.train.flags.writeable  # one array is shared by all callers


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize(("length", "stride"), [(1003, 16), (64, 16), (17, 16), (9, 1)])
def test_each_epoch_shows_each_of_its_windows_once(length, stride, extra):
    found, windows = positions(length, stride=stride, extra=extra), max(1, length // stride - 1)
    for epoch in range(3):
        rows = found.shuffled(np.arange(windows) + epoch * windows)
        starts = np.sort(rows[:, 0])
        assert np.all(np.diff(starts) == stride)
        assert starts[0] >= 0 and rows.max() < length and rows.dtype == np.int32
        np.testing.assert_array_equal(rows, rows[:, :1] + np.arange(stride + extra))


def test_epochs_differ_in_order_and_in_offset():
    epochs = starts_of(40)
    assert len({tuple(np.argsort(starts)) for starts in epochs}) == 40
    offsets = set(epochs.min(axis=1).tolist())
    # 40 draws of 16 offsets miss more than six with probability below 1e-4.
    assert offsets <= set(range(16)) and len(offsets) >= 10


def test_rows_are_a_function_of_seed_and_number_alone():
    found, rows = positions(), positions().shuffled(np.arange(210))  # these span four epochs
    for number in (209, 3, 100, 3):
        np.testing.assert_array_equal(found.shuffled(np.array([number]))[0], rows[number])
    np.testing.assert_array_equal(found.shuffled(np.arange(210)[::-1]), rows[::-1])
    assert not np.array_equal(positions(seed=4).shuffled(np.arange(210)), rows)
    assert not np.array_equal(starts_of(2)[1], starts_of(1, seed=4)[0])  # seed + 1 is no epoch + 1


def test_order_is_the_same_under_every_numpy():
    # Resuming under another NumPy must go on in the same order. If this fails after a change to
    # `epoch_order`, old runs can no longer be resumed exactly: say so in CHANGELOG.md.
    assert starts_of(1)[0, :7].tolist() == [312, 440, 488, 56, 744, 136, 808]


def numbers(length, *, batch_size, sequence_length):
    """Data whose held-out text is the numbers from 0."""
    text = np.arange(length)
    tokens = Tokens(text, text, None, "", "here", "there")
    rows = next_token_rows(tokens, sequence_length=sequence_length, seed=3, vocab_size=length)
    return Data(rows, batch_size, data.tokenizers.load("bytes"), None, "")


@pytest.mark.parametrize("rows", [slice(0, 3), slice(3, 7), slice(None, None, 2), slice(7, 7)])
def test_a_slice_of_rows_equals_the_slice_of_the_batch(rows):
    found = numbers(1003, batch_size=7, sequence_length=16)
    np.testing.assert_array_equal(found.batch(5, rows).inputs, found.batch(5).inputs[rows])
    np.testing.assert_array_equal(found.batch(5).inputs[:, 0], starts_of(1)[0, 35:42])
    assert found.batch(5, rows).targets.dtype == np.int32


def test_heldout_batches_cover_every_target_once_in_order():
    batches = list(numbers(107, batch_size=4, sequence_length=10).heldout())
    assert {(b.inputs.shape, b.inputs.dtype.name, b.weights.dtype.name) for b in batches} == {
        ((4, 10), "int32", "float32")
    }
    inputs, targets, weights = (
        np.concatenate([batch[leaf] for batch in batches]).ravel() for leaf in range(3)
    )
    assert weights.sum() == 100 and set(weights) == {0, 1}
    np.testing.assert_array_equal(inputs[weights > 0], np.arange(100))
    np.testing.assert_array_equal(targets[weights > 0], np.arange(1, 101))
    for length, count in ((100, 9), (101, 10)):  # one more token is one more target
        found = numbers(length, batch_size=1, sequence_length=10)
        assert found.rows.heldout_count == len(list(found.heldout())) == count


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 8)])
def test_each_row_of_a_global_array_is_made_once(shape):
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    found, asked = numbers(1003, batch_size=16, sequence_length=16), []

    def make_rows(rows):
        asked.append(rows)
        return found.batch(2, rows)

    like = jax.ShapeDtypeStruct((16, 16), np.int32, sharding=sharding)
    batch = data.to_mesh(make_rows, Batch(like, like))
    assert batch.inputs.sharding == sharding and batch.weights is None
    assert_same(batch, found.batch(2))
    assert sorted(i for rows in asked for i in range(16)[rows]) == list(range(16))


def test_global_arrays_may_be_cut_along_any_axis():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    full = np.arange(4 * 8).reshape(4, 8)
    shapes = [
        jax.ShapeDtypeStruct(shape, full.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
        for shape, axes in (((4, 8), ("data", "model")), ((4,), ("data",)))
    ]
    array, vector = data.to_mesh(lambda rows: [full[rows], full[rows, 0]], shapes)
    np.testing.assert_array_equal(array, full)
    np.testing.assert_array_equal(vector, full[:, 0])
    with pytest.raises(ValueError, match=r"arity|structure|length"):
        data.to_mesh(lambda rows: [full[rows]], shapes)


def test_decode_inverts_encode_and_replaces_broken_bytes():
    text = "Exit, pursued by a bear. é ☃"
    assert data.decode(data.encode(text)) == text
    assert data.encode(text).dtype == np.int32
    assert data.decode(np.array([104, 255])) == "h\ufffd"
    assert data.decode(np.array([], np.int32)) == ""


def test_errors_name_the_cause_and_the_cure():
    with pytest.raises(ValueError, match=r"has 16 tokens .* 17 .*longer text or a shorter"):
        positions(16)
    with pytest.raises(ValueError, match=r"there, heldout part: .* 11 .*; or raise --data"):
        next_token_rows(
            Tokens(np.arange(99), np.arange(10), None, "", "here", "there"),
            sequence_length=10,
            seed=0,
            vocab_size=99,
        )
    with pytest.raises(ValueError, match="step=-1"):
        numbers(99, batch_size=1, sequence_length=8).batch(-1)
    with pytest.raises(ValueError, match="first 256 logits"):
        data.decode(np.array([1, 300]))


@pytest.mark.parametrize(("length", "extra", "count"), [(12, 1, 2), (13, 1, 3), (12, 0, 3)])
def test_the_last_window_has_its_last_target(length, extra, count):
    windows = positions(length, stride=4, extra=extra)
    assert windows.count == count
    assert windows.in_order(np.arange(count))[-1, -1] == 4 * count + extra - 1


def test_the_first_id_that_is_no_token_is_refused():
    how = {"stride": 4, "extra": 1, "seed": 0, "where": "the text"}
    assert Windows(np.arange(5), vocab_size=5, **how).in_order(np.arange(1))[0, -1] == 4
    with pytest.raises(ValueError, match="the text holds token 4, outside a vocabulary of 4"):
        Windows(np.arange(5), vocab_size=4, **how).in_order(np.arange(1))
