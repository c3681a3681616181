"""What a run is: frozen dataclasses, one default for each pair of a model and an optimizer."""

import dataclasses
import difflib
import hashlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

import optax
import tyro

from models import PRESETS, DecoderConfig, EncoderConfig, reading
from train import files
from train.config import checks
from train.config.output import RunConfig
from train.config.presets import LARGE, TINY
from train.data.config import DataConfig
from train.optimizers.registry import OPTIMIZERS, Optimizer, name_of
from train.optimizers.sophia import SophiaG, SophiaH
from train.parallel.mesh import MeshConfig

_WARMUP, _LONG_WARMUP = 100, 2000  # published with the large models: 2000 of 100,000 steps


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run.

    >>> preset("tiny", "adamw").name
    'tiny-adamw'
    """

    model: DecoderConfig | EncoderConfig
    """Shape of the model."""
    optim: Optimizer
    """The optimizer and its hyperparameters."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """What it is trained on."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """How devices are arranged."""
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    """What is written and shown."""
    steps: int = 1200
    """Optimizer steps."""
    batch_size: int = 16
    """Sequences a step, over all devices."""
    accumulation: int = 1
    """Micro-batches that a step evaluates one after the other, for less memory: of batch_size
    sequences together, which they and the devices must divide. The gradient is the same, and so
    are samples of curvature whose groups the micro-batches can keep: of one row each, for one."""
    sequence_length: int = 64
    """Tokens a sequence."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of activations and products, in place of model.dtype; auto is bfloat16 on GPU and
    TPU and as the model says elsewhere. Parameters, softmax, losses, samples of curvature and
    optimizers are float32."""
    loss_chunk: int = 0
    """Positions of a sequence whose logits are held at once, for less memory where the vocabulary
    is large, and one more product with it in three; 0 holds all."""
    warmup_steps: int | None = None
    """Steps over which the learning rate grows from 0 to its peak; None for 100 (2000 for models
    from 30 million parameters), or a tenth of --steps if that is less."""
    final_learning_rate: float = 0.05
    """Learning rate at the end of the cosine, as a share of the peak."""
    gradient_clip: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""
    evaluate_every: int = 200
    """Steps between evaluations on held-out text; --run.evaluate-tokens says how much of it."""
    seed: int = 0
    """Of initial parameters, data order, and curvature samples."""
    start_from: str = ""
    """Folder of a run, or of a Hugging Face model, whose parameters to begin with; a head for
    classes that it lacks begins at random. Empty begins all at random."""
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
        if isinstance(self.optim, SophiaG | SophiaH):
            self.optim.estimator(1, self.batch_size, self.accumulation)
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

    @property
    def name(self) -> str:
        """MODEL-OPTIMIZER, as on the command line."""
        return f"{self.base}-{name_of(self.optim)}"

    @property
    def warmup(self) -> int:
        """`warmup_steps`, or what None stands for.

        >>> preset("tiny").warmup, dataclasses.replace(preset("tiny"), steps=60).warmup
        (100, 6)
        """
        usual = _LONG_WARMUP if self.base in LARGE else _WARMUP
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

    @property
    def hash(self) -> str:
        """Changes with whatever can change the result, not with where it runs or is written."""
        fields = {k: v for k, v in to_json(self).items() if k not in ("run", "mesh", "precision")}
        fields["warmup_steps"] = self.warmup
        places = ("cache", "download", "tfds_folder")
        fields["data"] = {k: v for k, v in fields["data"].items() if k not in places}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def preset(model: str = "tiny", optimizer: str = "sophia-g") -> Config:
    """The default run of a model and an optimizer.

    Args:
      model: a name in `models.PRESETS`.
      optimizer: a name in `OPTIMIZERS`.

    Returns:
      Its config: the published one for GPT-2 sizes, a two-minute one for tiny ones.
      `train.config.presets` says which hyperparameters are published, measured or guesses.

    Raises:
      ValueError: an unknown name; the message suggests the nearest.

    >>> preset("tiny", "adamw").optim.learning_rate
    0.01
    """
    _known(model, PRESETS, "model", ("resume",))
    _known(optimizer, OPTIMIZERS, "optimizer")
    shape = PRESETS[model]
    data = DataConfig(task="masked" if isinstance(shape, EncoderConfig) else "next-token")
    if model not in LARGE:
        return Config(shape, TINY[optimizer], data, base=model)
    return Config(
        dataclasses.replace(shape, scan_layers=True),
        LARGE[model][optimizer],
        data,
        base=model,
        run=RunConfig(checkpoint_every=1000),
        steps=100_000,
        batch_size=480,
        sequence_length=min(1024, shape.context),
        loss_chunk=128,
        evaluate_every=1000,
    )


def resolved(run: Config, platform: str) -> Config:
    """The config with the precision that it has on a platform, so that it stays when that changes.

    What it starts from and its cache mean the same from any folder.

    >>> resolved(preset(), "gpu").model.dtype, resolved(preset(), "cpu").model.dtype
    ('bfloat16', 'float32')
    """
    dtype = run.precision
    if dtype == "auto":
        dtype = "bfloat16" if platform in ("gpu", "tpu") else run.model.dtype
    model = dataclasses.replace(run.model, dtype=dtype)
    kept = dataclasses.replace(run.data, cache=absolute(run.data.cache))
    start = absolute(run.start_from)
    return dataclasses.replace(run, model=model, data=kept, precision=dtype, start_from=start)


def absolute(path: str) -> str:
    """From the root on, or from home, which may be another on another machine."""
    return path if path.startswith("~") or not path else str(Path(path).absolute())


def python() -> str:
    """The interpreter, as it is called from here."""
    running, here = Path(sys.executable), Path.cwd()
    return str(running.relative_to(here)) if running.is_relative_to(here) else "python"


def call(*words: object) -> str:
    """A command line that can be pasted, whatever is in its paths.

    >>> call("resume", Path("my runs/a")).partition(" ")[2]
    "-m train resume 'my runs/a'"
    """
    return shlex.join([python(), "-m", "train", *map(str, words)])


def command(run: Config) -> str:
    """The command line of a run, with a flag for each departure from its preset.

    >>> command(dataclasses.replace(preset("tiny", "adamw"), steps=500))
    'python -m train tiny adamw --steps 500'
    """
    names = (run.base, name_of(run.optim))
    return " ".join(["python -m train", *names, *_flags(run, preset(*names))])


def _flags(value: Any, default: Any, prefix: str = "--") -> list[str]:
    flags = []
    for field in dataclasses.fields(value):
        new, old = getattr(value, field.name), getattr(default, field.name)
        name = prefix + field.name.replace("_", "-")
        if isinstance(new, RunConfig) or field.name == "base" or new == old:
            continue
        if dataclasses.is_dataclass(new):
            flags += _flags(new, old, name + ".")
        elif isinstance(new, bool):
            head, _, tail = name.rpartition(".")
            flags.append(name if new else f"{head}.no-{tail}" if head else f"--no-{tail[2:]}")
        else:
            flags.append(f"{name} {shlex.quote(str(new))}")
    return flags


def _known(name: str, table: dict[str, Any], kind: str, commands: tuple[str, ...] = ()) -> None:
    if name not in table:
        words = [*table, *commands]
        # Reversed, so that the first of a family stands for it.
        forms = {form: word for word in words[::-1] for form in (word, word.partition("-")[0])}
        near = [word for word in words if word.startswith(name)]
        near += [forms[form] for form in difflib.get_close_matches(name, forms, cutoff=0.4)]
        hint = f" Did you mean {near[0]}?" if near else ""
        if kind == "model" and name in OPTIMIZERS:
            hint = f" That is an optimizer: name the model before it, such as tiny {name}."
        raise ValueError(f"unknown {kind} {name!r}.{hint} There are: {', '.join(table)}.")


def to_json(config: Config) -> dict[str, Any]:
    """The config as plain JSON values, with the optimizer's name."""
    return {**dataclasses.asdict(config), "optimizer": name_of(config.optim)}


def from_json(fields: dict[str, Any]) -> Config:
    """The inverse of `to_json`.

    Raises:
      KeyError, TypeError, AttributeError, ValueError: a field is missing, unknown or of another
        type.

    >>> from_json(to_json(preset())) == preset()
    True
    """
    fields = dict(fields)
    kinds = {
        "model": type(PRESETS[fields["base"]]),
        "optim": OPTIMIZERS[fields.pop("optimizer")],
        "data": DataConfig,
        "mesh": MeshConfig,
        "run": RunConfig,
    }
    made = {name: checks.make(kind, fields[name], f"{name}.") for name, kind in kinds.items()}
    return checks.make(Config, fields | made)


def save(config: Config, folder: Path) -> None:
    """Writes `config.json` into a run's folder."""
    files.replace_text(folder / "config.json", json.dumps(to_json(config), indent=1) + "\n")


def load(folder: Path) -> Config:
    """The config of a run.

    Raises:
      ValueError: the folder is missing, holds no run, or its `config.json` cannot be read.
    """
    files.check_local(folder, "the run")
    path = folder / "config.json"
    if not path.is_file():
        what = "holds no config.json" if folder.is_dir() else "does not exist"
        raise ValueError(
            f"{folder} {what}: give the folder of a run, such as runs/tiny-sophia-g-..., which "
            "the last line of that run named."
        )
    cure = "It was edited, cut short, or written by another version; restore it from a copy."
    fields = reading.read_json(path)
    try:
        run = from_json(fields)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be read as a run's config ({what}). {cure}") from error
    return dataclasses.replace(run, data=run.data.in_run(folder))
