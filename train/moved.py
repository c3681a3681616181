"""The data of a run that was trained elsewhere, or whose data is now in another place."""

import contextlib
import dataclasses
import glob
from collections.abc import Iterator
from pathlib import Path

from train.config import Config
from train.data import mixture, sources


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the data of a run is now; what is left empty is where it was."""

    source: str = ""
    """As for a new run; it must be the same data."""
    heldout_source: str = ""
    """As for a new run; it must be the same data."""
    tokenizer: str = ""
    """As for a new run; it must be the same tokenizer."""
    cache: str = ""
    """Folder of the tokens of sources other than bin:."""


STAYED = Places()


def placed(run: Config, places: Places) -> Config:
    """The config with the data where it is now."""
    given = {name: value for name, value in dataclasses.asdict(places).items() if value}
    for name in ("source", "heldout_source"):
        if name in given:
            given[name] = sources.absolute(given[name])
    return dataclasses.replace(run, data=dataclasses.replace(run.data, **given))


@contextlib.contextmanager
def explained(run: Config) -> Iterator[None]:
    """Adds to an error of reading the data of a saved run where it was looked for.

    Raises:
      ValueError: files of the data are not there.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if not (lost := _lost(run)):
            raise
        text = f"{error}".rstrip(".")
        raise ValueError(
            f"{text}. Nothing is at {lost[0]}: if the data of this run has moved, give its new "
            "place, such as --data.source text:NEW."
        ) from error


def _lost(run: Config) -> list[str]:
    """Paths, from the root on, of the run's data at which there is nothing."""
    given = [source for source in (run.data.source, run.data.heldout_source) if source]
    parts = [sources.parse(part) for source in given for part, _ in mixture.parse(source)]
    paths = [rest for kind, rest in parts if kind not in ("embedded", "tfds")]
    if run.data.tokenizer != "bytes":
        paths.append(run.data.tokenizer)
    whole = (str(Path(path).expanduser().absolute()) for path in paths)
    return [path for path in whole if not (Path(path).exists() or glob.glob(path, recursive=True))]
