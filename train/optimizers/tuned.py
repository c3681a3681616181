"""Hyperparameters of each optimizer for the sizes of GPT-2 and for tiny models, with their sources.

Published: Liu et al. 2023 for Sophia-G, Sophia-H and AdamW at 125m, 355m and 770m; Zhao et al. 2024
for the rate, scale and ranks of GaLore (Llamas of 60m to 1b). Measured: LOG.md has the runs. All
others are guesses, from a neighbouring size or a related optimizer. So is the weight decay of .1 of
optimizers whose paper has none, so that all compare on equal terms.
"""

from train.optimizers.adafactor import Adafactor
from train.optimizers.adam import Adam, AdamW
from train.optimizers.base import OptimizerConfig
from train.optimizers.galore import GaLore
from train.optimizers.lion import Lion
from train.optimizers.muon import Muon
from train.optimizers.orthosoph import OrthoSoph
from train.optimizers.registry import OPTIMIZERS
from train.optimizers.sgd import Sgd
from train.optimizers.sm3 import Sm3
from train.optimizers.soaa import Soaa
from train.optimizers.sophia import SophiaG, SophiaH
from train.optimizers.sophia_geometric import SophiaGeometric
from train.optimizers.sophia_lite import SophiaLite


def of_size(rate: float, gamma: float, adamw_rate: float, rank: int) -> dict[str, OptimizerConfig]:
    """One size, from the rate and gamma of Sophia, the rate of AdamW and the rank of GaLore."""
    return {
        "sophia-g": SophiaG(  # published, where the sample is half the rows in one group
            learning_rate=rate, gamma=gamma, weight_decay=0.2, batch_fraction=1 / 10, groups=0
        ),
        "sophia-h": SophiaH(  # published, with one probe for all of the 32 rows
            learning_rate=rate, weight_decay=0.2, batch_fraction=1 / 15, groups=4
        ),
        "sophia-lite": SophiaLite(learning_rate=adamw_rate),  # guess
        "sophia-geometric": SophiaGeometric(learning_rate=adamw_rate / 4),  # guess: Lion's
        "orthosoph": OrthoSoph(learning_rate=adamw_rate),  # guess
        "soaa": Soaa(learning_rate=adamw_rate),  # guess
        "adamw": AdamW(learning_rate=adamw_rate),  # published
        "adam": Adam(learning_rate=adamw_rate),  # guess
        "lion": Lion(learning_rate=adamw_rate / 4),  # guess; b1 and b2 published by Liu et al.
        "sm3": Sm3(),  # guess
        "adafactor": Adafactor(),  # its paper's largest relative step
        "muon": Muon(learning_rate=adamw_rate),  # guess
        "galore": GaLore(rank=rank),  # published for Llamas
        "sgd": Sgd(),  # guess
    }


OF_SIZE: dict[str, dict[str, OptimizerConfig]] = {
    "30m": of_size(6e-4, 0.05, 6e-4, 128),  # 125m's; the rank published for a Llama of 60m
    "125m": of_size(6e-4, 0.05, 6e-4, 256),  # published
    "355m": of_size(7e-4, 0.08, 3e-4, 256),  # published
    "540m": of_size(3e-4, 0.05, 2e-4, 512),  # 770m's
    "770m": of_size(3e-4, 0.05, 2e-4, 512),  # published; the rank that of a Llama of 1b
}
# At 1,200 steps of 16 x 64 bytes, where long momentum hurts sign-like steps.
TINY: dict[str, OptimizerConfig] = {
    "sophia-g": SophiaG(learning_rate=3e-3, b1=0.8, b2=0.9, gamma=0.1, groups=0),  # measured
    "sophia-h": SophiaH(learning_rate=3e-3, b1=0.8, b2=0.9, gamma=0.02, groups=0),  # measured
    "sophia-lite": SophiaLite(learning_rate=2.5e-3, b1=0.8),  # measured at 400 steps
    "sophia-geometric": SophiaGeometric(learning_rate=2e-3, b1=0.8),  # measured at 400 steps
    "orthosoph": OrthoSoph(learning_rate=2e-2),  # measured; one block of 64 rows a matrix
    "soaa": Soaa(learning_rate=5e-3, b1=0.8),  # measured at 400 steps
    "adamw": AdamW(learning_rate=1e-2, b1=0.8),  # measured
    "adam": Adam(learning_rate=1e-2, b1=0.8),  # guess: AdamW's
    "lion": Lion(learning_rate=3e-4, b1=0.8, b2=0.9),  # measured
    "sm3": Sm3(),  # guess
    "adafactor": Adafactor(learning_rate=0.1, min_dim_size_to_factor=32),  # guess
    "muon": Muon(learning_rate=2e-2),  # measured
    "galore": GaLore(learning_rate=2e-2, rank=16),  # guess
    "sgd": Sgd(learning_rate=0.3),  # guess
}


def tuned(optimizer: str, size: str = "") -> OptimizerConfig:
    """The hyperparameters of an optimizer; the defaults of its class if the tables have none.

    Args:
      optimizer: a name in `OPTIMIZERS`.
      size: a size of GPT-2, such as "125m"; empty for a tiny model.

    >>> tuned("adamw").learning_rate, tuned("adamw", "125m").learning_rate
    (0.01, 0.0006)
    """
    table = OF_SIZE[size] if size else TINY
    return table.get(optimizer) or OPTIMIZERS[optimizer]()
