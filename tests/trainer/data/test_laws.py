"""Laws of every task and source: rows are functions of (seed, step), whoever asks for them."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from corpora import DOCUMENTS, assert_same, loader, write_jsonl, write_tokens

import models
from train import data
from train.data import tokenizers
from train.data.load import fingerprint
from train.data.tasks import causal, mixture
from train.data.tasks.masked import hide

BYTES = tokenizers.load("bytes")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    records = [{"text": text, "label": i % 3} for i, text in enumerate(DOCUMENTS)]
    write_jsonl(folder / "a.jsonl", records)
    write_jsonl(folder / "b.jsonl", [{"text": text.upper()} for text in DOCUMENTS])
    return folder


SETTINGS = {
    "next-token": ("a", {}),
    "segments": ("a", {"segments": True}),
    "masked": ("a", {"task": "masked", "mask_rate": 0.3}),
    "masked segments": ("a", {"task": "masked", "segments": True}),
    "classify": ("a", {"task": "classify"}),
    "mixture": ("a:0.25,b:0.75", {}),
    "masked mixture": ("a:1,b:1", {"task": "masked"}),
}


@pytest.fixture(scope="module", params=SETTINGS)
def make(request, corpora):
    names, changes = SETTINGS[request.param]
    parts = [part.partition(":") for part in names.split(",")]
    source = ",".join(f"jsonl:{corpora / a}.jsonl{colon}{w}" for a, colon, w in parts)
    return lambda **more: loader(corpora)(source, **changes, **more)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_makes_the_same_batch(make, processes):
    found, share = make(batch_size=8), 8 // processes
    for step in (0, 1000):
        whole = found.batch(step)
        shares = [found.batch(step, slice(i * share, (i + 1) * share)) for i in range(processes)]
        assert_same([None if x[0] is None else np.concatenate(x) for x in zip(*shares)], whole)  # noqa: B905


def test_a_batch_depends_on_seed_and_step_alone(make):
    found = make()
    first = found.batch(7)
    found.batch(0), found.batch(900), list(found.heldout())
    assert_same(found.batch(7), first)
    assert_same(make().batch(7), first)
    assert not np.array_equal(make(seed=1).batch(7).inputs, first.inputs)
    assert not np.array_equal(found.batch(8).inputs, first.inputs)
    assert found.batch(3, slice(2, 2)).inputs.shape == (0, 16)


def test_resuming_with_another_batch_size_goes_on_in_the_same_list(make):
    rows = np.concatenate([make().batch(step).inputs for step in range(4)])
    np.testing.assert_array_equal(make(batch_size=8).batch(1).inputs, rows[8:])


def test_held_out_batches_have_one_shape_and_rows_of_weight_zero_fill_the_last(make):
    found = make()
    batches = list(found.heldout())
    assert len(batches) > 1
    for batch in batches:
        assert batch.inputs.shape == (4, 16) and batch.inputs.dtype == np.int32
        assert batch.weights.shape == batch.targets.shape and batch.weights.dtype == np.float32
        assert [x is None for x in batch[3:]] == [x is None for x in found.batch(0)[3:]]
    filled = batches[-1].inputs.any(axis=1)
    assert filled.sum() == (found.rows.heldout_count - 1) % 4 + 1
    assert not batches[-1].weights[~filled].any()
    # What is hidden there does not move with the seed, so evaluations compare.
    for one, other in zip(batches, make(seed=5).heldout(), strict=True):
        assert_same(one, other)


def test_the_embedded_text_gives_the_batches_it_always_gave(tmp_path):
    corpus, found = data.shakespeare(), loader(tmp_path)("embedded", seed=3)
    starts = {0: [909592, 1006488, 922232, 1131928], 12345: [202568, 173352, 525976, 1059848]}
    for step, start_B in starts.items():
        want = np.stack([corpus.train[start : start + 17] for start in start_B])
        np.testing.assert_array_equal(found.batch(step).inputs, want[:, :-1])
        np.testing.assert_array_equal(found.batch(step).targets, want[:, 1:])
        assert found.batch(step).weights is None
    assert found.bytes_per_token == 1 and found.vocab_size == 256 and found.classes == 0
    shorter = loader(tmp_path)("embedded", heldout_fraction=0.01)
    assert shorter.rows.heldout_count == (round(0.01 * sum(map(len, corpus))) - 1) // 16


def test_one_epoch_shows_each_window_once_whatever_the_documents(tmp_path):
    tokens = write_tokens(tmp_path / "own.bin", np.arange(5000))
    found = loader(tmp_path)(
        f"bin:{tokens}", headerless="uint16", tokenizer=str(vocabulary(tmp_path, 5000))
    )
    windows = 4750 // 16 - 1
    starts = found.rows.train(np.arange(2 * windows)).inputs[:, 0].reshape(2, windows)
    for epoch in np.sort(starts, axis=1):
        assert np.all(np.diff(epoch) == 16)
    order = np.argsort(starts, axis=1)
    assert not np.array_equal(order[0], order[1])
    # No order of the text is left: neighbours in the list are not neighbours in the text.
    share = np.mean(np.abs(np.diff(starts[0])) == 16)
    assert share < 4 * 2 / windows


def vocabulary(folder, size):
    """A WordPiece vocabulary whose words are numbers."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    path = folder / "vocab.txt"
    path.write_text("\n".join(special + [f"w{i}" for i in range(size - len(special))]))
    return path


def test_segments_end_with_their_token_and_what_follows_does_not_count(corpora):
    found = loader(corpora)(f"jsonl:{corpora / 'a.jsonl'}", segments=True, sequence_length=64)
    batch = found.batch(2)
    for row in range(4):
        segment = 0
        for t in range(64):
            assert batch.segments[row, t] == segment
            ends = batch.inputs[row, t] == BYTES.end
            assert batch.weights[row, t] == (not ends)
            segment += ends
    assert batch.segments.max() >= 2


def test_a_mixture_has_its_shares_exactly_and_visits_each_source_as_if_alone():
    def rows(offset, count):
        make = lambda number_N: causal.next_tokens(  # noqa: E731
            np.stack([number_N, number_N + offset], 1)
        )
        return data.rows.Rows(make, make, count)

    mixed = mixture.mixed_rows([rows(0, 5), rows(10**6, 3), rows(2 * 10**6, 2)], [2, 1, 5], seed=3)
    batch = mixed.train(np.arange(3000))
    kind = (batch.targets[:, 0] - batch.inputs[:, 0]) // 10**6
    for block in kind.reshape(3, 1000):
        assert np.bincount(block).tolist() == [250, 125, 625]
    assert not np.array_equal(kind[:1000], kind[1000:2000])
    for source, count in enumerate((750, 375, 1875)):
        np.testing.assert_array_equal(np.sort(batch.inputs[kind == source, 0]), np.arange(count))
    # In any stretch the shares are near the weights: no source comes in lumps.
    share = np.mean(kind[:200] == 2)
    assert abs(share - 0.625) < 4 * np.sqrt(0.625 * 0.375 / 200)
    heldout = mixed.heldout(np.arange(10))
    assert heldout.inputs[:, 0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1]


def test_hiding_follows_the_law_of_the_models():
    tokens = np.random.default_rng(0).integers(32, 250, (400, 100)).astype(np.int32)
    tokens[:, 0], tokens[:, -1] = BYTES.begin, BYTES.end
    inputs, weights = hide(tokens, np.arange(400), BYTES, seed=1, rate=0.15, mask=BYTES.mask)
    shares = {"numpy": law(tokens, inputs, weights)}
    theirs = models.mask_tokens(
        jax.random.key(0),
        jnp.asarray(tokens),
        mask_token=BYTES.mask,
        vocab_size=256,
        maskable=jnp.asarray((tokens != BYTES.begin) & (tokens != BYTES.end)),
    )
    shares["jax"] = law(tokens, *map(np.asarray, theirs))
    want = 0.15, 0.8, 0.1 * 255 / 256, 0.1 * 254 / 256
    for found in shares.values():
        for share, value, count in zip(found, want, (39200, 5880, 5880, 5880), strict=True):
            assert abs(share - value) < 4 * np.sqrt(value * (1 - value) / count)
    assert not weights[:, [0, -1]].any()
    np.testing.assert_array_equal(inputs[weights == 0], tokens[weights == 0])


def law(tokens, inputs, weights):
    """Shares: chosen; of these hidden, as they were, another token."""
    at = weights > 0
    new, old = inputs[at], tokens[at]
    other = (new != old) & (new != BYTES.mask)
    return weights[:, 1:-1].mean(), (new == BYTES.mask).mean(), (new == old).mean(), other.mean()


def test_an_epoch_hides_other_tokens_than_the_last(corpora):
    found = loader(corpora)(f"jsonl:{corpora / 'a.jsonl'}", task="masked")
    first, again = (found.rows.train(np.arange(300) + shift) for shift in (0, 3000))
    assert first.weights.mean() == pytest.approx(again.weights.mean(), abs=0.03)
    assert not np.array_equal(first.weights, again.weights)
    assert (first.inputs[:, 0] == BYTES.begin).all() and (first.inputs[:, -1] == BYTES.end).all()


def test_a_classifier_reads_pairs_padded_and_cut(tmp_path):
    records = [
        {"a": f"{i}" * (i + 1), "b": "xy" * i, "label": ["no", "yes"][i % 2]} for i in range(9)
    ]
    records = records * 20 + [{"a": f"filler {i}", "b": "", "label": "no"} for i in range(60)]
    path = write_jsonl(tmp_path / "pairs.jsonl", records)
    found = loader(tmp_path)(
        f"jsonl:{path}", task="classify", text_field="a,b", batch_size=64, sequence_length=14
    )
    assert found.class_names == ("no", "yes") and found.classes == 2
    batch, seen = found.batch(0), set()
    for row in range(64):
        real = batch.segments[row] == 0
        text = found.decode(batch.inputs[row, real])
        assert text[0] == "\x02" and text[-1] == "\x03"
        a, b = text[1:-1].split("\x03")
        types = [0] * (len(a) + 2) + [1] * (len(b) + 1)
        assert batch.types[row, real].tolist() == types
        assert not batch.inputs[row, ~real].any() and not batch.types[row, ~real].any()
        if a[0].isdigit():
            number = int(a[0])
            assert batch.targets[row] == number % 2
            assert ("xy" * number).startswith(b) and len(a) + len(b) <= 11
            assert len(a) + len(b) == min(11, 3 * number + 1)
            seen.add(number)
    assert len(seen) > 4
    assert batch.targets.shape == batch.weights.shape == (64,)


def test_an_epoch_of_a_classifier_shows_each_example_once(corpora):
    found = loader(corpora)(f"jsonl:{corpora / 'a.jsonl'}", task="classify", sequence_length=20)
    count = 200 - found.rows.heldout_count
    epochs = [found.rows.train(np.arange(count) + e * count).inputs for e in range(2)]
    rows = [{tuple(row) for row in epoch} for epoch in epochs]
    assert len(rows[0]) == count and rows[0] == rows[1]
    assert not np.array_equal(*epochs)


def test_the_fingerprint_tells_changed_data(corpora, tmp_path):
    one = loader(corpora)(f"jsonl:{corpora / 'a.jsonl'}")
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes((corpora / "a.jsonl").read_bytes())
    assert loader(tmp_path)(f"jsonl:{copy}").fingerprint == one.fingerprint
    copy.write_bytes(copy.read_bytes().replace(b"so it", b"So it", 1))
    assert loader(tmp_path)(f"jsonl:{copy}").fingerprint != one.fingerprint
    assert loader(tmp_path)("embedded").fingerprint != one.fingerprint


def test_the_fingerprint_tells_another_tokenizer_of_the_same_tokens():
    one, other = (types.SimpleNamespace(hash=name) for name in ("one", "other"))
    assert fingerprint(one, "tokens") == fingerprint(one, "tokens")
    assert fingerprint(one, "tokens") != fingerprint(other, "tokens")
