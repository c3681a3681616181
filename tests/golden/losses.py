"""Losses of fixed runs, to compare two versions of the code: `python -m tests.golden.losses FILE`.

Five optimizers train ten steps on a mesh of 2 x 2 x 2 fake CPU devices. The first call writes FILE;
a later one, perhaps of other code, compares with it.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

from train import preset, train
from train.parallel import xla_flags

xla_flags.add({"xla_force_host_platform_device_count": 8})

OPTIMIZERS = ("sophia-g", "sophia-h", "adamw", "orthosoph", "soaa")
WITHIN = 1e-6  # relative


def losses(optimizer: str, folder: str) -> list[float]:
    """Training losses, and held-out ones at the end."""
    run = preset("tiny", optimizer)
    output = dataclasses.replace(
        run.output, folder=f"{folder}/{optimizer}", log_every=1, quiet=True
    )
    mesh = dataclasses.replace(run.mesh, data=2, fsdp=2, tensor=2)
    history = train(dataclasses.replace(run, steps=10, mesh=mesh, output=output))
    return [row[name] for row in history for name in ("loss", "heldout_loss") if name in row]


def main(path: Path) -> None:
    """Writes or compares."""
    with tempfile.TemporaryDirectory() as folder:
        found = {name: losses(name, folder) for name in OPTIMIZERS}
    if not path.exists():
        path.write_text(json.dumps(found, indent=1) + "\n")
        return
    before = json.loads(path.read_text())
    for name, values in found.items():
        worst = max(abs(a - b) / abs(a) for a, b in zip(before[name], values, strict=True))
        print(f"{name:12} {len(values)} losses, worst relative difference {worst:.1e}")
        if worst > WITHIN:
            sys.exit(f"{name} differs by more than {WITHIN}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
