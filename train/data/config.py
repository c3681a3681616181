"""What a run is trained on, in plain fields."""

import dataclasses
from pathlib import Path
from typing import Literal

from train.files import check_local

PRETRAINED = "pretrained"
"""Folder in a run that was imported: the tokenizer of its source, special tokens, class names."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and what is made of it.

    >>> DataConfig(source="text:books/*.txt").tokenizer
    'bytes'
    """

    source: str = "embedded"
    """embedded; text:, jsonl:, csv:, tsv: or parquet: and a file or glob; bin: and a folder that
    `prepare` made, or files of ids alone; tfds:NAME[/CONFIG][:SPLIT]; or several with weights:
    bin:a:0.7,bin:b:0.3. A path that exists is taken literally, brackets and stars included."""
    tokenizer: str = "bytes"
    """bytes, or a path: a folder with GPT-2's vocab.bpe and encoder.json, a tokenizer.json, or a
    WordPiece vocab.txt. A bin: folder brings its own; of ids alone it is ids:N, N the largest and
    one."""
    task: Literal["next-token", "masked", "classify"] = "next-token"
    """Name the next token, the hidden tokens, or the class of a row."""
    heldout_fraction: float = 0.05
    """Share of documents to be judged by, chosen by their hash, so that copies of a document are
    on one side; of a text of one or few documents its end. A bin: folder keeps the share that it
    was prepared with, whatever this says."""
    heldout_source: str = ""
    """Judge by this source instead, such as tfds:lm1b:test: by its held-out part if it is bin:,
    else by all of it. Overlap with the source is not looked for."""
    text_field: str = ""
    """Field or column of the text, default text; two with a comma between them make pairs of
    sentences for classify, and are joined by a line break otherwise."""
    label_field: str = "label"
    """Field or column of the class."""
    separator: str = ""
    """What parts the documents of a text file, such as <|endoftext|>; default: a file is one."""
    segments: bool = False
    """Keep documents that share a row from seeing each other."""
    mask_rate: float = 0.15
    """Share of tokens that the masked task hides."""
    broken: Literal["error", "skip"] = "error"
    """What a line, cell or file that cannot be read does; skipped ones are counted and shown."""
    document_limit: int = 256 * 2**20
    """Bytes of the longest line, cell or document that is read; a longer one is broken."""
    headerless: Literal["", "uint16", "uint32"] = ""
    """Take bin: files without a header, as nanoGPT writes them, as tokens of this type; by
    default as uint16, or as uint32 if every second uint16 is the high half of an id."""
    download: bool = False
    """Let tfds: fetch and prepare a data set that is not there."""
    tfds_folder: str = "~/tensorflow_datasets"
    """Where tfds: looks for data sets."""
    cache: str = "~/.cache/sophia_optax/tokens"
    """Where the tokens of sources other than bin: are kept."""

    def __post_init__(self):
        for name in ("source", "heldout_source", "tokenizer", "tfds_folder", "cache"):
            check_local(getattr(self, name), f"data.{name}")
        low = self.heldout_fraction >= 0 if self.heldout_source else self.heldout_fraction > 0
        if not (low and self.heldout_fraction < 1):
            raise ValueError(
                f"data.heldout_fraction={self.heldout_fraction} leaves nothing to train on or "
                "to be judged by: choose one above 0 and below 1, or give --data.heldout-source."
            )
        if not 0 < self.mask_rate <= 1:
            raise ValueError(
                f"data.mask_rate={self.mask_rate} is no share; choose one above 0, at most 1."
            )
        if self.document_limit < 1:
            raise ValueError(f"data.document_limit={self.document_limit} must be at least 1 byte.")
        if self.task == "classify" and self.segments:
            raise ValueError("data.segments packs rows of text; task=classify has one a row.")

    def in_run(self, folder: Path) -> "DataConfig":
        """With the tokenizer that an imported run brings along, wherever its folder is now."""
        own = folder / PRETRAINED
        # At the old place there may be another run by now, with another tokenizer.
        if Path(self.tokenizer).name != PRETRAINED or not (own / "tokenizer.json").is_file():
            return self
        return dataclasses.replace(self, tokenizer=str(own.resolve()))
