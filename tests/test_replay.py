"""The asynchronous plan against plans worked out by hand and an oracle of the official code."""

import bisect
import contextlib
import itertools
import json
import random
import statistics

import pytest

from dgl_jax.errors import UserError
from dgl_jax.replay import POLICIES, PlanConfig, plan, select_slot, slowed_pmf
from dgl_jax.schedule import UPDATE


def _config(**options):
    defaults = {"num_blocks": 3, "steps_per_epoch": 4, "num_epochs": 3, "pmf": slowed_pmf(3)}
    return PlanConfig(**(defaults | options))


def _reads(monkeypatch, policy, size, actions, max_reuse=0):
    """The batches that block 1 reads when block 0 (w) and block 1 (r) are drawn as in actions."""
    config = PlanConfig(
        2, 100, 1, (0.5, 0.5), buffer_size=size, policy=policy, max_reuse=max_reuse, warm_up="none"
    )
    draws = iter([0.25 if action == "w" else 0.75 for action in actions])
    batches = []
    with monkeypatch.context() as patch, contextlib.suppress(RuntimeError):
        # RuntimeError: the draws have run out, a StopIteration inside a generator.
        patch.setattr(random.Random, "random", lambda self: next(draws))
        for event in plan(config):
            if event.block == 1:
                batches.append(event.batch)
                assert event.read_slot == event.batch % size  # The ring overwrites the oldest.
    assert next(draws, None) is None
    return batches


@pytest.mark.parametrize(
    "policy, size, actions, batches",
    [
        # REFERENCE 1.4: a ring of 5 holding 2..6, the next write due on the slot of 2.
        ("official", 5, "wwwwwww" + "rrrrr", [2, 6, 5, 4, 3]),
        ("lifo_least_reused", 5, "wwwwwww" + "rrrrr", [6, 5, 4, 3, 2]),
        ("fifo", 5, "wwwwwww" + "rrrrr", [2, 3, 4, 5, 6]),
        # All read once: a second round in the same order.
        ("official", 3, "wwww" + "rrrrrr", [1, 3, 2, 1, 3, 2]),
        ("lifo_least_reused", 3, "wwww" + "rrrrrr", [3, 2, 1, 3, 2, 1]),
        ("fifo", 3, "wwww" + "rrrrrr", [1, 2, 3, 1, 2, 3]),
        # Not yet full, so no slip; after "wwrr" both are read once, and batch 2 is unread.
        ("official", 5, "wwrrwrr", [1, 0, 2, 2]),
        ("lifo_least_reused", 5, "wwrrwrr", [1, 0, 2, 2]),
        ("fifo", 5, "wwrrwrr", [0, 1, 2, 0]),
        # Full to the brim: the pointer is back at slot 0, which holds the oldest.
        ("official", 3, "wwwrrr", [0, 2, 1]),
        ("lifo_least_reused", 3, "wwwrrr", [2, 1, 0]),
        # 0 is read twice, 1 once; writing 2 over 0 resets its slot's count.
        ("lifo_least_reused", 2, "wrrwrwrr", [0, 0, 1, 2, 2]),
        # Nothing to read yet: the reader skips its turns.
        ("lifo_least_reused", 2, "rrwrr", [0, 0]),
    ],
)
def test_read_order_by_hand(policy, size, actions, batches, monkeypatch):
    assert _reads(monkeypatch, policy, size, actions) == batches


def test_max_reuse_skips_the_turn(monkeypatch):
    # Cap 2: each batch is read once. Cap 3: twice.
    assert _reads(monkeypatch, "lifo_least_reused", 2, "wrrwwrrr", 2) == [0, 2, 1]
    assert _reads(monkeypatch, "lifo_least_reused", 2, "wrrrwrrr", 3) == [0, 0, 1, 1]
    # At M = 1 the official code does not count.
    assert _reads(monkeypatch, "official", 1, "wrrwr", 2) == [0, 0, 1]
    assert _reads(monkeypatch, "lifo_least_reused", 1, "wrrwr", 2) == [0, 1]
    config = _config(max_reuse=2, warm_up="none", buffer_size=3, num_epochs=30)
    reads = [(e.block, e.batch) for e in plan(config) if e.block]
    assert len(reads) == len(set(reads)) > 200


def test_whole_plan_by_hand():
    # Two blocks, round robin after the warm-up, M = 2, three updates each.
    config = _config(
        num_blocks=2, steps_per_epoch=3, num_epochs=1, pmf=None, buffer_size=2, policy="official"
    )
    events = [
        (e.block, e.turn, e.batch, e.read_slot, e.write_slot, e.age, e.use_count)
        for e in plan(config)
    ]
    assert events == [
        (0, 0, 0, None, 0, 0, 1),
        (0, 1, 1, None, 1, 0, 1),
        (1, 0, 0, 0, None, 1, 1),  # The slip: batch 0 is the oldest.
        (1, 1, 1, 1, None, 0, 1),
        (0, 2, 2, None, 0, 0, 1),  # Overwrites batch 0.
        (1, 2, 2, 0, None, 0, 1),
    ]
    assert all(event.operation == UPDATE for event in plan(config))


@pytest.mark.parametrize("policy", POLICIES)
def test_round_robin_with_one_slot_is_synchronous(policy):
    config = _config(pmf=None, buffer_size=1, warm_up="none", policy=policy)
    events = list(plan(config))
    assert len(events) == 3 * 12
    for number, event in enumerate(events):
        step, block = divmod(number, 3)
        assert (event.block, event.turn, event.batch) == (block, step, step)
        assert event.operation == UPDATE
        assert (event.age, event.use_count) == (0, 1)
        assert event.read_slot == (None if block == 0 else 0)
        assert event.write_slot == (None if block == 2 else 0)


def test_one_block_only_takes_new_batches():
    events = list(plan(_config(num_blocks=1, pmf=(1.0,), warm_up="none")))
    assert [(e.batch, e.read_slot, e.write_slot) for e in events] == [
        (step, None, None) for step in range(12)
    ]


def test_slots_hold_what_the_events_say():
    """Replaying reads and writes on real slots finds the batch, age and count of every event."""
    config = _config(num_blocks=4, pmf=slowed_pmf(4, 1, 1.5), buffer_size=7, num_epochs=60)
    slots = [[None] * 7 for _ in range(3)]
    num_writes = [0] * 4
    num_reads = {}
    for event in plan(config):
        if event.block:
            batch, written_at = slots[event.block - 1][event.read_slot]
            assert event.batch == batch
            assert event.age == num_writes[event.block - 1] - 1 - written_at
            key = event.block, written_at
            num_reads[key] = num_reads.get(key, 0) + 1
            assert event.use_count == num_reads[key]
        if event.block < 3:
            slot = event.write_slot
            oldest = min(slots[event.block], key=lambda held: held[1] if held else -1)
            assert slots[event.block][slot] == oldest
            slots[event.block][slot] = event.batch, num_writes[event.block]
        assert event.turn == num_writes[event.block]
        num_writes[event.block] += 1


# Measured over a whole run of 50 * 390 updates: 3.15, 3.25, 3.14 and 7.30, 7.26, 7.22 for the
# seeds 0, 1, 2. REFERENCE 1.4 and issue 3 say 3.2 and 7.2.
@pytest.mark.parametrize("policy, mean_age", [("lifo_least_reused", 3.2), ("official", 7.2)])
def test_mean_age_of_a_read_batch(policy, mean_age):
    config = PlanConfig(6, 390, 50, slowed_pmf(6), buffer_size=50, policy=policy)
    ages = [event.age for event in plan(config) if event.block]
    assert statistics.fmean(ages) == pytest.approx(mean_age, abs=0.15)


def test_slowed_block_is_drawn_less_often():
    assert slowed_pmf(4) == (0.25,) * 4
    # The README's rule S = 1 / (1 - noise): noise 0.5 is weights 1, 0.5, 1 before normalising.
    assert slowed_pmf(3, 1, 2.0) == pytest.approx((0.4, 0.2, 0.4))
    pmf = slowed_pmf(6, 2, 2.0)
    events = itertools.islice(plan(PlanConfig(6, 390, 50, pmf)), 40_000)
    counts = [0] * 6
    for event in events:
        counts[event.block] += 1
    assert [count / 40_000 for count in counts] == pytest.approx(list(pmf), abs=0.008)


def test_every_block_makes_all_its_updates_and_then_feeds():
    config = _config(pmf=slowed_pmf(3, 2, 2.0), num_epochs=10)
    events = list(plan(config))
    for block in range(3):
        own = [event for event in events if event.block == block]
        assert [event.turn for event in own] == list(range(len(own)))
        assert [event.operation == UPDATE for event in own] == [event.turn < 40 for event in own]
    finished = [event for event in events if event.operation != UPDATE]
    assert finished and {event.block for event in finished} == {0, 1}
    assert all(event.write_slot is not None for event in finished)
    # It ends with the last update, here of the slowed block.
    last = events[-1]
    assert (last.block, last.operation, last.turn) == (2, UPDATE, 39)
    # The slowed block, still updating, reads what was written after its feeder had finished.
    assert any(e.block == 2 and e.operation == UPDATE and e.batch >= 40 for e in events)


def test_official_accounting():
    exact = PlanConfig(6, 390, 50, slowed_pmf(6), (15, 30, 45))
    assert exact.num_updates == 50 * 390
    assert exact.drop_steps == (15 * 390, 30 * 390, 45 * 390)
    official = PlanConfig(6, 390, 50, slowed_pmf(6), (15, 30, 45), accounting="official")
    assert official.num_updates == 51 * 390
    assert official.drop_steps == (17 * 390, 32 * 390, 47 * 390)


def _official_oracle(config, epoch_decay):
    """The official loop's accounting and read rule, from its epoch counters (REFERENCE 1.4)."""
    rng, cumulative = random.Random(config.seed), list(itertools.accumulate(config.pmf))
    num_blocks, size = config.num_blocks, config.buffer_size
    epoch, position, done = [-1] * num_blocks, [0] * num_blocks, [False] * num_blocks
    held, counts, pointer = {}, {}, [0] * num_blocks
    num_draws_forced = 0
    while True:
        if num_draws_forced < 2 * num_blocks:
            block, num_draws_forced = num_draws_forced // 2, num_draws_forced + 1
        else:
            block = bisect.bisect(cumulative, rng.random() * cumulative[-1], hi=num_blocks - 1)
        if done[block]:
            done[block] = False
            drop = epoch[block] > 0 and epoch[block] % epoch_decay == 0
            epoch[block] += 1
            if drop:
                num_draws_forced = 0
                yield "drop", block, epoch[block] + 1  # Its own epochs so far.
                continue
        slot, batch = None, (block, position[block], epoch[block])
        if block:
            num_filled = sum((block - 1, s) in held for s in range(size))
            least = min(counts[block - 1, s] for s in range(num_filled))
            tied = [s for s in range(num_filled) if counts[block - 1, s] == least]
            # As indices from the right where they lie beyond the pointer.
            slot = max(s - num_filled if s > pointer[block - 1] else s for s in tied) % num_filled
            counts[block - 1, slot] += 1
            batch = held[block - 1, slot]
        position[block] = (position[block] + 1) % config.steps_per_epoch
        done[block] = position[block] == 0
        held[block, pointer[block]], counts[block, pointer[block]] = batch, 1
        written, pointer[block] = pointer[block], (pointer[block] + 1) % size
        yield block, slot, written, epoch[block] < config.num_epochs


def test_official_plan_is_that_of_the_official_loop():
    config = PlanConfig(
        num_blocks=6,
        steps_per_epoch=20,
        num_epochs=50,
        pmf=slowed_pmf(6, 3, 1.2),
        drop_epochs=(15, 30, 45, 60, 75),  # Beyond 50: of blocks that only feed.
        buffer_size=5,
        policy="official",
        warm_up="official",
        accounting="official",
        seed=3,
    )
    events = list(plan(config))
    expected, drops = [], []
    for item in _official_oracle(config, epoch_decay=15):
        if item[0] == "drop":
            drops.append(item[1:])
        else:
            expected.append(item)
        if len(expected) == len(events):
            break
    assert [(e.block, e.read_slot, e.operation == UPDATE) for e in events] == [
        (block, slot, update) for block, slot, _, update in expected
    ]
    assert [e.write_slot for e in events if e.block < 5] == [w for b, _, w, _ in expected if b < 5]
    for block in range(6):
        assert [own for b, own in drops if b == block][:3] == [17, 32, 47]
    assert [
        sum(e.operation == UPDATE for e in events if e.block == block) for block in range(6)
    ] == [1020] * 6


def test_warm_up():
    twice = [block for block in range(3) for _ in range(2)]
    first = [event.block for event in itertools.islice(plan(_config()), 6)]
    assert first == twice
    # Round robin, K = 3, 4 steps an epoch, a drop at epoch 1: after warm-up and two rounds more
    # block 0 would take its turn 4; that turn is lost, and the warm-up runs again. In it block 1
    # and then block 2 reach their own drop, and each restarts it.
    config = _config(pmf=None, drop_epochs=(1,), warm_up="official")
    blocks = [event.block for event in plan(config)]
    assert blocks[:12] == [*twice, 0, 1, 2, 0, 1, 2]
    assert blocks[12:] == [0, 0] + [0, 0, 1, 1] + twice + [0, 1, 2] * 6
    once = _config(pmf=None, drop_epochs=(1,), warm_up="once")
    assert [event.block for event in plan(once)] == [*twice, *[0, 1, 2] * 10]


@pytest.mark.parametrize("policy", POLICIES)
def test_resumed_is_uninterrupted(policy):
    config = _config(
        num_epochs=20, policy=policy, drop_epochs=(5, 10), warm_up="official", max_reuse=3
    )
    events = list(plan(config))
    for first_event in (0, 1, 7, 100, len(events) - 1, len(events)):
        assert list(plan(config, first_event)) == events[first_event:]
    assert list(plan(_config(**vars(config) | {"seed": 1}))) != events
    longer = plan(_config(**vars(config) | {"num_epochs": 25}))
    slots = [(e.block, e.read_slot, e.write_slot) for e in events]
    assert [(e.block, e.read_slot, e.write_slot) for e in longer][: len(slots)] == slots
    restored = json.loads(json.dumps(vars(config)))  # From a checkpoint's JSON.
    restored |= {"pmf": tuple(restored["pmf"]), "drop_epochs": tuple(restored["drop_epochs"])}
    assert PlanConfig(**restored) == config


def test_select_slot_ignores_slots_never_written():
    assert select_slot([1, 1, 0, 0], 2, "lifo_least_reused") == 1
    assert select_slot([1, 1, 0, 0], 2, "fifo") == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"buffer_size": 0}, "config.replay.buffer_size=0 must be at least 1; try 1"),
        ({"num_blocks": 0}, "num_blocks=0 must be at least 1; try 1"),
        ({"num_epochs": 0}, "num_epochs=0 must be positive and finite; try 50"),
        ({"max_reuse": 1}, "max_reuse=1 must be at least 2, .* or 0"),
        ({"drop_epochs": (2, 1)}, r"drop_epochs=\(2, 1\) must be .*; try \(1, 2\)"),
        ({"policy": "lifo"}, "policy='lifo' must be one of lifo_least_reused, official"),
        ({"warm_up": "yes"}, "warm_up='yes' must be one of none, once, official"),
        ({"accounting": "x"}, "accounting='x' must be one of exact, official"),
        ({"pmf": (0.5, 0.5)}, r"pmf=\(0.5, 0.5\) must have one probability .* 3 blocks"),
        ({"pmf": (0.5, 0.7, -0.2)}, "pmf=.* must be positive, or a block never runs"),
        ({"pmf": (0.5, 0.5, 0.0)}, "pmf=.* must be positive, or a block never runs"),
        ({"pmf": (1, 1, 2)}, r"must sum to 1, not 4; try \(0.25, 0.25, 0.5\)"),
    ],
)
def test_errors(options, message):
    with pytest.raises(UserError, match=f"^.*{message}") as error:
        _config(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "slow_block, slowdown, message",
    [
        (3, 1.0, "slow_block=3 must be one of the 3 blocks; use 0 to 2"),
        (-1, 1.0, "slow_block=-1 must be one of the 3 blocks; use 0 to 2"),
        (0, 0.5, "slowdown=0.5 must be at least 1 and finite; 1 is as fast"),
        (0, float("nan"), "slowdown=nan must be at least 1"),
    ],
)
def test_slowed_pmf_errors(slow_block, slowdown, message):
    with pytest.raises(UserError, match=message):
        slowed_pmf(3, slow_block, slowdown)
