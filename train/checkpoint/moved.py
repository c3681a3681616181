"""The data of a run that was trained on another machine, or whose data has moved since."""

import contextlib
import dataclasses
import glob
from collections.abc import Iterator
from pathlib import Path

from train.config.schema import Config, absolute
from train.data import DataConfig, paths, resolved, source_string


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the data of a run is now; an empty field means where it was."""

    source: str = ""
    """As for a new run; it must be the same data. A bin: folder names its own tokenizer."""
    heldout_source: str = ""
    """As for a new run; it must be the same data."""
    tokenizer: str = ""
    """As for a new run; it must be the same tokenizer."""
    cache: str = ""
    """Folder for the tokens of sources other than bin:."""


STAYED = Places()


def placed(config: Config, now: Places) -> Config:
    """The config with the data where it is now, in absolute paths.

    Raises:
      ValueError: a source is malformed, or the header of a bin: folder cannot be read.
    """
    given = {name: value for name, value in dataclasses.asdict(now).items() if value}
    for name in ("source", "heldout_source"):
        if name in given:
            given[name] = source_string.absolute(given[name])
    if "tokenizer" in given and Path(given["tokenizer"]).expanduser().exists():
        given["tokenizer"] = paths.absolute(given["tokenizer"])
    if "cache" in given:
        given["cache"] = absolute(given["cache"])
    data = dataclasses.replace(config.data, **given)
    if now.source and not now.tokenizer and _lost_tokenizer(data):
        own = resolved(dataclasses.replace(data, tokenizer=DataConfig.tokenizer)).tokenizer
        if own != DataConfig.tokenizer:
            data = dataclasses.replace(data, tokenizer=own)
    return dataclasses.replace(config, data=data)


@contextlib.contextmanager
def explained(config: Config) -> Iterator[None]:
    """Adds to an error of reading a run's data the path where files are missing.

    Raises:
      ValueError: files of the data are missing; other errors pass unchanged.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if not (lost := _lost(config.data)):
            raise
        text = f"{error}".rstrip(".")
        path, flag = next(iter(lost.items()))
        raise ValueError(
            f"{text}. Nothing is at {path}: if the data of this run has moved, say where it is "
            f"now, {flag}NEW."
        ) from error


def _lost(data: DataConfig) -> dict[str, str]:
    """Absolute path of each missing file of the run's data -> the flag that names another."""
    flags = {}
    for name in ("source", "heldout_source"):
        given = getattr(data, name)
        mixed = source_string.parse_mixture(given) if given else []
        parts = [source_string.parse_source(part) for part, _ in mixed]
        for kind, path in parts:
            if kind not in ("embedded", "tfds"):
                flags[path] = f"--data.{name.replace('_', '-')} {kind}:"
    found = {paths.absolute(path): flag for path, flag in flags.items()}
    lost = {path: flag for path, flag in found.items() if not _is_there(path)}
    if path := _lost_tokenizer(data):
        lost[path] = "--data.tokenizer "
    return lost


def _lost_tokenizer(data: DataConfig) -> str:
    """The path of a tokenizer whose files are missing, if so; ids:N and bytes have no files."""
    if data.tokenizer == DataConfig.tokenizer or data.tokenizer.startswith("ids:"):
        return ""
    path = paths.absolute(data.tokenizer)
    return "" if _is_there(path) else path


def _is_there(path: str) -> bool:
    return Path(path).exists() or bool(glob.glob(path, recursive=True))
