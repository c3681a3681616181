"""The benchmark of requirements: its runs are as it says, and its table is printed."""

import pytest

from benchmarks import plans


@pytest.mark.parametrize(("devices", "sampled"), [(8, 64), (256, 256)])
def test_a_run_samples_a_sequence_per_device_and_at_least_64(devices, sampled):
    run = plans.config("gpt2-125m", devices)
    assert run.batch_size * run.optim.batch_fraction == pytest.approx(sampled)
    assert devices % run.mesh.fsdp == run.model.width % run.mesh.fsdp == 0
    assert run.model.remat == "full" and run.precision == "bfloat16"


def test_the_table_has_a_row_for_each_model_and_number_of_devices(monkeypatch, capsys):
    monkeypatch.setattr(plans, "fake_devices", lambda number: None)  # the tests have eight already
    plans.main(["gpt2-30m", "--devices", "4", "8"])
    rows = [line for line in capsys.readouterr().out.splitlines() if "gpt2-30m" in line]
    assert [row.split("│")[2].strip() for row in rows] == ["4", "8"]
