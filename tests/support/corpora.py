"""Small corpora in the formats that sources read."""

import json

import numpy as np

from train.data import DataConfig, load

DOCUMENTS = [f"document {i}: " + "so it goes " * (i % 7 + 1) for i in range(200)]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_tokens(path, tokens, dtype=np.uint16):
    np.asarray(tokens, dtype).tofile(path)
    return path


def loader(tmp_path):
    """Like `load`, with small sizes and its own cache."""

    def small(source, *, batch_size=4, sequence_length=16, seed=0, **changes):
        config = DataConfig(source=source, cache=str(tmp_path / "cache"), **changes)
        return load(config, batch_size=batch_size, sequence_length=sequence_length, seed=seed)

    return small


def assert_same(left, right):
    """Two batches have the same leaves."""
    for one, other in zip(left, right, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype


def tiny_gpt2(folder):
    """A vocabulary in GPT-2's files: bytes and four merges."""
    from train.data.tokenizers.gpt2 import byte_characters

    folder.mkdir(exist_ok=True)
    characters = list(byte_characters().values())
    merges = ["t h", "th e", "Ġ the", "# #"]
    words = [*characters, *(m.replace(" ", "") for m in merges), "<|endoftext|>"]
    (folder / "encoder.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return folder
