"""Laws of the reports: valid JSON lines that survive a kill, text shown as it is, a figure."""

import dataclasses
import io
import json
import math
import os
import sys

import jax
import numpy as np
import pytest
from rich.console import Console

from train.config.presets import preset
from train.config.schema import OutputConfig
from train.logging import figures, jsonl, run_log, throughput
from train.optimizers.base import Due
from train.plan import flops


def terminal(**kwargs):
    return Console(file=io.StringIO(), width=100, **kwargs)


def shown(console):
    return console.file.getvalue()


def run(folder, steps, start=0, total=10, console=None, loss=2.0):
    with run_log.RunLog(folder, total, start, console=console or terminal()) as log:
        for step in steps:
            log.train(step, {"loss": loss, "tokens_per_second": 48_213.0, "grad_norm": 0.5})


def lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_each_step_is_one_json_line_at_once(tmp_path):
    with run_log.RunLog(tmp_path / "run", 2, quiet=True) as log:
        log.train(1, {"loss": np.float32(2.5), "tokens_per_second": 10})
        assert len(lines(tmp_path / "run")) == 1  # before the file is closed
        log.evaluate(2, {"heldout_loss": 2.25})
    assert jsonl.read_history(tmp_path / "run") == [
        {"step": 1, "loss": 2.5, "tokens_per_second": 10.0},
        {"step": 2, "heldout_loss": 2.25},
    ]


def test_a_sync_puts_the_lines_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    with run_log.RunLog(tmp_path, 1, quiet=True) as log:
        log.train(1, {"loss": 2.0})
        synced.clear()
        log.sync()
    assert synced == [(tmp_path / jsonl.FILE).stat().st_ino]


def test_non_finite_values_are_null_in_the_file_and_nan_in_the_history(tmp_path):
    with run_log.RunLog(tmp_path, 1, quiet=True) as log:
        log.train(1, {"loss": math.nan, "grad_norm": math.inf, "age": -math.inf})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    row = json.loads(lines(tmp_path)[0], parse_constant=refuse)
    assert row == {"step": 1, "loss": None, "grad_norm": None, "age": None}
    assert math.isnan(jsonl.read_history(tmp_path)[0]["loss"])


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "3",
        "null",
        "{}",
        '{"step": "x"}',
        '{"step": -1}',
        '{"step": 1.5}',
        '{"step": 2, "loss": "low"}',
        '{"step": 2, "loss": [1]}',
        '{"step": 2',
        "[" * 5000,
        "\udcff",
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    text = line + '\n{"step": 3, "loss": 1.0}\n'
    (tmp_path / jsonl.FILE).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"{jsonl.FILE}, line 1 is not .*: delete the line"):
        jsonl.read_history(tmp_path)
    with (
        pytest.raises(ValueError, match="line 1 is not"),
        run_log.RunLog(tmp_path, 5, 3, quiet=True),
    ):
        pass


@pytest.mark.parametrize("torn", ['{"step": 7, "lo', "{", "\0\0\0"])
def test_resuming_drops_later_steps_and_a_torn_line(tmp_path, torn):
    run(tmp_path, range(1, 7), loss=2.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert [row["step"] for row in jsonl.read_history(tmp_path)] == [1, 2, 3, 4, 5, 6]
    run(tmp_path, range(5, 9), start=4, loss=1.0)
    history = jsonl.read_history(tmp_path)
    assert [row["step"] for row in history] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["loss"] for row in history] == [2.0] * 4 + [1.0] * 4


def test_resuming_keeps_null_values(tmp_path):
    run(tmp_path, [1], loss=math.nan)
    run(tmp_path, [2], start=1)
    assert json.loads(lines(tmp_path)[0])["loss"] is None


def test_starting_anew_drops_the_old_run(tmp_path):
    with run_log.RunLog(tmp_path, 10, quiet=True) as log:
        log.evaluate(0, {"heldout_loss": 5.5})
    run(tmp_path, [1])
    assert [row["step"] for row in jsonl.read_history(tmp_path)] == [1]


def test_a_broken_line_before_the_last_is_named(tmp_path):
    run(tmp_path, [1])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not JSON: delete the line"):
        jsonl.read_history(tmp_path)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"give the folder of a run"):
        jsonl.read_history(tmp_path)


def test_without_a_terminal_lines_come_now_and_then(tmp_path, monkeypatch):
    clock = iter(np.arange(0.0, 1e6))  # a second a reading
    monkeypatch.setattr(run_log.time, "monotonic", lambda: float(next(clock)))
    console = terminal()
    run(tmp_path, range(1, 101), total=100, console=console)
    text = shown(console)
    assert "\x1b" not in text
    assert "\r" not in text
    steps = [int(line.split()[1].split("/")[0]) for line in text.splitlines()]
    assert steps[0] == 1
    assert steps[-1] == 100
    assert 4 < len(steps) < 30
    assert "step 100/100  loss 2.000  48.2k tokens/s" in text


def test_plain_lines_tell_the_time_left(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "_PLAIN_SECONDS", 0.0)
    console = terminal()
    now = 0.0
    with run_log.RunLog(tmp_path, 100, console=console) as log:
        log._progress.get_time = lambda: now
        for step in range(1, 11):
            now += 2.0
            log.train(step, {"loss": 1.0})
    assert "0:03:00 left" in shown(console).splitlines()[-1]  # 90 steps of two seconds


def test_a_terminal_shows_a_bar_with_the_metrics(tmp_path):
    console = terminal(force_terminal=True)
    run(tmp_path / "tiny-adamw", range(1, 6), console=console)
    text = shown(console)
    for part in ("tiny-adamw", "━", "5/10", "loss 2.000", "48.2k tokens/s"):
        assert part in text


@pytest.mark.parametrize("is_terminal", [True, False])
def test_printed_text_is_not_markup(tmp_path, is_terminal):
    console = terminal(force_terminal=is_terminal)
    sample = "[Exeunt.] [bold]no[/bold] :smile: " + "long line " * 20
    with run_log.RunLog(tmp_path, 1, console=console) as log:
        log.print(sample)
    assert sample in shown(console)


def test_evaluations_are_printed(tmp_path):
    console = terminal()
    with run_log.RunLog(tmp_path, 500, console=console) as log:
        log.evaluate(100, {"heldout_loss": 1.5, "bits_per_byte": 2.164})
    assert shown(console) == "step 100/500  heldout loss 1.5000  bits per byte 2.1640\n"


def test_quiet_shows_nothing(tmp_path, capsys):
    console = terminal(force_terminal=True)
    with run_log.RunLog(tmp_path, 1, quiet=True, console=console) as log:
        log.train(1, {"loss": 1.0})
        log.evaluate(1, {"heldout_loss": 1.0})
        log.print("text")
    assert shown(console) == ""
    assert capsys.readouterr().out == ""


def test_the_terminal_and_the_file_survive_an_error(tmp_path):
    console = terminal(force_terminal=True)
    log = run_log.RunLog(tmp_path, 10, console=console)

    def stopped():
        with log:
            log.train(1, {"loss": 1.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert shown(console).rstrip("\r\n").endswith("\x1b[?25h")  # the cursor is back
    assert [row["step"] for row in jsonl.read_history(tmp_path)] == [1]


def history_of(steps=200):
    rows = [{"step": s, "loss": 1 + 4 / s} for s in range(1, steps)]
    rows[0]["loss"] = math.nan
    return rows + [{"step": s, "heldout_loss": 1.1 + 4 / s} for s in range(50, steps, 50)]


@pytest.mark.parametrize("history", [history_of(), history_of(3), history_of()[:1], []])
@pytest.mark.parametrize("reference", [None, ([(50, 1.5), (100, 1.2)], "AdamW"), ([], "none")])
def test_any_history_can_be_drawn(tmp_path, history, reference):
    figures.plot(history, tmp_path / "loss.png", title="run", reference=reference)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_drawing_leaves_pyplot_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    loaded = "matplotlib.pyplot" in sys.modules
    figures.plot(history_of(), tmp_path / "loss.png", title="run")
    assert ("matplotlib.pyplot" in sys.modules) == loaded
    assert dict(matplotlib.rcParams) == before


def test_the_right_axis_is_in_bits(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: kept.append(figure))
    figures.plot(history_of(), tmp_path / "loss.png", title="run", unit="token")
    axes = kept[0].axes[0]
    (bits,) = axes.child_axes
    kept[0].draw_without_rendering()
    np.testing.assert_allclose(bits.get_ylim(), np.array(axes.get_ylim()) / np.log(2), rtol=1e-6)
    assert "nats per token" in axes.get_ylabel()
    assert "bits per token" in bits.get_ylabel()


@pytest.mark.parametrize("size", [0, 1, 2, 3, 39, 40, 41, 500])
def test_smoothing_keeps_length_and_constants_and_lowers_noise(size):
    noise = np.random.default_rng(0).normal(size=size)
    np.testing.assert_allclose(figures._smooth(np.full(size, 2.5)), 2.5)
    assert len(figures._smooth(noise)) == size
    if size >= 40:
        assert figures._smooth(noise).std() < 0.8 * noise.std()


def test_the_share_of_the_peak_is_that_of_tokens_a_second(monkeypatch, tmp_path):
    """A token of the tiny model is 3 x 262,144 operations; here is a chip that does a billion."""
    monkeypatch.setattr(throughput, "peak_flops", lambda kind: 1e9)
    console = terminal()
    with run_log.RunLog(tmp_path, 1, console=console) as log:
        watched = throughput.Meter(preset("tiny", "adamw"), log, 0, throughput.Health())
        measured = {"loss": np.float32(2), "grad_norm": np.float32(1), "skipped": np.float32(0)}
        watched.report(1, measured, Due(True))
    (row,) = jsonl.read_history(tmp_path)
    want = 3 * 262_144 * row["tokens_per_second"] / (1e9 * jax.device_count())
    assert row["mfu"] == pytest.approx(want, rel=1e-9)
    assert f"{want:.0%} MFU" in shown(console)


def test_the_time_of_a_step_is_that_between_two_results(monkeypatch, tmp_path):
    """Asking the device for a learning rate waits for the step that is under way by then."""
    now = 0.0
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now)

    def waits(count):
        nonlocal now
        now += 7
        return np.float32(0.1)

    run = dataclasses.replace(preset("tiny", "adamw"), output=OutputConfig(log_every=1))
    monkeypatch.setattr(type(run), "schedule", property(lambda run: waits))
    with run_log.RunLog(tmp_path, 4, quiet=True) as log:
        watched = throughput.Meter(run, log, 0, throughput.Health())
        for step in (1, 2, 3, 4):  # the results of step n are fetched once n + 1 is on its way
            now += 1
            watched.report(step, {"loss": np.float32(2), "skipped": np.float32(0)}, Due())
    seconds = [16 * 64 / row["tokens_per_second"] for row in jsonl.read_history(tmp_path)]
    assert seconds == pytest.approx([2, 8, 8])


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
    ],
)
def test_the_peak_is_that_of_the_chip_whose_name_jax_reports(kind, teraflops):
    assert flops.peak_flops(kind) == 1e12 * teraflops


@pytest.mark.parametrize("kind", ["cpu", "TPU v4 lite", "TPU v50", "NVIDIA H20", "RTX A1000"])
def test_the_peak_of_another_chip_is_not_guessed(kind):
    assert flops.peak_flops(kind) is None
