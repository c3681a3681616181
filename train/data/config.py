"""The config of a run's data."""

import dataclasses
from pathlib import Path
from typing import Literal

from train.files import check_local

PRETRAINED = "pretrained"
"""Folder of an imported run with the tokenizer files of its source."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The source of the text, its tokenizer, and the task.

    >>> DataConfig(source="text:books/*.txt").tokenizer
    'bytes'
    """

    source: str = "embedded"
    """embedded; text:, jsonl:, csv:, tsv: or parquet: and a file or glob; bin: and a folder that
    `prepare` made, or token files without a header; tfds:NAME[/CONFIG][:SPLIT]; or a mixture with
    weights, bin:a:0.7,bin:b:0.3. A path that exists is taken literally, brackets and stars
    included."""
    tokenizer: str = "bytes"
    """bytes, or a path: a folder with GPT-2's vocab.bpe and encoder.json, a tokenizer.json, or a
    WordPiece vocab.txt. A bin: folder brings its own tokenizer; token files without a header get
    ids:N, where N is one more than the largest id."""
    task: Literal["next-token", "masked", "classify"] = "next-token"
    """Predict the next token, the masked tokens, or the class of a row."""
    heldout_fraction: float = 0.05
    """Share of documents that are held out for evaluation, chosen by their hash, so that copies of
    a document stay together; for a text of one or few documents, its end. A bin: folder keeps the
    share that it was prepared with."""
    heldout_source: str = ""
    """Evaluate on this source instead, such as tfds:lm1b:test: on its held-out part if it is a
    bin: folder, otherwise on all of it. Overlap with the training source is not checked."""
    text_field: str = ""
    """Field or column of the text; default text. Two fields with a comma between them are the two
    sentences of a pair in classify, and are joined by a line break in other tasks."""
    label_field: str = "label"
    """Field or column of the class."""
    separator: str = ""
    """String between the documents of a text file, such as <|endoftext|>; by default each file is
    one document."""
    segments: bool = False
    """Keep documents that share a row from attending to each other."""
    mask_rate: float = 0.15
    """Share of tokens that the masked task masks."""
    broken: Literal["error", "skip"] = "error"
    """What to do with a line, cell or file that cannot be read; skipped ones are counted and
    printed."""
    document_limit: int = 256 * 2**20
    """Largest line, cell or document in bytes; a longer one counts as broken."""
    headerless: Literal["", "uint16", "uint32"] = ""
    """Type of the tokens in bin: files without a header, as nanoGPT writes them. By default
    uint16, or uint32 if every second uint16 looks like the high half of an id."""
    download: bool = False
    """Allow tfds: to download and prepare a data set that is missing."""
    tfds_folder: str = "~/tensorflow_datasets"
    """Where tfds: looks for data sets."""
    cache: str = "~/.cache/sophia_optax/tokens"
    """Folder for the token files of sources other than bin:."""

    def __post_init__(self):
        for name in ("source", "heldout_source", "tokenizer", "tfds_folder", "cache"):
            check_local(getattr(self, name), f"data.{name}")
        low = self.heldout_fraction >= 0 if self.heldout_source else self.heldout_fraction > 0
        if not (low and self.heldout_fraction < 1):
            raise ValueError(
                f"data.heldout_fraction={self.heldout_fraction} leaves nothing to train on or "
                "nothing to evaluate on: choose a fraction above 0 and below 1, or give "
                "--data.heldout-source."
            )
        if not 0 < self.mask_rate <= 1:
            raise ValueError(
                f"data.mask_rate={self.mask_rate} is not a share; choose one above 0, at most 1."
            )
        if self.document_limit < 1:
            raise ValueError(f"data.document_limit={self.document_limit} must be at least 1 byte.")
        if self.task == "classify" and self.segments:
            raise ValueError(
                "data.segments is for rows of packed text; task=classify has one text a row."
            )

    def in_run(self, folder: Path) -> "DataConfig":
        """The config with the tokenizer inside an imported run's folder, which may have moved."""
        own = folder / PRETRAINED
        # The recorded path may belong to another run by now, with another tokenizer.
        if Path(self.tokenizer).name != PRETRAINED or not (own / "tokenizer.json").is_file():
            return self
        return dataclasses.replace(self, tokenizer=str(own.resolve()))
