"""The benchmark of growth: power laws, collectives, and one device's share of a step."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from benchmarks import scaling
from models import DecoderConfig
from train.plan.hlo import collectives


@pytest.mark.parametrize("power", [1.0, 1.5])
def test_the_exponent_of_a_power_law_is_found(power):
    figures = {str(n): {"seconds": 3e-9 * n**power} for n in (10, 1000, 10**6)}
    assert scaling.exponent(figures) == pytest.approx(power)
    figures["10"]["seconds"] *= 100
    assert scaling.exponent(figures, least=1000) == pytest.approx(power)
    assert scaling.exponent(figures, least=10**6) is None


def test_collectives_are_counted_with_the_bytes_of_their_results():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def talk(a, b):
        scattered = jax.lax.psum_scatter(a, "x", tiled=True)
        return jax.lax.psum(a, "x"), jax.lax.all_gather(b, "x"), scattered

    talk = jax.shard_map(talk, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    arguments = jnp.ones((8, 10)), jnp.ones(6, jnp.bfloat16)
    found = collectives(str(jax.jit(talk).lower(*arguments).compile().as_text()))
    assert found["all-reduce"] == (1, 8 * 10 * 4)
    assert found["reduce-scatter"] == (1, 2 * 10 * 4)
    assert found["all-gather"][0] == 1 and found["all-gather"][1] in (4 * 6 * 2, 4 * 6 * 4)


@pytest.mark.slow
def test_the_work_of_a_device_is_constant_as_devices_and_rows_grow(monkeypatch):
    config = DecoderConfig(vocab_size=256, context=16, width=32, layers=1, heads=2)
    monkeypatch.setattr(scaling, "MODEL", config)
    monkeypatch.delitem(scaling.STEPS, "sample of all rows")
    figures = scaling.weak_scaling((2, 4))
    parameters = 256 * 32 + 16 * 32 + 12 * 32**2 + 3 * 32
    for layout in ("data", "fsdp"):
        for name in scaling.STEPS:
            two, four = (figures[f"{layout}, {name}, {n}"] for n in (2, 4))
            for figure in ("collectives", "collective_bytes"):
                assert four[figure] == two[figure] > 0, (layout, name)
            least = 0.95 if layout == "data" else 0.9  # fsdp divides the update
            for figure in ("flops", "bytes"):
                assert least <= four[figure] / two[figure] <= 1.05, (layout, name)
            halved = 0.5 if layout == "fsdp" else 1
            state = two["argument_bytes"] * halved
            assert four["argument_bytes"] == pytest.approx(state, rel=0.1), (layout, name)
    moved = figures["data, plain, 4"]["collective_bytes"] / 4
    embedding = 256 * 32  # may be reduced twice, as table and as head
    assert parameters <= moved <= 1.01 * (parameters + embedding)


@pytest.mark.slow
def test_both_tables_are_printed_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "fake_devices", lambda: None)  # the tests have eight already
    monkeypatch.setattr(scaling, "MODEL", dataclasses.replace(scaling.MODEL, layers=1, width=16))
    monkeypatch.setattr(scaling, "SIZES", (1e4, 1e5))
    monkeypatch.setattr(scaling, "STEPS", {"plain": scaling.STEPS["plain"]})
    path = tmp_path / "scaling.json"
    scaling.main(["--largest", "2e5", "--rounds", "1", "--devices", "1", "--json", str(path)])
    result = json.loads(path.read_text())
    for figures in result["update_times"].values():
        assert list(figures) == ["8192", "98304", "196608"]
    assert result["weak_scaling"]["data, plain, 1"]["collectives"] == 0
    out = capsys.readouterr().out
    assert "exponent, all" in out and "exponent, from" not in out
