"""The cost of curvature in a training step: `python -m benchmarks.curvature_cost` (five minutes).

- Operations: XLA's count for a whole step at the paper's batch of 480 x 1024 tokens, lowered but
  not compiled. So nothing is allocated, and XLA merges nothing. Layers are unrolled and groups run
  in parallel, because XLA counts the body of a loop once. The table also has the ratio to the count
  by formula.
- Temporaries: of programs compiled for CPU with few rows, where attention holds its T x T scores.
  These programs are never run.
- Times: of a small batch, with all programs interleaved.

A sample uses every n-th row. The paper uses half of the rows for Sophia-G, and 32 of 480 for
Sophia-H. The overhead at k is what one sample in k steps adds on average. "lax.cond" is one program
that calls `tx.update` and lets the transformation decide when to sample. XLA counts its branch with
curvature at every step.

The larger models take ten minutes: `--models --time --compile gpt2-355m gpt2-770m`.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import sophia_optax
from models import GPT2, DecoderConfig, split
from train.optimizers.base import Due, SamplingPlan
from train.parallel import xla_flags
from train.plan.flops import model_flops
from train.step.batch import Batch, next_tokens
from train.step.loss import Outputs, mean_loss, outputs_of
from train.step.train_step import TrainState, init_state, make_step

MODELS = ("gpt2-30m", "gpt2-125m", "gpt2-355m", "gpt2-770m")
DENOMINATORS = (1, 2, 4, 8, 10, 15, 16, 20)
FEW = (1, 8, 16)
INTERVALS = (1, 5, 10, 20)
SHARE = 8  # tables with only one fraction of rows sample an 8th
GROUPS = 4
Figures = dict[str, dict[str, float]]


class Sampler(NamedTuple):
    """An optimizer and its estimator of curvature."""

    tx: optax.GradientTransformation
    estimator: sophia_optax.Estimator | None = None


def gauss_newton(n: int = 1, groups: int = 1, interval: int = 10) -> Sampler:
    """Sophia-G on every n-th row, with all groups in parallel."""
    estimator = sophia_optax.gauss_newton_bartlett(
        batch_fraction=1 / n, groups=groups, parallel_groups=groups
    )
    return Sampler(
        sophia_optax.sophia_g(1e-3, estimator=estimator, update_interval=interval), estimator
    )


def hutchinson(n: int = 1) -> Sampler:
    """Sophia-H on every n-th row."""
    estimator = sophia_optax.hutchinson(batch_fraction=1 / n)
    return Sampler(sophia_optax.sophia_h(1e-3, estimator=estimator), estimator)


def sampling_of(estimator: sophia_optax.Estimator | None) -> SamplingPlan | None:
    """A plan for one micro-batch; the estimator selects rows and groups itself."""
    return None if estimator is None else SamplingPlan(estimator, 1, 1, 1, 1, 1, "backward")


def lower(
    config: DecoderConfig, sampler: Sampler, refresh: bool | None, rows: int, length: int
) -> jax.stages.Lowered:
    """The trainer's step lowered from shapes. If `refresh` is None, `tx` decides when to sample."""
    model = split(config)
    sampling = sampling_of(sampler.estimator)
    step = make_step(outputs_of(model), sampler.tx, sampling=sampling)
    if refresh is None:
        step = one_program(outputs_of(model), sampler.tx)
    state = jax.eval_shape(functools.partial(init_state, model.init, sampler.tx, 0))
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    step = jax.jit(step, static_argnums=2, donate_argnums=0)
    return step.lower(state, Batch(tokens, tokens), Due(refresh))


def one_program(outputs: Outputs, optimizer: optax.GradientTransformation) -> Any:
    """A step whose `tx` samples curvature inside a `lax.cond`, as in a simple user loop."""
    tx = optax.with_extra_args_support(optimizer)

    def obj_fn(params, batch):
        return mean_loss(outputs(params, batch), batch)

    def step(state, batch, due):
        loss, grads = jax.value_and_grad(obj_fn)(state.params, batch)
        extra = {"obj_fn": obj_fn, "logits_fn": outputs, "inputs": batch, "value": loss}
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), {"loss": loss}

    return step


def flops(program: Any) -> float:
    return program.cost_analysis()["flops"]


def amortized(refresh: float, plain: float, interval: int) -> float:
    """What one refresh in `interval` steps adds on average, as a share of a plain step."""
    return (refresh / plain - 1) / interval


def operations(config: DecoderConfig, rows: int, length: int, denominators: Sequence[int]):
    """A row for the plain step, and for a step with each kind of sample."""
    plain = flops(lower(config, gauss_newton(), False, rows, length))
    by_formula = model_flops(config, rows, length)
    figures: Figures = {"plain": {"flops": plain, "over_formula": plain / by_formula}}
    for name, sampler in samplers(denominators).items():
        refresh = flops(lower(config, sampler, True, rows, length))
        figures[name] = {"flops": refresh, "plain_steps": refresh / plain}
        for k in INTERVALS:
            figures[name][f"overhead_at_{k}"] = amortized(refresh, plain, k)
    return figures


def samplers(denominators: Sequence[int]) -> dict[str, Sampler]:
    return (
        {f"Sophia-G, {_share(n)}": gauss_newton(n) for n in denominators}
        | {f"Sophia-G, {_share(1)}, {GROUPS} groups": gauss_newton(groups=GROUPS)}
        | {f"Sophia-H, {_share(n)}": hutchinson(n) for n in denominators}
    )


def _share(n: int) -> str:
    return "all rows" if n == 1 else f"1/{n}"


def compiled(config: DecoderConfig, rows: int, length: int) -> Figures:
    """XLA's figures for the trainer's two programs, and for one program with a lax.cond."""
    sampler = gauss_newton(SHARE)
    cases = {"plain": False, f"refresh, 1/{SHARE}": True, f"lax.cond, 1/{SHARE}": None}
    figures = {}
    for name, refresh in cases.items():
        # Buffers are assigned before code is generated, so fast options give the same figures.
        options = xla_flags.known(xla_flags.QUICK)
        program = lower(config, sampler, refresh, rows, length).compile(compiler_options=options)
        memory = program.memory_analysis()
        assert memory is not None  # CPU reports it
        figures[name] = {
            "temporary_bytes": memory.temp_size_in_bytes,
            "bytes": (program.cost_analysis() or {})["bytes accessed"],
            "flops": flops(program),
        }
    return figures


def wall_times(config: DecoderConfig, rows: int, length: int, rounds: int) -> Figures:
    """Seconds of a plain step, and the other steps in units of it; runs are interleaved."""
    share = gauss_newton(SHARE, interval=2)
    cases = {
        "plain": (share, False),
        "Sophia-G, all rows": (gauss_newton(), True),
        f"Sophia-G, 1/{SHARE}": (share, True),
        f"Sophia-H, 1/{SHARE}": (hutchinson(SHARE), True),
        "lax.cond": (share, None),
    }
    tokens = jax.random.randint(jax.random.key(1), (rows, length + 1), 0, config.vocab_size)
    batch = next_tokens(tokens)
    init = jax.jit(functools.partial(init_state, split(config).init, share.tx, 0))
    programs, states = {}, {}
    for name, (sampler, refresh) in cases.items():
        programs[name] = lower(config, sampler, refresh, rows, length).compile()
        states[name] = init()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            states[name], _metrics = jax.block_until_ready(program(states[name], batch))
            times[name].append(time.perf_counter() - start)
    return in_plain_steps({name: seconds[1:] for name, seconds in times.items()})


def in_plain_steps(times: dict[str, list[float]]) -> Figures:
    """Medians of ratios to plain steps. With lax.cond, steps 1, 3, ... sample curvature."""
    ratios = {
        name: [t / p for t, p in zip(seconds, times["plain"], strict=True)]
        for name, seconds in times.items()
    }
    alone = ratios.pop("lax.cond")
    ratios |= {"lax.cond, no sample due": alone[::2], f"lax.cond, 1/{SHARE}": alone[1::2]}
    figures = {name: {"plain_steps": statistics.median(r)} for name, r in ratios.items()}
    figures["plain"]["seconds"] = statistics.median(times["plain"])
    return figures


def show_operations(model: str, figures: Figures, rows: int, length: int) -> None:
    plain = figures["plain"]
    table = Table(
        title=f"{model}, {rows} x {length} tokens: a plain step takes {plain['flops'] / 1e15:.3f} "
        f"PFLOP, {plain['over_formula']:.4f} of the count by formula"
    )
    table.add_column("a sample of curvature", no_wrap=True)
    for column in ("step / plain step", *(f"at k = {k}" for k in INTERVALS)):
        table.add_column(column, justify="right")
    for name, row in figures.items():
        if name != "plain":
            overheads = (f"{row[f'overhead_at_{k}']:.2%}" for k in INTERVALS)
            table.add_row(name, f"{row['plain_steps']:.4f}", *overheads)
    Console(width=105).print(table)


def show_programs(model: str, figures: Figures, rows: int, length: int) -> None:
    table = Table(title=f"{model}, compiled for {rows} x {length} tokens, not run")
    table.add_column("program")
    columns = ("temporaries (GB)", "over plain (GB)", "per row (GB)", "bytes (GB)", "TFLOP")
    for column in columns:
        table.add_column(column, justify="right")
    least = figures["plain"]["temporary_bytes"]
    for name, row in figures.items():
        temporary = row["temporary_bytes"]
        gigabytes = (temporary, temporary - least, temporary / rows, row["bytes"])
        cells = (f"{x / 1e9:.2f}" for x in gigabytes)
        table.add_row(name, *cells, f"{row['flops'] / 1e12:.2f}")
    Console(width=105).print(table)


def show_times(model: str, figures: Figures, rows: int, length: int) -> None:
    seconds = figures["plain"]["seconds"]
    table = Table(
        title=f"{model}, {rows} x {length} tokens: a plain step takes {1e3 * seconds:.0f} ms"
    )
    table.add_column("step")
    table.add_column("time / plain step", justify="right")
    for name, row in figures.items():
        table.add_row(name, f"{row['plain_steps']:.2f}")
    Console(width=105).print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = {"nargs": "*", "choices": list(GPT2)}
    parser.add_argument("--models", **names, default=MODELS, help="count operations")
    parser.add_argument(
        "--shares", **names, default=MODELS[1:2], help="models with all fractions of rows"
    )
    parser.add_argument("--compile", **names, default=MODELS[:2], help="count temporaries")
    parser.add_argument("--time", **names, default=["tiny"], help="run")
    parser.add_argument("--batch", type=int, default=480, help="rows, to count operations")
    parser.add_argument("--length", type=int, default=1024, help="tokens per row")
    parser.add_argument(
        "--time-batch", type=int, default=64, help="rows of 64 tokens, to measure time"
    )
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    if args.batch % GROUPS:
        parser.error(f"--batch {args.batch} does not divide into {GROUPS} groups.")
    result: dict[str, dict[str, Figures]] = {"operations": {}, "programs": {}, "times": {}}
    for model in args.models:
        shares = DENOMINATORS if model in args.shares else FEW
        divisors = [n for n in shares if args.batch % n == 0]
        figures = operations(GPT2[model], args.batch, args.length, divisors)
        show_operations(model, figures, args.batch, args.length)
        result["operations"][model] = figures
    for model in args.compile:
        figures = compiled(GPT2[model], SHARE, args.length)
        show_programs(model, figures, SHARE, args.length)
        result["programs"][model] = figures
    for model in args.time:
        figures = wall_times(GPT2[model], args.time_batch, 64, args.rounds)
        show_times(model, figures, args.time_batch, 64)
        result["times"][model] = figures
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
