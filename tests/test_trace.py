"""A traced run: the same numbers, every program once, in an order that is possible."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from dgl_jax import timeline, trace
from dgl_jax.config import PlacementConfig
from dgl_jax.placement import make_placements
from dgl_jax.schedule import Span

_ROOT = pathlib.Path(__file__).parents[1]


def _power(x):
    for _ in range(10):
        x = x @ x
    return x


def test_programs_are_recorded_between_their_inputs_and_outputs(tmp_path):
    below, above = make_placements(PlacementConfig(kind="pipelined", num_devices=2), 2)
    recorder = trace.start()
    assert trace.recorder() is recorder
    work = jax.jit(_power)
    first = recorder.watch(work, 0, "update", below)
    second = recorder.watch(work, 1, "update", above)
    x = jax.device_put(np.full((300, 300), 1e-3, np.float32), below.batch)
    for step in (None, 0, 1, 2, None):
        recorder.begin_step(step)
        second(jax.device_put(first(x), above.batch))
    spans = recorder.finish()
    trace.stop()
    assert trace.recorder() is None
    assert sorted((s.step, s.block, s.device) for s in spans) == [
        (step, block, block) for step in range(3) for block in range(2)
    ]
    for device in (0, 1):
        own = [span for span in spans if span.device == device]
        assert all(span.start < span.end for span in own)
        assert all(a.end <= b.start for a, b in itertools.pairwise(own))


def test_busy_fractions(tmp_path):
    """Block 0 works half of the time from its first program to its last, block 1 all of it."""
    spans = [Span(0, 0, step, "update", 10.0 + 2 * step, 11.0 + 2 * step) for step in range(4)]
    spans += [Span(1, 1, step, "update", 11.0 + 2 * step, 13.0 + 2 * step) for step in range(4)]
    fractions = timeline.write_trace(str(tmp_path), spans, 2, "title")
    assert fractions == pytest.approx([4 / 7, 1.0])
    content = json.loads((tmp_path / "trace.json").read_text())
    assert content["spans"][0] == [0, 0, 0, "update", 0.0, 1.0]
    assert len(content["spans"]) == 8
    assert (tmp_path / "timeline.png").stat().st_size > 10_000
    # In a fused run one program is all blocks.
    assert (
        timeline.write_trace(str(tmp_path), [s for s in spans if s.block == 1], 2, "title") is None
    )


@pytest.mark.slow
def test_a_traced_run_computes_what_it_would_have_computed(tmp_path, arrays_path):
    summaries = []
    for is_traced in (False, True):
        workdir = tmp_path / str(is_traced)
        command = [
            *(sys.executable, "experiments/train.py", f"--workdir={workdir}"),
            "--config=experiments/configs/quickstart.py",
            *("--config.data.name=arrays", f"--config.data.data_dir={arrays_path}"),
            *("--config.data.crop_padding=1", "--config.network.width_factor=0.0625"),
            *("--config.train.batch_size=24", "--config.eval.batch_size=50"),
            *("--config.train.num_epochs=0", "--config.train.num_steps=70"),
            *("--config.eval.every_epochs=9.0", "--config.checkpoint.every_steps=70"),
            *("--config.partition.strategy=uniform", "--config.partition.num_blocks=2"),
            *("--config.placement.kind=pipelined", "--config.placement.num_devices=2"),
            f"--config.trace={is_traced}", f"--config.profile={is_traced}",
        ]  # fmt: skip
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_ROOT)}
        result = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=900, cwd=_ROOT,
            env=environment,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        summaries.append(json.loads((workdir / "summary.json").read_text()))
    plain, traced = summaries
    assert traced["params_sha256"] == plain["params_sha256"]
    assert plain["busy_fractions"] is None
    assert len(traced["busy_fractions"]) == 2
    assert all(0 < fraction <= 1 for fraction in traced["busy_fractions"])
    spans = json.loads((workdir / "trace.json").read_text())["spans"]
    steps = range(trace.FIRST_STEP, trace.FIRST_STEP + trace.NUM_STEPS)
    recorded = sorted((step, block) for _, block, step, _, _, _ in spans)
    assert recorded == [(step, block) for step in steps for block in range(2)]
    assert (workdir / "timeline.png").exists()
    # jax.profiler's own trace; the programs have the blocks' names.
    (profile,) = workdir.glob("profile/**/*.xplane.pb")
    assert b"block_1" in profile.read_bytes()
