"""The optimizers of the command line, by name.

A new optimizer is a file with its config class, and a line here. All take the same schedule and
decay matrices alone, so that a comparison compares optimizers.
"""

from train.optimizers.adafactor import Adafactor
from train.optimizers.adam import Adam, AdamW
from train.optimizers.base import OptimizerConfig
from train.optimizers.galore import GaLore
from train.optimizers.lion import Lion
from train.optimizers.muon import Muon
from train.optimizers.orthosoph import OrthoSoph
from train.optimizers.sgd import Sgd
from train.optimizers.sm3 import Sm3
from train.optimizers.soaa import Soaa
from train.optimizers.sophia import SophiaG, SophiaH
from train.optimizers.sophia_geometric import SophiaGeometric
from train.optimizers.sophia_lite import SophiaLite

OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    "sophia-g": SophiaG,
    "sophia-h": SophiaH,
    "sophia-lite": SophiaLite,
    "sophia-geometric": SophiaGeometric,
    "orthosoph": OrthoSoph,
    "soaa": Soaa,
    "adamw": AdamW,
    "adam": Adam,
    "lion": Lion,
    "sm3": Sm3,
    "adafactor": Adafactor,
    "muon": Muon,
    "galore": GaLore,
    "sgd": Sgd,
}


def name_of(optimizer: OptimizerConfig) -> str:
    """The optimizer's name on the command line."""
    return next(name for name, kind in OPTIMIZERS.items() if type(optimizer) is kind)
