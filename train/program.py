"""From a config to compiled programs: shapes, then shardings, then arrays."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import models
from train import data
from train.config.schema import Config, resolved
from train.data import tokenizers
from train.data.tokenizers import Tokenizer
from train.optimizers.registry import SophiaGeometric, refresh_due
from train.optimizers.sophia import SophiaG, SophiaH
from train.parallel import mesh
from train.step import heldout, loss
from train.step import train_step as step_lib
from train.step.batch import Batch


class Program(NamedTuple):
    """What a config is turned into before anything is allocated."""

    apply: Callable[..., jax.Array]  # (params, tokens[B, T]) -> logits
    init: Any  # () -> TrainState, each shard made in place
    step: Any  # (state, batch, refresh: static bool or None) -> (state, metrics); state is donated
    due: Callable[[int], bool | None]  # step -> `refresh` of its program
    compile: Any  # refresh -> the compiled step of that kind, (state, batch) -> (state, metrics)
    evaluate: Any  # params, of `evaluate.make_evaluate` -> dict of floats, or None
    data: Callable[[], data.Data]  # read at the first call, with its errors
    batch: Any  # step number -> Batch on the mesh
    abstract: step_lib.TrainState  # ShapeDtypeStruct with sharding, for each leaf of the state


def assemble(config: Config, devices: Sequence[Any] | None = None) -> Program:
    """The programs of a run, on all devices there are or on those given.

    Raises:
      ValueError: the mesh does not fit the devices, or the batch or the model not the mesh.
    """
    placed = mesh.make_mesh(config.mesh, devices)
    config = resolved(config, placed.devices.flat[0].platform)
    _check_rows(config, placed)
    _check_model(config, placed)
    model = _split(config.model, placed)
    tx = _optimizer(config)
    init = functools.partial(step_lib.init_state, model.init, tx, config.seed)
    abstract = _abstract(init, tx, placed, model.specs)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    shapes = _batch_shapes(config, placed)
    loaded = _loaded(config, config.batch_size)
    outputs = loss.outputs_of(model, config.loss_chunk)
    step = jax.jit(
        _step(config, outputs, tx, placed),
        static_argnames="refresh",
        donate_argnums=0,
        out_shardings=(shardings, None),
    )
    return Program(
        apply=model.apply,
        init=jax.jit(init, out_shardings=shardings),
        step=step,
        due=functools.partial(refresh_due, config.optim),
        compile=functools.partial(_compile, step, abstract, shapes),
        evaluate=_evaluate(config, placed, outputs, loaded),
        data=loaded,
        batch=lambda number: data.to_mesh(functools.partial(loaded().batch, number), shapes),
        abstract=abstract,
    )


class Trained(NamedTuple):
    """What is to be known of a config whose parameters are there and are not trained."""

    params: Any  # ShapeDtypeStruct with sharding, for each parameter
    step: Any  # the same, of the number of steps done
    data: Callable[[], data.Data]  # read at the first call, with its errors
    evaluate: Any  # params -> dict of floats


def assemble_trained(config: Config) -> Trained:
    """For parameters sharded over all devices that there are, whatever mesh `run` was trained on.

    Without an optimizer; held-out rows come in batches that divide over the devices.
    """
    devices = jax.device_count()
    placed = mesh.make_mesh(mesh.MeshConfig(fsdp=math.gcd(devices, config.model.width)))
    rows = -(-config.batch_size // devices) * devices
    config = resolved(config, placed.devices.flat[0].platform)
    model = _split(config.model, placed)
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(model.init, jax.random.key(0)),
        mesh.parameter_shardings(placed, model.specs),
    )
    outputs = loss.outputs_of(model, config.loss_chunk)
    whole = NamedSharding(placed, P())
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    loaded = _loaded(config, rows)
    return Trained(params, step, loaded, _evaluate(config, placed, outputs, loaded))


def settled(config: Config) -> Config:
    """The config as it is recorded, so that it means the same from any folder and without its data.

    Paths of the data start at the root. A bin: source brings its tokenizer, and a vocabulary that
    the model has no rows for is made to fit: nobody has named the tokenizer, or the size for it.
    """
    chosen = data.resolved(config.data)
    if config.data.tokenizer != "bytes" or chosen.tokenizer == "bytes":
        return dataclasses.replace(config, data=chosen)
    size = max(config.model.vocab_size, tokenizers.load(chosen.tokenizer).vocab_size)
    model = dataclasses.replace(config.model, vocab_size=size)
    return dataclasses.replace(config, data=chosen, model=model)


def use_compile_cache(folder: str) -> None:
    """Keeps compiled programs between runs: a restart takes seconds."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))


def _check_rows(config: Config, placed: Mesh) -> None:
    devices = mesh.row_devices(placed)
    parts = devices * config.accumulation
    if config.batch_size % parts:
        cut = f" in {config.accumulation} micro-batches" * (config.accumulation > 1)
        raise ValueError(
            f"batch_size={config.batch_size} does not divide over {devices} devices{cut}; choose "
            f"a multiple of {parts}."
        )


def _check_model(config: Config, placed: Mesh) -> None:
    """Each axis of a parameter divides; half a head is no use to attention."""
    model, fsdp, tensor = config.model, placed.shape["fsdp"], placed.shape["tensor"]
    if model.width % fsdp:
        raise ValueError(
            f"--mesh.fsdp {fsdp} does not divide the model's width of {model.width}, along which "
            "parameters are sharded; choose a factor of it."
        )
    sizes = {
        "heads": model.heads,
        "key/value heads": getattr(model, "kv_heads", 0) or model.heads,
        "hidden units (ffn_width)": model.ffn_width or 4 * model.width,
        "words (--model.vocab-multiple pads them)": model.padded_vocab,
    }
    for name, size in sizes.items():
        if size % tensor:
            raise ValueError(
                f"--mesh.tensor {tensor} does not divide the model's {size} {name}; choose a "
                "common factor of them."
            )


def _optimizer(config: Config) -> optax.GradientTransformation:
    optimizer = config.optim.make(
        config.schedule,
        seed=config.seed,
        total_steps=config.steps,
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        max_norm=config.gradient_clip or None,
    )
    if not config.gradient_clip or isinstance(
        config.optim, SophiaGeometric
    ):  # which clips by itself
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.gradient_clip), optimizer)


def _abstract(init, tx: optax.GradientTransformation, placed: Mesh, specs) -> step_lib.TrainState:
    shapes = jax.eval_shape(init)
    params = mesh.parameter_shardings(placed, specs)
    opt_state = mesh.state_shardings(placed, tx.init, shapes.params, params)
    shardings = shapes._replace(step=NamedSharding(placed, P()), params=params, opt_state=opt_state)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def _batch_shapes(config: Config, placed: Mesh) -> Batch:
    sizes = {"batch_size": config.batch_size, "sequence_length": config.sequence_length}
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mesh.batch_sharding(placed)),
        data.batch_shapes(config.data, **sizes),
    )


def _loaded(config: Config, batch_size: int) -> Callable[[], data.Data]:
    return functools.cache(functools.partial(_load, config, batch_size))


def _load(config: Config, batch_size: int) -> data.Data:
    sizes = {"batch_size": batch_size, "sequence_length": config.sequence_length}
    loaded = data.load(config.data, **sizes, seed=config.seed)
    _check_vocabulary(config, loaded.vocab_size)
    wanted = getattr(config.model, "classes", 0)
    if loaded.classes != wanted:
        raise ValueError(
            f"{config.data.source} has {loaded.classes} classes ({', '.join(loaded.class_names)}), "
            f"the model {wanted}: set --model.classes {loaded.classes}."
        )
    return loaded


def load_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of a run's text, where its data is not needed.

    Raises:
      ValueError: there is none, or it has more tokens than the model.
    """
    tokenizer = tokenizers.load(config.data.tokenizer)
    _check_vocabulary(config, tokenizer.vocab_size)
    return tokenizer


def _check_vocabulary(config: Config, tokens: int) -> None:
    if tokens > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer {config.data.tokenizer} has {tokens} tokens, more than the "
            f"{config.model.vocab_size} of the model: set --model.vocab-size {tokens}."
        )


def _evaluate(
    config: Config, placed: Mesh, outputs: loss.Outputs, loaded: Callable[[], data.Data]
) -> Callable[..., dict[str, float] | None]:
    return heldout.make_evaluate(
        functools.partial(outputs, constrain=mesh.constrain_activations(placed)),
        loaded,
        mesh.batch_sharding(placed),
        whole_text=config.data.task == "next-token",
    )


def _compile(step, state: step_lib.TrainState, batch: Batch, refresh: bool | None, options=None):
    return step.lower(state, batch, refresh=refresh).compile(compiler_options=options)


def _split(config: models.DecoderConfig | models.EncoderConfig, placed: Mesh) -> models.Functional:
    model = models.split(config)
    gathered = functools.partial(mesh.gather_embedding, placed)
    functions = ("apply", "features", "logits", "unembedding")
    return model._replace(**{name: gathered(getattr(model, name)) for name in functions})


def _step(config: Config, outputs: loss.Outputs, tx: optax.GradientTransformation, placed: Mesh):
    # cuDNN attention has no second derivative.
    twice_differentiable = _split(dataclasses.replace(config.model, attention="xla"), placed)
    sampling = {}
    if isinstance(config.optim, SophiaG | SophiaH):
        cut = config.batch_size, config.accumulation
        shards = config.optim.shards(mesh.row_devices(placed), *cut)
        sampling["estimator"] = config.optim.estimator(shards, *cut)
        sampling["sample_every"] = config.optim.strides(*cut)[0]
        if shards > 1:
            sampling["constrain_group"] = mesh.constrain_group(placed)
    return step_lib.make_step(
        outputs,
        tx,
        seed=config.seed,
        hessian_outputs=loss.outputs_of(twice_differentiable, config.loss_chunk),
        constrain=mesh.constrain_activations(placed),
        over_rows=functools.partial(mesh.over_rows, placed),
        accumulation=config.accumulation,
        **sampling,
    )
