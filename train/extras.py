"""Libraries of extras, imported when they are asked for."""

import importlib
from typing import Any


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
