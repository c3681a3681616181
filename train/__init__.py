"""Training on a mesh of devices: `python -m train`, or `train(preset("tiny", "sophia-g"))`."""

import importlib
from typing import TYPE_CHECKING, Any

from train.extras import missing

if TYPE_CHECKING:
    from train.config.presets import preset
    from train.config.schema import Config
    from train.loop import resume, train

__all__ = ["Config", "preset", "resume", "train"]
_HOMES = {"Config": "train.config.schema", "preset": "train.config.presets"}


def __getattr__(name: str) -> Any:
    # Imported at first use: these modules need tyro, which `train.step` does not.
    if name not in __all__:
        raise AttributeError(f"module 'train' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOMES.get(name, "train.loop")), name)
    except ModuleNotFoundError as error:
        if cure := missing(error):
            raise ModuleNotFoundError(cure, name=error.name) from error
        raise
