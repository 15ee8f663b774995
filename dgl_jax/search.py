"""A search from beginning to end: pretraining, outer steps, cuts and heads for any K."""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import auto as tqdm

from dgl_jax import cost, distributed, metrics
from dgl_jax.auxiliary import OPTIONS, make_heads
from dgl_jax.block import init_block_state, make_block_step
from dgl_jax.config import PlacementConfig, SearchConfig, SearchSettings, to_dict
from dgl_jax.data import load_dataset
from dgl_jax.errors import UserError, not_finite_error
from dgl_jax.grouping import compute_dtype, configured_network
from dgl_jax.losses import make_loss_fn
from dgl_jax.methods import METHODS
from dgl_jax.models import check_image_shape
from dgl_jax.models.network import Network
from dgl_jax.optim import make_optimizer
from dgl_jax.partition import balanced_cuts, check_num_blocks, slowest_block_cost
from dgl_jax.pipeline import run_once
from dgl_jax.placement import make_placements
from dgl_jax.precision import matmul_precision
from dgl_jax.provenance import provenance
from dgl_jax.run_folder import check_writable, extra, previous_run, write_summary
from dgl_jax.sedona.discretise import discretise, discretise_balanced
from dgl_jax.sedona.hypergradient import ESTIMATORS, make_hypergradient
from dgl_jax.sedona.inner import make_inner_step
from dgl_jax.sedona.outer import (
    OuterState,
    from_bytes,
    make_outer_optimizer,
    make_outer_step,
    snapshot_steps,
    to_bytes,
)
from dgl_jax.sedona.relaxation import init_state, init_variables, relax, relaxed_network
from dgl_jax.sedona.result import SearchResult, write_result
from dgl_jax.types import Batch

RESULT_FILE = "search.json"


def search(config: SearchConfig, workdir: str) -> dict[str, Any]:
    """Searches cuts and heads by SEDONA; goes on where a killed run stopped.

    Pretraining trains all layers and candidates with every signal and candidate weighed alike,
    and keeps snapshots of the weights. Each outer step draws one of them, moves the decision
    variables, and stores it back one inner step further on.

    Args:
      config: what to search.
      workdir: the run's folder; gets search.json (the result, for ``partition.from_search``),
        config.json, metrics.jsonl, TensorBoard events, checkpoints, pictures and summary.json.

    Returns:
      The summary, as in summary.json.

    Raises:
      UserError: a mistake in the configuration, or a loss that is not finite.
    """
    with matmul_precision(config.precision):
        return _search(config, workdir)


def _search(config: SearchConfig, workdir: str) -> dict[str, Any]:
    start_time = time.perf_counter()
    settings = config.search
    if distributed.num_processes() > 1:
        raise UserError("a search runs in one process only; leave out --num_processes")

    # ---- The run's folder; a search that is finished already is not touched. Where another K is
    # asked of it, what follows the loop is done again from the last checkpoint.
    previous = previous_run(config, workdir)
    if (
        previous
        and previous["summary"].get("finished")
        and all(
            previous["config"]["search"].get(name) == to_dict(config)["search"][name]
            for name in ("num_blocks", "max_imbalance", "backprop_steps")
        )
    ):
        return previous["summary"]
    check_writable(workdir)

    # ---- Data: the weights learn on one side of the split, the decision variables on the other.
    data = dataclasses.asdict(config.data) | {"seed": config.seed}
    size, held_out_size = settings.batch_size, settings.validation_batch_size
    train = load_dataset(**data, batch_size=size, eval_batch_size=size)
    data |= {"held_out": True, "augment": False, "batch_size": held_out_size}
    held_out = load_dataset(**data, eval_batch_size=held_out_size)

    # ---- The network, and all that it may be made of.
    dtype = compute_dtype(config)
    network = configured_network(config, train.num_classes)
    check_image_shape(network, train.image_shape)
    num_layers = len(network.layers)
    for num_blocks in settings.num_blocks:
        check_num_blocks(num_layers, num_blocks, "config.search.num_blocks")
    options = {option: getattr(config.auxiliary, option) for option in OPTIONS}
    candidates = make_heads(
        settings.candidates,
        train.num_classes,
        dtype=dtype,
        field="config.search.candidates",
        **options,
    )
    loss_fn = make_loss_fn(config.loss)
    relaxed = relaxed_network(network, candidates, loss_fn)

    # ---- States and programs.
    num_pretraining, num_outer = settings.num_pretraining_steps, settings.num_outer_steps
    optimizer = make_optimizer(config.optimizer, num_pretraining, train.steps_per_epoch)
    outer_optimizer = make_outer_optimizer(settings)
    key = jax.random.key(config.seed)
    images = jnp.zeros((settings.batch_size, *train.image_shape))
    # Committed to the device, as what a step returns is: its program is then compiled once.
    device_memory = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    variables = init_variables(num_layers, len(candidates))
    weights, outer_state = jax.device_put(
        (
            init_state(
                relaxed,
                optimizer,
                key,
                images,
                kernel_init=config.network.kernel_init,
                norm_init=config.network.norm_init,
                compiler_options=run_once(jax.devices()[0]),
            ),
            OuterState(variables, outer_optimizer.init(variables)),
        ),
        device_memory,
    )
    probabilities = jax.jit(relax)
    undecided = probabilities(outer_state.variables)
    snapshot_memory = _snapshot_memory(settings, weights)
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    # Until pretraining gets to them, the snapshots are the first weights, so that every
    # checkpoint has one structure.
    snapshots = [jax.device_put(copy(weights), snapshot_memory)] * settings.num_snapshots
    pretraining_step = jax.jit(make_inner_step(relaxed, optimizer), donate_argnums=0)
    hypergradient = make_hypergradient(
        ESTIMATORS[settings.hypergradient], relaxed, optimizer, remat=settings.remat
    )
    outer_step = jax.jit(
        make_outer_step(relaxed, optimizer, outer_optimizer, hypergradient), donate_argnums=(0, 1)
    )

    # ---- What the folder holds already is gone on with.
    from dgl_jax import checkpoint  # Imports orbax, which takes a second.

    saved = _to_save(outer_state, weights, snapshots)
    num_steps = num_pretraining + num_outer
    checkpointer = checkpoint.open_checkpointer(os.path.join(workdir, "checkpoints"))
    # Latest and next.
    checkpoint.check_room(checkpointer, saved, num_checkpoints=2, last_step=num_steps)
    config_json = json.dumps(to_dict(config), indent=2)
    metrics.write_atomically(os.path.join(workdir, "config.json"), config_json)
    made_by = provenance()  # Once: the checkout may change while the search goes on.
    write_summary(workdir, {"finished": False, "made_by": made_by})
    first_step = 0
    record = {"pretraining_seconds": 0.0, "outer_seconds": 0.0, "compile_seconds": 0.0}
    restored = checkpoint.restore_latest(checkpointer, saved)
    if restored is not None:
        first_step, saved, record = restored
        outer_state = saved["outer"]
        weights, *snapshots = [
            jax.device_put(from_bytes(vector, weights), memory)
            for vector, memory in zip(
                (saved["weights"], *saved["snapshots"]),
                (device_memory, *[snapshot_memory] * settings.num_snapshots),
            )
        ]
    del saved
    checkpoint_every = config.checkpoint.every_steps or max(1, num_steps // 20)
    keep_after = {step: index for index, step in enumerate(snapshot_steps(settings))}
    log = _SearchLog(workdir, first_step, num_steps)

    def wall_seconds():  # Of this process and those before it; an older checkpoint has none.
        return record.get("wall_seconds", 0.0) + time.perf_counter() - start_time

    # ---- The loop. The host only dispatches steps, under the guard as in training.
    clock, compiled_before = time.perf_counter(), metrics.compile_seconds()
    with contextlib.ExitStack() as stack:
        for close in (train.close, held_out.close, log.close):
            stack.callback(close)
        stack.enter_context(checkpointer)
        for step in range(first_step, num_steps):
            with jax.transfer_guard("disallow"):
                if step < num_pretraining:
                    phase, decisions = "pretrain", None
                    weights, losses = pretraining_step(
                        weights, undecided, train.batch_at(step), key
                    )
                    if step + 1 in keep_after:
                        snapshots[keep_after[step + 1]] = jax.device_put(
                            copy(weights), snapshot_memory
                        )
                    scalars = {"layer_losses": losses}
                else:
                    phase, outer = "search", step - num_pretraining
                    index = _draw(config.seed, outer, settings.num_snapshots)
                    snapshot = jax.device_put(snapshots[index], device_memory)
                    start = num_pretraining + outer * (settings.num_inner_steps + 1)
                    batches = [
                        train.batch_at(start + t) for t in range(settings.num_inner_steps + 1)
                    ]
                    outer_state, snapshot, scalars = outer_step(
                        outer_state, snapshot, batches, held_out.batch_at(outer), key
                    )
                    snapshots[index] = jax.device_put(snapshot, snapshot_memory)
                    decisions = probabilities(outer_state.variables)
            log.append(phase, scalars)
            step += 1
            is_saved = step % checkpoint_every == 0 or step in (num_pretraining, num_steps)
            if is_saved or step % settings.log_every_steps == 0:
                log.end_interval(step, phase, decisions)
            if is_saved:
                log.flush()
                now, compiled = time.perf_counter(), metrics.compile_seconds()
                name = "pretraining_seconds" if phase == "pretrain" else "outer_seconds"
                record[name] += now - clock
                record["compile_seconds"] += compiled - compiled_before
                clock, compiled_before = now, compiled
                saved = _to_save(outer_state, weights, snapshots)
                about = record | {"wall_seconds": wall_seconds()}
                checkpoint.save(checkpointer, step, saved, top1=None, record=about)
                del saved
        checkpointer.wait()

    # ---- What came of it.
    found = jax.device_get(outer_state.variables)
    alpha, beta = (tuple(map(tuple, rows.tolist())) for rows in (found.alpha, found.beta))
    heads = [candidates[index] for index in np.argmax(found.beta, axis=1)]
    layer_flops, head_flops = cost.layer_and_head_costs(
        network, heads, train.image_shape, settings.batch_size, "flops"
    )
    groupings, balanced_groupings = {}, {}
    for num_blocks in settings.num_blocks:
        best = balanced_cuts(layer_flops, head_flops, num_blocks)
        bound = settings.max_imbalance * slowest_block_cost(layer_flops, head_flops, best)
        for into, found_cuts in (
            (groupings, discretise(alpha, beta, num_blocks)),
            (
                balanced_groupings,
                discretise_balanced(alpha, beta, num_blocks, layer_flops, head_flops, bound),
            ),
        ):
            into[str(num_blocks)] = {
                "cuts": list(found_cuts.cuts),
                "heads": [settings.candidates[head] for head in found_cuts.heads],
                "margin": found_cuts.margin,
                # Of the network's own FLOPs; its inverse bounds the speed-up by parallel blocks.
                "slowest_block": slowest_block_cost(layer_flops, head_flops, found_cuts.cuts)
                / (sum(layer_flops) + head_flops[-1]),
            }
    search_seconds = record["pretraining_seconds"] + record["outer_seconds"]
    summary = {
        "finished": True,
        "network": config.network.name,
        "dataset": config.data.name,
        "seed": config.seed,
        "num_layers": num_layers,
        "candidates": list(settings.candidates),
        "hypergradient": settings.hypergradient,
        "snapshots": settings.snapshots,
        "pretraining_steps": num_pretraining,
        "outer_steps": num_outer,
        "inner_steps": settings.num_inner_steps,
        "groupings": groupings,
        "max_imbalance": settings.max_imbalance,
        "balanced_groupings": balanced_groupings,
        "layer_flops": layer_flops,
        "head_flops": head_flops,
        "pretraining_seconds": record["pretraining_seconds"],
        "outer_seconds": record["outer_seconds"],
        "compile_seconds": record["compile_seconds"],
        "backprop_step_seconds": None,
        "backprop_steps": settings.backprop_steps,
        "cost_in_backprop_trainings": None,
        "wall_seconds": wall_seconds(),
        "snapshot_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(snapshots)),
        "snapshot_memory": snapshot_memory.memory_kind,
        "peak_memory_bytes": cost.peak_memory_bytes(),
        "variables_sha256": hashlib.sha256(
            found.alpha.tobytes() + found.beta.tobytes()
        ).hexdigest(),
        "made_by": made_by,
        "jax_version": jax.__version__,
        "device_kind": jax.devices()[0].device_kind,
    }
    write_result(
        os.path.join(workdir, RESULT_FILE),
        SearchResult(config.network.name, settings.candidates, alpha, beta),
        {"groupings": groupings, "balanced_groupings": balanced_groupings},
    )
    write_summary(workdir, summary)

    # ---- Extras: one that fails costs a line and nothing else.
    def time_backprop():
        seconds = _backprop_step_seconds(config, network, optimizer, train.image_shape)
        return {
            "backprop_step_seconds": seconds,
            "cost_in_backprop_trainings": search_seconds / (settings.backprop_steps * seconds),
        }

    summary |= extra("timing a step of backprop", time_backprop)
    write_summary(workdir, summary)

    def draw():
        from dgl_jax.sedona.plots import plot_search  # Imports matplotlib.

        plot_search(workdir, summary)

    extra("the plots", draw)
    return summary


def _to_save(outer_state: OuterState, weights: Any, snapshots: list[Any]) -> dict[str, Any]:
    """What a checkpoint holds. Of weights it has one vector, not thousands of small files."""
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    return {
        "outer": outer_state,
        "weights": jax.device_put(to_bytes(weights), host),
        "snapshots": [jax.device_put(to_bytes(snapshot), host) for snapshot in snapshots],
    }


def _snapshot_memory(settings: SearchSettings, weights: Any) -> jax.sharding.Sharding:
    """Where snapshots lie. ``auto``: on the device, if they take a quarter of it at the most."""
    device = jax.devices()[0]
    on_host = settings.snapshot_memory == "host"
    if settings.snapshot_memory == "auto":
        size = settings.num_snapshots * sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
        limit = (device.memory_stats() or {}).get("bytes_limit")  # None on a CPU.
        on_host = limit is not None and size > limit / 4
    kind = "pinned_host" if on_host else device.default_memory().kind
    return jax.sharding.SingleDeviceSharding(device, memory_kind=kind)


def _draw(seed: int, outer_step: int, num_snapshots: int) -> int:
    """Which snapshot an outer step takes: a function of (seed, step)."""
    return int(np.random.default_rng((seed, outer_step)).integers(num_snapshots))


def _backprop_step_seconds(
    config: SearchConfig, network: Network, optimizer: Any, image_shape: tuple[int, ...]
) -> float:
    """One step of the network by backprop, as long as the search's device and batch make it."""
    size = config.search.batch_size
    batch = Batch(jnp.zeros((size, *image_shape)), jnp.zeros(size, jnp.int32))
    blocks = METHODS["backprop"].make_blocks(network, (), None, make_loss_fn(config.loss))
    init = jax.jit(lambda key, x: init_block_state(blocks[0], optimizer, key, x))
    state = init(jax.random.key(config.seed), batch.images)
    placements = make_placements(PlacementConfig(), num_blocks=1)
    works = [make_block_step(blocks[0], optimizer)]
    (seconds,) = cost.block_step_seconds(blocks, works, [state], batch, placements)
    return seconds


class _SearchLog:
    """Writes each interval's means, a whole interval late, and shows progress."""

    def __init__(self, workdir: str, first_step: int, num_steps: int):
        self._writer = metrics.MetricsWriter(workdir, first_step=first_step)
        self._bar = tqdm.tqdm(total=num_steps, initial=first_step, unit="step", disable=None)
        self._rows, self._unread = [], []

    def append(self, phase: str, scalars: dict[str, jax.Array]) -> None:
        self._bar.set_description(phase, refresh=False)
        self._bar.update()
        self._rows.append(scalars)

    def end_interval(self, step: int, phase: str, decisions: Any) -> None:
        """Takes the steps since the last interval; `decisions` are those after the last step."""
        if self._rows:
            self._unread.append((step, phase, self._rows, decisions))
        self._rows = []
        if len(self._unread) > 1:
            self._read()

    def flush(self) -> None:
        """Waits for all intervals taken so far and writes them.

        Raises:
          UserError: a loss was not finite.
        """
        while self._unread:
            self._read()

    def close(self) -> None:
        self._writer.close()
        self._bar.close()

    def _read(self) -> None:
        step, phase, rows, decisions = self._unread.pop(0)
        rows, decisions = jax.device_get((rows, decisions))
        for offset, row in enumerate(rows):
            for name, value in row.items():
                if not np.all(np.isfinite(value)):
                    raise not_finite_error(f"{phase}/{name}", step - len(rows) + 1 + offset)
        means = {name: np.mean([row[name] for row in rows], axis=0) for name in rows[0]}
        line = {}
        for layer, loss in enumerate(means.pop("layer_losses", ())):
            line[f"{phase}/layer_{layer}/loss"] = line[f"{phase}/loss"] = float(loss)
        line |= {f"{phase}/{name}": float(value) for name, value in means.items()}
        if decisions is not None:
            for layer, (signal, heads) in enumerate(zip(decisions.signal, decisions.head)):
                line[f"{phase}/layer_{layer}/local"] = float(signal[0])
                for head, weight in enumerate(heads):
                    line[f"{phase}/layer_{layer}/head_{head}"] = float(weight)
        self._writer.write(step, line)
        shown = ("search/validation_loss", "search/validation_top1", "pretrain/loss")
        texts = [f"{name.partition('/')[2]} {line[name]:.3f}" for name in shown if name in line]
        self._bar.set_postfix_str(", ".join(texts))
