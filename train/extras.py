"""Optional libraries, which extras of the package install."""

import importlib.util
from typing import Any

_OURS = ("sophia_optax", "models", "train")


def missing(error: ModuleNotFoundError) -> str:
    """A message that names the extra with a missing library; empty for a module of ours."""
    if not error.name or error.name.split(".")[0] in _OURS:
        return ""
    return (
        f"the trainer needs {error.name}, which is not installed: install the extra, pip install "
        "-e '.[train]' in a clone or pip install 'sophia_optax[train]'."
    )


def check_installed(*modules: str) -> None:
    """Raises ModuleNotFoundError now for libraries whose slow import comes later."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def need(module: str, extra: str, purpose: str) -> Any:
    """Imports an optional library.

    Args:
      module: to import.
      extra: of this project, that installs it.
      purpose: what needs it; begins the message.

    Raises:
      ValueError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{purpose} needs {error.name}: install the extra, pip install -e '.[{extra}]'."
        ) from error
