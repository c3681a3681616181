"""What a run is: frozen dataclasses, one default for each pair of a model and an optimizer."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import optax
import tyro

from models import DecoderConfig, EncoderConfig
from train import files
from train.config import checks
from train.config.output import OutputConfig
from train.config.sizes import GPT2_SIZE
from train.data.config import DataConfig
from train.optimizers.base import OptimizerConfig, TrainContext
from train.optimizers.registry import name_of
from train.parallel.mesh import MeshConfig

_WARMUP, _LONG_WARMUP = 100, 2000  # published with the large models: 2000 of 100,000 steps


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run.

    >>> from train.config.presets import preset
    >>> preset("tiny", "adamw").name
    'tiny-adamw'
    """

    model: DecoderConfig | EncoderConfig
    """Shape of the model."""
    optim: OptimizerConfig
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """Training data."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """Mesh of devices."""
    output: OutputConfig = dataclasses.field(default_factory=OutputConfig)
    """What is written and shown."""
    steps: int = 1200
    """Optimizer steps."""
    batch_size: int = 16
    """Sequences per step, over all devices."""
    accumulation: int = 1
    """Micro-batches of a step, evaluated one after the other for less memory. They and the devices
    must divide batch_size. The gradient stays the same; so do curvature samples if no group spans
    two micro-batches, for example with groups of one row."""
    sequence_length: int = 64
    """Tokens per sequence."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of activations and matrix products, instead of model.dtype; auto is bfloat16 on GPU and
    TPU and model.dtype elsewhere. Parameters, softmax, losses, curvature samples and optimizers are
    float32."""
    loss_chunk: int = 0
    """Positions of a sequence whose logits are in memory at once: less memory with a large
    vocabulary, for a third more products with it; 0 holds all."""
    warmup_steps: int | None = None
    """Steps of linear warm-up of the learning rate; None for 100 (2000 for models from 30 million
    parameters), or a tenth of --steps if that is less."""
    final_learning_rate: float = 0.05
    """Learning rate at the end of the cosine, as a fraction of the peak."""
    gradient_clip: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""
    evaluate_every: int = 200
    """Steps between evaluations on the held-out split; --output.evaluate-tokens sets their size."""
    seed: int = 0
    """Seed of initial parameters, data order and curvature samples."""
    start_from: str = ""
    """Folder of a run or of a Hugging Face model to take the initial parameters from. A
    classification head that it lacks is initialised at random. Empty initialises all at random."""
    base: tyro.conf.Suppress[str] = "tiny"
    """The model's name, before any flag changed it."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulation", "sequence_length", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} does not divide into accumulation="
                f"{self.accumulation} micro-batches; choose a multiple of {self.accumulation}."
            )
        checks.check_numbers(dataclasses.asdict(self), "--")
        if not 0 <= self.final_learning_rate <= 1:
            raise ValueError(
                f"final_learning_rate={self.final_learning_rate} is a share of the peak: choose "
                "0 to 1."
            )
        if self.loss_chunk < 0:
            raise ValueError(f"loss_chunk={self.loss_chunk} is negative; 0 holds all positions.")
        if self.gradient_clip < 0:
            raise ValueError(f"gradient_clip={self.gradient_clip} is negative; 0 turns it off.")
        checks.check_task(self.data.task, self.model)
        files.check_local(self.start_from, "--start-from")
        if self.sequence_length > self.model.context:
            raise ValueError(
                f"sequence_length={self.sequence_length} is longer than the model's context of "
                f"{self.model.context}; lower it or raise --model.context."
            )
        if not 0 <= self.warmup < self.steps:
            raise ValueError(
                f"warmup_steps={self.warmup} must be at least 0 and less than "
                f"steps={self.steps}, or the learning rate never reaches its peak: give "
                "--warmup-steps too, about a tenth of --steps."
            )
        self.optim.build(self.context())  # raises what does not fit the run

    @property
    def name(self) -> str:
        """MODEL-OPTIMIZER, as on the command line."""
        return f"{self.base}-{name_of(self.optim)}"

    @property
    def warmup(self) -> int:
        """Steps of warm-up, with the default filled in.

        >>> from train.config.presets import preset
        >>> preset("tiny").warmup, dataclasses.replace(preset("tiny"), steps=60).warmup
        (100, 6)
        """
        usual = _LONG_WARMUP if self.base in GPT2_SIZE else _WARMUP
        return min(usual, self.steps // 10) if self.warmup_steps is None else self.warmup_steps

    @property
    def schedule(self) -> optax.Schedule:
        """Linear warm-up, then a cosine to `final_learning_rate` of the peak."""
        peak = self.optim.learning_rate
        return optax.warmup_cosine_decay_schedule(
            0.0 if self.warmup else peak,
            peak,
            self.warmup,
            self.steps,
            self.final_learning_rate * peak,
        )

    def context(self, row_devices: int = 1) -> TrainContext:
        """What an optimizer may need to know of the run.

        Args:
          row_devices: devices over which rows are spread.
        """
        return TrainContext(
            schedule=self.schedule,
            seed=self.seed,
            steps=self.steps,
            batch_size=self.batch_size,
            accumulation=self.accumulation,
            row_devices=row_devices,
            max_grad_norm=self.gradient_clip or None,
        )

    @property
    def hash(self) -> str:
        """A hash of what can change the result; not of the mesh, precision and output."""
        fields: dict[str, Any] = dataclasses.asdict(self) | {"optimizer": name_of(self.optim)}
        fields = {k: v for k, v in fields.items() if k not in ("output", "mesh", "precision")}
        fields["warmup_steps"] = self.warmup
        places = ("cache", "download", "tfds_folder")
        fields["data"] = {k: v for k, v in fields["data"].items() if k not in places}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def resolved(config: Config, platform: str) -> Config:
    """The config with its precision on a platform filled in and its paths made absolute.

    >>> from train.config.presets import preset
    >>> resolved(preset(), "gpu").model.dtype, resolved(preset(), "cpu").model.dtype
    ('bfloat16', 'float32')
    """
    dtype = config.precision
    if dtype == "auto":
        dtype = "bfloat16" if platform in ("gpu", "tpu") else config.model.dtype
    model = dataclasses.replace(config.model, dtype=dtype)
    kept = dataclasses.replace(config.data, cache=absolute(config.data.cache))
    start = absolute(config.start_from)
    return dataclasses.replace(config, model=model, data=kept, precision=dtype, start_from=start)


def absolute(path: str) -> str:
    """An absolute path; ~ stays, since home differs between machines."""
    return path if path.startswith("~") or not path else str(Path(path).absolute())
