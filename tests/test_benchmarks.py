import pytest

from benchmarks import update_cost


@pytest.fixture(scope="module")
def rows():
    return update_cost.run(size=8 * 1024 * 512, rounds=0)


@pytest.mark.parametrize("name", ["sophia_h", "sophia_g"])
def test_between_refreshes_a_parameter_costs_twenty_eight_bytes_and_no_temporaries(rows, name):
    row, adamw = rows[f"{name}, between refreshes"], rows["optax.adamw"]
    assert row["bytes_per_parameter"] <= 28.1 < adamw["bytes_per_parameter"]
    assert row["temporary_megabytes"] < 0.01


def test_the_chain_costs_what_a_function_written_by_hand_costs(rows):
    by_hand = rows["Sophia by hand, between refreshes"]["bytes_per_parameter"]
    chain = rows["sophia_g, between refreshes"]["bytes_per_parameter"]
    assert chain == pytest.approx(by_hand, rel=1e-3)


def test_statistics_cost_on_refreshes_alone(rows):
    on, off = (rows[f"sophia_g, refresh, statistics {x}"] for x in ("on", "off"))
    assert on["bytes_per_parameter"] > off["bytes_per_parameter"]
