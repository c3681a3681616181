"""A tokenizer trained on a source: `python -m train train-tokenizer SOURCE -o FILE`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from train.data.config import DataConfig
from train.data.prepare.documents import documents
from train.data.prepare.prepare import report_skipped
from train.data.prepare.source_files import source_files
from train.extras import need
from train.files import check_local


def train_tokenizer(
    source: Annotated[str, tyro.conf.Positional],
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    vocab_size: int = 32_000,
    kind: Literal["bpe", "wordpiece"] = "bpe",
    data: DataConfig = DataConfig(),  # noqa: B008
) -> Path:
    """Train a tokenizer on a source of documents.

    Args:
      source: text:, jsonl:, csv:, tsv: or parquet: and a file or glob, or tfds:NAME.
      output: path of the tokenizer.json to write; pass it as --data.tokenizer afterwards.
      vocab_size: largest number of tokens, special tokens included.
      kind: bpe merges bytes as GPT-2 does; wordpiece cuts lower-case words as BERT does.
      data: how to read the source.

    Returns:
      The path of the tokenizer.json.

    Raises:
      ValueError: there are no documents, or broken ones.
    """
    check_local(output, "-o")
    if output.suffix != ".json":
        raise ValueError(f"output={output} must end in .json, such as tokenizer.json.")
    library = need("tokenizers", "data", "training a tokenizer")
    if kind == "bpe":
        model, special = library.ByteLevelBPETokenizer(), ["<|endoftext|>"]
    else:
        model = library.BertWordPieceTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    files, fields = source_files(source, data)
    skipped: list[str] = []
    texts = ("\n".join(v) for file in files for v in documents(file, data, fields, skipped))
    model.train_from_iterator(
        texts, vocab_size=vocab_size, min_frequency=2, show_progress=False, special_tokens=special
    )
    report_skipped({"count": len(skipped), "first": skipped[:5]}, Console(stderr=True))
    output.parent.mkdir(parents=True, exist_ok=True)
    model.save(str(output))
    return output
