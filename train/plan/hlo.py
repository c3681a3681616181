"""Collectives of a compiled program, counted in its HLO text."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
Calls = list[tuple[str, int]]  # (name of a computation, number of runs)


class Collective(NamedTuple):
    """Collectives of one kind in one run of a program on one device."""

    number: int
    bytes: int  # of their results


def collectives(text: str) -> dict[str, Collective]:
    """Collectives of one run of a compiled program.

    A collective in a loop body counts once per iteration, and nested loops multiply. Every branch
    of a conditional counts. A loop with an unknown number of iterations (`jax.lax.scan` makes none)
    counts once.

    Args:
      text: `Compiled.as_text()`.

    Returns:
      Kind -> number and bytes of the results, for the kinds that occur.

    Raises:
      ValueError: the text is no HLO module.

    >>> text = '''HloModule m
    ... body (x: f32[4]) -> f32[4] {
    ...   ROOT y = f32[4]{0} all-reduce(x), to_apply=add
    ... }
    ... ENTRY main (x: f32[4]) -> f32[4] {
    ...   ROOT z = f32[4]{0} while(x), body=body, backend_config={"known_trip_count":{"n":"3"}}
    ... }'''
    >>> collectives(text)
    {'all-reduce': Collective(number=3, bytes=48)}
    """
    entry, bodies = _computations(text)
    found: dict[str, list[int]] = {}
    for name, times in _runs(entry, {name: _calls(lines) for name, lines in bodies.items()}):
        for kind, size in _of(bodies[name]):
            count, total = found.get(kind, (0, 0))
            found[kind] = [count + times, total + times * size]
    return {kind: Collective(*found[kind]) for kind in KINDS if kind in found}


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """(name of the entry computation, name of each computation -> its lines)."""
    entry, bodies, lines = "", {}, []
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([^\s(]+) \(.*\{$", line)
        if header:
            lines = bodies[header[2]] = []
            entry = header[2] if header[1] else entry
        else:
            lines.append(line)
    if not entry:
        raise ValueError(
            "no ENTRY computation: this is not the text of a compiled program. Pass "
            "`lowered.compile().as_text()`."
        )
    return entry, bodies


def _calls(lines: list[str]) -> Calls:
    """Computations that these lines call, and how often."""
    calls = []
    for line in lines:
        trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line) if " while(" in line else None
        names = re.findall(r"(?:body|condition|calls|to_apply|\w+_computation)=%?([\w.\-]+)", line)
        for group in re.findall(r"(?:branch_computations|calls)=\{([^}]*)\}", line):
            names += re.findall(r"[\w.\-]+", group)
        calls += [(name, int(trips[1]) if trips else 1) for name in names]
    return calls


def _runs(name: str, calls: dict[str, Calls], times: int = 1) -> Iterator[tuple[str, int]]:
    """Each computation that is reached and its number of runs, once per call path."""
    yield name, times
    for inner, number in calls[name]:
        if inner in calls:
            yield from _runs(inner, calls, times * number)


def _of(lines: list[str]) -> Iterator[tuple[str, int]]:
    """(kind, bytes of the result) of each collective; an asynchronous pair counts at its end."""
    for line in lines:
        found = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-done)?\(", line)
        if found:
            yield found[2], sum(map(_bytes, re.finditer(r"([a-z]+)(\d*)\w*\[([\d,]*)\]", found[1])))


def _bytes(shape: re.Match[str]) -> int:
    bits = int(shape[2] or 8)  # pred, which takes a byte, names no bits
    return math.prod(int(n) for n in shape[3].split(",") if n) * bits // 8
