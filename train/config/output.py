"""What a run writes and shows, in plain fields."""

import dataclasses

from train import files
from train.logging import profiler


@dataclasses.dataclass(frozen=True)
class OutputConfig:
    """What a run writes and shows; nothing here changes what it computes."""

    folder: str = ""
    """Where the run is kept; empty makes a new one, runs/MODEL-OPTIMIZER-DATE-TIME."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 400
    """Steps between checkpoints; the last step always has one."""
    checkpoint_minutes: float = 0.0
    """Minutes after which there is a checkpoint, wherever the steps are; 0 counts steps alone."""
    keep_checkpoints: int = 2
    """Checkpoints kept: the last few, and the best of those saved at an evaluation."""
    evaluate_tokens: int = 2_097_152
    """Held-out tokens that an evaluation reads, in whole batches, evenly spaced and the same each
    time; all are read at the last step, and with 0 always."""
    sample_length: int = 400
    """Characters of text sampled at the end; 0 for none."""
    recompute_reference: bool = False
    """First train AdamW with this budget and store what it reached in
    ~/.cache/sophia_optax/references.json."""
    compile_cache: str = "~/.cache/sophia_optax/xla"
    """Folder of compiled programs, for fast restarts; empty for none."""
    quiet: bool = False
    """Show no progress."""
    max_bad_steps: int = 10
    """Steps in a row whose loss or gradient is not finite, after which a run gives up. Each of them
    changes nothing, and the next takes the next batch."""
    spike: float = 0.0
    """Standard deviations above the mean of the last 50 logged losses from which a loss is called
    a spike: shown, and counted in metrics.jsonl; 0 looks for none."""
    profile: str = ""
    """Steps to trace with the profiler of JAX, such as 10:15; empty traces none."""
    tensorboard: bool = False
    """Write event files for TensorBoard too, into the run's folder."""
    wandb: str = ""
    """Project at Weights & Biases that gets the metrics too; empty for none."""
    trackio: str = ""
    """Project in trackio's database on this machine that gets the metrics too; empty for none."""

    def __post_init__(self):
        for name in ("log_every", "checkpoint_every", "keep_checkpoints", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"output.{name}={getattr(self, name)} must be at least 1.")
        for name, zero in (("sample_length", "samples none"), ("evaluate_tokens", "reads all")):
            if getattr(self, name) < 0:
                raise ValueError(f"output.{name}={getattr(self, name)} is negative; 0 {zero}.")
        for name in ("checkpoint_minutes", "spike"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"output.{name}={getattr(self, name)} is negative; 0 turns it off."
                )
        for name in ("folder", "compile_cache"):
            files.check_local(getattr(self, name), f"--output.{name.replace('_', '-')}")
        profiler.parse(self.profile)
