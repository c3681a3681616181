"""What digests add to the save of a state: `python digest_cost.py FOLDER [MEGABYTES]`."""

import shutil
import sys
import time
from pathlib import Path

import jax
import numpy as np

from train.checkpoint import digests, store


def state(megabytes: int) -> dict[str, jax.Array]:
    """Three times the parameters, as Sophia keeps them; random bits, which do not compress."""
    draw = np.random.default_rng(0)
    size = megabytes * 2**20 // 4 // 12
    return {
        f"{name}{i}": jax.numpy.asarray(draw.standard_normal(size, np.float32))
        for name in ("params", "m", "h")
        for i in range(4)
    }


def seconds(action, *args) -> float:
    start = time.perf_counter()
    jax.block_until_ready(action(*args))
    return time.perf_counter() - start


def main(folder: Path, megabytes: int) -> None:
    arrays = state(megabytes)
    gigabytes = sum(x.nbytes for x in arrays.values()) / 1e9
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays
    )
    for turn in range(3):
        shutil.rmtree(folder, ignore_errors=True)
        checkpoints = store.Checkpoints(folder)
        blocking = seconds(checkpoints.save, 1, arrays)
        whole = blocking + seconds(checkpoints.close)
        writing = seconds(digests.write, folder / "1")
        verifying = seconds(digests.fault, folder / "1")
        with store.Checkpoints(folder) as again:
            restoring = seconds(again.restore, target)
        print(
            f"{gigabytes:.2f} GB, turn {turn}: save {whole:.2f} s, of which the run waits "
            f"{blocking:.2f} s; digests again {writing:.2f} s ({writing / gigabytes:.2f} s/GB, "
            f"{writing / whole:.0%} of the save); verified in {verifying:.2f} s "
            f"({verifying / gigabytes:.2f} s/GB, {verifying / restoring:.0%} of a restore of "
            f"{restoring:.2f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1424)
