"""With `row_numbers`, parts of a batch draw the labels and probes of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from moments import jit
from tanh_model import KEY, ROWS, arguments, close, shared

from sophia_optax import gauss_newton_bartlett, hutchinson

NUMBERS = np.arange(ROWS)
FACTORIES = (gauss_newton_bartlett, hutchinson)


def part(tree, first, number):
    return jax.tree.map(lambda x: x[first::number], tree)


def sample(estimate, params, extra):
    return jit(lambda params: estimate(KEY, params, None, **extra))(params)


# (number of micro-batches -> estimator of each, that number)
ESTIMATORS = {
    "GNB, a group a row": (lambda parts: gauss_newton_bartlett(groups=ROWS // parts), 4),
    "GNB, draws, groups side by side": (
        lambda parts: gauss_newton_bartlett(groups=ROWS // parts, num_samples=2, parallel_groups=2),
        2,
    ),
    "Hutchinson, a set a row": (lambda parts: hutchinson(groups=ROWS // parts), 4),
    "Hutchinson, four sets": (lambda parts: hutchinson(groups=4 // parts), 2),
    "Hutchinson, four sets, one a part": (lambda parts: hutchinson(groups=4 // parts), 4),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] if n == "Hutchinson, a set a row" else [])
        for n in ESTIMATORS
    ],
)
def test_micro_batches_average_to_the_sample_of_the_whole_batch(name):
    make, number = ESTIMATORS[name]
    with jax.enable_x64(True):
        params, extra = arguments()
        whole = sample(make(1), params, extra)

        @jit
        def average(params):
            samples = []
            for i in range(number):
                inputs, numbers = part((extra["inputs"], NUMBERS), i, number)
                more = extra | {"inputs": inputs, "row_numbers": numbers}
                samples.append(make(number)(KEY, params, None, **more))
            return jax.tree.map(lambda *h: sum(h) / number, *samples)

        close(average(params), whole)


@pytest.mark.parametrize("factory", FACTORIES)
def test_without_numbers_a_part_draws_as_if_its_rows_were_the_first(factory):
    with jax.enable_x64(True):
        params, extra = arguments()
        extra |= {"inputs": part(extra["inputs"], 1, 2)}
        plain, *numbered = (
            sample(factory(groups=4), params, extra | {"row_numbers": numbers})
            for numbers in (None, np.arange(4), np.arange(1, 8, 2))
        )
        close(plain, numbered[0])
        assert not np.allclose(plain["w2"], numbered[1]["w2"])


@pytest.mark.parametrize("factory", FACTORIES)
def test_a_share_of_the_rows_keeps_their_numbers_beside_the_gradient_too(factory):
    with jax.enable_x64(True):
        params, extra = arguments()
        numbers = NUMBERS[::-1] + 100
        half = factory(groups=2, batch_fraction=0.5)
        have = shared(half, params, extra | {"row_numbers": numbers})[2]
        inputs, numbers = part((extra["inputs"], numbers), 0, 2)
        close(
            have,
            sample(factory(groups=2), params, {**extra, "inputs": inputs, "row_numbers": numbers}),
        )


def test_a_set_of_all_shards_has_one_probe():
    """It comes from the smallest row number on any shard, though each shard passes its own."""
    with jax.enable_x64(True):
        params, extra = arguments()
        estimate = hutchinson(groups=2)

        def of_shard(inputs, numbers):
            more = extra | {"inputs": inputs, "row_numbers": numbers}
            return estimate(KEY, params, None, **more, axis_name="data")

        split = PartitionSpec("data")
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        mapped = jax.shard_map(
            of_shard, mesh=mesh, in_specs=(split, split), out_specs=PartitionSpec()
        )
        close(jit(mapped)(extra["inputs"], jnp.asarray(NUMBERS)), sample(estimate, params, extra))


def test_a_function_that_samples_gets_the_key_of_the_groups_first_number():
    def loss(params, rows, key):
        return params[rows[0] % 4] * jax.random.normal(key), 1

    gnb = gauss_newton_bartlett(groups=4)
    numbers = np.array([5, 1, 9, 2])
    extra = {"sampled_loss_fn": loss, "inputs": np.arange(4), "row_numbers": numbers}
    h = sample(gnb, jnp.zeros(4), extra)
    want = [jax.random.normal(jax.random.fold_in(KEY, n)) ** 2 / 4 for n in numbers]
    np.testing.assert_allclose(h, want, rtol=1e-5)


@pytest.mark.parametrize("numbers", [np.arange(7), np.arange(8.0), 3])
@pytest.mark.parametrize("factory", FACTORIES)
def test_numbers_of_another_form_are_refused(factory, numbers):
    params, extra = arguments(dtype="float32")
    with pytest.raises(ValueError, match=r"`row_numbers` must be int32\[8\], a number for each"):
        factory(groups=2)(KEY, params, None, **extra, row_numbers=numbers)
