"""Where a new run begins: its config as it is recorded, its data, its first state."""

import functools
from pathlib import Path
from typing import NamedTuple

import jax

from train import inputs, program
from train.checkpoint import manifest, run_folder, warm_start
from train.config import schema, serialize
from train.config.schema import Config
from train.logging.throughput import Health
from train.parallel import processes
from train.step.train_step import TrainState


class Start(NamedTuple):
    """Where a run begins."""

    state: TrainState
    health: Health = Health()
    notes: tuple[str, ...] = ()  # for the user


def recorded(config: Config) -> Config:
    """The config as it is recorded: its precision and paths mean the same on any machine."""
    config = schema.resolved(config, jax.default_backend())
    return processes.on_all(functools.partial(inputs.settled, config))


def begin(config: Config) -> None:
    """Makes the folder of a run that has done no step, with a checkpoint to resume from.

    Raises:
      ValueError, CheckpointError, OSError: as in `train.loop.train`.
    """
    config = recorded(config)
    with run_folder.new(config) as folder:
        programs = program.assemble(config)
        with run_folder.checkpoints(config, folder) as checkpoints:
            fingerprint = read_data(programs)
            beside = manifest.make(0, serialize.to_json(config), fingerprint, Health())
            checkpoints.save(0, initial(config, programs), beside)
        processes.on_main(lambda: serialize.save(config, folder))


def initial(config: Config, programs: program.Program) -> TrainState:
    """The state of step 0, with the parameters that the config starts from."""
    state = programs.init()
    if not config.start_from:
        return state
    path, names = Path(config.start_from).expanduser(), programs.data().class_names
    return state._replace(params=warm_start.start_from(path, config, state.params, names))


def read_data(programs: program.Program) -> str:
    """Reads the data on all processes, and returns its fingerprint.

    Raises:
      ValueError: a process cannot read the data, or reads other data than process 0.
    """
    fingerprint = processes.on_all(programs.data).fingerprint
    processes.check_same({"data": fingerprint})
    return fingerprint
