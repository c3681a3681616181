"""Steps whose loss is not finite: what they leave alone, what is made up for, when a run ends."""

import math

import numpy as np
import pytest
from small_run import change_programs, losses, output, small

import train
from train.logging import jsonl


def spoiled(monkeypatch, *bad):
    """Batches of these steps have a target that is no token, and a loss that is not a number.

    Returns:
      A list that fills with [step, refresh] of each step that runs.
    """
    ran = []

    def spoil(batch):
        def spoilt(step):
            ran.append([step, None])
            whole = batch(step)
            bad_batch = whole._replace(targets=whole.targets.at[3, -1].set(999))
            return bad_batch if step in bad else whole

        return spoilt

    def note(compile):
        def compiled(due):
            step = compile(due)

            def noted(state, batch):
                ran[-1][1] = due.refresh
                return step(state, batch)

            return noted

        return compiled

    change_programs(monkeypatch, batch=spoil, compile=note)
    return ran


def test_bad_steps_change_nothing_and_a_sample_of_curvature_is_retaken(tmp_path, monkeypatch):
    """Also across a resume right after the step at which the sample was due."""
    sampled = spoiled(monkeypatch, 4, 10)
    history = train.train(output(small(tmp_path / "run", steps=14), checkpoint_every=11))
    rows = {row["step"]: row for row in history if "grad_norm" in row}
    assert [step for step, row in rows.items() if math.isnan(row["loss"])] == [5, 11]
    assert [rows[step]["skipped_steps"] for step in (4, 5, 10, 11, 14)] == [0, 1, 1, 2, 2]
    assert rows[5]["hessian_age"] == rows[4]["hessian_age"]  # counters stand still
    assert [step for step, refresh in sampled if refresh] == [0, 10, 11]
    assert rows[5]["learning_rate"] == rows[6]["learning_rate"]
    sampled.clear()
    again = train.resume(tmp_path / "run", step=11)
    timed = ("tokens_per_second",)
    for row, want in zip(again, history, strict=True):
        np.testing.assert_equal(
            {k: v for k, v in row.items() if k not in timed},
            {k: v for k, v in want.items() if k not in timed},
        )
    assert [step for step, refresh in sampled if refresh] == [11]


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path, monkeypatch):
    spoiled(monkeypatch, 2, 4, 5, 6)
    run = output(small(tmp_path / "run", "adamw"), max_bad_steps=3)
    with pytest.raises(FloatingPointError, match=r"at 3 steps in a row, up to step 7: none of"):
        train.train(run)
    assert max(losses(jsonl.read_history(tmp_path / "run"))) == 7
