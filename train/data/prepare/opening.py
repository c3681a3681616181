"""Opens files as UTF-8 bytes; their first bytes, not their names, tell packing and encoding."""

import bz2
import codecs
import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from train.data.prepare.records import Broken
from train.extras import need

_HEAD = 4096  # bytes that tell packing and encoding


def _arrow(codec: str) -> Callable[[Path], IO[bytes]]:
    def unpack(path: Path) -> IO[bytes]:
        arrow = need("pyarrow", "data", f"{path}, which is packed by {codec},")
        return arrow.CompressedInputStream(arrow.OSFile(str(path)), codec)

    return unpack


_PACKED: dict[bytes, tuple[str, Callable[[Path], Any]]] = {
    b"\x1f\x8b": ("gzip", gzip.open),
    **{b"BZh%d1AY&SY" % level: ("bzip2", bz2.open) for level in range(1, 10)},
    b"\xfd7zXZ\x00": ("xz", lzma.open),
    b"\x28\xb5\x2f\xfd": ("zstd", _arrow("zstd")),
    b"\x04\x22\x4d\x18": ("lz4", _arrow("lz4")),
}
_OTHER = {
    b"PK\x03\x04": "a zip archive: unpack it",
    b"PK\x05\x06": "an empty zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it",
    b"Rar!\x1a\x07": "a rar archive: unpack it",
    b"\x1f\x9d": "packed by compress: unpack it (gzip -d)",
    b"PAR1\x15": "a Parquet file: read it as parquet:",
    b"ARROW1\x00\x00": "an Arrow file: write it as Parquet, and read it as parquet:",
    b"%PDF-1.": "a PDF file: extract its text",
    b"%PDF-2.": "a PDF file: extract its text",
}
_MARKS = {  # UTF-32 first: its little-endian mark begins with the one of UTF-16
    codecs.BOM_UTF8: "UTF-8",
    codecs.BOM_UTF32_LE: "UTF-32LE",
    codecs.BOM_UTF32_BE: "UTF-32BE",
    codecs.BOM_UTF16_LE: "UTF-16LE",
    codecs.BOM_UTF16_BE: "UTF-16BE",
}


def open_plain(path: Path) -> IO[bytes]:
    """Opens a file without unpacking or decoding it.

    Raises:
      Broken: the file is empty.
    """
    if path.stat().st_size == 0:
        raise Broken(f"{path} is empty")
    return path.open("rb")


def open_bytes(path: Path) -> IO[bytes]:
    """Opens a text file as UTF-8 bytes without a byte-order mark; closing it closes the file.

    Raises:
      Broken: the file is empty, or of a kind that cannot be read; the message names the kind.
    """
    file = _unpacked(path)
    try:
        text = io.BufferedReader(file, 2**16)  # pyright: ignore
        head = text.peek(_HEAD)
        if not head:
            raise Broken(f"{path} is empty once it is unpacked")
        _refuse(head, path)
        mark = next((mark for mark in _MARKS if head.startswith(mark)), b"")
        text.read(len(mark))
        if mark in (b"", codecs.BOM_UTF8):
            return text
        return io.BufferedReader(_Recoded(text, _MARKS[mark], path), 2**16)
    except BaseException:
        file.close()
        raise


def _unpacked(path: Path) -> IO[bytes]:
    with open_plain(path) as file:
        head = file.read(16)
    unpack = next((open_ for magic, (_, open_) in _PACKED.items() if head.startswith(magic)), None)
    return path.open("rb", buffering=0) if unpack is None else unpack(path)


def _refuse(head: bytes, path: Path) -> None:
    for magic, what in _OTHER.items():
        if head.startswith(magic):
            raise Broken(f"{path} is {what}")
    for magic, (name, _) in _PACKED.items():
        if head.startswith(magic):
            raise Broken(f"{path} is packed twice, the second time by {name}: unpack it once")
    if head[257:262] == b"ustar":
        raise Broken(f"{path} is a tar archive: unpack it and give the files in it")
    if encoding := _unmarked(head):
        raise Broken(
            f"{path} looks like {encoding} without a byte-order mark, by the positions of its NUL "
            f"bytes; convert it by iconv -f {encoding} -t UTF-8"
        )


def _unmarked(head: bytes) -> str:
    """The UTF-16 or UTF-32 encoding whose pattern of NUL bytes a text without a mark has, or ""."""
    nuls = [i for i, byte in enumerate(head) if not byte]
    if any(head.startswith(mark) for mark in _MARKS) or len(nuls) < max(2, len(head) / 25):
        return ""
    if len(nuls) > 0.7 * len(head):
        letters = {0, 1, 2, 3} - {i % 4 for i in nuls}
        return "UTF-32LE" if letters == {0} else "UTF-32BE" if letters == {3} else ""
    halves = {i % 2 for i in nuls}
    return "UTF-16LE" if halves == {1} else "UTF-16BE" if halves == {0} else ""


class _Recoded(io.RawIOBase):
    """A file in another encoding, as UTF-8 bytes."""

    def __init__(self, file: IO[bytes], encoding: str, path: Path):
        self._file, self._path, self._encoding = file, path, encoding
        self._text = io.TextIOWrapper(file, encoding, newline="")
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            try:
                self._rest = self._text.read(2**14).encode()
            except UnicodeError as error:
                raise Broken(
                    f"{self._path} begins as {self._encoding} but continues as something else "
                    f"({error}); it is cut or damaged"
                ) from error
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    def close(self) -> None:
        self._text.close()
        super().close()
