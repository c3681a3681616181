"""What a run writes and shows."""

import dataclasses

from train import files
from train.logging import profiler


@dataclasses.dataclass(frozen=True)
class OutputConfig:
    """What a run writes and shows; nothing here changes what it computes."""

    folder: str = ""
    """Folder of the run; empty makes a new one, runs/MODEL-OPTIMIZER-DATE-TIME."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 400
    """Steps between checkpoints; the last step always has one."""
    checkpoint_minutes: float = 0.0
    """Also save a checkpoint after this many minutes; 0 counts steps alone."""
    keep_checkpoints: int = 2
    """Checkpoints kept: the last few, and the best of those saved at an evaluation."""
    evaluate_tokens: int = 2_097_152
    """Held-out tokens that an evaluation reads, in whole batches, evenly spaced and the same each
    time. The last step reads all of them; 0 always reads all."""
    sample_length: int = 400
    """Characters of text sampled at the end; 0 for none."""
    recompute_reference: bool = False
    """First train AdamW with this budget and store what it reached in
    ~/.cache/sophia_optax/references.json."""
    compile_cache: str = "~/.cache/sophia_optax/xla"
    """Cache of compiled programs, for fast restarts; empty turns it off."""
    quiet: bool = False
    """Show no progress."""
    max_bad_steps: int = 10
    """Give up after this many steps in a row with a non-finite loss or gradient. A skipped step
    changes nothing, and the next step takes the next batch."""
    spike: float = 0.0
    """Report a loss this many standard deviations above the mean of the last 50 logged losses as a
    spike, and count it in metrics.jsonl; 0 turns it off."""
    profile: str = ""
    """Steps to trace with JAX's profiler, such as 10:15; empty turns it off."""
    tensorboard: bool = False
    """Also write event files for TensorBoard into the run's folder."""
    wandb: str = ""
    """Also send metrics to this project at Weights & Biases; empty turns it off."""
    trackio: str = ""
    """Also log metrics to this project in trackio\'s local database; empty turns it off."""

    def __post_init__(self):
        for name in ("log_every", "checkpoint_every", "keep_checkpoints", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"output.{name}={getattr(self, name)} must be at least 1.")
        for name, zero in (("sample_length", "turns it off"), ("evaluate_tokens", "reads all")):
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
