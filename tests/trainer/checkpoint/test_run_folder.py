"""A run's folder: one run at a time, files whole or absent, nothing outside of it."""

import os
import signal
import subprocess
import sys

import pytest

from train import files, lock


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "config.json"
    files.replace_text(path, "old")
    mode = path.stat().st_mode

    def fails(temporary):
        temporary.write_text("half of the n")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        files.replace(path, fails)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"] and path.read_text() == "old"
    plain = tmp_path / "plain"
    plain.write_text("x")
    assert mode == plain.stat().st_mode


def test_a_link_is_replaced_and_not_followed(tmp_path):
    outside = tmp_path / "precious"
    outside.write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").symlink_to(outside)
    files.replace_text(run / "config.json", "new")
    assert outside.read_text() == "mine" and (run / "config.json").read_text() == "new"


def test_a_folder_that_leads_out_is_refused(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    assert files.inside(run, "checkpoints") == run / "checkpoints"
    (run / "checkpoints").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoints is a link to .*, outside of the run"):
        files.inside(run, "checkpoints")
    with pytest.raises(ValueError, match="outside"):
        files.inside(run, "../elsewhere")


def test_a_second_run_is_told_who_holds_the_folder(tmp_path):
    with (
        lock.hold(tmp_path),
        pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on .* since \d{{4}}-"),
        lock.hold(tmp_path),
    ):
        pass
    with lock.hold(tmp_path):  # free again
        pass


def test_the_lock_of_a_killed_process_is_void(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from train import lock\n"
        "with lock.hold(Path(sys.argv[1])):\n"
        "  print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=-1, stdout=-1, text=True
    )
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"process {process.pid} on"), lock.hold(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert str(process.pid) in (tmp_path / lock.FILE).read_text()
    with lock.hold(tmp_path):
        assert str(os.getpid()) in (tmp_path / lock.FILE).read_text()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / lock.FILE).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"\.lock"), lock.hold(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "mine"
