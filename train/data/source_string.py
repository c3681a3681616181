"""Source strings such as `text:books/*.txt` and `bin:a:0.7,bin:b:0.3`: their kinds and weights."""

import difflib
import re
from collections.abc import Sequence

import numpy as np

from train.data import paths
from train.files import check_local

KINDS = ("embedded", "bin", "text", "jsonl", "csv", "tsv", "parquet", "tfds")
BLOCK = 1000
"""Rows in which each source of a mixture has exactly its share: weights count in thousandths."""


def parse_source(source: str) -> tuple[str, str]:
    """The kind of one source and the part after its colon.

    Raises:
      ValueError: the kind is unknown; the message suggests the nearest one.

    >>> parse_source("tfds:glue/sst2")
    ('tfds', 'glue/sst2')
    """
    check_local(source, "source")
    kind, _, rest = source.partition(":")
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, 1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"unknown source {source!r}.{hint} Give {KINDS[0]}, or one of {', '.join(KINDS[1:])} "
            "with a colon and a path or name, such as text:books/*.txt."
        )
    if (kind == "embedded") == bool(rest):
        raise ValueError(
            f"source {source!r} should have {'no' if rest else 'a'} path: "
            f"{'embedded' if rest else f'{kind}:PATH'}."
        )
    return kind, rest


def parse_mixture(source: str) -> list[tuple[str, float]]:
    """The sources of a mixture with their weights; a single source has weight 1.

    Raises:
      ValueError: a weight is missing, or too small to be met.

    >>> parse_mixture("bin:a:0.7,embedded:0.3")
    [('bin:a', 0.7), ('embedded', 0.3)]
    >>> parse_mixture("tfds:lm1b:train")
    [('tfds:lm1b:train', 1.0)]
    """
    found = [re.fullmatch(r"(.+):(\d*\.?\d+)", part) for part in source.split(",")]
    if len(found) < 2 or not any(found):
        return [(source, 1.0)]
    parts = [(match[1], float(match[2])) for match in found if match]
    if len(parts) < len(found):
        raise ValueError(
            f"source {source!r}: give each source of a mixture a weight, bin:a:0.7,bin:b:0.3."
        )
    rows_per_block([weight for _, weight in parts])
    return parts


def rows_per_block(weights: Sequence[float]) -> np.ndarray:
    """Rows of each source in a block of `BLOCK` rows, int64[S], by largest remainders.

    >>> rows_per_block([2, 1]).tolist()
    [667, 333]
    """
    share_S = np.asarray(weights, np.float64) / max(sum(weights), np.finfo(float).tiny) * BLOCK
    count_S = np.floor(share_S).astype(np.int64)
    order_S = np.argsort(count_S - share_S, kind="stable")
    count_S[order_S[: BLOCK - count_S.sum()]] += 1
    if count_S.min() < 1 or min(weights) <= 0:
        raise ValueError(
            f"weights {list(weights)}: each must be above 0 and at least {1 / BLOCK:g} of their "
            "sum."
        )
    return count_S


def absolute(source: str) -> str:
    """The same source with absolute paths; mixtures keep their weights.

    >>> absolute("embedded:0.5,text:/a/*.txt:0.5"), absolute("tfds:glue/sst2:train")
    ('embedded:0.5,text:/a/*.txt:0.5', 'tfds:glue/sst2:train')
    """
    if not source:
        return source
    whole = len(parse_mixture(source)) == 1
    return ",".join(map(_absolute, [source] if whole else source.split(",")))


def _absolute(part: str) -> str:
    kind, rest = parse_source(part) if part.startswith("tfds:") else part.partition(":")[::2]
    if kind in ("embedded", "tfds") or kind not in KINDS or not rest:
        return part
    return f"{kind}:{paths.absolute(rest)}"
