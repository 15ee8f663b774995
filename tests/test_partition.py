"""Cuts against brute force and against figures worked out by hand."""

import fractions
import itertools
import random

import pytest

from dgl_jax.errors import UserError
from dgl_jax.partition import (
    balanced_cuts,
    balanced_cuts_and_devices,
    block_ranges,
    deal_devices,
    explicit_cuts,
    per_layer_cuts,
    uniform_cuts,
)


@pytest.mark.parametrize(
    "num_layers, num_blocks, cuts",
    [
        # SEDONA's baselines: floor(linspace(-1, L - 1, K + 1)[1:-1]).
        (16, 2, (7,)),
        (16, 4, (3, 7, 11)),
        (16, 8, (1, 3, 5, 7, 9, 11, 13)),
        (33, 4, (7, 15, 23)),  # linspace(-1, 32, 5) = -1, 7.25, 15.5, 23.75, 32
        (10, 4, (1, 4, 6)),  # -1, 1.5, 4, 6.5, 9
        (50, 2, (24,)),
        (4, 4, (0, 1, 2)),
        (5, 1, ()),
    ],
)
def test_uniform(num_layers, num_blocks, cuts):
    assert uniform_cuts(num_layers, num_blocks) == cuts
    sizes = [end - first for first, end in block_ranges(num_layers, cuts)]
    assert sum(sizes) == num_layers and max(sizes) - min(sizes) <= 1


def test_per_layer_is_one_block_a_layer():
    assert block_ranges(3, per_layer_cuts(3)) == [(0, 1), (1, 2), (2, 3)]


def _slowest(layer_costs, head_costs, cuts):
    return max(
        sum(layer_costs[first:end]) + head_costs[end - 1]
        for first, end in block_ranges(len(layer_costs), cuts)
    )


def test_balanced_is_optimal():
    generator = random.Random(0)
    for _ in range(60):
        num_layers = generator.randint(1, 8)
        layer_costs = [generator.randint(0, 9) for _ in range(num_layers)]
        head_costs = [generator.randint(0, 4) for _ in range(num_layers)]
        for num_blocks in range(1, num_layers + 1):
            best = min(
                _slowest(layer_costs, head_costs, cuts)
                for cuts in itertools.combinations(range(num_layers - 1), num_blocks - 1)
            )
            cuts = balanced_cuts(layer_costs, head_costs, num_blocks)
            assert len(cuts) == num_blocks - 1
            assert explicit_cuts(num_layers, cuts) == cuts
            assert _slowest(layer_costs, head_costs, cuts) == best


def test_balanced_by_hand():
    # Without heads 6 | 1 2 3 is even; a dear head after layer 0 moves the cut.
    assert balanced_cuts([6, 1, 2, 3], [0, 0, 0, 0], 2) == (0,)
    assert balanced_cuts([6, 1, 2, 3], [9, 0, 0, 0], 2) == (1,)


def _best(layer_costs, head_costs, all_cuts, num_devices, allowed):
    """Of everything there is: the fastest, then the fewest devices, then the first cuts."""
    return min(
        (
            max(
                fractions.Fraction(sum(layer_costs[first:end]) + head_costs[end - 1], number)
                for (first, end), number in zip(block_ranges(len(layer_costs), cuts), devices)
            ),
            sum(devices),
            cuts,
            devices,
        )
        for cuts in all_cuts
        for devices in itertools.product(allowed, repeat=len(cuts) + 1)
        if sum(devices) <= num_devices
    )


def test_dealt_devices_are_optimal_and_no_more_than_help():
    generator = random.Random(1)
    for _ in range(150):
        num_layers = generator.randint(1, 6)
        num_blocks = generator.randint(1, min(4, num_layers))
        # Few distinct costs, zeros among them: many ties.
        layer_costs = [generator.choice((0, 1, 2, 2, 7)) for _ in range(num_layers)]
        head_costs = [generator.choice((0, 1, 5)) for _ in range(num_layers)]
        allowed = generator.choice(([1], [1, 2, 4], [1, 2, 3, 6], [4, 1, 2], [1, 5]))
        num_devices = generator.randint(num_blocks, 10)
        every = tuple(itertools.combinations(range(num_layers - 1), num_blocks - 1))
        _, _, *expected = _best(layer_costs, head_costs, every, num_devices, allowed)
        found = balanced_cuts_and_devices(layer_costs, head_costs, num_blocks, num_devices, allowed)
        assert list(found) == expected
        cuts = generator.choice(every)
        block_costs = [
            sum(layer_costs[first:end]) + head_costs[end - 1]
            for first, end in block_ranges(num_layers, cuts)
        ]
        *_, devices = _best(layer_costs, head_costs, (cuts,), num_devices, allowed)
        assert deal_devices(block_costs, num_devices, allowed) == devices


def test_dealt_devices_by_hand():
    # The dear block gets three; the sixth device would make no difference to the slowest stage.
    assert deal_devices([30, 10, 10], 6, range(1, 7)) == (3, 1, 1)
    assert deal_devices([30, 10, 10], 6, (1, 2, 4)) == (4, 1, 1)
    # With one device a block 4 | 4 4 or 4 4 | 4 is best; with three, a cut that fits two to one.
    assert balanced_cuts_and_devices([4, 4, 4], [0, 0, 0], 2, 3, (1, 2)) == ((0,), (1, 2))
    assert balanced_cuts_and_devices([4, 4, 4], [9, 0, 0], 2, 3, (1, 2)) == ((1,), (2, 1))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: explicit_cuts(4, (3,)), "3 is outside the network"),
        (lambda: explicit_cuts(4, (-1,)), "-1 is outside the network"),
        (lambda: explicit_cuts(4, (1, 1)), r"strictly increasing; try \(1,\)"),
        (lambda: explicit_cuts(4, (2, 0)), r"strictly increasing; try \(0, 2\)"),
        (lambda: uniform_cuts(4, 5), "num_blocks=5 must be between 1 and the network's 4"),
        (lambda: balanced_cuts([1, 1], [0, 0], 3), "num_blocks=3 must be between 1"),
        (
            lambda: balanced_cuts_and_devices([1, 1], [0, 0], 3, 9, (1,)),
            "num_blocks=3 must be between 1",
        ),
        (
            lambda: deal_devices([1, 1, 1], 2, (1, 2)),
            "auto=True: 3 blocks need at least 3 devices, but there are 2; take fewer blocks",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(UserError, match=message):
        call()
