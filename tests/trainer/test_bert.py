"""BERT: pre-trained on hidden tokens, then a classifier that starts from it."""

import dataclasses
import functools
import json
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import models
import train
from train import loop, program
from train.checkpoint import warm_start
from train.config.presets import preset
from train.config.schema import OutputConfig
from train.data import DataConfig, load
from train.optimizers.base import Due
from train.step.batch import Batch

MODEL = models.EncoderConfig(
    vocab_size=256, context=32, width=32, layers=1, heads=2, ffn_width=64, scan_layers=True
)
TWO = dataclasses.replace(MODEL, layers=2, scan_layers=False)
CLASSES = dataclasses.replace(MODEL, classes=2)


def sentence(draw):
    """One of two words, between others that repeat one letter, is the class."""
    letter, label = draw.choice("abcdefghijklm"), draw.choice(["up", "no"])
    words = [letter * draw.randint(4, 9) for _ in range(3)]
    words.insert(draw.randrange(4), label)
    return {"text": " ".join(words), "verdict": label}


def small(folder, optimizer, *, rate=1e-2, **changes):
    base = preset("tiny-bert", optimizer)
    fields = {
        "model": MODEL,
        "optim": dataclasses.replace(base.optim, learning_rate=rate),
        "output": OutputConfig(folder=str(folder), compile_cache="", quiet=True, log_every=1),
        "batch_size": 32,
        "sequence_length": 32,
        "warmup_steps": 10,
        "evaluate_every": 1000,
    }
    return dataclasses.replace(base, **fields | changes)


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """What eight compute is tested elsewhere, and takes longer."""
    assemble = functools.partial(program.assemble, devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "assemble", lambda run, devices=None: assemble(run))
        yield


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """What `DataConfig` says of a labelled file."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    lines = [json.dumps(sentence(draw)) + "\n" for _ in range(1000)]
    (folder / "toy.jsonl").write_text("".join(lines))
    return {
        "source": f"jsonl:{folder / 'toy.jsonl'}",
        "cache": str(folder / "cache"),
        "label_field": "verdict",
        "heldout_fraction": 0.1,
    }


@pytest.fixture(scope="module")
def masked(texts, tmp_path_factory):
    """(folder, history) of a run that names hidden bytes."""
    folder = tmp_path_factory.mktemp("runs") / "masked"
    data = DataConfig(task="masked", **texts)
    return folder, train.train(small(folder, "adamw", steps=120, data=data))


def test_hidden_bytes_are_named_better_than_their_frequencies_tell(masked, texts):
    data = load(DataConfig(task="masked", **texts), batch_size=32, sequence_length=32, seed=0)
    hidden = np.concatenate([batch.targets[batch.weights > 0] for batch in data.heldout()])
    counts = np.bincount(hidden)
    shares = counts[counts > 0] / len(hidden)
    entropy, reached = -np.sum(shares * np.log(shares)), masked[1][-1]["heldout_loss"]
    assert masked[1][0]["loss"] == pytest.approx(math.log(256), rel=0.1)
    assert reached < 0.75 * entropy


def test_a_classifier_starts_from_a_run_on_hidden_tokens(masked, texts, tmp_path):
    data, start = DataConfig(task="classify", **texts), str(masked[0])
    run = small(tmp_path / "run", "adamw", steps=60, model=CLASSES, data=data, start_from=start)
    history = train.train(run)
    assert history[0]["loss"] == pytest.approx(math.log(2), rel=0.1)
    assert history[-1]["accuracy"] > 0.9


def equal(have, want):
    assert jax.tree.structure(have) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, have, want)


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    """The folder of a run that has done nothing."""
    folder = tmp_path_factory.mktemp("two")
    loop.begin(small(folder, "adamw", steps=11, model=TWO))
    return folder


def started(folder, model):
    """The parameters of a run of `model` that starts from that folder."""
    run = small("", "adamw", steps=11, model=model)
    return warm_start.start_from(folder, run, program.assemble(run).abstract.params)


def test_a_run_starts_from_layers_stacked_or_not(masked, two_layers):
    stacked, apart = (warm_start.load(folder).params for folder in (masked[0], two_layers))
    model = dataclasses.replace(MODEL, scan_layers=False)
    equal(started(masked[0], model), models.unstack_blocks(stacked))
    model = dataclasses.replace(TWO, scan_layers=True)
    equal(started(two_layers, model), models.stack_blocks(apart))


def test_the_head_of_another_task_stays_fresh_as_a_whole(masked):
    """The masked head's first matrix has the shape of the pooler's, and is none."""
    run = small("", "adamw", steps=11, model=CLASSES, data=DataConfig(task="classify"))
    fresh = program.assemble(run).abstract.params
    begun = warm_start.start_from(masked[0], run, fresh)
    assert jax.tree.leaves(begun["head"]) == jax.tree.leaves(fresh["head"])
    there = warm_start.load(masked[0]).params
    equal(*({**params, "head": None} for params in (begun, there)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"width": 16, "layers": 2},
            r"holds another model: \['.*'\] is \(.*32.*\), not \(.*--model",
        ),
        ({"layers": 1}, r"\['01'\]\['attention'\]\['key'\] is \(32, 32\), not None;"),
        ({"layers": 3}, r"\['02'\]\['attention'\]\['key'\] is None, not \(32, 32\);"),
        ({"vocab_size": 300}, r"\['tokens'\]\['embedding'\] is \(256, 32\), not \(300, 32\)"),
    ],
)
def test_another_model_is_refused_with_the_name_of_a_parameter(two_layers, change, message):
    with pytest.raises(ValueError, match=message):
        started(two_layers, dataclasses.replace(TWO, **change))


def test_other_tokens_are_refused(masked, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "rain"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    data = DataConfig(task="masked", tokenizer=str(tmp_path / "vocab.txt"))
    run = small("", "adamw", steps=11, data=data)
    with pytest.raises(ValueError, match=r"tokens of bytes.*set --data.tokenizer bytes"):
        warm_start.start_from(masked[0], run, None)


TINY = models.EncoderConfig(
    vocab_size=8, context=6, width=8, layers=1, heads=2, ffn_width=8, token_types=1
)


def exact_diagonal(params, batch):
    """Of Gauss-Newton, by the definition: the mean over what counts of J' (diag(p) - p p') J."""
    flat, unravel = ravel_pytree(params)
    model = models.split(TINY)
    logits = lambda flat: model.apply(unravel(flat), batch.inputs)  # noqa: E731
    jacobian = jax.jit(jax.jacfwd(logits))(flat)
    shares = jax.nn.softmax(logits(flat))[..., None]
    mean = jnp.sum(shares * jacobian, -2, keepdims=True)
    each = jnp.sum(shares * (jacobian - mean) ** 2, -2)
    return jnp.einsum("bt,btp->p", batch.weights, each) / batch.weights.sum()


@pytest.mark.slow
def test_a_sample_of_a_masked_batch_is_of_what_is_hidden_alone():
    """The mean of 400 draws, in two micro-batches, of rows that hide 0 to 6 tokens.

    What stands at the others changes nothing at all.
    """
    draw = np.random.default_rng(0)
    tokens = draw.integers(8, size=(8, 6)).astype(np.int32)
    weights = (np.arange(6) < np.array([0, 1, 6, 2, 0, 5, 3, 1])[:, None]).astype(np.float32)
    inputs = np.where(weights > 0, 0, tokens)
    other = np.where(weights > 0, tokens, (tokens + 1) % 8)
    run = small("", "sophia-g", steps=11, model=TINY, batch_size=8, sequence_length=6)
    optim = dataclasses.replace(run.optim, num_samples=400)
    programs = program.assemble(dataclasses.replace(run, optim=optim, accumulation=2))
    step = programs.compile(Due(True))
    states = [step(programs.init(), Batch(inputs, x, weights)) for x in (tokens, other)]
    equal(states[0], states[1])
    state = states[0][0].opt_state
    mass = optax.tree.get(state, "mass")
    sample = ravel_pytree(optax.tree.get(state, "h"))[0] / mass
    exact = exact_diagonal(programs.init().params, Batch(inputs, tokens, weights))
    assert jnp.sum((sample - exact) ** 2) < 0.01 * jnp.sum(exact**2)
    assert float(jnp.sum(sample) / jnp.sum(exact)) == pytest.approx(1, abs=0.05)
