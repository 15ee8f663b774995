"""A training run from beginning to end."""

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import auto as tqdm

from dgl_jax import (
    cost,
    distributed,
    drift,
    evaluation,
    metrics,
    placement,
    trace,
)
from dgl_jax.config import LOCAL_METHODS, Config, to_dict
from dgl_jax.data import Dataset, describe_dataset, load_dataset, load_dataset_in_parts
from dgl_jax.errors import UserError, WorkerError, not_finite_error
from dgl_jax.grouping import (
    choose_cuts_heads_and_devices,
    configured_blocks,
    configured_network,
)
from dgl_jax.losses import SIMILARITY_LOSSES, local_losses
from dgl_jax.methods import METHODS
from dgl_jax.models import check_image_shape
from dgl_jax.optim import make_optimizer, make_schedule
from dgl_jax.pipeline import activation_shapes, init_states
from dgl_jax.precision import matmul_precision
from dgl_jax.provenance import provenance
from dgl_jax.run_folder import check_writable, extra, previous_run, write_summary
from dgl_jax.schedule import APPLY, BACKWARD, UPDATE, calls
from dgl_jax.transfer import fetch, is_local, place
from dgl_jax.types import Batch, TrainState

_IN_SEVERAL_PROCESSES = (
    "dgl",
    "sequential",
    "ddg",
    "features_replay",
    "backprop",
    "data_parallel",
    "pipeline_backprop",
)


def train_and_evaluate(config: Config, workdir: str) -> dict[str, Any] | None:
    """Trains a network as decoupled blocks; goes on where a killed run stopped.

    Args:
      config: what to train.
      workdir: the run's folder; gets config.json, metrics.jsonl, TensorBoard events,
        checkpoints, plots and summary.json.

    Returns:
      The summary, as in summary.json; None in all processes but the first.

    Example (no doctest: it trains for an epoch and writes a folder):
      fields = {"network": {"name": "cnn4", "width_factor": 0.25}, "train": {"num_epochs": 1.0}}
      summary = train_and_evaluate(from_dict(fields), "runs/mine")  # Of dgl_jax.config.
      summary["test_top1"]  # Of each block that classifies, a fraction in [0, 1].

    Raises:
      UserError: a mistake in the configuration, or a metric that is not finite.
      WorkerError: a worker of async_dgl_parallel failed; a checkpoint of all blocks is kept.
    """
    with matmul_precision(config.precision):
        return _train_and_evaluate(config, workdir)


def _train_and_evaluate(config: Config, workdir: str) -> dict[str, Any] | None:
    start_time, start_compile_seconds = time.perf_counter(), metrics.compile_seconds()

    # ---- The run's folder; a run that is finished already is not touched. Of several processes
    # the first one reads and writes there, and says what it found.
    placement.request_cpu_devices(config.placement)
    if config.method.name == "data_parallel":
        config = dataclasses.replace(config, placement=placement.over_all(config.placement))
    distributed.check_same(to_dict(config))
    if distributed.num_processes() > 1 and config.method.name not in _IN_SEVERAL_PROCESSES:
        raise UserError(
            f"config.method.name={config.method.name} runs in one process only; leave out "
            f"--num_processes, or choose from {', '.join(_IN_SEVERAL_PROCESSES)}"
        )
    is_main = distributed.is_main()
    previous = distributed.agree(previous_run(config, workdir) if is_main else None)
    if previous and previous["summary"].get("finished"):
        if is_main and not os.path.exists(os.path.join(workdir, "learning_curves.png")):
            extra("the plots", lambda: _draw(workdir, previous["summary"]))
        return previous["summary"] if is_main else None
    if is_main:
        check_writable(workdir)

    # ---- Network, cuts, blocks: known before any data is on a device.
    data = config.data
    description = describe_dataset(
        name=data.name, data_dir=data.data_dir, image_size=data.image_size
    )
    image_shape, num_classes = description.image_shape, description.num_classes
    network = configured_network(config, num_classes)
    check_image_shape(network, image_shape)
    # Costs that are measured differ from process to process.
    cuts, head_names, devices_per_block = map(
        tuple,
        distributed.agree(
            choose_cuts_heads_and_devices(
                config,
                network,
                num_classes,
                image_shape,
                resolved=previous["config"]["resolved"] if previous else None,
            )
        ),
    )
    method = METHODS[config.method.name]
    blocks = configured_blocks(config, network, cuts, head_names, num_classes)
    num_blocks = len(blocks)
    placements = placement.make_placements(config.placement, num_blocks, devices_per_block)
    placement.check_processes(placements)
    placement.check_meshes(placements)

    # ---- Data, on the devices of the first block.
    load = load_dataset if distributed.num_processes() == 1 else load_dataset_in_parts
    dataset = load(
        **dataclasses.asdict(data),
        batch_size=config.train.batch_size,
        eval_batch_size=config.eval.batch_size,
        seed=config.seed,
        sharding=placements[0].batch,
    )
    steps_per_epoch = dataset.steps_per_epoch
    num_updates = config.train.num_steps or round(config.train.num_epochs * steps_per_epoch)
    if num_updates < 1:
        raise UserError(
            f"config.train.num_epochs={config.train.num_epochs} is less than one step; "
            f"an epoch has {steps_per_epoch} steps"
        )
    if not previous:
        losses = local_losses(config.loss, len(cuts) + 1)
        _check_first_batch(losses, dataset, config.train.batch_size)

    steps_per_call = config.train.steps_per_call
    if steps_per_call > 1 and (dataset.stream is None or distributed.num_processes() > 1):
        raise UserError(
            f"config.train.steps_per_call={steps_per_call} needs one process and data that lies "
            "whole on its devices; leave it at 1"
        )
    if steps_per_call > steps_per_epoch:
        raise UserError(
            f"config.train.steps_per_call={steps_per_call} must not exceed the {steps_per_epoch} "
            f"steps of an epoch; try {steps_per_epoch}"
        )

    # ---- In what order they run. A step is one turn of the schedule, an epoch of it the steps
    # in which every block sees every image once, on average.
    schedule = method.make_schedule(config, num_blocks, num_updates, steps_per_epoch)
    num_steps, num_updates = schedule.num_steps, schedule.num_updates
    epoch_steps = num_steps / num_updates * steps_per_epoch
    eval_every = max(1, round(config.eval.every_epochs * epoch_steps))
    checkpoint_every = config.checkpoint.every_steps or max(1, round(epoch_steps))

    # ---- States and programs, where the blocks live.
    optimizer_config = dataclasses.replace(
        config.optimizer,
        drop_epochs=tuple(e + schedule.drop_delay_epochs for e in config.optimizer.drop_epochs),
    )
    optimizer = make_optimizer(optimizer_config, num_updates, steps_per_epoch)
    key = jax.random.key(config.seed)
    images = jax.ShapeDtypeStruct((config.train.batch_size, *image_shape), jnp.float32)
    block_states = init_states(blocks, optimizer, key, image_shape, placements)
    # However they were asked for, a runner finds the updates of each block in train.num_steps.
    train_config = dataclasses.replace(config.train, num_steps=num_updates, num_epochs=0.0)
    recorder = trace.start() if config.trace else trace.stop()
    runner = method.make_runner(
        dataclasses.replace(config, train=train_config), blocks, optimizer, key, placements
    )
    state = TrainState(block_states, runner.init_memory(block_states, images))
    del block_states  # Or it would keep what no runner donates.
    evaluate = evaluation.make_evaluate(runner.logits, placements[-1], config.eval.ensemble_last)
    probe = drift.make_probe(blocks, placements)
    costs = cost.block_costs(blocks, image_shape)
    classifiers = [block.index for block in blocks if block.classifies]

    # ---- What the folder holds already is gone on with.
    from dgl_jax import checkpoint  # Imports orbax, which takes a second.

    os.makedirs(workdir, exist_ok=True)
    checkpointer = checkpoint.open_checkpointer(os.path.join(workdir, "checkpoints"))
    # Latest, best and next.
    checkpoint.check_room(checkpointer, state, num_checkpoints=3, last_step=num_steps)
    resolved = {
        "cuts": list(cuts),
        "heads": list(head_names) if config.method.name in LOCAL_METHODS else [],
        "dealt_devices": list(devices_per_block),  # By placement.auto; else empty.
        "num_devices": config.placement.num_devices or len(jax.devices()),
        "num_steps": num_steps,
        "num_updates": num_updates,
        "steps_per_epoch": steps_per_epoch,
        "image_shape": list(image_shape),
        "num_classes": num_classes,
    }
    # Asked once: the checkout may change while the run goes on.
    made_by = provenance()
    if is_main:
        config_json = json.dumps(to_dict(config) | {"resolved": resolved}, indent=2)
        metrics.write_atomically(os.path.join(workdir, "config.json"), config_json)
        unfinished = {
            "finished": False,
            "method": config.method.name,
            "cuts": list(cuts),
            "made_by": made_by,
        }
        write_summary(workdir, unfinished)
    step = 0
    seconds = {"wall_seconds": 0.0, "compile_seconds": 0.0, "train_seconds": 0.0}
    record = seconds | {"timed_steps": 0, "totals": {}}
    restored = checkpoint.restore_latest(checkpointer, state)
    if restored is not None:
        step, state, record = restored
    writer = metrics.MetricsWriter(workdir, first_step=step) if is_main else None
    batch_size = config.train.batch_size
    bar = tqdm.tqdm(
        total=num_steps * batch_size,
        initial=step * batch_size,
        unit="img",
        unit_scale=True,
        desc=config.method.name,
        disable=None if is_main else True,  # None: quiet where stderr is no terminal.
    )
    learning_rate = make_schedule(optimizer_config, num_updates, steps_per_epoch)
    log = metrics.TrainingLog(
        writer,
        bar,
        every_steps=config.train.log_every_steps,
        batch_size=batch_size,
        steps_per_epoch=epoch_steps,
        learning_rates=np.asarray(jax.vmap(learning_rate)(jnp.arange(num_updates))),
        totals=record["totals"],
        in_step=num_steps == num_updates,
    )

    splits = ("test", "validation") if dataset.num_validation else ("test",)

    def evaluate_all(step, is_written=False):
        results = {split: evaluate(state.blocks, dataset.eval_batches(split)) for split in splits}
        if config.eval.log_drift:
            images, _, mask = next(iter(dataset.eval_batches("test")))
            histograms = fetch(probe(state.blocks, images, mask))
        if not is_main:
            return None
        for split, means in results.items():
            for block, loss in zip(classifiers, means["loss"]):
                if not math.isfinite(loss):
                    raise not_finite_error(f"{split}/block_{block}/loss={loss}", step)
            if not is_written:
                writer.write(step, _flat_names(split, means, classifiers))
        if config.eval.log_drift:
            drift.save_histograms(workdir, step, histograms)
        return results

    def is_due(every, step, num_done):
        """Whether a multiple of ``every`` is among the last ``num_done`` steps."""
        return step // every > (step - num_done) // every

    def all_seconds():  # Of this process and those before it.
        return {
            "wall_seconds": record["wall_seconds"] + time.perf_counter() - start_time,
            # An older version's checkpoint has none.
            "compile_seconds": record.get("compile_seconds", 0.0)
            + metrics.compile_seconds()
            - start_compile_seconds,
        }

    def save(step, state, top1=None):
        _check_finite(state.blocks, step)
        now = record | all_seconds() | {"totals": dict(record["totals"])}
        checkpoint.save(checkpointer, step, state, top1=top1, record=now)

    # ---- The loop. The host only dispatches steps; the guard proves that no step makes host and
    # devices wait for each other. It is around nothing else: what saves, evaluates and logs copies
    # to the host.
    results, is_evaluated = None, False
    clock, clock_step = None, step
    with contextlib.ExitStack() as stack:
        for resource in (dataset, writer, bar, runner):
            if resource is not None:
                stack.callback(resource.close)
        stack.enter_context(checkpointer)
        first_traced = step + trace.FIRST_STEP
        last_traced, profiles = first_traced + trace.NUM_STEPS, None  # Whether it does; not yet.
        for tasks_of_steps in calls(schedule, step, steps_per_call, steps_per_epoch):
            tasks = tasks_of_steps[0]
            if recorder:
                recorder.begin_step(step if first_traced <= step < last_traced else None)
            if config.profile and profiles is None and step >= first_traced:
                profiles = True
                jax.profiler.start_trace(os.path.join(workdir, "profile"))
                stack.callback(_stop_profile)
            elif profiles and step >= last_traced:
                profiles = False
                _stop_profile()
            step_start, compiled = time.perf_counter(), metrics.compile_seconds()
            try:
                with jax.transfer_guard("disallow"):
                    if len(tasks_of_steps) > 1:
                        state, step_metrics = runner.steps(state, tasks_of_steps, dataset.stream)
                    else:
                        state, step_metrics = runner.step(state, tasks, dataset.batch_at)
            except WorkerError:  # What all blocks have done is kept.
                log.flush()
                if checkpointer.latest is None or checkpointer.latest.step < step:
                    save(step, runner.snapshot(state))
                raise
            num_done = len(tasks_of_steps)
            step += num_done
            for task in tasks:
                if task.operation in (UPDATE, BACKWARD, APPLY) and task.block in step_metrics:
                    made = np.arange(task.turn + 1, task.turn + 1 + num_done)
                    # A new dict: stand-ins are the same ones in every step.
                    step_metrics[task.block] = step_metrics[task.block] | {"updates": made}
            log.append(step, step_metrics, num_steps=num_done)
            if clock is None or metrics.compile_seconds() > compiled:
                # A step that compiles is not timed; sequential has one for every block.
                if clock is not None:
                    record["train_seconds"] += step_start - clock
                    record["timed_steps"] += step - num_done - clock_step
                jax.block_until_ready(step_metrics)
                clock, clock_step = time.perf_counter(), step
            is_eval = is_due(eval_every, step, num_done) or step == num_steps
            is_checkpoint = is_eval or is_due(checkpoint_every, step, num_done)
            if is_checkpoint:
                log.flush()
                now = time.perf_counter()
                record["train_seconds"] += now - clock
                record["timed_steps"] += step - clock_step
                if step > first_traced:  # A pause is nobody's idle time.
                    last_traced = min(last_traced, step)
                    if profiles:
                        profiles = False
                        _stop_profile()
                state = runner.snapshot(state)
                results, is_evaluated = evaluate_all(step) if is_eval else None, is_eval
                # Orbax keeps the best: all processes must say the same.
                top1 = distributed.agree(results[splits[-1]]["top1"][-1] if results else None)
                save(step, state, top1=top1)
                # Blocks that have no tasks but decide themselves have trained on meanwhile.
                clock, clock_step = time.perf_counter() if tasks else now, step
        if not is_evaluated:  # The run had been killed after its last checkpoint.
            results = evaluate_all(step, is_written=True)
        checkpointer.wait()
        best_step = checkpoint.best_step(checkpointer)

    # ---- What came of it. The summary comes before all that a finished run can do without.
    trained = fetch([(block.params, block.batch_stats) for block in state.blocks])
    timed_updates = record["timed_steps"] * num_updates / num_steps
    train_seconds = record["train_seconds"]
    summary = is_main and {
        "finished": True,
        "method": config.method.name,
        "dataset": config.data.name,
        "network": config.network.name,
        "auxiliary": ", ".join(dict.fromkeys(resolved["heads"])) or None,
        "num_blocks": num_blocks,
        "cuts": list(cuts),
        "heads": resolved["heads"],
        "placement": config.placement.kind,
        "seed": config.seed,
        "steps": num_steps,
        "updates_per_block": num_updates,
        "epochs": num_updates / steps_per_epoch,
        "batch_size": batch_size,
        "classifiers": classifiers,
        "test_top1": results["test"]["top1"],
        "test_top5": results["test"]["top5"],
        "test_loss": results["test"]["loss"],
        "ensemble_top1": results["test"]["ensemble_top1"],
        "ensemble_last_top1": results["test"]["ensemble_last_top1"],
        "validation_top1": results.get("validation", {}).get("top1"),
        "best_step": best_step,
        "train_examples_per_second": (
            timed_updates * batch_size / train_seconds if train_seconds else None
        ),
        "wall_seconds": all_seconds()["wall_seconds"],
        "compile_seconds": all_seconds()["compile_seconds"],
        "peak_memory_bytes": cost.peak_memory_bytes(),
        "aux_flops_ratio": cost.aux_flops_ratios(costs),
        "block_flops": [block.layers_flops for block in costs],
        "head_flops": [block.head_flops for block in costs],
        "block_parameters": [block.layers_parameters for block in costs],
        "head_parameters": [block.head_parameters for block in costs],
        "parameters": sum(block.layers_parameters + block.head_parameters for block in costs),
        "bytes_between_blocks": [
            method.bytes_between(config, x)
            for x in activation_shapes(blocks, state.blocks, images)[:-1]
        ],
        "method_memory_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state.memory)),
        "block_step_seconds": None,
        "busy_fractions": None,
        "ideal_speed_up": None,
        "reached_speed_up": None,
        "params_sha256": _sha256(trained),
        "made_by": made_by,
        "jax_version": jax.__version__,
        "device_kind": placements[0].devices[0].device_kind,
        "num_devices": len({device for where in placements for device in where.devices}),
        "num_processes": distributed.num_processes(),
        "devices_per_block": [len(where.devices) for where in placements],
    }
    if is_main:
        write_summary(workdir, summary)

    # ---- Extras: one that fails costs a line and nothing else.
    def time_blocks():
        works = [method.make_block_work(config, block, optimizer) for block in blocks]
        batch = Batch(
            place(np.zeros(images.shape, np.float32), placements[0].batch),
            place(np.zeros(batch_size, np.int32), placements[0].batch),
        )
        seconds = cost.block_step_seconds(blocks, works, state.blocks, batch, placements)
        speed_ups = _speed_ups(seconds, placements, timed_updates, train_seconds)
        return {"block_step_seconds": seconds, **speed_ups}

    def write_trace():
        title = f"{config.method.name}, {config.network.name}, K = {num_blocks}: measured"
        from dgl_jax import timeline  # Imports matplotlib.

        spans = recorder.finish()
        return {"busy_fractions": timeline.write_trace(workdir, spans, num_blocks, title)}

    trace.stop()
    extras = {}
    if config.eval.time_blocks:
        extras |= extra("timing the blocks (config.eval.time_blocks)", time_blocks)
    if recorder:
        extras |= extra("the trace (config.trace)", write_trace)
    if not is_main:
        return None
    if extras:
        summary |= extras
        write_summary(workdir, summary)
    if config.eval.log_drift:
        extra("drift.json (config.eval.log_drift)", lambda: drift.write_drift(workdir))
    extra("the plots", lambda: _draw(workdir, summary))
    return summary


def _draw(workdir: str, summary: dict[str, Any]) -> None:
    from dgl_jax import plots  # Imports matplotlib.

    plots.plot_run(workdir, summary)


def _speed_ups(
    step_seconds: Sequence[float] | None,
    placements: Sequence[placement.BlockPlacement],
    timed_updates: float,
    train_seconds: float,
) -> dict[str, float | None]:
    """How much faster than all blocks' work on one device: at best, and as it was.

    None where it is not known what one device would need: blocks have several each.
    """
    has_one_each = all(len(where.devices) == 1 for where in placements)
    if not (step_seconds and train_seconds and has_one_each):
        return {"ideal_speed_up": None, "reached_speed_up": None}
    by_device = collections.Counter()
    for where, seconds in zip(placements, step_seconds, strict=True):
        by_device[where.devices[0]] += seconds
    total = sum(step_seconds)
    return {
        "ideal_speed_up": total / max(by_device.values()),
        "reached_speed_up": total * timed_updates / train_seconds,
    }


def _stop_profile() -> None:
    with contextlib.suppress(RuntimeError):  # Stopped already.
        jax.profiler.stop_trace()


def _sha256(arrays: Any) -> str:
    """Of all their bytes in tree order: to compare two runs."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(arrays):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _check_first_batch(losses: Sequence[str], dataset: Dataset, batch_size: int) -> None:
    """A batch of one class has nothing to teach to a loss that compares its examples."""
    matching = [loss for loss in losses if loss in SIMILARITY_LOSSES]
    if not matching:
        return
    labels = jax.device_get(dataset.batch_at(0).labels)
    dataset.close()  # A stream begins anew with the first step.
    if len(np.unique(labels)) < 2:
        raise UserError(
            f"config.train.batch_size={batch_size}: the first batch has one class only "
            f"({labels[0]}), but the {matching[0]} loss needs two to compare; try a larger batch, "
            "or data of more classes"
        )


def _flat_names(split: str, means: dict[str, Any], classifiers: Sequence[int]) -> dict[str, float]:
    """``test/block_0/top1``, and ``test/ensemble_top1`` for what is not one a block."""
    flat = {}
    for name, value in means.items():
        if isinstance(value, list):
            flat |= {f"{split}/block_{block}/{name}": x for block, x in zip(classifiers, value)}
        else:
            flat[f"{split}/{name}"] = value
    return flat


@jax.jit
def _all_finite(state: Any) -> jax.Array:
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in floats]))


def _check_finite(states: Any, step: int) -> None:
    """An update can overflow although its loss was finite; such a state is not saved."""
    for block, state in enumerate(states):
        if is_local(state.step.sharding) and not jax.device_get(_all_finite(state)):
            raise not_finite_error(f"a parameter of block_{block}", step)
