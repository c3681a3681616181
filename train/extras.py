"""Libraries of extras, imported when they are asked for."""

import importlib.util
from typing import Any

_OURS = ("sophia_optax", "models", "train")


def missing(error: ModuleNotFoundError) -> str:
    """Which extra has the trainer's library that is not installed; empty for a module of ours."""
    if not error.name or error.name.split(".")[0] in _OURS:
        return ""
    return (
        f"the trainer needs {error.name}, which is not installed: install the extra, pip install "
        "-e '.[train]' in a clone or pip install 'sophia_optax[train]'."
    )


def check_installed(*modules: str) -> None:
    """Raises ModuleNotFoundError now for a library that is imported late, as it is slow."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def need(module: str, extra: str, purpose: str) -> Any:
    """An optional library.

    Args:
      module: to import.
      extra: of this project, which installs it.
      purpose: what needs it, to begin the message with.

    Raises:
      ValueError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{purpose} needs {error.name}: install the extra, pip install -e '.[{extra}]'."
        ) from error
