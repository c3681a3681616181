"""End to end, on a model small enough for seconds."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_run import MODEL, small

import models
import train
from train import baseline, loop, program, report
from train.checkpoint import policy, store, warm_start
from train.config import command_line, serialize
from train.config.presets import preset
from train.logging import jsonl
from train.optimizers.base import BuiltOptimizer
from train.parallel import processes
from train.step.loss import outputs_of, token_losses


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    """Compiling is what takes long here: programs are kept."""
    options = jax.config
    old = options.jax_compilation_cache_dir, options.jax_persistent_cache_min_compile_time_secs
    options.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
    options.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    yield
    options.update("jax_compilation_cache_dir", old[0])
    options.update("jax_persistent_cache_min_compile_time_secs", old[1])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, train.train(small(folder))


def losses(history):
    return {row["step"]: row["loss"] for row in history if "loss" in row}


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
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["before the step", "after the step"])
def test_a_run_that_was_told_to_stop_resumes_as_if_it_had_not(
    number, moment, finished, tmp_path, monkeypatch, capsys
):
    due, report, handler = BuiltOptimizer.due, loop.Meter.report, signal.getsignal(number)

    asked = []

    def before(optimizer, step, pending=False):
        asked.append(step)
        # The first to ask is what compiles.
        if asked.count(7) == 2 and step == 7 and moment == "before the step":
            os.kill(os.getpid(), number)
        return due(optimizer, step, pending)

    def after(meter, step, measured, sampled):
        if step == 8 and moment == "after the step":
            os.kill(os.getpid(), number)
        report(meter, step, measured, sampled)

    run = small(tmp_path / "cut")
    run = dataclasses.replace(run, output=dataclasses.replace(run.output, quiet=False))
    with monkeypatch.context() as patch:
        patch.setattr(BuiltOptimizer, "due", before)
        patch.setattr(loop.Meter, "report", after)
        with pytest.raises(KeyboardInterrupt, match="step 8"):
            train.train(run)
    assert "stopped at step 8 of 12, which is saved" in capsys.readouterr().out
    assert max(losses(jsonl.read_history(tmp_path / "cut"))) == 8
    with loop._checkpoints(run, tmp_path / "cut") as checkpoints:
        assert checkpoints.latest == 8
    assert losses(train.resume(tmp_path / "cut")) == losses(finished[1])
    assert signal.getsignal(number) == handler


def test_a_finished_run_can_be_made_longer(finished, tmp_path):
    train.train(small(tmp_path / "run", steps=6))
    history = train.resume(tmp_path / "run", steps=8)
    assert max(losses(history)) == 8
    assert serialize.load(tmp_path / "run").steps == 8
    with pytest.raises(ValueError, match="steps=7 is less than the 8"):
        train.resume(tmp_path / "run", steps=7)
    assert serialize.load(tmp_path / "run").steps == 8


def test_the_last_line_is_the_command_that_goes_on(tmp_path, capsys):
    folder = tmp_path / "[lr=.01]" / "[" / "run"
    run = small(folder, steps=3)
    train.train(dataclasses.replace(run, output=dataclasses.replace(run.output, quiet=False)))
    lines = capsys.readouterr().out.strip().splitlines()
    command = f"{command_line.python()} -m train resume '{folder}' --steps 6"
    assert lines[-1] == command
    assert f"curves: {folder}/loss.png" in lines
    assert "bits a byte on held-out text" in "\n".join(lines)
    assert (folder / "sample.txt").read_text().startswith("HAMLET.")


@pytest.mark.parametrize(("optimizer", "offered"), [("adamw", False), ("lion", True)])
def test_adamw_is_not_offered_as_its_own_reference(optimizer, offered):
    run = small("unused", optimizer)
    shown = report._comparison(run, None, "")
    assert ("--output.recompute-reference" in shown) == offered
    assert not report._comparison(run, None, "stopped at step 3")


def test_programs_are_compiled_before_the_first_step_and_never_again(
    finished, tmp_path, monkeypatch, capsys
):
    """Both kinds of step for a run, the plain one alone for steps that sample nothing."""
    events, made = [], []
    make_step, assemble = program.step_lib.make_step, program.assemble

    def watched(*args, **kwargs):
        step = make_step(*args, **kwargs)

        def traced(state, batch, due):
            events.append(due.refresh)
            return step(state, batch, due)

        return traced

    def kept(run):
        made.append(assemble(run))
        return made[-1]

    monkeypatch.setattr(program.step_lib, "make_step", watched)
    monkeypatch.setattr(program, "assemble", kept)
    monkeypatch.setattr(loop.Meter, "report", lambda *args: events.append("step"))
    run = small(tmp_path / "run", steps=5)
    train.train(dataclasses.replace(run, output=dataclasses.replace(run.output, quiet=False)))
    assert events == [True, False, *["step"] * 5]
    shown = capsys.readouterr().out
    for name in ("step that samples curvature", "plain step"):
        assert re.search(rf"^compiling the {name}\ncompiled the {name} in \d+\.\d s$", shown, re.M)
    events.clear()
    train.resume(tmp_path / "run", steps=8)
    assert events == [False, *["step"] * 3]
    assert [programs.step._cache_size() for programs in made] == [0, 0]


def test_a_program_that_does_not_compile_leaves_the_folder_free(tmp_path, monkeypatch):
    def fails(*args):
        raise ValueError("no such kernel")

    run = small(tmp_path / "run", "adamw", steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(program, "compile_step", fails)
        with pytest.raises(ValueError, match="no such kernel"):
            train.train(run)
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()
    assert max(losses(train.train(run))) == 3


def test_a_run_in_micro_batches_is_the_run_in_one_piece(tmp_path):
    """End to end, eight devices of which four share each parameter."""
    mesh = program.mesh.MeshConfig(fsdp=4)
    runs = (
        train.train(small(tmp_path / str(k), "adamw", batch_size=16, accumulation=k, mesh=mesh))
        for k in (1, 2)
    )
    whole, cut = (list(losses(history).values()) for history in runs)
    np.testing.assert_allclose(cut, whole, rtol=1e-5)


def test_a_run_goes_on_on_another_mesh(tmp_path):
    """With fsdp 8, and from the middle data 8: the same losses and parameters to rounding."""
    norms, seen, folder = [], [], tmp_path / "run"
    sharded = small(folder, mesh=program.mesh.MeshConfig(fsdp=8))
    for mesh in (None, program.mesh.MeshConfig(data=8)):
        if mesh is None:
            history = train.train(sharded)
        else:
            history = train.resume(folder, step=6, mesh=mesh)
            assert serialize.load(folder).mesh == mesh
        seen.append(list(losses(history).values()))
        with loop._checkpoints(sharded, folder) as checkpoints:
            step, state = checkpoints.restore(program.assemble(sharded).abstract)
        assert step == 12
        norms.append(float(optax.tree.norm(state.params)))
    assert seen[0][:6] == seen[1][:6] and len(seen[1]) == 12
    np.testing.assert_allclose(seen[1][6:], seen[0][6:], rtol=1e-5)
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_a_run_that_saved_nothing_yet_starts_again_but_a_lost_checkpoint_is_named(tmp_path, capsys):
    run = small(tmp_path / "run", "adamw", steps=4)
    run = dataclasses.replace(
        run, output=dataclasses.replace(run.output, quiet=False, sample_length=0)
    )
    history = train.train(run)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert losses(train.resume(tmp_path / "run")) == losses(history)
    shown = capsys.readouterr().out
    (aside,) = (tmp_path / "run").glob("metrics-*.jsonl")
    assert "no checkpoint yet: starting from step 0" in shown
    assert f"the metrics up to step 4 are now in {aside}" in shown
    assert [json.loads(line) for line in aside.read_text().splitlines()] == history
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "loss": 1.0}\n')  # of a run that must have saved by then
    with pytest.raises(store.CheckpointError, match="does not exist"):
        train.resume(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "checkpoints" / "put-aside-4").mkdir(parents=True)
    with pytest.raises(store.CheckpointError, match="holds no checkpoint"):
        train.resume(tmp_path / "run")


def test_checkpoints_come_by_the_clock_too(tmp_path):
    run = small(tmp_path / "run", "adamw", steps=4)
    shown = dataclasses.replace(run.output, checkpoint_minutes=1e-9, keep_checkpoints=9)
    train.train(dataclasses.replace(run, output=shown))
    with loop._checkpoints(run, tmp_path / "run") as checkpoints:
        assert checkpoints.steps == [1, 2, 3, 4]


def test_processes_must_find_the_same_data(finished, tmp_path, monkeypatch):
    """Compared with what the others found before anything is compiled, or a checkpoint read."""
    run, said = small(tmp_path / "run"), processes.check_same

    def compare(fields):
        said(fields)
        if "data" in fields:
            raise ValueError(f"data {fields['data']} is another")

    monkeypatch.setattr(processes, "check_same", compare)
    monkeypatch.setattr(store.Checkpoints, "restore", None)
    fingerprint = program.assemble(run).data().fingerprint
    for begin in (lambda: train.train(run), lambda: train.resume(finished[0])):
        with pytest.raises(ValueError, match=f"data {fingerprint} is another"):
            begin()


def test_processes_must_go_on_from_one_checkpoint(finished, monkeypatch):
    said = []
    monkeypatch.setattr(processes, "check_same", lambda *words: said.append(words))
    monkeypatch.setattr(loop, "_run", lambda *args: None)
    train.resume(finished[0], step=12)
    assert said[0][0]["allow_changes"] is False
    assert said[-1] == ({"checkpoint": 12}, said[-1][1])
    assert "an older one with --step" in said[-1][1]


def test_the_first_signal_does_not_end_the_last_save(tmp_path, monkeypatch):
    close = store.Checkpoints.close

    def told(checkpoints):
        if (tmp_path / "run" / "config.json").exists() and not asked:
            asked.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        close(checkpoints)

    asked = []
    monkeypatch.setattr(store.Checkpoints, "close", told)
    assert max(losses(train.train(small(tmp_path / "run", "adamw", steps=4)))) == 4
    assert asked


def test_a_run_that_went_back_stays_there_though_it_is_killed_before_it_saves(
    finished, tmp_path, monkeypatch
):
    folder, restored = tmp_path / "run", []
    shutil.copytree(finished[0], folder)

    def killed(run, programs, checkpoints, meter):
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(loop.policy, "Saver", killed)
        with pytest.raises(InterruptedError):
            train.resume(folder, step=6)
    assert max(losses(jsonl.read_history(folder))) == 6  # those of the other future are cut
    monkeypatch.setattr(loop, "_run", lambda *args: restored.append(args[3]))
    train.resume(folder)
    assert int(restored[0].state.step) == 6
    assert not restored[0].notes


def test_a_taken_folder_is_refused(finished):
    with pytest.raises(ValueError, match="already holds a run"):
        train.train(small(finished[0]))


def test_parameters_that_are_not_finite_stop_the_run_and_spare_the_good_checkpoint(tmp_path):
    folder = tmp_path / "run"
    train.train(small(folder, "adamw", steps=6))
    run = serialize.load(folder)
    hot = dataclasses.replace(run.optim, learning_rate=1e30, weight_decay=1e30)
    shown = dataclasses.replace(run.output, checkpoint_every=1, keep_checkpoints=1)
    serialize.save(dataclasses.replace(run, optim=hot, output=shown), folder)
    with pytest.raises(ValueError, match=r"step 6: optim.learning_rate 0\.01 -> 1e\+30.*Put back"):
        train.resume(folder, steps=12)
    with pytest.raises(FloatingPointError, match=r"at step 7, .* not saved.*step 6 is kept"):
        train.resume(folder, steps=12, allow_changes=True)
    with loop._checkpoints(run, folder) as checkpoints:
        assert checkpoints.steps == [6]


def test_a_checkpoint_whose_parameters_are_not_finite_is_passed_over(tmp_path, monkeypatch):
    """Such are never saved: it was damaged on disk."""
    folder, here = tmp_path / "run", policy.wrong_here
    run = small(folder, "adamw", steps=6)
    train.train(
        dataclasses.replace(run, output=dataclasses.replace(run.output, checkpoint_every=3))
    )

    def damaged_at_6(step, state):
        tokens = state["params"]["tokens"]["embedding"] * (jnp.nan if step == 6 else 1)
        return here(step, state | {"params": state["params"] | {"tokens": tokens}})

    monkeypatch.setattr(policy, "wrong_here", damaged_at_6)
    loaded = warm_start.load(folder)
    assert loaded.step == 3
    assert "step 6 is damaged (params/tokens is not finite" in loaded.notes[0]


def test_a_checkpoint_under_the_name_of_another_step_is_passed_over(tmp_path):
    folder = tmp_path / "run"
    run = small(folder, "adamw", steps=6)
    train.train(
        dataclasses.replace(run, output=dataclasses.replace(run.output, checkpoint_every=3))
    )
    checkpoints = folder / "checkpoints"
    (checkpoints / "3").rename(checkpoints / "5")
    shutil.rmtree(checkpoints / "6")
    shutil.copytree(checkpoints / "5", checkpoints / "3")
    loaded = warm_start.load(folder)
    assert loaded.step == 3
    assert "step 5 is damaged (it holds the state of step 3)" in loaded.notes[0]


def spoiled(monkeypatch, *bad):
    """Batches of these steps have a target that is no token, and a loss that is no number."""
    assemble, sampled = program.assemble, []

    def spoil(run):
        programs = assemble(run)

        def batch(step):
            sampled.append([step, None])
            whole = programs.batch(step)
            spoilt = whole._replace(targets=whole.targets.at[3, -1].set(999))

            return spoilt if step in bad else whole

        def compile(due):
            step = programs.compile(due)

            def noted(state, batch):
                sampled[-1][1] = due.refresh
                return step(state, batch)

            return noted

        return programs._replace(batch=batch, compile=compile)

    monkeypatch.setattr(program, "assemble", spoil)
    return sampled


def test_bad_steps_change_nothing_and_a_sample_of_curvature_is_retaken(tmp_path, monkeypatch):
    """Also across a resume right after the step at which the sample was due."""
    sampled = spoiled(monkeypatch, 4, 10)
    run = small(tmp_path / "run", steps=14)
    run = dataclasses.replace(run, output=dataclasses.replace(run.output, checkpoint_every=11))
    history = train.train(run)
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
    run = small(tmp_path / "run", "adamw")
    run = dataclasses.replace(run, output=dataclasses.replace(run.output, max_bad_steps=3))
    with pytest.raises(FloatingPointError, match=r"at 3 steps in a row, up to step 7: none of"):
        train.train(run)
    assert max(losses(jsonl.read_history(tmp_path / "run"))) == 7


def test_only_optimizers_with_an_interval_sample_curvature():
    runs = (preset("tiny", name) for name in ("sophia-h", "adamw"))
    sophia, adamw = (run.optim.build(run.context()) for run in runs)
    assert [step for step in range(25) if sophia.due(step).refresh] == [0, 10, 20]
    assert not any(adamw.due(step).refresh for step in range(25))


def test_the_reference_is_adamw_with_the_same_budget_and_goes_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(baseline, "OWN", tmp_path / "references.json")
    monkeypatch.chdir(tmp_path)
    run = small("", "adamw", steps=4)  # which is its own twin, begun in the same second
    assert baseline.find(run).stale and baseline.is_twin(run)
    shipped = baseline.SHIPPED.read_bytes()
    train.train(
        dataclasses.replace(run, output=dataclasses.replace(run.output, recompute_reference=True))
    )
    folder, beside = sorted((tmp_path / "runs").iterdir())
    assert beside.name == f"{folder.name}-reference"
    found = baseline.find(run)
    assert not found.stale
    assert found.command.startswith("python -m train tiny adamw --model.context 16")
    assert found.heldout[-1][0] == 4
    other_optimizer = dataclasses.replace(run, optim=preset("tiny", "lion").optim)
    assert not baseline.find(other_optimizer).stale
    assert baseline.SHIPPED.read_bytes() == shipped  # which belongs to the source
    assert baseline.find(dataclasses.replace(run, steps=5)).stale


def test_a_process_without_the_history_stores_no_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(baseline, "OWN", tmp_path / "references.json")
    monkeypatch.setattr(processes, "is_main", lambda: False)
    baseline.recompute(small(""), tmp_path / "run", lambda run: [])
    assert not baseline.OWN.exists()


def test_the_shipped_reference_belongs_to_the_shipped_config():
    found = baseline.find(preset())
    assert found is not None
    assert not found.stale, (
        f"renew it: python -m train --output.recompute-reference ({found.command}), then copy "
        f"{baseline.OWN} over {baseline.SHIPPED}"
    )
    assert json.loads(baseline.SHIPPED.read_text())[baseline.twin(preset()).hash]


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
