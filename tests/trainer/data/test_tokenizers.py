"""Tokenizers: the size of a vocabulary with holes, and text that spells a special token."""

import json
from pathlib import Path

import numpy as np
import pytest
from corpora import loader, tiny_gpt2, write_tokens

from train.data import DataConfig, embedded, storage, tokenizers
from train.data.prepare.prepare import prepare
from train.data.tokenizers import gpt2

library = pytest.importorskip("tokenizers", reason="the extra data is not installed")
pytest.importorskip("tiktoken", reason="the extra data is not installed")
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

SPECIAL = ["<|endoftext|>", "[MASK]", "[CLS]", "[SEP]", "[PAD]", "<s>", "</s>"]
SPELLED = [
    "<|endoftext|>",
    "how <|endoftext|> works",
    "how<s>it</s>works",
    "[MASK] [CLS][SEP] how [PAD]",
    "[mask] <S> <|ENDOFTEXT|>",
    "how [UNK] it <unk>",
]


def bpe(ignore_merges=False, byte_level=True):
    model = library.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    model.decoder = decoders.Fuse()
    if byte_level:
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
    # A text full of them: merges could make what the special tokens spell.
    return train(model, trainers.BpeTrainer, vocab_size=400, show_progress=False)


def wordpiece(pre_tokenizer=pre_tokenizers.BertPreTokenizer):
    model = library.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer, model.decoder = pre_tokenizer(), decoders.WordPiece()
    return train(model, trainers.WordPieceTrainer, ["[UNK]"], vocab_size=200, show_progress=False)


def unigram():
    model = library.Tokenizer(models.Unigram())
    model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    more = {"vocab_size": 60, "unk_token": "<unk>", "show_progress": False}
    return train(model, trainers.UnigramTrainer, ["<unk>"], **more)


def words():
    model = library.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return train(model, trainers.WordLevelTrainer, ["[UNK]"], show_progress=False)


def train(model, trainer, more=(), **how):
    alphabet = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    how |= alphabet if trainer is trainers.BpeTrainer else {}
    text = ["how it works, so it goes", "aa [] <> | M A S K endoftext how"] * 9
    model.train_from_iterator(text, trainer(special_tokens=[*more, *SPECIAL], **how))
    return model


KINDS = {
    "BPE": bpe,
    "BPE that ignores merges": lambda: bpe(ignore_merges=True, byte_level=False),
    "WordPiece": wordpiece,
    "WordPiece of whole words": lambda: wordpiece(pre_tokenizers.WhitespaceSplit),
    "Unigram": unigram,
    "WordLevel": words,
}


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return KINDS[request.param]()


def loaded(model, tmp_path):
    model.save(str(tmp_path / "t.json"))
    return tokenizers.load(str(tmp_path / "t.json"))


@pytest.mark.parametrize("added", [True, False])
def test_text_that_spells_a_special_token_is_text(model, tmp_path, added):
    spec = json.loads(model.to_str())
    if not added:  # the vocabulary alone has them, as that of a converted model may
        spec["added_tokens"] = []
    (tmp_path / "t.json").write_text(json.dumps(spec))
    found = tokenizers.load(str(tmp_path / "t.json"))
    special = {model.token_to_id(name) for name in SPECIAL} - {None}
    assert len(special) == len(SPECIAL)
    unknown = spec["model"].get("unk_token") is not None or spec["model"].get("unk_id") is not None
    for text in SPELLED:
        ids = found.encode(text)
        assert not special & set(ids.tolist()), text
        assert len(ids)
        if not unknown:
            assert found.decode(ids) == text


def test_ordinary_text_has_the_tokens_that_the_library_gives(model, tmp_path):
    found = loaded(model, tmp_path)
    for text in ("how it works, so it goes", "aa [] <> | M A S K", "", "  how\n", "é☃ how"):
        want = model.encode(text, add_special_tokens=False).ids
        assert found.encode(text).tolist() == want


def test_a_document_that_spells_the_end_is_one_document(tmp_path):
    bpe().save(str(tmp_path / "t.json"))
    config = DataConfig(tokenizer=str(tmp_path / "t.json"))
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"how {i} <|endoftext|> works")
    header = prepare(f"text:{tmp_path}/*.txt", tmp_path / "out", config, quiet=True)
    ids = np.fromfile(tmp_path / "out/train.bin", header["dtype"])
    end = tokenizers.load(config.tokenizer).end
    assert (ids == end).sum() == header["splits"]["train"]["documents"]


def test_added_tokens_that_are_not_special_stay_tokens(tmp_path):
    model = bpe()
    model.add_tokens(["<tool>"])
    found = loaded(model, tmp_path)
    assert model.token_to_id("<tool>") in found.encode("how <tool> works")
    assert found.vocab_size == model.token_to_id("<tool>") + 1


def test_merges_that_make_a_special_token_are_not_used(tmp_path):
    vocabulary = {"<": 0, "s": 1, ">": 2, "<s": 3, "<s>": 4, "<|endoftext|>": 5, "<s>s": 6}
    merges = [("<", "s"), ("<s", ">"), ("<s>", "s")]
    model = library.Tokenizer(models.BPE(vocabulary, merges))
    model.add_special_tokens(["<s>"])
    assert loaded(model, tmp_path).encode("<s>s").tolist() == [3, 2, 1]


@pytest.mark.parametrize("more", ["<>0x41", "0x41"])
def test_text_that_spells_a_byte_token_of_a_unigram_model_is_text(tmp_path, more):
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *more, "a", "<0x4"]
    scores = [(piece, -1.0 - i / 100) for i, piece in enumerate(dict.fromkeys(pieces))]
    model = library.Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    model.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    assert model.decode(model.encode("a<0x41>a").ids) == "aAa"  # by the library
    found = loaded(model, tmp_path)
    for text in ("a<0x41>a", "<0x00><0xFF>", "<0x41", "é☃<0xC3>"):
        assert found.decode(found.encode(text)) == text


def holes(tmp_path):
    """Words with the ids 0 to 4 and 300."""
    names = {"<|endoftext|>": 0, "a": 1, "b": 2, "c": 3, "[UNK]": 4, "last": 300}
    model = library.Tokenizer(models.WordLevel(names, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save(str(tmp_path / "holes.json"))
    return str(tmp_path / "holes.json")


def test_a_vocabulary_with_holes_is_as_large_as_its_largest_id(tmp_path):
    found = tokenizers.load(holes(tmp_path))
    assert found.vocab_size == 301 and found.dtype == np.uint16
    (tmp_path / "a.txt").write_text("a b last zz " * 200)
    config = DataConfig(tokenizer=found.name)
    header = prepare(f"text:{tmp_path / 'a.txt'}", tmp_path / "out", config, quiet=True)
    ids = np.fromfile(tmp_path / "out/train.bin", header["dtype"])
    assert ids[:4].tolist() == [1, 2, 300, 4] and header["tokenizer"]["vocab_size"] == 301


def test_any_id_below_the_size_is_decoded_and_holes_are_replacement_characters(tmp_path):
    found = tokenizers.load(holes(tmp_path))
    for token in range(found.vocab_size):
        assert found.decode(np.array([token]))
    assert found.decode(np.array([1, 2, 9, 300, 10, 11])) == "a b\ufffdlast\ufffd\ufffd"
    with pytest.raises(ValueError, match="tokens reach from 301 to 301, the vocabulary"):
        found.decode(np.array([301]))


def gpt2_files(folder, more):
    folder.mkdir()
    merges = ["t h", "th e"]
    names = [*gpt2.byte_characters().values(), "th", "the"]
    vocabulary = {name: i for i, name in enumerate(names)} | more
    (folder / "encoder.json").write_text(json.dumps(vocabulary))
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return tokenizers.load(str(folder))


def test_gpt2_files_may_have_holes_and_added_tokens(tmp_path):
    found = gpt2_files(tmp_path / "gpt2", {"<|endoftext|>": 300, "<|pad|>": 305, "thethe": 306})
    assert found.vocab_size == 307 and found.end == 300
    text = "the<|endoftext|><|pad|>thethe"
    ids = found.encode(text)
    assert found.decode(ids) == text and ids.max() < 258
    assert found.decode(np.array([257, 259, 305])) == "the\ufffd<|pad|>"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"<|endoftext|>": 257}, "two tokens with the id 257"),
        ({"<|endoftext|>": -1}, "has the id -1"),
        ({"<|endoftext|>": "x"}, "has the id 'x'"),
        ({"<|endoftext|>": 2**40}, "has the id 1099511627776"),
        ({"t": 300}, "do not belong together"),
    ],
)
def test_gpt2_files_with_impossible_ids_are_refused(tmp_path, more, message):
    with pytest.raises(ValueError, match=rf"encoder\.json.*{message}|{message}"):
        gpt2_files(tmp_path / "gpt2", more)


def test_added_tokens_whose_ids_the_library_changes_are_refused(tmp_path):
    model = library.Tokenizer(models.BPE({"<|endoftext|>": 0, "a": 1, "b": 4}, []))
    model.add_tokens(["new"])  # the library numbers it 3: as many as the vocabulary has
    spec = json.loads(model.to_str())
    spec["added_tokens"][-1]["id"] = 5
    (tmp_path / "t.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=r"t\.json says that the added token 'new' has the id 5"):
        tokenizers.load(str(tmp_path / "t.json"))
    model = library.Tokenizer(models.BPE({"<|endoftext|>": 0, "a": 1, "b": 2, "d": 4}, []))
    model.add_tokens(["new"])
    with pytest.raises(ValueError, match=r"t\.json has two tokens with the id 4"):
        loaded(model, tmp_path)


def test_lines_of_a_vocabulary_end_at_line_feeds_alone(tmp_path):
    path = tmp_path / "vocab.txt"
    lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "\u2028", "\x85x", "so"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")  # a mark is none of its words
    found = tokenizers.load(str(path))
    assert found.encode("so").tolist() == [7] and found.vocab_size == 8


def test_a_number_that_does_not_fit_its_type_is_named_and_never_wrapped():
    for numbers, dtype in (([1, 256], np.uint8), ([-1], np.uint16), ([2**31], np.int32)):
        with pytest.raises(
            ValueError, match=rf"a\.bin: number {len(numbers) - 1} is {numbers[-1]}"
        ):
            storage.narrow(numbers, dtype, "a.bin")
    for numbers in ([0.5], [2**70], ["x"]):
        with pytest.raises(ValueError, match=r"a\.bin: .* not integers"):
            storage.narrow(numbers, np.int32, "a.bin")
    assert storage.narrow([], np.uint8, "a.bin").dtype == np.uint8
    edge = storage.narrow([0, 255], np.uint8, "a.bin")
    assert edge.dtype == np.uint8 and edge.tolist() == [0, 255]
    with pytest.raises(ValueError, match="from 0 to 255"):
        embedded.decode(np.array([256]))


def test_a_stated_token_beyond_int32_is_refused(tmp_path):
    path = write_tokens(tmp_path / "a.bin", np.full(900, 2**31 + 5), np.uint32)
    with pytest.raises(ValueError, match="2147483653"):
        loader(tmp_path)(f"bin:{path}", headerless="uint32").batch(0)


def test_no_other_module_of_data_casts_to_a_type_of_integers():
    folder = Path(storage.__file__).parent
    # Positions, counts and segments are made here, not read: they are not tokens.
    allowed = {
        "storage.py": 2,
        "source_string.py": 1,
        "tokens.py": 1,
        "rows.py": 1,
        "windows.py": 1,
    }
    for path in folder.rglob("*.py"):
        casts = [
            line
            for line in path.read_text().splitlines()
            if ".astype(" in line and "float" not in line
        ]
        assert len(casts) <= allowed.get(path.name, 0), (path, casts)


def test_gpt2_tokens_are_those_of_another_implementation(tmp_path):
    ours = tokenizers.load(str(tiny_gpt2(tmp_path / "gpt2")))
    vocabulary = json.loads((tmp_path / "gpt2/encoder.json").read_text())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("#", "#")]
    theirs = library.ByteLevelBPETokenizer(vocabulary, merges)
    text = "the  other: they'll see ### é☃\n\n the<|endoftext|>"
    plain = text.replace("<|endoftext|>", "")
    assert ours.encode(plain).tolist() == theirs.encode(plain).ids
    assert ours.decode(ours.encode(text)) == text and ours.end not in ours.encode(text)
    assert ours.vocab_size == 261 and ours.end == 260 and ours.dtype == np.uint16
    with pytest.raises(
        ValueError, match="tokens reach from 1 to 300, the vocabulary from 0 to 260"
    ):
        ours.decode(np.array([1, 300]))
    (tmp_path / "gpt2/vocab.bpe").write_text("th e\nt h\n")
    with pytest.raises(ValueError, match="do not belong together"):
        tokenizers.load(str(tmp_path / "gpt2"))


def test_wordpiece_lowers_words_unless_its_vocabulary_has_capitals(tmp_path):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*special, "so", "##fa", "it"]))
    assert tokenizers.load(str(path)).encode("Sofa it goes").tolist() == [5, 6, 7, 1]
    assert tokenizers.load(str(tmp_path)).hash == tokenizers.load(str(path)).hash
    path.write_text("\n".join([*special, "So", "so", "it"]))
    found = tokenizers.load(str(path))
    assert found.encode("So so").tolist() == [5, 6]
    assert (found.begin, found.end, found.pad, found.mask) == (2, 3, 0, 4)
    path.write_text("so\nit")
    with pytest.raises(ValueError, match=r"not a WordPiece vocabulary .*: \[CLS\], \[MASK\]"):
        tokenizers.load(str(path))
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json is not a tokenizer\.json"):
        tokenizers.load(str(tmp_path / "x.json"))
