"""Workers that really run at once: what they computed, what they read, and that none waits.

What a run does can't be foretold, so it is recorded, and replayed by an oracle in float64.
"""

import collections
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dgl_jax import checkpoint, metrics, workers
from dgl_jax.config import (
    Config,
    LossConfig,
    MethodConfig,
    OptimizerConfig,
    PlacementConfig,
    ReplayConfig,
    TrainConfig,
    default_config,
    from_dict,
)
from dgl_jax.errors import UserError, WorkerError
from dgl_jax.losses import make_loss_fn
from dgl_jax.methods import METHODS
from dgl_jax.models.network import apply_module
from dgl_jax.optim import make_optimizer
from dgl_jax.pipeline import init_states
from dgl_jax.placement import make_placements
from dgl_jax.train import train_and_evaluate
from dgl_jax.types import TrainState
from dgl_jax.workers import Buffer, Work, Workers

_METHOD = METHODS["async_dgl_parallel"]
_ROOT = pathlib.Path(__file__).parents[1]
_QUICKSTART = _ROOT / "experiments" / "configs" / "quickstart.py"
_NUM_UPDATES = 20
# The learning rate falls after 10 updates of a block.
_OPTIMIZER = OptimizerConfig(learning_rate=0.05, schedule="step", drop_epochs=(2.0,))


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("block_")]


@pytest.fixture
def blocks(small_network, small_head):
    return _METHOD.make_blocks(small_network, (0, 2), small_head, make_loss_fn(LossConfig()))


# ---- What the workers computed.


def _make(blocks, max_in_flight=4, **replay):
    """A runner, and a state to start from, of three blocks on three devices."""
    config = Config(
        method=MethodConfig(name="async_dgl_parallel"),
        replay=ReplayConfig(buffer_size=3, **replay),
        placement=PlacementConfig(
            kind="pipelined", num_devices=3, max_steps_in_flight=max_in_flight
        ),
        train=TrainConfig(batch_size=8, num_steps=_NUM_UPDATES, num_epochs=0.0),
    )
    placements = make_placements(config.placement, len(blocks))
    optimizer = make_optimizer(_OPTIMIZER, _NUM_UPDATES, steps_per_epoch=5)
    key = jax.random.key(0)
    states = init_states(blocks, optimizer, key, (6, 6, 2), placements)
    runner = _METHOD.make_runner(config, blocks, optimizer, key, placements)
    images = jax.ShapeDtypeStruct((8, 6, 6, 2), jnp.float32)
    schedule = _METHOD.make_schedule(config, len(blocks), _NUM_UPDATES, 5)
    assert schedule.num_steps == 3 * _NUM_UPDATES and schedule.num_updates == _NUM_UPDATES
    assert list(schedule.tasks(57)) == [(), (), ()]
    return runner, TrainState(states, runner.init_memory(states, images))


def _record(monkeypatch):
    """Lists that fill with the events, and with what each block saw when it chose a slot."""
    events, reads = [], collections.defaultdict(list)
    next_event, select_slot = Workers.next_event, workers.select_slot

    def recorded_event(self):
        events.append(next_event(self))
        return events[-1]

    def recorded_select(use_counts, num_writes, policy):
        block = int(threading.current_thread().name.removeprefix("block_"))
        reads[block].append((list(use_counts), num_writes))  # The buffers' lock is held here.
        return select_slot(use_counts, num_writes, policy)

    monkeypatch.setattr(Workers, "next_event", recorded_event)
    monkeypatch.setattr(workers, "select_slot", recorded_select)
    return events, reads


def _replay(blocks, state, events, batches, codec=lambda x: x):
    """The parameters after the events of the log, by plain lists, jax.grad and SGD by hand."""
    modules = [[*block.layers, block.head] for block in blocks]
    is_last = [block is blocks[-1] for block in blocks]
    state = jax.device_get(state)
    outputs = [{} for _ in blocks]  # {turn: (activations, labels)}
    for block, buffer in enumerate(state.memory["buffers"]):
        for turn in range(max(0, buffer["num_writes"] - 3), int(buffer["num_writes"])):
            slot = buffer["slots"][turn % 3]
            outputs[block][turn] = (slot["activations"]["x"], slot["labels"])
    with jax.enable_x64(True):
        double = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)
        params = [[*s.params["layers"], s.params["head"]] for s in state.blocks]
        stats = [[*s.batch_stats["layers"], s.batch_stats["head"]] for s in state.blocks]
        traces = [optax.tree_utils.tree_get(s.opt_state, "trace") for s in state.blocks]
        momentum = [[*trace["layers"], trace["head"]] for trace in traces]
        params, stats, momentum = double(params), double(stats), double(momentum)

        def make_gradient(block):
            def loss(params, stats, x, labels):
                after = []
                for module, p, s in zip(modules[block], params, stats):
                    activations, (x, s) = x, apply_module(module, p, s, x, train=True)
                    after.append(s)
                one_hot = labels[:, None] == jnp.arange(4)[None]
                log_p = x - jnp.log(jnp.sum(jnp.exp(x), axis=1, keepdims=True))
                return -jnp.mean(jnp.sum(one_hot * log_p, axis=1)), (activations, after)

            return jax.jit(jax.value_and_grad(loss, has_aux=True))

        gradient_fns = [make_gradient(block) for block in range(len(blocks))]
        for event in events:
            block, turn = event.block, event.turn
            if block == 0:
                batch = batches[turn % len(batches)]
                x, labels = batch.images, batch.labels
            else:
                x, labels = outputs[block - 1][event.source]
            x, labels = double(x), jnp.asarray(labels)
            if event.metrics is None:  # It only feeds.
                for module, p, s in zip(modules[block][:-1], params[block], stats[block]):
                    x, _ = apply_module(module, p, s, x, train=False)
                outputs[block][turn] = (codec(x), labels)
                continue
            (loss, (activations, stats[block])), gradients = gradient_fns[block](
                params[block], stats[block], x, labels
            )
            np.testing.assert_allclose(event.metrics["loss"], loss, rtol=2e-4)
            outputs[block][turn] = (activations if is_last[block] else codec(activations), labels)
            learning_rate = 0.05 if turn < 10 else 0.05 * 0.2
            momentum[block] = jax.tree.map(
                lambda m, g, p: 0.9 * m + g + 5e-4 * p, momentum[block], gradients, params[block]
            )
            params[block] = jax.tree.map(
                lambda p, m, rate=learning_rate: p - rate * m, params[block], momentum[block]
            )
        return jax.device_get((params, stats))


def _check_reads(events, reads, policy, max_reuse, first_turns, first_counts):
    """Every read is what the rule asks for, by plain lists of [turn, use count]."""
    for block in (1, 2):
        own = [event for event in events if event.block == block]
        assert [event.turn for event in own] == list(
            range(first_turns[block], first_turns[block] + len(own))
        )
        seen = [
            read for read in reads[block] if not max_reuse or min_count(*read) < max_reuse
        ]  # Less the turns skipped, as all batches were used up.
        num_writes = first_turns[block - 1]
        ring = [[turn, first_counts[block - 1][turn % 3]] for turn in range(num_writes)][-3:]
        for event, (use_counts, writes_then) in zip(own, seen):
            assert event.source + 1 + event.age == writes_then >= num_writes
            ring += [[turn, 1] for turn in range(num_writes, writes_then)]
            ring, num_writes = ring[-3:], writes_then
            assert [use_counts[turn % 3] for turn, _ in ring] == [count for _, count in ring]
            least = min(count for _, count in ring)
            tied = [turn for turn, count in ring if count == least]
            allowed = min(tied) if policy == "fifo" else max(tied)
            if policy == "official" and len(ring) == 3 and ring[0][0] in tied:
                allowed = ring[0][0]  # That code's slip: the oldest passes for the freshest.
            assert event.source == allowed
            assert event.use_count == least
            assert not max_reuse or least < max_reuse
            next(entry for entry in ring if entry[0] == event.source)[1] += 1


def min_count(use_counts, num_writes):
    return min(use_counts[: min(num_writes, 3)])


def _fake_int8(x):
    """To 255 steps a channel and back."""
    scale = np.abs(x).max(axis=(0, 1, 2), keepdims=True) / 127
    return np.round(x / np.where(scale > 0, scale, 1)) * scale


@pytest.mark.parametrize(
    "policy, slow_block, max_reuse, buffer_dtype, max_in_flight, resumed",
    [
        ("lifo_least_reused", 1, 3, "float32", 2, True),
        ("official", 2, 0, "float32", 1, False),
        ("fifo", 0, 0, "int8", 4, False),
    ],
)
def test_what_was_logged_is_what_was_computed(
    blocks, small_batches, monkeypatch,
    policy, slow_block, max_reuse, buffer_dtype, max_in_flight, resumed,
):  # fmt: skip
    runner_args = {
        "policy": policy,
        "slow_block": slow_block,
        "slowdown": 4.0,
        "max_reuse": max_reuse,
        "buffer_dtype": buffer_dtype,
    }
    runner, state = _make(blocks, max_in_flight, **runner_args)
    batches = jax.device_put(small_batches, jax.devices()[0])
    batch_at = lambda step: batches[step % len(batches)]
    done = 0
    if resumed:  # In a new runner, from a snapshot of a run that went on.
        is_snapped = threading.Event()

        def halting_batch_at(step):  # Without new batches max_reuse brings all blocks to a halt.
            assert step < 5 or is_snapped.wait(60)
            return batch_at(step)

        with contextlib.closing(runner):
            for done in range(1, 9):
                state, _ = runner.step(state, (), halting_batch_at)
            state = runner.snapshot(state)
            is_snapped.set()
            runner.step(state, (), halting_batch_at)
        runner, _ = _make(blocks, max_in_flight, **runner_args)
    first = jax.device_get(state.memory)
    assert [s.step for s in jax.device_get(state.blocks)] == first["turns"].tolist()
    assert [b["num_writes"] for b in first["buffers"]] == first["turns"][:-1].tolist()
    counts = [buffer["use_counts"].tolist() for buffer in first["buffers"]]
    events, reads = _record(monkeypatch)

    live, told = state, []
    with contextlib.closing(runner), jax.transfer_guard("disallow"):
        for step in range(done, 3 * _NUM_UPDATES):
            live, row = runner.step(live, (), batch_at)
            told.append(row)
            if step == done:
                compile_seconds = metrics.compile_seconds()
        end = runner.snapshot(live)
        assert metrics.compile_seconds() == compile_seconds

    updates = [event for event in events if event.metrics is not None]
    for row, event in zip([row for row in told if row], updates, strict=True):
        ((block, scalars),) = row.items()
        assert block == event.block and scalars["updates"] == event.turn + 1
        assert ("age" in scalars) == ("use_count" in scalars) == (block > 0)
        if block > 0:
            assert (scalars["age"], scalars["use_count"]) == (event.age, event.use_count)
    memory = jax.device_get(end.memory)
    assert [int(s.step) for s in jax.device_get(end.blocks)] == [_NUM_UPDATES] * 3
    assert memory["told"] == 3 * _NUM_UPDATES

    _check_reads(events, reads, policy, max_reuse, first["turns"], counts)
    stale = [event for event in events if event.age > 0 or event.use_count > 1]
    assert len(stale) >= 3  # Else the test would see nothing.

    params, stats = _replay(
        blocks, state, events, small_batches, _fake_int8 if buffer_dtype == "int8" else lambda x: x
    )
    tolerance = 2e-3 if buffer_dtype == "int8" else 2e-5
    for block, final in enumerate(jax.device_get(end.blocks)):
        actual = [[*tree["layers"], tree["head"]] for tree in (final.params, final.batch_stats)]
        jax.tree.map(
            lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=tolerance),
            actual,
            [params[block], stats[block]],
        )


# ---- That no worker waits for another: workers in plain Python, without a device.


def _start(updates, num_updates=10**6, size=3, max_in_flight=2, **replay):
    """Workers of the given ``update(turn) -> outputs``, one a block; what they read is posted."""

    def make_work(update):
        return Work(
            update=lambda turn, inputs: (turn + 1, update(turn), {"inputs": inputs}),
            feed=lambda state, inputs: update(inputs),
        )

    num_blocks = len(updates)
    running = Workers(
        [make_work(update) for update in updates],
        lambda turn: turn,
        [0] * num_blocks,
        [Buffer([None] * size, [0] * size, 0) for _ in range(num_blocks - 1)],
        [0] * num_blocks,
        num_updates=num_updates,
        replay=ReplayConfig(buffer_size=size, **replay),
        max_in_flight=max_in_flight,
    )
    running.start()
    return running


def _until(running, wanted):
    """Takes events until each block has had so many turns in them; returns all."""
    events, left = [], collections.Counter(wanted)
    while left.total():
        events.append(running.next_event())
        left[events[-1].block] -= left[events[-1].block] > 0
    return events


def test_a_worker_that_stands_still_holds_up_nobody():
    is_freed = threading.Event()

    def stuck(turn):
        assert turn < 2 or is_freed.wait(60)
        return turn

    with contextlib.closing(_start([lambda turn: turn, stuck, lambda turn: turn])) as running:
        events = _until(running, {0: 200, 2: 200})
        assert [event.turn for event in events if event.block == 1] in ([], [0], [0, 1])
        # Block 2 has only the two batches that block 1 had written, used more and more often.
        late = [event for event in events if event.block == 2][-50:]
        assert {event.source for event in late} <= {0, 1} and late[-1].use_count > 50
        states, turns, buffers = running.cut()  # A cut needs no worker either.
        assert states == turns and turns[1] <= 2
        assert [buffer.num_writes for buffer in buffers] == turns[:2]
        is_freed.set()
        _until(running, {1: 50})


class _Unfinished:
    """An output that its device has not computed yet."""

    def __init__(self, is_done):
        self._is_done = is_done

    def block_until_ready(self):
        assert self._is_done.wait(60)


def test_an_output_is_not_read_before_it_is_computed():
    is_done = threading.Event()
    outputs = lambda turn: turn if turn < 3 else _Unfinished(is_done)
    with contextlib.closing(_start([outputs, lambda turn: turn], size=5)) as running:
        events = _until(running, {1: 100})
        assert {event.source for event in events if event.block == 1} <= {0, 1, 2}
        assert running.cut()[1][0] == 3  # Two turns in flight count for nothing yet.
        is_done.set()
        while running.next_event().source < 3:
            pass


def test_a_block_that_has_finished_feeds_those_above():
    has_fed = threading.Event()

    def fast(turn):
        if turn == 40:
            has_fed.set()
        return turn

    def slow(turn):
        assert has_fed.wait(60)
        return turn

    with contextlib.closing(_start([fast, slow], num_updates=30, size=2, max_reuse=2)) as running:
        events = _until(running, {1: 30})
    reads = [event.source for event in events if event.block == 1]
    assert len(set(reads)) == 30 and max(reads) > 30  # With max_reuse=2 each is read once.
    assert {event.use_count for event in events} == {1}
    for block, end in ((0, 41), (1, 30)):
        own = [event for event in events if event.block == block]
        assert [event.turn for event in own] == list(range(len(own))) and len(own) >= end
        assert [event.turn for event in own if event.metrics is not None] == list(range(30))


def test_without_anything_to_read_a_turn_is_skipped(monkeypatch):
    has_skipped, read = threading.Event(), Workers._read

    def watched_read(self, block, turn):
        found = read(self, block, turn)
        if found is None:
            has_skipped.set()
        return found

    def late(turn):
        assert has_skipped.wait(60)
        return turn

    monkeypatch.setattr(Workers, "_read", watched_read)
    with contextlib.closing(_start([late, lambda turn: turn], num_updates=3)) as running:
        events = [event for event in _until(running, {0: 3, 1: 3}) if event.block == 1]
    assert events[0].skipped_turns > 0 and [event.skipped_turns for event in events][1:] == [0, 0]


def test_a_slowed_worker_sleeps_for_its_own_turn_times_s_minus_one(monkeypatch):
    sleeps = []
    wait = threading.Event.wait

    def recorded_wait(self, timeout=None):
        if threading.current_thread().name == "block_1" and timeout not in (None, 1e-3):
            sleeps.append(timeout)
            return wait(self, 0)
        return wait(self, timeout)

    def update(turn):
        time.sleep(0.002)
        return turn

    monkeypatch.setattr(threading.Event, "wait", recorded_wait)
    with contextlib.closing(_start([update] * 2, slow_block=1, slowdown=3.0)) as running:
        _until(running, {1: 20})
        running.slowdown = 1.0
        _until(running, {1: 5})
        before = len(sleeps)
        _until(running, {1: 5})
    assert min(sleeps[:20]) >= 2 * 0.002
    assert set(sleeps[before:]) == {0.0}


def test_an_interrupt_ends_the_wait_and_close_ends_the_threads():
    is_freed = threading.Event()
    running = _start([lambda turn: is_freed.wait(60), lambda turn: turn])
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist ignores it.
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            running.next_event()
        timer.join()
    finally:
        signal.signal(signal.SIGINT, handler)
    is_freed.set()
    running.close()
    assert not any(thread.is_alive() for thread in running._threads)


# ---- A worker that fails.


@pytest.mark.parametrize("where", ["dispatch", "device"])
def test_a_failure_stops_all_and_leaves_the_last_good_state(where, monkeypatch):
    # So that turns are in flight when it fails.
    monkeypatch.setattr(workers, "_is_ready", lambda tree: False)

    class Broken:
        def block_until_ready(self):
            raise FloatingPointError("the device says no")

    def update(turn):
        if turn < 5:
            return turn
        if where == "device":
            return Broken()
        raise FloatingPointError("the device says no")

    running = _start([lambda turn: turn, update, lambda turn: turn], max_in_flight=3)
    with pytest.raises(
        WorkerError,
        match="^block_1's worker failed at its update 6: FloatingPointError: the device says no$",
    ) as error:
        while True:
            running.next_event()
    assert isinstance(error.value.__cause__, FloatingPointError)
    assert not any(thread.is_alive() for thread in running._threads)
    states, turns, buffers = running.cut()
    assert states == turns and turns[1] == 5
    assert [buffer.num_writes for buffer in buffers] == turns[:2]
    assert sorted(buffers[1].slots) == [2, 3, 4]


# ---- Whole runs.


def _config(arrays_path, **fields):
    fields = {
        "method.name": "async_dgl_parallel",
        "replay.buffer_size": 4,
        "placement.kind": "pipelined",
        "placement.num_devices": 2,
        "data.name": "arrays",
        "data.data_dir": arrays_path,
        "data.crop_padding": 1,
        "data.flip": False,
        "network.name": "cnn4",
        "network.width_factor": 0.0625,
        "partition.strategy": "explicit",
        "partition.cuts": (1,),
        "auxiliary.name": "mlp",
        "optimizer.schedule": "cosine",
        "train.batch_size": 24,
        "train.num_epochs": 6.0,
        "train.log_every_steps": 5,
        "eval.batch_size": 48,
        "eval.every_epochs": 6.0,
        "eval.time_blocks": False,
    } | {name.replace("__", "."): value for name, value in fields.items()}
    config = default_config().to_dict()
    for name, value in fields.items():
        section, field = name.split(".")
        config[section][field] = value
    return from_dict(config)


def _saved(workdir):
    with checkpoint.open_checkpointer(workdir / "checkpoints") as checkpointer:
        step = checkpointer.latest.step
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
            checkpointer.metadata(step).metadata["states"],
        )
        return step, jax.device_get(checkpointer.load(step, {"states": wanted})["states"])


def test_a_run_whose_worker_fails_goes_on_with_the_same_command(arrays_path, tmp_path, monkeypatch):
    config = _config(arrays_path, checkpoint__every_steps=1000)
    read = Workers._read

    def failing_read(self, block, turn):
        if block == 1 and turn == 5:
            raise OSError("a cable was pulled")
        return read(self, block, turn)

    with monkeypatch.context() as patch:
        patch.setattr(Workers, "_read", failing_read)
        with pytest.raises(WorkerError, match="block_1's worker failed at its update 6: OSError"):
            train_and_evaluate(config, str(tmp_path))
    step, states = _saved(tmp_path)
    made = [int(block["step"]) for block in states["blocks"]]
    assert made[1] == 5 and made[0] >= 1 and step <= sum(made)
    assert json.loads((tmp_path / "summary.json").read_text())["finished"] is False

    summary = train_and_evaluate(config, str(tmp_path))
    assert summary["finished"] and summary["steps"] == 120 and summary["updates_per_block"] == 60
    step, states = _saved(tmp_path)
    assert step == 120 and [int(block["step"]) for block in states["blocks"]] == [60, 60]
    assert min(summary["test_top1"]) > 0.5  # Chance is 0.25.
    lines = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    training = [line for line in lines if "train/block_1/age" in line]
    assert all(line["train/block_1/use_count"] >= 1 for line in training)
    assert not [line for line in lines if "train/block_0/age" in line]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"placement__kind": "fused"}, "set config.placement.kind=pipelined"),
        ({"placement__data_parallel": 2}, "config.placement.data_parallel=2 is not for"),
        ({"replay__warm_up": "none"}, "config.replay.warm_up=none is used by async_dgl only"),
        ({"replay__max_reuse": 1}, "config.replay.max_reuse=1 must be at least 2"),
    ],
)
def test_mistakes(arrays_path, fields, message):
    with pytest.raises(UserError, match=message) as error:
        _config(arrays_path, **fields)
    assert "\n" not in str(error.value)


def test_there_must_be_a_block_to_slow(arrays_path):
    config = _config(arrays_path, replay__slow_block=2)
    with pytest.raises(UserError, match="slow_block=2 must be one of the 2 blocks; use 0 to 1"):
        _METHOD.make_schedule(config, 2, 10, 5)


@pytest.mark.slow
def test_killed_and_gone_on_with_from_the_command_line(tmp_path):
    """kill -9 in the middle, on the embedded images and four devices; then the same command."""
    fields = {
        "method.name": "async_dgl_parallel",
        "placement.kind": "pipelined",
        "placement.num_devices": 4,
        "replay.buffer_size": 5,
        "network.width_factor": 0.125,
        "train.batch_size": 50,
        "train.num_epochs": 0.4,
        "checkpoint.every_steps": 40,
        "eval.time_blocks": False,
    }
    command = [
        sys.executable,
        _ROOT / "experiments" / "train.py",
        f"--config={_QUICKSTART}",
        f"--workdir={tmp_path}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        lines = metrics.read_metrics(tmp_path / "metrics.jsonl")
        if lines and lines[-1]["step"] >= 120:
            break
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    step, states = _saved(tmp_path)
    made = [int(block["step"]) for block in states["blocks"]]
    assert 40 <= step < 320 and step <= sum(made)
    memory = states["memory"]
    assert [b["num_writes"] for b in memory["buffers"]] == memory["turns"][:3].tolist()

    result = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=900, env=environment
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 320 and summary["num_devices"] == 4
    assert min(summary["test_top1"]) > 0.4  # Chance is 0.1.
    step, states = _saved(tmp_path)
    assert step == 320 and [int(block["step"]) for block in states["blocks"]] == [80] * 4
    for name in ("learning_curves.png", "accuracy_by_depth.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
