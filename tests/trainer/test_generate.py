"""Text from a model: what is picked, and that a cache changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import DecoderConfig, EncoderConfig
from train.generate import Picking, pick, sample

CONFIG = DecoderConfig(vocab_size=20, context=8, width=16, layers=1, heads=2)
PARAMS = jax.tree.map(lambda x: 8 * x, jax.jit(models.split(CONFIG).init)(jax.random.key(0)))
LOGITS = jnp.log(jnp.array([0.05, 0.4, 0.1, 0.3, 0.15]))


@functools.cache
def shares(how):
    draws = jax.vmap(lambda key: pick(key, LOGITS, how))(jax.random.split(jax.random.key(1), 4000))
    return np.bincount(draws, minlength=5) / 4000


@pytest.mark.parametrize(
    ("how", "want"),
    [
        (Picking(temperature=1.0), [0.05, 0.4, 0.1, 0.3, 0.15]),
        (Picking(temperature=0.5), np.array([0.05, 0.4, 0.1, 0.3, 0.15]) ** 2),
        (Picking(temperature=1.0, top_k=2), [0, 0.4, 0, 0.3, 0]),
        (Picking(temperature=1.0, top_k=9), [0.05, 0.4, 0.1, 0.3, 0.15]),
        (Picking(temperature=1.0, top_p=0.8), [0, 0.4, 0, 0.3, 0.15]),
        (Picking(temperature=1.0, top_p=0.6, top_k=3), [0, 0.4, 0, 0.3, 0]),
        (Picking(temperature=1.0, top_p=1e-6), [0, 1, 0, 0, 0]),
        (Picking(temperature=0), [0, 1, 0, 0, 0]),
    ],
)
def test_tokens_are_picked_in_proportion_to_what_is_left_of_them(how, want):
    want = np.asarray(want) / np.sum(want)
    assert np.all((shares(how) > 0) <= (want > 0))
    np.testing.assert_allclose(shares(how), want, atol=5 * np.sqrt(0.25 / 4000))


@pytest.mark.parametrize(
    "how",
    [
        Picking(temperature=-1),
        Picking(temperature=float("nan")),
        Picking(top_k=-1),
        Picking(top_p=0),
        Picking(top_p=1.1),
    ],
)
def test_what_picks_nothing_is_refused(how):
    with pytest.raises(ValueError, match=r"--top-k .* picks nothing"):
        sample(CONFIG, PARAMS, np.array([1]), length=1, how=how)


def test_a_cold_sample_takes_the_likeliest_token_each_time():
    """Where the context is full, its later half is what the text goes on from."""
    have = sample(CONFIG, PARAMS, np.array([3, 1]), length=17, how=Picking(temperature=0))
    apply, text = jax.jit(models.split(CONFIG).apply), [3, 1]
    start = 0
    for _ in range(17):
        if len(text) - start > CONFIG.context:
            start = len(text) - CONFIG.context // 2
        window = text[start:]
        padded = np.pad(window, (0, CONFIG.context - len(window)))
        text.append(int(apply(PARAMS, padded[None])[0, len(window) - 1].argmax()))
    np.testing.assert_array_equal(have, text)


def test_a_sample_is_a_function_of_its_seed_and_keeps_the_prompt():
    warm = Picking(temperature=9)
    draw = functools.partial(sample, CONFIG, PARAMS, np.array([3, 1]), length=5, how=warm)
    np.testing.assert_array_equal(draw(seed=1), draw(seed=1))
    assert (draw(seed=1) != draw(seed=2)).any()
    np.testing.assert_array_equal(draw()[:2], [3, 1])
    assert len(draw()) == 7


def test_tokens_that_the_tokenizer_lacks_are_not_drawn():
    drawn = sample(CONFIG, PARAMS, np.array([3]), length=40, how=Picking(temperature=9), tokens=5)
    assert drawn.max() < 5


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(ValueError, match=rf"seed={seed} must be .* choose another --seed"):
        sample(CONFIG, PARAMS, np.array([3]), length=1, seed=seed)


def test_an_empty_prompt_and_an_encoder_are_refused():
    with pytest.raises(ValueError, match="prompt is empty"):
        sample(CONFIG, PARAMS, np.array([], int), length=1)
    with pytest.raises(ValueError, match="give a decoder"):
        sample(EncoderConfig(vocab_size=8, width=8, heads=2, layers=1), {}, np.ones(1), length=1)
