"""The plan of asynchronous DGL with replay: who runs, which slot is read, which is written.

Plain Python, no devices. The plan does not depend on the data, only on its configuration, so a
run is resumed from the number of events done: `plan(config, first_event)`.

Words: a *slot* holds one mini-batch of a block's output with its labels; a block's *buffer* is a
ring of M slots, read by the block above. A block that is drawn takes a *turn*: it reads, updates
unless it has finished, and writes. A turn is one event of the plan.
"""

import bisect
import dataclasses
import itertools
import math
import random
from collections.abc import Iterator, Sequence

from dgl_jax.errors import UserError
from dgl_jax.schedule import FEED, UPDATE, Task

POLICIES = ("lifo_least_reused", "official", "fifo")
WARM_UPS = ("none", "once", "official")
ACCOUNTINGS = ("exact", "official")


@dataclasses.dataclass(frozen=True)
class Event(Task):
    """One turn of one block: a task, and the slots it uses.

    Its ``operation`` is `UPDATE`, or `FEED` once the block has finished and only feeds the
    block above. Its ``batch`` is the batch of the stream that it sees, or whose activations it
    reads; block 0 takes a new batch every turn, so there it equals ``turn``. Its ``turn`` counts
    the turns the block has had before: while it updates, also its updates so far
    (`BlockState.step`), of which its learning rate is a function.

    Attributes:
      read_slot: the slot it reads in the buffer of the block below; None for block 0.
      write_slot: the slot it overwrites in its own buffer; None for the last block.
      age: the writes to the buffer it reads since the read slot was written; 0 for the newest
        batch and for block 0.
      use_count: 1 if this is the batch's first read, 2 for the second, ...; 1 for block 0.
    """

    read_slot: int | None
    write_slot: int | None
    age: int
    use_count: int


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """What a plan depends on.

    Attributes:
      num_blocks: K.
      steps_per_epoch: the mini-batches of one pass over the data.
      num_epochs: the epochs of updates of each block (see `accounting`).
      pmf: how often each block is drawn, K probabilities (see `slowed_pmf`); None: round robin,
        0 to K - 1 in turn. Round robin with M = 1 and no warm-up is synchronous DGL.
      drop_epochs: the epochs at whose start a block lowers its learning rate.
      buffer_size: M, in mini-batches.
      policy: which slot is read (see `select_slot`).
      max_reuse: a slot whose use count (1 when written, 1 more a read) has reached it is not
        read, so a batch is read max_reuse - 1 times; with none left the block skips its turn.
        0: no limit. With the policy `official` there is none at M = 1, as in that code.
      warm_up: `none`; `once`: blocks 0, 0, 1, 1, ... run first, so that no buffer is empty;
        `official`: again whenever any block lowers its rate, which costs that block the turn it
        was drawn for. A block that is drawn while the buffer below is empty skips its turn.
      accounting: `exact`: a block makes num_epochs * steps_per_epoch updates and drops at
        drop_epochs. `official`: one epoch more, and drops two epochs later: with 50 and
        15/30/45 it drops at its own epochs 17/32/47 and stops after 51.
      seed: of the draws.

    Source: DGL, Algorithm 2 and section 4.3; the official code for the max_reuse, the warm-up
      and `official`. Known from that code: a block's epoch count starts at -1; it is raised at
      the draw after a pass of the data is complete, and the drop is decided just before that,
      by the old count (so after k passes the count is k - 2: 15 at k = 17), the stop just after
      (50 at k = 51). Inferred: that the paper's figures were made with it, though its text says
      that updates stop after 50 epochs.
    Deviation: the plan ends when all blocks have made their updates; the official code feeds on
      for about an epoch, in which no parameter changes. It drops at every multiple of 15, so
      also in blocks that only feed, which restarts the warm-up: list 60, 75, ... to have that.
      There a drop costs no turn as long as another block is in its first epoch; here it does.
    """

    num_blocks: int
    steps_per_epoch: int
    num_epochs: float
    pmf: tuple[float, ...] | None
    drop_epochs: tuple[float, ...] = ()
    buffer_size: int = 50
    policy: str = "lifo_least_reused"
    max_reuse: int = 0
    warm_up: str = "once"
    accounting: str = "exact"
    seed: int = 0

    def __post_init__(self):
        for name in ("num_blocks", "steps_per_epoch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1; try 1")
        if self.buffer_size < 1:
            raise UserError(
                f"config.replay.buffer_size={self.buffer_size} must be at least 1; try 1"
            )
        if not 0 < self.num_epochs < math.inf:
            raise UserError(f"num_epochs={self.num_epochs} must be positive and finite; try 50")
        if self.max_reuse != 0 and self.max_reuse < 2:
            raise UserError(
                f"config.replay.max_reuse={self.max_reuse} must be at least 2, as writing a batch "
                "counts as its first use; try 2 (each batch is read once) or 0 (no limit)"
            )
        if list(self.drop_epochs) != sorted(set(self.drop_epochs)):
            raise UserError(
                f"config.optimizer.drop_epochs={self.drop_epochs} must be strictly increasing; "
                f"try {tuple(sorted(set(self.drop_epochs)))}"
            )
        for name, choices in [
            ("policy", POLICIES),
            ("warm_up", WARM_UPS),
            ("accounting", ACCOUNTINGS),
        ]:
            if getattr(self, name) not in choices:
                raise UserError(
                    f"config.replay.{name}={getattr(self, name)!r} must be one of "
                    f"{', '.join(choices)}"
                )
        if self.pmf is not None:
            _check_pmf(self.pmf, self.num_blocks)

    @property
    def num_updates(self) -> int:
        """The updates each block makes in the whole run."""
        extra = 1 if self.accounting == "official" else 0
        return round((self.num_epochs + extra) * self.steps_per_epoch)

    @property
    def drop_steps(self) -> tuple[int, ...]:
        """The updates of a block that are its first with a lower learning rate."""
        extra = 2 if self.accounting == "official" else 0
        return tuple(round((epoch + extra) * self.steps_per_epoch) for epoch in self.drop_epochs)


def slowed_pmf(num_blocks: int, slow_block: int = 0, slowdown: float = 1.0) -> tuple[float, ...]:
    """Every block equally often, but for one that is drawn 1/S as often as each other one.

    Args:
      num_blocks: K.
      slow_block: the slowed block, 0-based.
      slowdown: S; 1 is the uniform pmf.

    Returns:
      K probabilities.

    Example:
      >>> slowed_pmf(num_blocks=3, slow_block=0, slowdown=2.0)
      (0.2, 0.4, 0.4)

    Source: DGL, section 4.3: "decreasing its selection probability by a factor S"; the official
      code lowers a weight of 1 by `noise` and normalises, S = 1 / (1 - noise).
    Deviation: none.

    Raises:
      UserError: if S < 1, or there is no such block.
    """
    if not 0 <= slow_block < num_blocks:
        raise UserError(
            f"config.replay.slow_block={slow_block} must be one of the {num_blocks} blocks; "
            f"use 0 to {num_blocks - 1}"
        )
    if not 1 <= slowdown < math.inf:
        raise UserError(
            f"config.replay.slowdown={slowdown} must be at least 1 and finite; 1 is as fast as "
            "the other blocks, 2 half as fast"
        )
    weights = [1.0] * num_blocks
    weights[slow_block] = 1.0 / slowdown
    return tuple(weight / sum(weights) for weight in weights)


def select_slot(use_counts: Sequence[int], num_writes: int, policy: str) -> int:
    """The slot to read: among those with the least use count, by freshness.

    Args:
      use_counts: M counts, of which those of slots never written are not looked at.
      num_writes: the writes to this buffer so far, at least 1; they went to slots 0, 1, ...,
        M - 1, 0, ..., so the next goes to num_writes mod M, which holds the oldest once full.
      policy: `lifo_least_reused`: the freshest. `official`: the freshest, but of a full buffer
        the oldest slot passes for the freshest. `fifo`: the oldest.

    Returns:
      A slot.

    Example:
      >>> counts = (1, 2, 1)  # The newest batch is in slot 2; that in slot 1 has been read once.
      >>> select_slot(counts, 3, "lifo_least_reused"), select_slot(counts, 3, "fifo")
      (2, 0)

    Source: DGL, section 3 ("a last-in-first-out rule, with precedence for the least reused").
    Deviation: `official` has the slip of the official code, `eligible > pointer` for `>=`:
      5 slots with the batches 2 to 6 are read 2, 6, 5, 4, 3. `fifo` is ours, for comparison.
      Of 6 uniform blocks at M = 50 the mean `Event.age` over all reads is 3.2 and 7.3 (`fifo` 25).
    """
    size = len(use_counts)
    filled = range(min(num_writes, size))
    least = min(use_counts[: len(filled)])
    tied = [slot for slot in filled if use_counts[slot] == least]
    if policy == "official":
        return min(tied, key=lambda slot: (num_writes - slot) % size)
    best = max if policy == "fifo" else min
    return best(tied, key=lambda slot: (num_writes - 1 - slot) % size)


def plan(config: PlanConfig, first_event: int = 0) -> Iterator[Event]:
    """The events of a run, from the given one on, until every block has made its updates.

    Args:
      config: what the plan depends on.
      first_event: the events already done. They are planned again and dropped, at some
        microseconds each.

    Returns:
      An iterator of events. A longer num_epochs continues the same plan, but for the updates.

    Example:
      >>> config = PlanConfig(num_blocks=2, steps_per_epoch=2, num_epochs=1, pmf=None,
      ...                     buffer_size=1, warm_up="none")  # Synchronous DGL.
      >>> [(event.block, event.batch, event.age) for event in plan(config)]
      [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]

    Source: DGL, Algorithm 2.
    Deviation: as the options of `PlanConfig` say.
    """
    return itertools.islice(_events(config), first_event, None)


def _events(config: PlanConfig) -> Iterator[Event]:
    size, last_block = config.buffer_size, config.num_blocks - 1
    num_updates, drop_steps = config.num_updates, config.drop_steps
    max_reuse = config.max_reuse or math.inf
    if size == 1 and config.policy == "official":
        max_reuse = math.inf
    warm_up = [block for block in range(config.num_blocks) for _ in range(2)]
    cumulative = list(itertools.accumulate(config.pmf or ()))
    rng = random.Random(config.seed)

    # Buffer b is written by block b and read by block b + 1.
    use_counts = [[0] * size for _ in range(last_block)]
    batches = [[0] * size for _ in range(last_block)]
    turns = [0] * config.num_blocks  # For buffer b, turns[b] is also its number of writes.
    drops = [0] * config.num_blocks
    forced = [] if config.warm_up == "none" else list(warm_up)
    block = -1
    while min(turns) < num_updates:
        if forced:
            block = forced.pop(0)
        elif config.pmf is None:
            block = (block + 1) % config.num_blocks
        else:
            block = bisect.bisect(cumulative, rng.random() * cumulative[-1], hi=last_block)

        turn = turns[block]
        if turn in drop_steps[drops[block] :]:
            drops[block] += 1
            if config.warm_up == "official":
                forced = list(warm_up)
                continue

        read_slot, batch, age, use_count = None, turn, 0, 1
        if block > 0:
            num_writes, counts = turns[block - 1], use_counts[block - 1]
            if num_writes == 0:
                continue
            read_slot = select_slot(counts, num_writes, config.policy)
            use_count = counts[read_slot]
            if use_count >= max_reuse:
                continue
            counts[read_slot] += 1
            batch = batches[block - 1][read_slot]
            age = (num_writes - 1 - read_slot) % size

        write_slot = None
        if block < last_block:
            write_slot = turn % size
            use_counts[block][write_slot] = 1
            batches[block][write_slot] = batch

        turns[block] += 1
        operation = UPDATE if turn < num_updates else FEED
        yield Event(block, operation, batch, turn, read_slot, write_slot, age, use_count)


def _check_pmf(pmf: Sequence[float], num_blocks: int) -> None:
    if len(pmf) != num_blocks:
        raise UserError(
            f"config.replay.pmf={pmf} must have one probability for each of the {num_blocks} blocks"
        )
    if not all(0 < p < math.inf for p in pmf):
        raise UserError(
            f"config.replay.pmf={pmf} must be positive, or a block never runs; raise the others"
        )
    if abs(sum(pmf) - 1) > 1e-6:
        scaled = tuple(round(p / sum(pmf), 6) for p in pmf)
        raise UserError(f"config.replay.pmf={pmf} must sum to 1, not {sum(pmf):.6g}; try {scaled}")
