"""Other places for metrics, a trace of some steps, spikes of the loss."""

import contextlib
import sys
import types

import jax.numpy as jnp
import pytest

from train.config.schema import OutputConfig
from train.logging import profiler, run_log, trackers
from train.logging.throughput import Spikes


@pytest.mark.parametrize(
    ("make", "extra"),
    [
        (lambda folder: trackers.TensorBoard(folder), "tensorboard"),
        (lambda folder: trackers.wandb("project", folder, {}), "wandb"),
        (lambda folder: trackers.trackio("project", folder, {}), "trackio"),
    ],
)
def test_a_missing_library_names_the_extra(make, extra, tmp_path, monkeypatch):
    for library in ("tensorboardX", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=rf"--output\.{extra} needs .*'\.\[{extra}\]'"):
        make(tmp_path)


class Calls:
    """Notes what a library is called with."""

    def __init__(self):
        self.seen = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.seen.append((name, args, kwargs)) or self


def test_tensorboard_gets_one_point_of_each_metric(tmp_path, monkeypatch):
    library = Calls()
    monkeypatch.setitem(sys.modules, "tensorboardX", library)
    writer = trackers.TensorBoard(tmp_path / "tb", start=4)
    writer.write(5, {"loss": 2.0, "grad_norm": 1.0})
    writer.close()
    assert library.seen == [
        ("SummaryWriter", (str(tmp_path / "tb"),), {"purge_step": 5}),
        ("add_scalar", ("loss", 2.0, 5), {}),
        ("add_scalar", ("grad_norm", 1.0, 5), {}),
        ("close", (), {}),
    ]


@pytest.mark.parametrize("make", [trackers.wandb, trackers.trackio])
def test_an_experiment_goes_on_with_the_run_of_this_folder(make, tmp_path, monkeypatch):
    library = Calls()
    monkeypatch.setitem(sys.modules, make.__name__, library)
    writer = make("sophia", tmp_path, {"seed": 3})
    writer.write(5, {"loss": 2.0})
    writer.close()
    (_, _, given), logged, finished = library.seen
    assert given["project"] == "sophia" and given["resume"] == "allow"
    assert given["name"] == tmp_path.name and given["config"] == {"seed": 3}
    assert given.get("id", tmp_path.name) == tmp_path.name
    assert logged == ("log", ({"loss": 2.0},), {"step": 5})
    assert finished[0] == "finish"


def test_the_log_passes_metrics_on_and_closes_all_writers(tmp_path):
    closed, got = [], []

    def close(name, fails):
        closed.append(name)
        if fails:
            raise OSError("network")

    others = [
        types.SimpleNamespace(
            write=lambda step, values: got.append((step, values)),
            close=lambda name=name: close(name, name == "b"),
        )
        for name in "ab"
    ]
    with (
        pytest.raises(OSError, match="network"),
        run_log.RunLog(tmp_path, 2, quiet=True, writers=others) as log,
    ):
        log.train(1, {"loss": 2.0})
    assert got == [(1, {"loss": 2.0})] * 2
    assert sorted(closed) == ["a", "b"]


def test_a_silent_log_writes_nothing(tmp_path, capsys):
    with run_log.RunLog(tmp_path / "run", 2, silent=True) as log:
        log.train(1, {"loss": 2.0})
        log.print("text")
        log.sync()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_a_full_disk_is_named(tmp_path):
    with run_log.RunLog(tmp_path, 2, quiet=True) as log:
        rest, log._lines._file = log._lines._file, open("/dev/full", "a", buffering=1)  # noqa: SIM115
        with pytest.raises(OSError, match=r"No space left .*free space.*metrics\.jsonl"):
            log.train(1, {"loss": 2.0})
        with contextlib.suppress(OSError):
            log._lines._file.close()
        log._lines._file = rest


@pytest.mark.parametrize("steps", ["5", "5:3", "0:3", "a:b", "1:2:3", "-1:2"])
def test_a_profile_of_no_steps_is_refused(steps):
    with pytest.raises(ValueError, match="write FIRST:LAST"):
        OutputConfig(profile=steps)


@pytest.mark.parametrize("wrong", [{"checkpoint_minutes": -1}, {"spike": -1}, {"max_bad_steps": 0}])
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"output\.{next(iter(wrong))}="):
        OutputConfig(**wrong)


@pytest.mark.parametrize("last", [2, 9])
def test_a_profile_is_written_and_says_how_to_look_at_it(last, tmp_path):
    """Also where the run ends before the last step of it."""
    said = []
    with profiler.profiler(f"2:{last}", tmp_path / "profile", said.append) as after:
        for step in range(4):
            after(step, jnp.ones(3) * step)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert len(said) == 1 and f"xprof --logdir {tmp_path / 'profile'}" in said[0]


def test_spikes_are_found_and_counted_across_a_resume():
    losses = [2.0 + 0.01 * (i % 3) for i in range(30)]
    losses[20] = 2.5
    whole = Spikes(6.0)
    found = [whole.add(loss) for loss in losses]
    assert [i for i, (_, above) in enumerate(found) if above] == [20]
    assert found[-1][0] == 1
    rows = [{"loss": loss, "spikes": n} for loss, (n, _) in zip(losses, found, strict=True)]
    rows.insert(3, {"heldout_loss": 9.0})
    resumed = Spikes(6.0, rows[:26])
    assert [resumed.add(loss) for loss in losses[25:]] == found[25:]
    assert not resumed.add(float("nan"))[1]


def test_a_run_has_the_trackers_that_it_asks_for(tmp_path, monkeypatch):
    libraries = {name: Calls() for name in ("tensorboardX", "wandb", "trackio")}
    for name, library in libraries.items():
        monkeypatch.setitem(sys.modules, name, library)
    assert trackers.asked_for(OutputConfig(), tmp_path, {}, 0) == []
    output = OutputConfig(tensorboard=True, wandb="a", trackio="b")
    assert len(trackers.asked_for(output, tmp_path, {}, 3)) == 3
    assert libraries["tensorboardX"].seen[0][2] == {"purge_step": 4}
    assert [libraries[name].seen[0][2]["project"] for name in ("wandb", "trackio")] == ["a", "b"]


def test_a_spike_is_above_ten_losses_or_more_and_none_below_them():
    found, short, ten = Spikes(3.0), Spikes(3.0), Spikes(3.0)
    for number in range(10):
        loss = 2.0 + 0.1 * (number % 2)
        found.add(loss)
        ten.add(loss)
        assert number == 9 or short.add(loss) == (0, "")
    assert short.add(9.0) == (0, "")  # after nine losses
    assert ten.add(9.0)[0] == 1
    assert found.add(0.1) == (0, "")  # far below
    for loss in (float("nan"), float("inf")):
        found.add(loss)
    assert "above 1.873" in found.add(9.0)[1]  # those are not compared with
