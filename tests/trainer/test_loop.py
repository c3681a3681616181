"""Runs end to end, on a model small enough for seconds."""

import math
import os
import re
import signal

import jax
import numpy as np
import optax
import pytest
from small_run import MODEL, change_programs, losses, output, small

import models
import train
from train import program
from train.checkpoint import run_folder
from train.config import serialize
from train.logging import jsonl
from train.logging.throughput import Meter
from train.parallel.mesh import MeshConfig
from train.step import train_step
from train.step.loss import outputs_of, token_losses


@pytest.mark.newest
def test_a_run_learns_and_keeps_its_metrics_figure_and_config(finished):
    folder, history = finished
    seen = losses(history)
    assert list(seen) == list(range(1, 13))
    assert seen[12] < seen[1]
    assert history == jsonl.read_history(folder)
    last = [row for row in history if "bits_per_byte" in row][-1]
    assert last["bits_per_byte"] == pytest.approx(last["heldout_loss"] / math.log(2))
    assert {"win_rate", "hessian_age", "grad_norm", "learning_rate"} <= history[0].keys()
    assert (folder / "loss.png").stat().st_size > 10_000
    assert serialize.load(folder).model == MODEL


@pytest.mark.newest
@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGINT, "before the step"),
        (signal.SIGTERM, "after the step"),
        pytest.param(signal.SIGTERM, "before the step", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "after the step", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_told_to_stop_resumes_as_if_it_had_not(
    number, moment, finished, tmp_path, monkeypatch, capsys
):
    report, handler = Meter.report, signal.getsignal(number)

    def told(batch):
        def before(step):
            if step == 7 and moment == "before the step":
                os.kill(os.getpid(), number)
            return batch(step)

        return before

    def after(meter, step, measured, sampled):
        if step == 8 and moment == "after the step":
            os.kill(os.getpid(), number)
        report(meter, step, measured, sampled)

    run = output(small(tmp_path / "cut"), quiet=False)
    with monkeypatch.context() as patch:
        change_programs(patch, batch=told)
        patch.setattr(Meter, "report", after)
        with pytest.raises(KeyboardInterrupt, match="step 8"):
            train.train(run)
    assert "stopped at step 8 of 12, which is saved" in capsys.readouterr().out
    assert max(losses(jsonl.read_history(tmp_path / "cut"))) == 8
    with run_folder.checkpoints(run, tmp_path / "cut") as checkpoints:
        assert checkpoints.latest == 8
    assert losses(train.resume(tmp_path / "cut")) == losses(finished[1])
    assert signal.getsignal(number) == handler


def test_each_step_takes_its_own_batch(tmp_path, monkeypatch):
    taken = []
    noted = lambda batch: lambda step: taken.append(step) or batch(step)  # noqa: E731
    change_programs(monkeypatch, batch=noted)
    train.train(small(tmp_path / "run", "adamw", steps=4))
    assert taken == [0, 1, 2, 3]


def test_a_finished_run_can_be_made_longer(finished, tmp_path):
    train.train(small(tmp_path / "run", steps=6))
    history = train.resume(tmp_path / "run", steps=8)
    assert max(losses(history)) == 8
    assert serialize.load(tmp_path / "run").steps == 8
    with pytest.raises(ValueError, match="steps=7 is less than the 8"):
        train.resume(tmp_path / "run", steps=7)
    assert serialize.load(tmp_path / "run").steps == 8


def test_programs_are_compiled_before_the_first_step_and_never_again(
    finished, tmp_path, monkeypatch, capsys
):
    """Both kinds of step for a run, the plain one alone for steps that sample nothing."""
    events, made = [], []
    make_step, assemble = train_step.make_step, program.assemble

    def watched(*args, **kwargs):
        step = make_step(*args, **kwargs)

        def traced(state, batch, due):
            events.append(due.refresh)
            return step(state, batch, due)

        return traced

    def kept(run):
        made.append(assemble(run))
        return made[-1]

    monkeypatch.setattr(train_step, "make_step", watched)
    monkeypatch.setattr(program, "assemble", kept)
    monkeypatch.setattr(Meter, "report", lambda *args: events.append("step"))
    train.train(output(small(tmp_path / "run", steps=5), quiet=False))
    assert events == [True, False, *["step"] * 5]
    shown = capsys.readouterr().out
    for name in ("step that samples curvature", "plain step"):
        assert re.search(rf"^compiling the {name}\ncompiled the {name} in \d+\.\d s$", shown, re.M)
    events.clear()
    train.resume(tmp_path / "run", steps=8)
    assert events == [False, *["step"] * 3]
    assert [programs.step._cache_size() for programs in made] == [0, 0]


def test_a_program_that_does_not_compile_leaves_the_folder_free(tmp_path, monkeypatch):
    def fails(refresh):
        raise ValueError("no such kernel")

    run = small(tmp_path / "run", "adamw", steps=3)
    with monkeypatch.context() as patch:
        change_programs(patch, compile=lambda compile: fails)
        with pytest.raises(ValueError, match="no such kernel"):
            train.train(run)
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()
    assert max(losses(train.train(run))) == 3


def test_a_run_in_micro_batches_is_the_run_in_one_piece(tmp_path):
    """End to end, eight devices of which four share each parameter."""
    mesh = MeshConfig(fsdp=4)
    runs = (
        train.train(small(tmp_path / str(k), "adamw", batch_size=16, accumulation=k, mesh=mesh))
        for k in (1, 2)
    )
    whole, cut = (list(losses(history).values()) for history in runs)
    np.testing.assert_allclose(cut, whole, rtol=1e-5)


def test_a_run_goes_on_on_another_mesh(tmp_path):
    """With fsdp 8, and from the middle data 8: the same losses and parameters to rounding."""
    norms, seen, folder = [], [], tmp_path / "run"
    sharded = small(folder, mesh=MeshConfig(fsdp=8))
    for mesh in (None, MeshConfig(data=8)):
        if mesh is None:
            history = train.train(sharded)
        else:
            history = train.resume(folder, step=6, mesh=mesh)
            assert serialize.load(folder).mesh == mesh
        seen.append(list(losses(history).values()))
        with run_folder.checkpoints(sharded, folder) as checkpoints:
            step, state = checkpoints.restore(program.assemble(sharded).abstract)
        assert step == 12
        norms.append(float(optax.tree.norm(state.params)))
    assert seen[0][:6] == seen[1][:6] and len(seen[1]) == 12
    np.testing.assert_allclose(seen[1][6:], seen[0][6:], rtol=1e-5)
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_only_optimizers_with_an_interval_sample_curvature():
    runs = (small("unused", name) for name in ("sophia-h", "adamw"))
    sophia, adamw = (program.assemble(run).optimizer for run in runs)
    assert [step for step in range(25) if sophia.due(step).refresh] == [0, 10, 20]
    assert not any(adamw.due(step).refresh for step in range(25))


def test_evaluation_is_the_mean_over_all_held_out_windows():
    run = small("unused")
    programs = program.assemble(run)
    params = programs.init().params
    losses = jax.jit(lambda params, batch: token_losses(outputs_of(model)(params, batch), batch))
    model, heldout = models.split(run.model), list(programs.data().heldout())
    seen = [losses(params, batch)[batch.weights > 0] for batch in heldout]
    want = np.mean(np.concatenate(seen))
    assert programs.evaluate(params)["heldout_loss"] == pytest.approx(want, rel=1e-5)


def test_the_batch_of_a_step_is_that_of_seed_and_step():
    run = small("unused", seed=3)
    programs = program.assemble(run)
    want = programs.data().batch(5)
    jax.tree.map(np.testing.assert_array_equal, programs.batch(5), want)
    tokens = programs.data().rows.train(np.arange(40, 48))
    np.testing.assert_array_equal(tokens.inputs, want.inputs)
    assert (want.targets[:, :-1] == want.inputs[:, 1:]).all()
