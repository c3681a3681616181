"""Import and export: the tokenizer, its tokens with a role, and class names go in and come out.

`benchmarks/transformers_roundtrip.py` checks the same against `transformers` itself.
"""

import dataclasses
import json
import random

import numpy as np
import pytest
import tokenizers as library
from tiny_models import END, SIZES, TEXT, byte_pairs, model_in, read, word_pieces
from tokenizers import pre_tokenizers

from models import DecoderConfig, EncoderConfig
from models.presets import BYTE_IDS
from train import data, inputs
from train.cli import main
from train.config import serialize
from train.convert import tokenizer_files
from train.convert.to_hugging_face import special_ids
from train.data import embedded, tokenizers
from train.data.tokenizers import for_transformers

GPT2 = DecoderConfig(vocab_size=300, bias=True, **SIZES)


@pytest.fixture(autouse=True)
def short_text(monkeypatch):
    """Shorter than the embedded text, which is tokenized at each import."""
    corpus = embedded.cut(np.frombuffer(TEXT.encode(), np.uint8), 0.2)
    monkeypatch.setattr(data, "shakespeare", lambda: corpus)


def test_the_tokenizer_and_its_ids_go_in_and_come_out(tmp_path):
    ids = {"bos_token_id": 7, "eos_token_id": [0, 9], "pad_token_id": None, "sep_token_id": 5}
    source, run, out = tmp_path / "source", tmp_path / "run", tmp_path / "out"
    model_in(source, GPT2, ids=ids)
    byte_pairs().save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "x": 1}')
    (source / "generation_config.json").write_text('{"eos_token_id": [0, 9], "top_p": 0.5}')
    main.main(["import", str(source), str(run)])
    loaded = tokenizers.load(serialize.load(run).data.tokenizer)
    assert loaded.encode("not to be").tolist() == byte_pairs().encode("not to be").ids
    prompt = tokenizers.load(str(source)).encode("not to be")
    assert inputs.load_tokenizer(serialize.load(run)).decode(prompt) == "not to be"
    (source / "tokenizer.json").rename(tmp_path / "tokenizer.json")  # the run has its own
    main.main(["export", str(run), str(out)])
    for name in ("tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert read(out / "config.json").items() >= ids.items()
    run.rename(tmp_path / "moved")
    assert inputs.load_tokenizer(serialize.load(tmp_path / "moved")).hash == loaded.hash
    other = run / "pretrained"  # of another run, which has taken the place
    other.mkdir(parents=True)
    byte_pairs(280).save(str(other / "tokenizer.json"))
    assert inputs.load_tokenizer(serialize.load(tmp_path / "moved")).hash == loaded.hash


def test_another_tokenizer_may_be_asked_for_and_then_has_its_own_ids(tmp_path):
    source, run, out = tmp_path / "source", tmp_path / "run", tmp_path / "out"
    model_in(source, GPT2, ids={"bos_token_id": 7, "eos_token_id": 9, "pad_token_id": 9})
    byte_pairs().save(str(source / "tokenizer.json"))
    main.main(["import", str(source), str(run), "--tokenizer", "bytes"])
    assert serialize.load(run).data.tokenizer == "bytes"
    main.main(["export", str(run), str(out)])
    assert read(out / "config.json").items() >= BYTE_IDS.items()
    assert for_transformers.is_bytes(read(out / "tokenizer.json"))
    with pytest.raises(SystemExit, match="give the tokenizer as --tokenizer x"):
        main.main(["import", str(source), str(tmp_path / "b"), "--data.tokenizer", "x"])


def test_the_ids_of_the_byte_presets_are_those_of_the_byte_tokenizer():
    ours = tokenizers.load("bytes")
    assert special_ids(ours) == BYTE_IDS
    assert (ours.begin, ours.end, ours.pad) == (2, 3, 0)


@pytest.mark.parametrize("encoder", [False, True])
def test_bytes_are_written_as_a_tokenizer_with_the_same_tokens(encoder, tmp_path):
    ours = tokenizers.load("bytes")
    for_transformers.write(ours, tmp_path, length=64, encoder=encoder)
    model = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    stream = random.Random(0)
    for _ in range(200):
        points = (stream.choice((300, 0x3000, 0xD800)) for _ in range(stream.randrange(40)))
        text = "".join(chr(stream.randrange(point)) for point in points)
        assert model.encode(text, add_special_tokens=False).ids == list(text.encode())
        some = np.frombuffer(stream.randbytes(20), np.uint8)
        assert model.decode(some.tolist(), skip_special_tokens=False) == ours.decode(some)
    for text in ("ă", "Ă", "\x00\x02\x03\x1a", "<0x03>"):  # letters that stand for bytes elsewhere
        assert model.encode(text, add_special_tokens=False).ids == list(text.encode())
    stated = read(tmp_path / "tokenizer_config.json")
    assert model.token_to_id(stated["eos_token"]) == ours.end
    assert model.token_to_id(stated["pad_token"]) == ours.pad
    assert read(tmp_path / "special_tokens_map.json").items() <= stated.items()
    pair = model.encode("a", "b")
    assert pair.ids == ([2, 97, 3, 98, 3] if encoder else [97, 98])
    assert pair.type_ids == ([0, 0, 0, 1, 1] if encoder else [0, 1])


def test_a_run_on_bytes_is_exported_with_them_and_imported_as_them(tmp_path):
    model = DecoderConfig(vocab_size=256, bias=True, **SIZES)
    model_in(tmp_path / "bare", model)
    assert read(tmp_path / "bare" / "config.json")["eos_token_id"] == 3
    main.main(["import", str(tmp_path / "bare"), str(tmp_path / "run")])
    main.main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert read(tmp_path / "out" / "generation_config.json") == BYTE_IDS
    main.main(["import", str(tmp_path / "out"), str(tmp_path / "again")])
    for name in ("run", "again"):
        assert serialize.load(tmp_path / name).data.tokenizer == "bytes"


def test_the_older_files_of_gpt2_are_made_a_tokenizer_json(tmp_path):
    source = tmp_path / "source"
    model_in(source, GPT2)
    byte_pairs().save_model(str(source))
    (source / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    kept = tmp_path / "kept"
    kept.mkdir()
    loaded = tokenizers.load(tokenizer_files.adopt(source, GPT2, kept))
    assert loaded.encode("not to").tolist() == byte_pairs().encode(" not to").ids
    assert loaded.end == byte_pairs().token_to_id(END)
    llama = dataclasses.replace(GPT2, positions="rope")
    with pytest.raises(ValueError, match=r"has no tokenizer that can be read: save it as a tok"):
        tokenizer_files.adopt(source, llama, kept)


@pytest.mark.parametrize("lower", [True, False])
def test_the_vocab_txt_of_bert_is_cased_as_its_config_says(lower, tmp_path):
    model = EncoderConfig(vocab_size=100, **SIZES)
    model_in(tmp_path, model)
    word_pieces().save_model(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    kept = tmp_path / "kept"
    kept.mkdir()
    loaded = tokenizers.load(tokenizer_files.adopt(tmp_path, model, kept))
    unknown = word_pieces().token_to_id("[UNK]")
    assert (loaded.encode("BE").tolist() == loaded.encode("be").tolist()) == lower
    assert (unknown in loaded.encode("BE")) != lower


@pytest.mark.parametrize("kind", ["encoder.json", "vocab.txt"])
def test_tokenizers_of_other_files_are_written_with_the_same_tokens(kind, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    if kind == "vocab.txt":
        word_pieces().save_model(str(own))
    else:
        model = library.ByteLevelBPETokenizer()
        model.train_from_iterator([TEXT], 300, show_progress=False)
        model.save_model(str(own))
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = [*letters, *(w for w, _ in by_number(model) if w not in letters)]
        numbers = {word: i for i, word in enumerate(words)}
        (own / "encoder.json").write_text(json.dumps(numbers))
        (own / "merges.txt").rename(own / "vocab.bpe")
        (own / "vocab.json").unlink()
    ours = tokenizers.load(str(own))
    for_transformers.write(ours, tmp_path, length=16, encoder=kind == "vocab.txt")
    theirs = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode(TEXT, add_special_tokens=False).ids == ours.encode(TEXT).tolist()
    stated = read(tmp_path / "tokenizer_config.json")
    assert theirs.token_to_id(stated["eos_token"]) == ours.end
    if kind == "vocab.txt":
        assert stated["sep_token"] == "[SEP]" and stated["mask_token"] == "[MASK]"
        assert theirs.encode("be").tokens[0] == "[CLS]"


def by_number(model):
    return sorted(model.get_vocab().items(), key=lambda pair: pair[1])


def test_an_import_that_fails_leaves_no_folder(tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    small = dataclasses.replace(GPT2, vocab_size=280)
    model_in(source, small)
    with pytest.raises(SystemExit, match=r"has no tokenizer that can be read.*or choose one with"):
        main.main(["import", str(source), str(run)])
    byte_pairs().save(str(source / "tokenizer.json"))
    with pytest.raises(SystemExit, match=r"has \d+ tokens, more than the 280 of its model"):
        main.main(["import", str(source), str(run)])
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"the tokenizer of .*source cannot be used"):
        main.main(["import", str(source), str(run)])
    (source / "tokenizer.json").unlink()
    (tmp_path / "outside.json").write_text("{}")
    (source / "tokenizer.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(SystemExit, match="which leads out of the folder"):
        main.main(["import", str(source), str(run)])
    assert not run.exists()
    run.mkdir()
    (run / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="already holds a run, or a part of one"):
        main.main(["import", str(source), str(run)])


@pytest.mark.parametrize(
    ("model", "contents"),
    [
        (GPT2, {"tokenizer.json": b"["}),
        (GPT2, {"tokenizer.json": b"[]"}),
        (GPT2, {"tokenizer.json": b'{"model": {"vocab": 5}, "pre_tokenizer": {"type": []}}'}),
        (GPT2, {"vocab.json": b'{"a": "b"}', "merges.txt": b"a"}),
        (GPT2, {"vocab.json": b'{"a": -1}', "merges.txt": b"\xff \xff x"}),
        (EncoderConfig(vocab_size=300, **SIZES), {"vocab.txt": b"\xff\n"}),
        (EncoderConfig(vocab_size=300, **SIZES), {"vocab.txt": b"a\nb\n"}),
        (
            EncoderConfig(vocab_size=300, **SIZES),
            {"vocab.txt": b"[SEP]\n[CLS]\n", "tokenizer_config.json": b'{"strip_accents": 5}'},
        ),
    ],
)
def test_a_malformed_tokenizer_is_named(model, contents, tmp_path):
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "kept").mkdir()
    with pytest.raises(ValueError, match=rf"the tokenizer of {tmp_path} cannot be used: .*choose"):
        tokenizer_files.adopt(tmp_path, model, tmp_path / "kept")


# ---------------------------------------------------------------- classes
