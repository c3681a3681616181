"""A run of some steps of a model that is trained in seconds."""

import dataclasses

from models import DecoderConfig
from train import data, program
from train.config.presets import preset
from train.config.schema import OutputConfig

MODEL = DecoderConfig(vocab_size=256, context=16, width=16, layers=1, heads=2)


def small(folder, optimizer="sophia-g", **changes):
    defaults = {"steps": 12, "batch_size": 8, "sequence_length": 16, "warmup_steps": 2}
    shown = OutputConfig(
        folder=str(folder),
        log_every=1,
        checkpoint_every=6,
        sample_length=20,
        compile_cache="",
        quiet=True,
    )
    return dataclasses.replace(
        preset("tiny", optimizer),
        model=MODEL,
        data=data.DataConfig(heldout_fraction=0.003),
        output=shown,
        **defaults | {"evaluate_every": 12} | changes,
    )


def output(run, **changes):
    """The run with other settings of its output."""
    return dataclasses.replace(run, output=dataclasses.replace(run.output, **changes))


def losses(history):
    """Step -> training loss."""
    return {row["step"]: row["loss"] for row in history if "loss" in row}


def change_programs(monkeypatch, **changes):
    """Replaces fields of every assembled program; a change takes the field and returns another."""
    assemble = program.assemble

    def changed(config, devices=None):
        made = assemble(config, devices)
        return made._replace(**{name: of(getattr(made, name)) for name, of in changes.items()})

    monkeypatch.setattr(program, "assemble", changed)
