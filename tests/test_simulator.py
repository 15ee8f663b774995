"""The simulator against schedules worked out by hand, and its own laws on random instances."""

import collections
import dataclasses
import itertools
import json
import math
import pathlib
import random
import subprocess
import sys

import pytest

from dgl_jax.errors import UserError
from dgl_jax.schedule import (
    ALL_REDUCE,
    APPLY,
    BACKWARD,
    FORWARD,
    LOSS,
    SEND,
    UPDATE,
    Span,
    pipeline,
)
from dgl_jax.simulator import bound_in_flight, run, simulate, spans_of, steady_seconds
from dgl_jax.task_lists import METHODS, BlockLoad, Cluster, Link, Scenario
from dgl_jax.timeline import plot_speed_ups, plot_timeline

# A forward pass of 1 s and a backward pass of 2 s; 3 bytes handed on.
_BLOCK = BlockLoad(1.0, 2.0, activation_bytes=3.0, kept_bytes=1.0)


def _equal(a, b):
    return a == pytest.approx(b, rel=1e-12, abs=0)


def _seconds(method, scenario):
    return simulate(method, scenario).seconds_per_step


def test_dgl_is_as_fast_as_its_slowest_block():
    slow = BlockLoad(1.5, 3.0, head_forward_seconds=0.25, head_backward_seconds=0.25)
    result = simulate("dgl", Scenario((_BLOCK, slow, _BLOCK, _BLOCK), batch_size=10))
    assert _equal(result.seconds_per_step, 5.0)
    assert _equal(result.images_per_second, 2.0)
    # Backprop: 3 + 4.5 + 3 + 3, as it has no auxiliary head.
    assert _equal(result.speed_up, 13.5 / 5) and _equal(result.ideal_speed_up, 13.5 / 5)
    assert [_equal(x, 3 / 5) for x in result.busy_fractions[2:]] == [True, True]
    assert _equal(result.busy_fractions[1], 1.0)


def test_a_slow_link_bounds_dgl_only_above_the_time_of_computing():
    for bandwidth, expected in ((1.0, 3.0), (3 / 4, 4.0)):
        scenario = Scenario((_BLOCK,) * 3, Cluster(Link(bandwidth, latency=0.5)))
        assert _equal(_seconds("dgl", scenario), expected)
    assert simulate("dgl", scenario).bytes_per_step == pytest.approx(6.0, rel=1e-12)


def test_links_between_hosts_are_those_of_devices_of_different_hosts():
    cluster = Cluster(Link(math.inf), between_hosts=Link(3 / 7), devices_per_host=2)
    assert _equal(_seconds("dgl", Scenario((_BLOCK,) * 2, cluster)), 3.0)
    assert _equal(_seconds("dgl", Scenario((_BLOCK,) * 3, cluster)), 7.0)


def test_backprop_is_the_sum_without_auxiliary_heads():
    head = {"head_forward_seconds": 0.5, "head_backward_seconds": 0.5}
    blocks = (_BLOCK, dataclasses.replace(_BLOCK, **head), dataclasses.replace(_BLOCK, **head))
    result = simulate("backprop", Scenario(blocks))
    assert _equal(result.seconds_per_step, 3 + 3 + 4) and result.speed_up == 1.0
    assert result.bytes_per_step == 0 and result.kept_bytes == 3.0


@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 8, 32])
@pytest.mark.parametrize("num_blocks", [1, 2, 4, 5])
def test_pipelines_of_backprop_have_the_known_bubble(num_blocks, num_microbatches):
    scenario = Scenario((_BLOCK,) * num_blocks, num_microbatches=num_microbatches)
    expected = (num_microbatches + num_blocks - 1) * 3 / num_microbatches
    gpipe, interleaved = (
        simulate(f"pipeline_backprop_{name}", scenario) for name in ("gpipe", "1f1b")
    )
    assert _equal(gpipe.seconds_per_step, expected)
    assert _equal(interleaved.seconds_per_step, expected)
    # GPipe keeps all microbatches, 1F1B as many as the pipeline is deep; the last block one.
    assert _equal(gpipe.kept_bytes, 1.0 if num_blocks > 1 else 1 / num_microbatches)
    assert _equal(interleaved.kept_bytes, min(num_blocks / num_microbatches, 1.0))


def test_pipelines_of_backprop_run_the_schedule_of_their_runner():
    scenario = Scenario((_BLOCK,) * 3, num_microbatches=4)
    for kind in ("gpipe", "1f1b"):
        simulated = METHODS[f"pipeline_backprop_{kind}"](scenario, 2)
        of_runner = itertools.chain(*pipeline(kind, 3, 4, 2).tasks(0))
        assert [(t.block, t.operation, t.step) for t in simulated if t.operation != SEND] == [
            (t.block, t.operation, t.batch) for t in of_runner
        ]


def test_ddg_is_as_fast_as_its_slowest_block_where_links_are_free():
    slow = BlockLoad(2.0, 2.5, head_forward_seconds=9.0, kept_bytes=1.0)  # It has no such head.
    result = simulate("ddg", Scenario((_BLOCK, slow, _BLOCK, _BLOCK)))
    assert _equal(result.seconds_per_step, 4.5)
    # Block 0's batch comes back three steps later: four are kept.
    assert _equal(result.kept_bytes, 4.0)


@pytest.mark.parametrize("num_blocks", [2, 3, 4])
def test_ddg_waits_for_transfers_where_dgl_does_not(num_blocks):
    # Block 0's backward pass waits for its batch to go up and come down, K - 1 steps after it
    # left, and its forward pass of the step after waits for that: every K steps 2 (K - 1)
    # transfers are in the way, besides K blocks' passes of 3 s.
    scenario = Scenario((_BLOCK,) * num_blocks, Cluster(Link(latency=0.25)))
    exposed = 2 * (num_blocks - 1) * 0.25 / num_blocks
    assert _equal(_seconds("ddg", scenario), 3 + exposed)
    assert _equal(_seconds("dgl", scenario), 3.0)


def test_too_few_steps_in_flight_leave_blocks_idle():
    scenario = Scenario((_BLOCK,) * 4)
    tasks = METHODS["dgl"](scenario, 40)
    # A step takes four blocks' time; with two unfinished, every 12 s two of them end.
    for bound, expected in ((2, 6.0), (4, 3.0)):
        times = zip(tasks, run(bound_in_flight(tasks, bound)), strict=True)
        ends = [end for task, (_, end) in times if (task.block, task.operation) == (3, UPDATE)]
        assert _equal(steady_seconds(ends), expected)
    # One in flight is three more, the pipeline's depth, by the rule.
    assert _equal(_seconds("dgl", dataclasses.replace(scenario, max_steps_in_flight=1)), 3.0)


def test_a_slow_worker_holds_up_nobody_in_async_dgl():
    scenario = Scenario((_BLOCK,) * 3, slow_block=0, slowdown=4.0)
    free = simulate("async_dgl", scenario)
    assert [_equal(x, y) for x, y in zip(free.block_seconds, (12.0, 3.0, 3.0))] == [True] * 3
    assert all(_equal(x, 1.0) for x in free.busy_fractions)
    assert [_equal(x, 12.0) for x in simulate("dgl", scenario).block_seconds] == [True] * 3


def test_data_parallel_is_a_share_and_a_ring_all_reduce():
    block = dataclasses.replace(_BLOCK, parameter_bytes=5.0, head_parameter_bytes=100.0)
    scenario = Scenario((block,) * 4, Cluster(Link(2.0)))
    result = simulate("data_parallel", scenario)
    assert _equal(result.seconds_per_step, 12 / 4 + 2 * 3 / 4 * 20 / 2)
    assert _equal(result.bytes_per_step, 2 * 3 * 20)
    # The backward pass takes 2 s: so much can be hidden of 15 s, of 3.75 s and of 0.375 s.
    for bandwidth, exposed in ((2.0, 13.0), (8.0, 1.75), (80.0, 0.0)):
        faster = dataclasses.replace(scenario, cluster=Cluster(Link(bandwidth)))
        hidden = dataclasses.replace(faster, hide_all_reduce=True)
        assert _equal(_seconds("data_parallel", hidden), 3 + exposed)


def test_an_all_reduce_across_hosts_is_hierarchical():
    # 48 bytes on 3 hosts of 4 devices. Inside: 12 bytes a device in each of 3 + 3 rounds. Across:
    # each of 4 rings has its 12 bytes in 3 parts, of 4 bytes in each of 2 + 2 rounds.
    block = dataclasses.replace(_BLOCK, parameter_bytes=4.0)
    cluster = Cluster(Link(8.0, 0.25), Link(2.0, 0.5), devices_per_host=4)
    result = simulate("data_parallel", Scenario((block,) * 12, cluster))
    assert _equal(result.seconds_per_step, 36 / 12 + 6 * (12 / 8 + 0.25) + 4 * (4 / 2 + 0.5))
    assert _equal(result.bytes_per_step, 2 * 11 * 48)
    # A block over three devices, two of one host and one of the next: 6 bytes, its head's too.
    # All 6 have to go through the one ring that the second host's device is in.
    block = dataclasses.replace(
        _BLOCK, parameter_bytes=5.0, head_parameter_bytes=1.0, num_devices=3
    )
    cluster = Cluster(Link(2.0), Link(1.0, latency=0.125), devices_per_host=2)
    scenario = Scenario((block,), cluster)
    assert _equal(_seconds("dgl", scenario), 1 + 2 * 3 / 2 + 2 * (3 / 1 + 0.125))
    # Of a pipeline's, only the last microbatch's backward pass can hide a part.
    hidden = dataclasses.replace(scenario, num_microbatches=4, hide_all_reduce=True)
    without_head = 2 * 2.5 / 2 + 2 * (2.5 / 1 + 0.125)
    expected = 1 + without_head - 2 / 3 / 4
    assert _equal(_seconds("pipeline_backprop_1f1b", hidden), expected)


def test_a_slow_host_bounds_the_rate_of_dispatch():
    # Two programs and a transfer a step; a free-running worker's own are fewer.
    scenario = Scenario((_BLOCK,) * 2, Cluster(dispatch_seconds=1.25))
    assert _equal(_seconds("dgl", scenario), 3.75)
    assert _equal(_seconds("async_dgl", scenario), 3.0)


def test_a_bursty_steady_state_is_measured_over_whole_periods():
    assert _equal(steady_seconds([0, 1, 4, 5, 8, 9, 12, 13, 16]), 2.0)
    assert steady_seconds([3.0]) == 3.0 and steady_seconds([3.0, 5.0]) == 2.0


def _random_scenario(rng):
    blocks = tuple(
        BlockLoad(
            *(rng.uniform(0.1, 2.0) for _ in range(4)),
            *(rng.uniform(0, 3) for _ in range(4)),
            num_devices=rng.choice([1, 1, 2]),
        )
        for _ in range(rng.randint(1, 6))
    )
    links = [Link(10 ** rng.uniform(-1, 2), rng.uniform(0, 0.5)) for _ in range(2)]
    cluster = Cluster(*links, rng.randint(1, 4), rng.choice([0.0, 0.1, 1.0]))
    numbers = (rng.randint(1, 5), rng.randint(1, 4), rng.choice([None, 0]), 2.0)
    return Scenario(blocks, cluster, 8, *numbers, hide_all_reduce=rng.random() < 0.5)


@pytest.mark.parametrize("method", METHODS)
def test_laws_on_random_instances(method):
    rng = random.Random(method)
    for _ in range(25):
        scenario, num_steps = _random_scenario(rng), rng.randint(4, 9)
        bound = rng.randint(1, 6)
        tasks = bound_in_flight(METHODS[method](scenario, num_steps), bound)
        times = run(tasks, scenario.cluster.dispatch_seconds)

        # Causes come before their effects.
        ended = collections.defaultdict(list)
        for task, (start, end) in zip(tasks, times, strict=True):
            assert end == start + task.seconds
            assert all(start >= times[i][1] + tasks[i].delay for i in task.inputs)
            for step, last in ended[task.host]:
                assert step > task.step - bound or start >= last
            if task.operation != SEND:
                ended[task.host].append((task.step, end))
        # Whatever is used is used by one at a time.
        used = collections.defaultdict(list)
        for task, interval in zip(tasks, times):
            for resource in (*task.devices, *task.links):
                used[resource].append(interval)
        for intervals in used.values():
            intervals.sort()
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(intervals))
        # Busy time is the number of tasks times what each takes.
        spans = spans_of(tasks, times)
        for device in {span.device for span in spans}:
            busy = math.fsum(span.end - span.start for span in spans if span.device == device)
            counts = collections.Counter(t.seconds for t in tasks if device in t.devices)
            assert busy == pytest.approx(math.fsum(n * s for s, n in counts.items()), rel=1e-12)
        # Every block makes its passes over every batch, once.
        if method not in ("backprop", "data_parallel"):
            late = len(scenario.blocks) - 1 if method == "ddg" else 0
            shares = scenario.num_microbatches
            counts = collections.Counter((t.block, t.batch, t.operation) for t in tasks)
            for block in range(len(scenario.blocks)):
                for batch in range(num_steps - late):
                    names = (FORWARD, BACKWARD, LOSS, APPLY, UPDATE)
                    made = [counts[block, batch, name] for name in names]
                    if "pipeline" not in method:
                        assert made in ([1, 1, 0, 0, 0], [0, 0, 0, 0, 1])
                    elif block == len(scenario.blocks) - 1:
                        assert made == [0, 0, shares, 1, 0]
                    else:
                        assert made == [shares, shares, 0, 1, 0]
        # Nothing is faster than the ideal, if a block's devices have nothing to agree on.
        result = simulate(method, scenario)
        assert result.speed_up <= result.ideal_speed_up * (1 + 1e-9)
        assert all(x <= 1 + 1e-9 for x in result.busy_fractions)


def test_an_unknown_method_and_numbers_out_of_range_are_said():
    scenario = Scenario((_BLOCK,))
    with pytest.raises(UserError, match="method=dni is unknown; choose one of backprop"):
        simulate("dni", scenario)
    with pytest.raises(UserError, match="num_microbatches=0 must be at least 1"):
        simulate("dgl", dataclasses.replace(scenario, num_microbatches=0))
    with pytest.raises(UserError, match="bandwidth above 0"):
        simulate("dgl", dataclasses.replace(scenario, cluster=Cluster(Link(0.0))))


def test_pictures_are_drawn_of_any_operation(tmp_path):
    spans = [
        Span(3, 1, 7, ALL_REDUCE, 1e-7, 2e-7),
        *(Span(0, 0, n, UPDATE, n, n + 1) for n in range(12)),
    ]
    plot_timeline(spans, str(tmp_path / "timeline.png"), "title", ["first", "second"])
    plot_speed_ups(str(tmp_path / "speed.png"), "title", {"dgl": {2: 1.5, 4: 3.0}}, {2: 2, 4: 4})
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("timeline.png", "speed.png"))


def test_it_needs_no_jax():
    code = "import sys, dgl_jax.simulator; sys.exit(bool({'jax', 'matplotlib'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_finished_run_is_predicted_from_its_summary(tmp_path):
    summary = {
        "method": "dgl", "num_blocks": 2, "network": "small", "dataset": "embedded",
        "batch_size": 12, "device_kind": "cpu", "train_examples_per_second": None,
        "block_step_seconds": [3.0, 6.0], "block_flops": [2.0, 4.0], "head_flops": [1.0, 2.0],
        "bytes_between_blocks": [12.0], "block_parameters": [5, 6], "head_parameters": [1, 2],
    }  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    script = pathlib.Path(__file__).parents[1] / "experiments" / "simulate.py"
    arguments = ["--inside_host_bandwidth=2", "--inside_host_latency=0", "--dispatch_seconds=0"]
    arguments += ["--num_microbatches=4", f"--summary={tmp_path}/summary.json", f"--out={tmp_path}"]
    result = subprocess.run(
        [sys.executable, script, *arguments], check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "simulate.json").read_text())["rows"]
    seconds = {row["method"]: row["seconds_per_step"] for row in rows}
    # The first block's head takes a third of its 3 s; a mini-batch is sent in 6 s.
    assert _equal(seconds["backprop"], 2 + 6)
    assert _equal(seconds["dgl"], 6) and _equal(seconds["async_dgl"], 6)
    # Half of 8 s, and 4 bytes for each of 13 parameters, all but those of the auxiliary head.
    assert _equal(seconds["data_parallel"], 4 + 2 / 2 * 52 / 2)
    assert _equal(seconds["data_parallel (all-reduce hidden)"], 4 / 3 + 2 / 2 * 52 / 2)
    assert (tmp_path / "timeline_ddg.png").exists()

    (tmp_path / "summary.json").write_text(json.dumps(summary | {"devices_per_block": [1, 2]}))
    result = subprocess.run(
        [sys.executable, script, *arguments], check=False, capture_output=True, text=True
    )
    assert result.returncode == 2 and "devices_per_block=[1, 2]; the times of" in result.stderr
