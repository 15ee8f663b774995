"""When each block's program ran on its devices: recorded, drawn, summed up.

A thread for each group of devices waits for each program's inputs and then for its outputs. A device works off its
programs in the order of dispatch, so a program began when its inputs had come and the program
before it had ended. This is the same on every kind of device, within some tenths of a millisecond.
"""

import json
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from dgl_jax import distributed
from dgl_jax.metrics import write_atomically
from dgl_jax.placement import BlockPlacement
from dgl_jax.timeline import Span, plot_timeline

# The steps of a run that are recorded: after the first ones, which compile and fill the pipeline.
FIRST_STEP, NUM_STEPS = 20, 40
_DRAWN_STEPS = 8

_recorder = None


class Recorder:
    """Records the programs that `watch` has been given, between `begin_step` calls."""

    def __init__(self):
        self.spans: list[Span] = []
        self._step = None
        self._queues: dict[tuple[jax.Device, ...], queue.SimpleQueue] = {}
        self._threads: list[threading.Thread] = []

    def begin_step(self, step: int | None) -> None:
        """Programs dispatched from now on are of this step; None: they are not recorded."""
        self._step = step

    def watch(
        self, program: Callable[..., Any], block: int, operation: str, placement: BlockPlacement
    ) -> Callable[..., Any]:
        """The program, with each of its runs recorded. It must not donate its arguments."""

        def watched(*args):
            outputs = program(*args)
            if self._step is not None:
                run = (self._step, block, operation, args, outputs)
                self._queue(placement.devices).put(run)
            return outputs

        return watched

    def finish(self) -> list[Span]:
        """Waits for all that was recorded."""
        for waiting in self._queues.values():
            waiting.put(None)
        for thread in self._threads:
            thread.join()
        return sorted(self.spans, key=lambda span: span.start)

    def _queue(self, devices: tuple[jax.Device, ...]) -> queue.SimpleQueue:
        if devices not in self._queues:
            self._queues[devices] = queue.SimpleQueue()
            arguments = (devices[0].id, self._queues[devices])
            thread = threading.Thread(target=self._follow, args=arguments, daemon=True)
            thread.start()
            self._threads.append(thread)
        return self._queues[devices]

    def _follow(self, device: int, waiting: queue.SimpleQueue) -> None:
        while (run := waiting.get()) is not None:
            step, block, operation, args, outputs = run
            jax.block_until_ready(args)
            start = time.time()  # Of the machine: processes compare theirs.
            jax.block_until_ready(outputs)
            self.spans.append(Span(device, block, step, operation, start, time.time()))
            del run, args, outputs  # Or the last ones would stay until the end of the run.


def start() -> Recorder:
    """Blocks' programs that are made from now on are recorded."""
    global _recorder
    _recorder = Recorder()
    return _recorder


def stop() -> None:
    """Programs made from now on are not."""
    global _recorder
    _recorder = None


def recorder() -> Recorder | None:
    """The one that `start` made."""
    return _recorder


def write_trace(
    workdir: str, spans: Sequence[Span], num_blocks: int, title: str
) -> list[float] | None:
    """Writes trace.json and timeline.png from what all processes have recorded.

    Args:
      workdir: the run's folder.
      spans: of this process.
      num_blocks: K.
      title: of the picture.

    Returns:
      The busy fraction of each block over the recorded steps, from its first program's start to
      its last one's end; None in all processes but the first, or where nothing was recorded.
    """
    rows = [
        [span.device, span.block, span.step, span.operation, span.start, span.end] for span in spans
    ]
    rows = [row for part in distributed.collect(rows) for row in part]
    if not distributed.is_main() or not rows:
        return None
    spans = sorted((Span(*row) for row in rows), key=lambda span: span.start)
    origin = spans[0].start
    content = {
        "columns": ["device", "block", "step", "operation", "start_seconds", "end_seconds"],
        "spans": [
            [s.device, s.block, s.step, s.operation, s.start - origin, s.end - origin]
            for s in spans
        ],
    }
    write_atomically(os.path.join(workdir, "trace.json"), json.dumps(content) + "\n")
    # Drawn is a part in which all devices are at work.
    devices = {span.device for span in spans}
    begin = max(min(s.start for s in spans if s.device == device) for device in devices)
    steps = {span.step for span in spans}
    end = begin + _DRAWN_STEPS * (max(span.end for span in spans) - spans[0].start) / len(steps)
    drawn = [span for span in spans if span.end > begin and span.start < end]
    plot_timeline(drawn, os.path.join(workdir, "timeline.png"), title)
    fractions = []
    for block in range(num_blocks):
        own = [span for span in spans if span.block == block]
        if not own:  # In a fused run all is one program.
            return None
        busy = sum(span.end - span.start for span in own)
        fractions.append(busy / (max(s.end for s in own) - min(s.start for s in own)))
    return fractions
