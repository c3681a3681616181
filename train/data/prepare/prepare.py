"""Text to token files: `python -m train prepare SOURCE -o DIR`."""

import functools
import hashlib
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from train import files, lock
from train.data import tokenizers
from train.data.config import DataConfig
from train.data.prepare import token_writer
from train.data.prepare.header import read_header, write_header
from train.data.prepare.records import Broken, SourceFile
from train.data.prepare.source_files import source_files
from train.data.tokenizers import Tokenizer
from train.files import check_local

_PARTS = "parts"


def prepare(
    source: Annotated[str, tyro.conf.Positional],
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    data: DataConfig = DataConfig(),  # noqa: B008
    workers: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Turn text into token files that training reads by memory map.

    Files are read in parallel. Finished files are kept: after an interruption the same command
    continues where it stopped. header.json is written last; with it the folder is complete.

    Args:
      source: text:, jsonl:, csv:, tsv: or parquet: and a file or glob, or tfds:NAME.
      output: folder for train.bin, heldout.bin, header.json and the tokenizer.
      data: how to read the source; its fields source, task and cache are not used.
      workers: number of threads; 0 for one per processor.
      quiet: print nothing.

    Returns:
      The header.

    Raises:
      ValueError: there is nothing to read, the data is broken, or the folder holds other data.
    """
    if workers < 0:
        raise ValueError(f"--workers {workers} is negative; 0 means one per processor.")
    check_local(output, "-o")
    tokenizer = tokenizers.load(data.tokenizer)
    found, fields = source_files(source, data)
    request = request_hash(found, fields, tokenizer, data)
    console = Console(stderr=True, quiet=quiet)
    say = functools.partial(console.print, markup=False, soft_wrap=True)  # paths are not markup
    output.mkdir(parents=True, exist_ok=True)
    with lock.hold(output, say, wait=True):
        header = read_header(output)
        if header is None:
            _claim(output / _PARTS, request)
            start = time.perf_counter()
            counts = _write_parts(found, fields, tokenizer, data, output, workers, console)
            header = token_writer.join_parts(output / _PARTS, counts, tokenizer, data, output)
            report_skipped(header["skipped"], console)
            tokenizer.copy(output / "tokenizer")
            seconds = round(time.perf_counter() - start, 3)
            header = {**header, "request": request, "seconds": seconds, "source": source}
            write_header(output, header)
            shutil.rmtree(output / _PARTS)
        elif header["request"] != request:
            raise ValueError(
                f"{output} holds {header.get('source')}, prepared with other settings or from "
                "other files; choose another folder or remove it."
            )
        say(_summary(output, header))
    return header


def _write_parts(
    found: list[SourceFile],
    fields: tuple[str, ...],
    tokenizer: Tokenizer,
    data: DataConfig,
    output: Path,
    workers: int,
    console: Console,
) -> list[dict[str, Any] | None]:
    """Writes the part of each file that has none yet; returns the counts of all parts."""
    stems = [output / _PARTS / f"{i:05}" for i in range(len(found))]
    counts = [token_writer.done(stem, tokenizer.dtype) for stem in stems]
    todo = [i for i, count in enumerate(counts) if count is None]
    stop = threading.Event()
    with _progress(console) as progress, ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        task = progress.add_task("", total=len(found), completed=len(found) - len(todo), tokens=0)

        def tick(tokens: int) -> None:
            if stop.is_set():
                raise Broken("stopped")
            progress.update(task, tokens=progress.tasks[0].fields["tokens"] + tokens)

        shared = fields, tokenizer, data
        work = {pool.submit(token_writer.write, found[i], *shared, stems[i], tick): i for i in todo}
        try:
            for future in as_completed(work):
                counts[work[future]] = future.result()
                progress.advance(task)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return counts


def request_hash(
    found: list[SourceFile], fields: tuple[str, ...], tokenizer: Tokenizer, data: DataConfig
) -> str:
    """A hash of everything that decides the contents of the token files."""
    states = [
        (s.kind, str(s.path.resolve()), (t := s.path.stat()).st_size, t.st_mtime_ns) for s in found
    ]
    how = (data.heldout_fraction, data.separator, data.broken, data.document_limit)
    rules = [tokenizer.rules] * (tokenizer.rules > 1)
    stated = json.dumps([states, fields, tokenizer.hash, how, *rules])
    return hashlib.sha256(stated.encode()).hexdigest()


def _claim(folder: Path, request: str) -> None:
    """Marks the folder of parts as belonging to this request."""
    folder.mkdir(exist_ok=True)
    mark = folder / "request"
    if mark.exists() and mark.read_bytes() != request.encode():
        raise ValueError(
            f"{folder.parent} holds an unfinished preparation of other files or with other "
            "settings; repeat that command, choose another folder, or remove this one."
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


def report_skipped(skipped: dict[str, Any], console: Console) -> None:
    """Prints how many records were skipped, and the first of them."""
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
