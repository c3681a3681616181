"""Losses of fixed runs, to compare two versions of the code: `python -m tests.golden.losses FILE`.

Five optimizers train ten steps on a mesh of 2 x 2 x 2 fake CPU devices, and the default run of
`make train` on one. The first call writes FILE; a later one, perhaps of other code, compares with it.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

from train import xla_flags

xla_flags.add({"xla_force_host_platform_device_count": 8})

from train import preset, train

OPTIMIZERS = ("sophia-g", "sophia-h", "adamw", "orthosoph", "soaa")
WITHIN = 1e-6  # relative


def losses(optimizer: str, folder: str, steps: int, axis: int) -> list[float]:
    """Training losses, and held-out ones at the end."""
    run = preset("tiny", optimizer)
    output = dataclasses.replace(run.run, folder=f"{folder}/{optimizer}{steps}", log_every=1, quiet=True)
    mesh = dataclasses.replace(run.mesh, data=axis, fsdp=axis, tensor=axis)
    run = dataclasses.replace(run, steps=steps, mesh=mesh, run=output)
    history = train(run)
    return [row[name] for row in history for name in ("loss", "heldout_loss") if name in row]


def measure() -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        found = {name: losses(name, folder, 10, 2) for name in OPTIMIZERS}
        return found


def main(path: Path) -> None:
    found = measure()
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
