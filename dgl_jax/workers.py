"""A worker a block: threads that take turns on their own, and the buffers between them.

A worker reads a mini-batch from the buffer of the block below, dispatches its turn to its own
device and writes what comes out to its own buffer. It waits for nothing but its own device.

One lock stands over all buffers and all that workers have brought to an end. It is held for
microseconds, while references are chosen and replaced, never while a device computes or
copies; since there is but one, no order of locks can go wrong, and whoever holds it sees a
consistent cut through the run. (Python lets one thread run at a time anyway.)

A turn counts when its device has *finished* it: then, in one go, the block's state is
replaced, the output published in its buffer, and the event posted. A reader that could take an
output still being computed would in effect wait for the writer's device. And a turn that fails
leaves the state before it: programs do not donate their state, so that it is still there.
"""

import collections
import contextlib
import dataclasses
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from dgl_jax.config import ReplayConfig
from dgl_jax.errors import WorkerError
from dgl_jax.replay import select_slot

State = Any
Slot = Any  # A mini-batch: a tree of arrays.

# After a turn that a worker had to skip, as there was nothing to read.
_RETRY_SECONDS = 1e-3
# How long to wait at the end for devices that still compute.
_JOIN_SECONDS = 30.0


@dataclasses.dataclass
class Buffer:
    """A ring of M mini-batches, written by one block and read by the next.

    Attributes:
      slots: M mini-batches; `num_writes` says which have been written.
      use_counts: of each slot: 1 when written, 1 more a read.
      num_writes: they went to slots 0, 1, ..., M - 1, 0, ...; write n holds the output of the
        writing block's turn n.
    """

    slots: list[Slot]
    use_counts: list[int]
    num_writes: int


@dataclasses.dataclass(frozen=True)
class Work:
    """What a block does in a turn. Both functions dispatch and return without waiting.

    Attributes:
      update: ``update(state, inputs) -> (state, outputs, metrics)``; must not donate the state.
      feed: ``feed(state, inputs) -> outputs``, for a block that has made its updates.
    """

    update: Callable[[State, Slot], tuple[State, Slot, dict[str, Any]]]
    feed: Callable[[State, Slot], Slot]


@dataclasses.dataclass(frozen=True)
class Event:
    """A turn that has ended.

    Attributes:
      block: the block, 0-based.
      turn: the turns the block has had before; while it updates, also its updates so far.
      source: the turn of the block below whose output it read; of block 0, its own turn, since
        it takes a new batch of the stream every turn.
      age: the writes to the buffer since that output was written; 0 for block 0.
      use_count: 1 if this was that output's first read, 2 for the second, ...; 1 for block 0.
      skipped_turns: how often the worker had nothing to read since its turn before.
      metrics: of the update; None where the block has finished and only fed.
    """

    block: int
    turn: int
    source: int
    age: int
    use_count: int
    skipped_turns: int
    metrics: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class _Failure:
    block: int
    turn: int
    error: BaseException


class Workers:
    """K threads and the K - 1 buffers between them.

    Source: DGL, Algorithm 4.
    Deviation: a block that has made its updates feeds those above, as in the official code of
      Algorithm 2; `ReplayConfig.max_reuse`, too, is that code's.
    """

    def __init__(
        self,
        works: Sequence[Work],
        stream: Callable[[int], Slot],
        states: Sequence[State],
        buffers: Sequence[Buffer],
        turns: Sequence[int],
        *,
        num_updates: int,
        replay: ReplayConfig,
        max_in_flight: int,
    ):
        """Args:
        works: one a block.
        stream: ``stream(turn)``, the batch of each turn of block 0; called by its thread.
        states: of the blocks, after so many turns.
        buffers: of all blocks but the last; block b's is read by block b + 1.
        turns: those that each block has had.
        num_updates: of each block; turns beyond them only feed.
        replay: its policy, max_reuse, slow_block and slowdown.
        max_in_flight: turns that a worker has dispatched but its device not finished, at most.
        """
        self._works, self._stream = works, stream
        self._states, self._buffers, self._turns = list(states), list(buffers), list(turns)
        self._num_updates, self._max_in_flight = num_updates, max_in_flight
        self._policy = replay.policy
        self._max_reuse = replay.max_reuse or math.inf
        if replay.policy == "official" and replay.buffer_size == 1:
            self._max_reuse = math.inf  # As in the plan: that code does not count then.
        self._slow_block = replay.slow_block
        # S; a benchmark may change it while the workers run.
        self.slowdown = replay.slowdown
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._events = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, args=(block,), name=f"block_{block}", daemon=True)
            for block in range(len(works))
        ]

    def start(self) -> None:
        """Starts all threads; once."""
        for thread in self._threads:
            thread.start()

    def next_event(self) -> Event:
        """The next turn of any block that has ended; waits for it.

        Raises:
          WorkerError: a worker failed. All others have ended their turns and stopped.
        """
        event = self._events.get()
        if not isinstance(event, _Failure):
            return event
        self.close()
        raise WorkerError(
            f"block_{event.block}'s worker failed at its "
            f"{'update' if event.turn < self._num_updates else 'turn'} {event.turn + 1}: "
            f"{type(event.error).__name__}: {event.error}"
        ) from event.error

    def cut(self) -> tuple[list[State], list[int], list[Buffer]]:
        """States, turns and buffers at one instant. What is still computed is no part of it.

        It costs no device anything: arrays are never overwritten, so references do.
        """
        with self._lock:
            buffers = [
                Buffer(list(buffer.slots), list(buffer.use_counts), buffer.num_writes)
                for buffer in self._buffers
            ]
            return list(self._states), list(self._turns), buffers

    def close(self) -> None:
        """Stops all workers, each after the turns that its device has begun."""
        self._stop.set()
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            if thread.ident is not None:  # It was started.
                thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self, block: int) -> None:
        """A worker's life."""
        work, state = self._works[block], self._states[block]
        turn = at = self._turns[block]  # The next to dispatch; the one at hand.
        in_flight = collections.deque()  # (event, state, outputs), the oldest first.
        skipped_turns = 0

        def end_oldest():
            nonlocal at
            ended = in_flight.popleft()
            at = ended[0].turn
            self._end_turn(*ended)

        try:
            with jax.transfer_guard("disallow"):  # A thread does not inherit it.
                while not self._stop.is_set() and self._is_needed(block, turn):
                    while in_flight and _is_ready(in_flight[0][1:]):  # The stream may be slow.
                        end_oldest()
                    at = turn
                    read = self._read(block, turn)
                    if read is None:
                        skipped_turns += 1
                        if in_flight:
                            end_oldest()
                        else:
                            self._stop.wait(_RETRY_SECONDS)
                        continue
                    start = time.perf_counter()
                    inputs, *staleness = read
                    metrics = None
                    if turn < self._num_updates:
                        state, outputs, metrics = work.update(state, inputs)
                    else:
                        outputs = work.feed(state, inputs)
                    event = Event(block, turn, *staleness, skipped_turns, metrics)
                    in_flight.append((event, state, outputs))
                    turn, skipped_turns = turn + 1, 0
                    # A slowed worker's turns do not overlap, or the sleep would cost nothing.
                    slowdown = self.slowdown if block == self._slow_block else 1.0
                    while len(in_flight) >= (self._max_in_flight if slowdown == 1.0 else 1):
                        end_oldest()
                    self._stop.wait((slowdown - 1.0) * (time.perf_counter() - start))
                while in_flight:
                    end_oldest()
        except BaseException as error:  # noqa: BLE001 whatever it is, the run must hear of it
            self._stop.set()
            failure = _Failure(block, at, error)
            if at == turn:  # It was not dispatched; those before it were, and still count.
                with contextlib.suppress(Exception):
                    while in_flight:
                        end_oldest()
            self._events.put(failure)

    def _is_needed(self, block: int, turn: int) -> bool:
        """Whether a block has updates to make, or one above it has."""
        return min([turn, *self._turns[block + 1 :]]) < self._num_updates

    def _read(self, block: int, turn: int) -> tuple[Slot, int, int, int] | None:
        """``(inputs, source, age, use_count)``, or None where there is nothing to read."""
        if block == 0:
            return self._stream(turn), turn, 0, 1
        buffer = self._buffers[block - 1]
        with self._lock:
            if buffer.num_writes == 0:
                return None
            slot = select_slot(buffer.use_counts, buffer.num_writes, self._policy)
            use_count = buffer.use_counts[slot]
            if use_count >= self._max_reuse:
                return None
            buffer.use_counts[slot] += 1
            age = (buffer.num_writes - 1 - slot) % len(buffer.slots)
            return buffer.slots[slot], buffer.num_writes - 1 - age, age, use_count

    def _end_turn(self, event: Event, state: State, outputs: Slot) -> None:
        """Waits for this worker's own device, and makes a turn count."""
        jax.block_until_ready((state, outputs, event.metrics))
        block = event.block
        with self._lock:
            self._states[block] = state
            self._turns[block] = event.turn + 1
            if block < len(self._buffers):
                buffer = self._buffers[block]
                slot = buffer.num_writes % len(buffer.slots)
                buffer.slots[slot], buffer.use_counts[slot] = outputs, 1
                buffer.num_writes += 1
            self._events.put(event)


def _is_ready(tree: Any) -> bool:
    return all(leaf.is_ready() for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
