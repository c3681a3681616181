"""Text to token files: `python -m train prepare SOURCE -o DIR`, and `train-tokenizer`."""

import functools
import hashlib
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from os import cpu_count
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from train import files, lock
from train.data import sources, tokenizers
from train.data.config import DataConfig
from train.data.prepare import token_writer
from train.data.prepare.documents import documents
from train.data.prepare.opening import Broken
from train.data.prepare.readers import Shard
from train.data.tokenizers import Tokenizer
from train.extras import need
from train.files import check_local


def prepare(
    source: Annotated[str, tyro.conf.Positional],
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    data: DataConfig = DataConfig(),  # noqa: B008
    workers: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Turn text into token files that training reads by memory map.

    Files are worked on in parallel. What is finished stays: the same command goes on where it was
    stopped. The folder counts as prepared once its header.json is there, which is written last.

    Args:
      source: text:, jsonl:, csv:, tsv: or parquet: and a file or glob, or tfds:NAME.
      output: folder for train.bin, heldout.bin, header.json and the tokenizer.
      data: how to read it; source, task and cache are not used.
      workers: threads; 0 takes one a processor.
      quiet: show nothing.

    Returns:
      The header.

    Raises:
      ValueError: nothing to read, broken data, or a folder that holds something else.
    """
    if workers < 0:
        raise ValueError(f"--workers {workers} is negative; 0 takes one a processor.")
    check_local(output, "-o")
    tokenizer = tokenizers.load(data.tokenizer)
    shards, fields = sources.shards(source, data)
    request = request_hash(shards, fields, tokenizer, data)
    console = Console(stderr=True, quiet=quiet)
    say = functools.partial(console.print, markup=False, soft_wrap=True)  # paths as they are
    output.mkdir(parents=True, exist_ok=True)
    with lock.hold(output, say, wait=True):
        header = sources.read_header(output)
        if header is None:
            header = _prepare(shards, fields, tokenizer, data, output, request, workers, console)
            header = {**header, "source": source}
            sources.write_header(output, header)
            shutil.rmtree(output / "parts")
        elif header["request"] != request:
            raise ValueError(
                f"{output} holds {header.get('source')}, prepared otherwise or from other files; "
                "choose another folder or remove it."
            )
        say(_summary(output, header))
    return header


def _prepare(
    shards: list[Shard],
    fields: tuple[str, ...],
    tokenizer: Tokenizer,
    data: DataConfig,
    output: Path,
    request: str,
    workers: int,
    console: Console,
) -> dict[str, Any]:
    folder, start = output / "parts", time.perf_counter()
    _claim(folder, request)
    counts = [token_writer.done(folder / f"{i:05}", tokenizer.dtype) for i in range(len(shards))]
    todo = [i for i, count in enumerate(counts) if count is None]
    stop = threading.Event()
    with _progress(console) as progress, ThreadPoolExecutor(workers or cpu_count()) as pool:
        task = progress.add_task("", total=len(shards), completed=len(shards) - len(todo), tokens=0)

        def tick(tokens: int) -> None:
            if stop.is_set():
                raise Broken("stopped")
            progress.update(task, tokens=progress.tasks[0].fields["tokens"] + tokens)

        work = {
            pool.submit(
                token_writer.write, shards[i], fields, tokenizer, data, folder / f"{i:05}", tick
            ): i
            for i in todo
        }
        try:
            for future in as_completed(work):
                counts[work[future]] = future.result()
                progress.advance(task)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    header = token_writer.merge(folder, counts, tokenizer, data, output)
    _report_skipped(header["skipped"], console)
    tokenizer.copy(output / "tokenizer")
    return {**header, "request": request, "seconds": round(time.perf_counter() - start, 3)}


def request_hash(
    shards: list[Shard], fields: tuple[str, ...], tokenizer: Tokenizer, data: DataConfig
) -> str:
    """A hash of all that decides what the token files hold."""
    states = [
        (s.kind, str(s.path.resolve()), (t := s.path.stat()).st_size, t.st_mtime_ns) for s in shards
    ]
    how = (data.heldout_fraction, data.separator, data.broken, data.document_limit)
    rules = [tokenizer.rules] * (tokenizer.rules > 1)
    stated = json.dumps([states, fields, tokenizer.hash, how, *rules])
    return hashlib.sha256(stated.encode()).hexdigest()


def _claim(folder: Path, request: str) -> None:
    folder.mkdir(exist_ok=True)
    mark = folder / "request"
    if mark.exists() and mark.read_bytes() != request.encode():
        raise ValueError(
            f"{folder.parent} holds an unfinished preparation of other files or in another way; "
            "repeat that command, choose another folder, or remove this one."
        )
    files.replace_text(mark, request)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("preparing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("files  {task.fields[tokens]:,} tokens"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _report_skipped(skipped: dict[str, Any], console: Console) -> None:
    if skipped["count"]:
        console.print(f"skipped {skipped['count']} broken records; the first:")
        for line in skipped["first"]:
            console.print(f"  {line}", markup=False)


def _summary(output: Path, header: dict[str, Any]) -> str:
    tokens = sum(split["tokens"] for split in header["splits"].values())
    size = sum(split["bytes"] for split in header["splits"].values())
    seconds = max(header.get("seconds", 0), 1e-9)
    return (
        f"{output}: {tokens:,} tokens, {size / max(1, tokens):.2f} bytes each, "
        f"{header['splits']['heldout']['tokens']:,} held out ({header.get('heldout')}); "
        f"{tokens / seconds / 1e6:.2f}M tokens/s, {size / seconds / 1e6:.1f} MB/s"
    )


def train_tokenizer(
    source: Annotated[str, tyro.conf.Positional],
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    vocab_size: int = 32_000,
    kind: Literal["bpe", "wordpiece"] = "bpe",
    data: DataConfig = DataConfig(),  # noqa: B008
) -> Path:
    """Train a tokenizer on a source of documents.

    Args:
      source: as of `prepare`.
      output: the tokenizer.json to write, whose path is then a --data.tokenizer.
      vocab_size: tokens at most, special ones included.
      kind: bytes merged as in GPT-2, or lower-case pieces of words as in BERT.
      data: how to read the source.

    Returns:
      Its path.

    Raises:
      ValueError: no documents, or broken ones.
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
    shards, fields = sources.shards(source, data)
    skipped: list[str] = []
    texts = ("\n".join(v) for shard in shards for v in documents(shard, data, fields, skipped))
    model.train_from_iterator(
        texts, vocab_size=vocab_size, min_frequency=2, show_progress=False, special_tokens=special
    )
    _report_skipped({"count": len(skipped), "first": skipped[:5]}, Console(stderr=True))
    output.parent.mkdir(parents=True, exist_ok=True)
    model.save(str(output))
    return output
