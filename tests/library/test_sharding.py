"""Devices along mesh axes."""

import types

import pytest

from sophia_optax.sharding import devices_of


@pytest.mark.parametrize(
    ("names", "devices"), [(None, 1), ("data", 4), (("data", "fsdp"), 8), (("fsdp", None), 2)]
)
def test_devices_along_several_axes_are_their_product(names, devices):
    assert devices_of(types.SimpleNamespace(shape={"data": 4, "fsdp": 2}), names) == devices
