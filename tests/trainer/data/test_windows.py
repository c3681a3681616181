"""Laws of the data: a pure function of (seed, step), every window once an epoch, no leak."""

import hashlib
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from train import data
from train.data.tasks import windows

TEXTS = Path(data.__file__).parent / "texts"


def rows_of(step, *, length=1003, batch_size=7, sequence_length=16, seed=3, **kwargs):
    """A batch of a text whose tokens are their own positions."""
    return data.batch(
        np.arange(length),
        batch_size=batch_size,
        sequence_length=sequence_length,
        seed=seed,
        step=step,
        **kwargs,
    )


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


@pytest.mark.parametrize(("length", "sequence_length"), [(1003, 16), (64, 16), (17, 16), (9, 1)])
def test_each_epoch_shows_each_of_its_windows_once(length, sequence_length):
    windows = max(1, length // sequence_length - 1)
    for epoch in range(3):
        rows = rows_of(epoch, length=length, batch_size=windows, sequence_length=sequence_length)
        starts = np.sort(rows[:, 0])
        assert np.all(np.diff(starts) == sequence_length)
        assert starts[0] >= 0 and rows.max() < length
        np.testing.assert_array_equal(rows, rows[:, :1] + np.arange(sequence_length + 1))


def test_epochs_differ_in_order_and_in_offset():
    windows = 1003 // 16 - 1
    epochs = [rows_of(epoch, batch_size=windows)[:, 0] for epoch in range(40)]
    orders = {tuple(np.argsort(starts)) for starts in epochs}
    offsets = {starts.min() for starts in epochs}
    assert len(orders) == 40
    # 40 draws of 16 offsets miss more than six with probability below 1e-4.
    assert offsets <= set(range(16)) and len(offsets) >= 10


def test_rows_do_not_depend_on_how_the_list_is_cut_into_steps():
    whole = rows_of(0, batch_size=210)
    np.testing.assert_array_equal(np.concatenate([rows_of(s) for s in range(30)]), whole)
    np.testing.assert_array_equal(rows_of(29), whole[-7:])  # 210 rows span four epochs


def test_batch_is_a_function_of_seed_and_step_alone():
    first = rows_of(11)
    windows._epoch.cache_clear()
    rows_of(0), rows_of(500), rows_of(11, seed=4)
    np.testing.assert_array_equal(rows_of(11), first)
    assert not np.array_equal(rows_of(11, seed=4), first)
    count = 1003 // 16 - 1  # the second epoch of a seed is not the first of the next
    assert not np.array_equal(rows_of(1, batch_size=count), rows_of(0, batch_size=count, seed=4))


def test_order_is_the_same_under_every_numpy():
    # Resuming under another NumPy must go on in the same order. If this fails after a change to
    # `_epoch`, old runs can no longer be resumed exactly: say so in CHANGELOG.md.
    assert rows_of(0)[:, 0].tolist() == [312, 440, 488, 56, 744, 136, 808]


@pytest.mark.parametrize("rows", [slice(0, 3), slice(3, 7), slice(None, None, 2), slice(7, 7)])
def test_a_slice_of_rows_equals_the_slice_of_the_batch(rows):
    part = rows_of(5, rows=rows)
    np.testing.assert_array_equal(part, rows_of(5)[rows])
    assert part.dtype == np.int32


def test_heldout_batches_cover_every_target_once_in_order():
    batches = list(data.heldout_batches(np.arange(107), batch_size=4, sequence_length=10))
    assert {(r.shape, r.dtype.name, w.shape, w.dtype.name) for r, w in batches} == {
        ((4, 11), "int32", (4,), "float32")
    }
    real = np.concatenate([rows[weight > 0] for rows, weight in batches])
    np.testing.assert_array_equal(real[:, 1:].ravel(), np.arange(1, 101))
    np.testing.assert_array_equal(real[:, :-1].ravel(), np.arange(100))
    assert sum(weight.sum() for _, weight in batches) == 10
    for length, count in ((100, 9), (101, 10)):  # one more token is one more target
        batches = data.heldout_batches(np.arange(length), batch_size=1, sequence_length=10)
        assert len(list(batches)) == count


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 8)])
def test_each_row_of_a_global_array_is_made_once(shape):
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    asked = []

    def make_rows(rows):
        asked.append(rows)
        return rows_of(2, batch_size=16, rows=rows)

    array = data.to_mesh(make_rows, (16, 17), sharding)
    assert array.sharding == sharding
    np.testing.assert_array_equal(array, rows_of(2, batch_size=16))
    assert sorted(i for rows in asked for i in range(16)[rows]) == list(range(16))


def test_global_arrays_may_be_cut_along_any_axis():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    full = np.arange(4 * 8).reshape(4, 8)
    array = data.to_mesh(
        lambda rows: full[rows], (4, 8), NamedSharding(mesh, PartitionSpec("data", "model"))
    )
    np.testing.assert_array_equal(array, full)
    weights = data.to_mesh(
        lambda rows: full[rows, 0], (4,), NamedSharding(mesh, PartitionSpec("data"))
    )
    np.testing.assert_array_equal(weights, full[:, 0])


def test_decode_inverts_encode_and_replaces_broken_bytes():
    text = "Exit, pursued by a bear. é ☃"
    assert data.decode(data.encode(text)) == text
    assert data.encode(text).dtype == np.int32
    assert data.decode(np.array([104, 255])) == "h\ufffd"
    assert data.decode(np.array([], np.int32)) == ""


@pytest.mark.parametrize(
    ("change", "cure"),
    [
        ({"length": 16}, "longer text or a shorter sequence_length"),
        ({"batch_size": 0}, "batch_size=0 .* at least 1"),
        ({"sequence_length": 0}, "sequence_length=0 must be at least 1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_errors_name_the_cause_and_the_cure(change, cure):
    with pytest.raises(ValueError, match=cure):
        rows_of(0, **change)


def test_heldout_errors_come_at_the_call():
    with pytest.raises(ValueError, match="11"):
        data.heldout_batches(np.arange(10), batch_size=1, sequence_length=10)


def test_decode_refuses_what_is_no_byte():
    with pytest.raises(ValueError, match="first 256 logits"):
        data.decode(np.array([1, 300]))
