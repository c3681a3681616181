"""Options of XLA, set only if the installed jaxlib knows them.

Each jaxlib has its own set, and an unknown name in XLA_FLAGS aborts the process that starts JAX. So
a subprocess tries them first, which takes a third of a second.
"""

import functools
import os
import re
import subprocess
import sys
from importlib.metadata import version
from typing import Any

Option = bool | int | str

QUICK: dict[str, Option] = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
"""Faster compilation of slower programs."""
PATIENT: dict[str, Option] = {"xla_cpu_collective_call_terminate_timeout_seconds": 600}
"""Without it, XLA gives up on an all-reduce of fake devices after 40 s on busy cores."""

_START = "from jaxlib import xla_client; xla_client.make_cpu_client()"
_UNKNOWN = re.compile(r"Unknown flags? in XLA_FLAGS:(.*)")


def known(options: dict[str, Option]) -> dict[str, Any]:
    """The options that the installed jaxlib knows; a line on stderr names the others.

    The result can be passed to `jax.jit` as `compiler_options`.

    >>> known({"xla_backend_optimization_level": 0})
    {'xla_backend_optimization_level': 0}
    """
    unknown = _unknown(_words(options))
    return {name: value for name, value in options.items() if name not in unknown}


def flags(options: dict[str, Option]) -> str:
    """The known options in the form of the environment variable XLA_FLAGS."""
    return _words(known(options))


def add(options: dict[str, Option]) -> None:
    """Appends known options to XLA_FLAGS; JAX reads it when it first looks for devices."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags(options)}".strip()


def _words(options: dict[str, Option]) -> str:
    return " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())


@functools.cache
def _unknown(words: str) -> frozenset[str]:
    """Names that XLA refuses; all names if it stops for another reason."""
    environment = os.environ | {"XLA_FLAGS": words}
    command = [sys.executable, "-c", _START]
    tried = subprocess.run(command, env=environment, capture_output=True, text=True)
    if tried.returncode == 0:
        return frozenset()
    found = _UNKNOWN.search(tried.stderr)
    refused = frozenset(re.findall(r"--(\w+)", found[1] if found else words))
    _say(", ".join(sorted(refused)))
    return refused


@functools.cache
def _say(names: str) -> None:
    print(f"jaxlib {version('jaxlib')} does not know {names}: not set", file=sys.stderr)
