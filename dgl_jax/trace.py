"""When each block's program ran on its devices: recorded.

A thread for each group of devices waits for each program's inputs and then for its outputs. A
device works off its programs in the order of dispatch, so a program began when its inputs had come
and the program before it had ended. This is the same on every kind of device, within some tenths
of a millisecond.
"""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from dgl_jax.placement import BlockPlacement
from dgl_jax.schedule import Span

# The steps of a run that are recorded: after the first ones, which compile and fill the pipeline.
FIRST_STEP, NUM_STEPS = 20, 40

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
