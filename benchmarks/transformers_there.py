"""The part of `benchmarks.transformers_roundtrip` that needs torch and transformers.

    python benchmarks/transformers_there.py make FOLDER     makes small models and tokenizers
    python benchmarks/transformers_there.py check FOLDER    loads their exports; prints JSON

It imports nothing of this project.
"""
# pyright: reportMissingImports=false

import json
import sys
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

VOCABULARY = 512
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 64}
LABELS = {0: "good", 1: "so-so", 2: "bad"}  # not in alphabetical order
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"


def byte_level(text: str, special: list[str], *, split: bool) -> tokenizers.Tokenizer:
    """A tokenizer like GPT-2's, or like Qwen's with `split`."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split:
        model.normalizer = normalizers.NFC()
        model.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(text.splitlines(True), trainer)
    return model


def byte_fallback(text: str) -> tokenizers.Tokenizer:
    """A tokenizer like Llama-2's: <s> before each text, ▁ for spaces, bytes for unknown letters."""
    model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    model.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    model.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special[:3], show_progress=False
    )
    # Trained on single words; the model itself does not split at spaces.
    model.train_from_iterator((word for word in text.split()), trainer)
    spec = json.loads(model.to_str())
    words = [word for word in spec["model"]["vocab"] if word not in special]
    words = (special + words)[:VOCABULARY]
    spec["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    known = set(words)
    spec["model"]["merges"] = [
        pair for pair in spec["model"]["merges"] if {*pair, "".join(pair)} <= known
    ]
    model = tokenizers.Tokenizer.from_str(json.dumps(spec))
    model.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return model


def word_pieces(text: str) -> tokenizers.Tokenizer:
    """A tokenizer like BERT's, lower-case."""
    model = tokenizers.BertWordPieceTokenizer()
    model.train_from_iterator(text.splitlines(), vocab_size=VOCABULARY, show_progress=False)
    return model._tokenizer


def fast(model: tokenizers.Tokenizer, **special: str) -> transformers.PreTrainedTokenizerFast:
    """Wraps a tokenizer so that transformers can save it."""
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special)


def make(folder: Path) -> None:
    """Saves models with tokenizers, some of them only with the older files of a tokenizer."""
    text = (folder / "text.txt").read_text(encoding="utf-8")[:200_000]
    torch.manual_seed(0)
    end = "<|endoftext|>"
    gpt2 = fast(byte_level(text, [end], split=False), bos_token=end, eos_token=end)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    ids = {"bos_token_id": gpt2.bos_token_id, "eos_token_id": gpt2.eos_token_id}
    config = transformers.GPT2Config(vocab_size=len(gpt2), **sizes, **ids)
    keep(folder, "gpt2", transformers.GPT2LMHeadModel(config), gpt2)
    keep(folder, "gpt2-older", transformers.GPT2LMHeadModel(config), gpt2, "vocab.json merges.txt")

    llama = fast(byte_fallback(text), unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    config = transformers.LlamaConfig(vocab_size=len(llama), num_key_value_heads=2, **SIZES)
    keep(folder, "llama", transformers.LlamaForCausalLM(config), llama)

    words = [end, "<|im_start|>", "<|im_end|>"]
    qwen = fast(byte_level(text, words, split=True), eos_token="<|im_end|>", pad_token=end)
    ids = {"bos_token_id": 0, "eos_token_id": qwen.eos_token_id, "pad_token_id": qwen.pad_token_id}
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY, num_key_value_heads=2, head_dim=16, **SIZES, **ids
    )
    model = transformers.Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = [qwen.eos_token_id, 0]
    keep(folder, "qwen3", model, qwen)

    special = {name: f"[{name[:3].upper()}]" for name in ("unk_token", "cls_token", "sep_token")}
    special |= {"pad_token": "[PAD]", "mask_token": "[MASK]"}
    bert = fast(word_pieces(text), **special)
    config = transformers.BertConfig(vocab_size=len(bert), **SIZES)
    keep(folder, "bert", transformers.BertForMaskedLM(config), bert)
    keep(folder, "bert-older", transformers.BertForMaskedLM(config), bert, "vocab.txt")
    config = transformers.BertConfig(
        vocab_size=len(bert), **SIZES, id2label=LABELS, label2id={v: k for k, v in LABELS.items()}
    )
    keep(folder, "bert-classes", transformers.BertForSequenceClassification(config), bert)


def keep(folder: Path, name: str, model, tokenizer, older: str = "") -> None:
    """Saves a model with a tokenizer.json, or with the older files of a tokenizer."""
    place = folder / "source" / name
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    if not older:
        return
    spec = json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (place / file).unlink(missing_ok=True)
    if "vocab.txt" in older:
        words = sorted(spec["vocab"], key=spec["vocab"].get)
        (place / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    else:
        (place / "vocab.json").write_text(json.dumps(spec["vocab"]), encoding="utf-8")
        lines = [" ".join(pair) for pair in spec["merges"]]
        (place / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]), encoding="utf-8")


class EndAt(transformers.LogitsProcessor):
    """Makes one token the most likely once the text has this length."""

    def __init__(self, token: int, length: int):
        self.token, self.length = token, length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.length:
            scores[:, self.token] = 1e9
        return scores


def check(folder: Path) -> None:
    """Prints a JSON object: export -> what transformers loads from it."""
    text = (folder / "text.txt").read_text(encoding="utf-8")
    found = {place.name: check_one(folder, place, text) for place in sorted(folder.glob("out/*"))}
    print(json.dumps(found))


def check_one(folder: Path, place: Path, text: str) -> dict:
    """What transformers loads from one export."""
    ours = np.load(folder / "ours" / f"{place.name}.npz")
    config = transformers.AutoConfig.from_pretrained(place)
    architecture = config.architectures[0]
    kinds = {"ForMaskedLM": transformers.AutoModelForMaskedLM}
    kinds |= {"ForSequenceClassification": transformers.AutoModelForSequenceClassification}
    kind = next((kinds[k] for k in kinds if k in architecture), transformers.AutoModelForCausalLM)
    model = kind.from_pretrained(place).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    with torch.no_grad():
        logits = model(torch.from_numpy(ours["tokens"]).long()).logits.numpy()
    ids = np.array(tokenizer(text, add_special_tokens=False).input_ids)
    result = {
        "architecture": architecture,
        "difference": float(np.abs(logits - ours["logits"]).max()),
        "largest": float(np.abs(logits).max()),
        "equal": bool(np.array_equal(ids, ours["ids"])),
        "count": len(ids),
        "decoded": tokenizer.decode(ids[:5000]) == str(ours["decoded"]),
        "roles": [getattr(config, f"{role}_token_id", None) for role in ("bos", "eos", "pad")],
        "names": list(config.id2label.values()) if "Sequence" in architecture else [],
    }
    if kind is transformers.AutoModelForCausalLM:
        end = int(ours["end"])
        new = model.generate(
            torch.tensor([[5, 6, 7]]),
            max_new_tokens=20,
            logits_processor=[EndAt(end, 8)],
            do_sample=False,
        )
        result["stops"] = new.shape[1] == 9 and int(new[0, -1]) == end
    source = folder / "source" / place.name / "config.json"
    if source.is_file():
        before = transformers.AutoConfig.from_pretrained(source.parent)
        if result["names"]:
            result["names_before"] = list(before.id2label.values())
        result["before"] = [getattr(before, f"{r}_token_id", None) for r in ("bos", "eos", "pad")]
    return result


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
