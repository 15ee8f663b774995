"""Where to cut, and how many devices a block gets: costs in, cuts and numbers out. Plain Python.

A cut is the 0-based layer after which the network is cut: cuts (1, 3) of six layers give the
blocks 0-1, 2-3 and 4-5. ``num_blocks`` is K, ``num_layers`` is L.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from dgl_jax.errors import UserError


def explicit_cuts(num_layers: int, cuts: Sequence[int]) -> tuple[int, ...]:
    """Checks and returns the given cuts.

    Raises:
      UserError: if a cut is outside 0..L-2, or they are not strictly increasing.
    """
    for cut in cuts:
        if not 0 <= cut <= num_layers - 2:
            raise UserError(
                f"partition.cuts={tuple(cuts)}: {cut} is outside the network, whose "
                f"{num_layers} layers can be cut after 0 to {num_layers - 2}"
            )
    if list(cuts) != sorted(set(cuts)):
        raise UserError(
            f"partition.cuts={tuple(cuts)} must be strictly increasing; "
            f"try {tuple(sorted(set(cuts)))}"
        )
    return tuple(int(cut) for cut in cuts)


def uniform_cuts(num_layers: int, num_blocks: int) -> tuple[int, ...]:
    """Cuts into K blocks whose numbers of layers differ by one at most.

    Example:
      >>> uniform_cuts(num_layers=7, num_blocks=3)  # Blocks of 2, 2 and 3 layers.
      (1, 3)

    Source: SEDONA's baselines cut after ``linspace(-1, L - 1, K + 1)[1:-1]`` rounded down.
    Deviation: the official DGL code makes blocks of equal size and a shorter last one.

    Raises:
      UserError: if K is not within 1..L.
    """
    check_num_blocks(num_layers, num_blocks)
    return tuple(k * num_layers // num_blocks - 1 for k in range(1, num_blocks))


def per_layer_cuts(num_layers: int) -> tuple[int, ...]:
    """One block a layer."""
    return tuple(range(num_layers - 1))


def balanced_cuts(
    layer_costs: Sequence[float], head_costs: Sequence[float], num_blocks: int
) -> tuple[int, ...]:
    """The cuts into K blocks whose slowest block is as fast as any cuts can make it.

    Exact, by dynamic programming over (blocks, layers) in O(K L^2).

    Args:
      layer_costs: L costs, of any one unit (FLOPs, seconds).
      head_costs: L costs; head_costs[j] is the cost of the head that a block has when its
        last layer is j: the auxiliary head for j < L - 1, the network's own for the last.
      num_blocks: K.

    Returns:
      K - 1 cuts. Among equally fast ones, those whose upper blocks are in turn as fast as can be.

    Raises:
      UserError: if K is not within 1..L.

    Example:
      >>> balanced_cuts((4, 1, 1, 2), head_costs=(1, 1, 1, 0), num_blocks=2)  # 4 + 1 and 4 + 0.
      (0,)
    """
    num_layers = len(layer_costs)
    check_num_blocks(num_layers, num_blocks)
    prefix = [0.0]
    for cost in layer_costs:
        prefix.append(prefix[-1] + cost)

    def block_cost(first: int, last: int) -> float:
        return prefix[last + 1] - prefix[first] + head_costs[last]

    # best[first]: the least slowest-block cost of cutting layers first.. into k blocks, and
    # the last layer of the first of these blocks.
    best = [(block_cost(first, num_layers - 1), num_layers - 1) for first in range(num_layers)]
    choices = [best]
    for k in range(2, num_blocks + 1):
        shorter = best
        best = []
        for first in range(num_layers):
            options = [
                (max(block_cost(first, last), shorter[last + 1][0]), last)
                for last in range(first, num_layers - k + 1)
            ]
            best.append(min(options, default=(math.inf, num_layers - 1)))
        choices.append(best)

    cuts = []
    first = 0
    for best in reversed(choices[1:]):
        last = best[first][1]
        cuts.append(last)
        first = last + 1
    return tuple(cuts)


def deal_devices(
    block_costs: Sequence[float], num_devices: int, allowed: Sequence[int]
) -> tuple[int, ...]:
    """How many devices each block gets, so that the slowest stage is as fast as it can be.

    A stage's time is its block's cost divided by the block's devices. Exact, by bisection over
    the times that a stage can have.

    Args:
      block_costs: K costs, of any one unit (FLOPs, seconds).
      num_devices: those at hand.
      allowed: the numbers of devices that a block may have.

    Returns:
      K numbers. Each block has the fewest devices with which it is no slower than the slowest
      stage must be: devices that would speed up others only are left out.

    Raises:
      UserError: if there are fewer devices than the blocks need.

    Example:
      >>> deal_devices((2.0, 4.0, 1.0), num_devices=4, allowed=(1, 2))  # 2, 4 / 2 and 1.
      (1, 2, 1)
    """
    allowed = _affordable(allowed, len(block_costs), num_devices)

    def dealt(slowest):
        return [_devices_needed(cost, slowest, allowed) for cost in block_costs]

    slowest = _least(
        {cost / devices for cost in block_costs for devices in allowed},
        lambda slowest: sum(dealt(slowest)) <= num_devices,
    )
    return tuple(int(devices) for devices in dealt(slowest))


def balanced_cuts_and_devices(
    layer_costs: Sequence[float],
    head_costs: Sequence[float],
    num_blocks: int,
    num_devices: int,
    allowed: Sequence[int],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The cuts into K blocks, and their devices, whose slowest stage is as fast as any can be.

    Exact, by bisection over the times that a stage can have; for each of them dynamic programming
    in O(K L^2) finds the fewest devices with which no stage takes longer.

    Args:
      layer_costs: as in `balanced_cuts`.
      head_costs: as in `balanced_cuts`.
      num_blocks: K.
      num_devices: those at hand.
      allowed: the numbers of devices that a block may have.

    Returns:
      K - 1 cuts and K numbers of devices. Of equally fast choices, those with the fewest devices
      in all; of these, the cuts that come first in lexicographic order.

    Raises:
      UserError: if K is not within 1..L, or there are fewer devices than the blocks need.
    """
    num_layers = len(layer_costs)
    check_num_blocks(num_layers, num_blocks)
    allowed = _affordable(allowed, num_blocks, num_devices)
    prefix = [0.0, *itertools.accumulate(layer_costs)]
    # costs[first][last - first]: of the block from layer first to layer last.
    costs = [
        [prefix[last + 1] - prefix[first] + head_costs[last] for last in range(first, num_layers)]
        for first in range(num_layers)
    ]

    def needed(slowest):
        return [[_devices_needed(cost, slowest, allowed) for cost in row] for row in costs]

    def fewest(needed):
        """By k - 1 and first: the fewest devices for layers first.. in k blocks."""
        rows = [[needed[first][-1] for first in range(num_layers)]]
        for _ in range(1, num_blocks):
            # A block from first to last, and after it those from last + 1.
            rest = rows[-1][1:]
            rows.append(
                [
                    min(map(int.__add__, needed[first], rest[first:]), default=_TOO_MANY)
                    for first in range(num_layers)
                ]
            )
        return rows

    slowest = _least(
        {cost / devices for row in costs for cost in row for devices in allowed},
        lambda slowest: fewest(needed(slowest))[-1][0] <= num_devices,
    )
    needed_devices = needed(slowest)
    rows = fewest(needed_devices)
    cuts, devices, first = [], [], 0
    for k in range(num_blocks - 1, 0, -1):
        last = next(
            last
            for last in range(first, num_layers - 1)
            if needed_devices[first][last - first] + rows[k - 1][last + 1] == rows[k][first]
        )
        cuts.append(last)
        devices.append(needed_devices[first][last - first])
        first = last + 1
    return tuple(cuts), (*devices, needed_devices[first][-1])


# More devices than there are: no allowed number is enough. An integer, so that sums stay exact.
_TOO_MANY = 2**40


def _devices_needed(cost: float, slowest: float, allowed: Sequence[int]) -> int:
    """The fewest devices with which a block of this cost takes no longer than ``slowest``."""
    index = bisect.bisect_left(allowed, True, key=lambda devices: cost / devices <= slowest)
    return allowed[index] if index < len(allowed) else _TOO_MANY


def _least(times: Iterable[float], is_possible: Callable[[float], bool]) -> float:
    """The least of these times that is possible; with it all longer ones are."""
    times = sorted(times)
    return times[bisect.bisect_left(times, True, key=is_possible)]


def _affordable(allowed: Sequence[int], num_blocks: int, num_devices: int) -> list[int]:
    """The allowed numbers, ascending, that leave enough devices to the other blocks."""
    allowed = sorted(allowed)
    if num_blocks * allowed[0] > num_devices:
        raise UserError(
            f"config.placement.auto=True: {num_blocks} blocks need at least "
            f"{num_blocks * allowed[0]} devices, but there are {num_devices}; take fewer blocks, "
            "raise config.placement.num_devices, or leave auto out, so that blocks share devices"
        )
    most = num_devices - (num_blocks - 1) * allowed[0]
    return [devices for devices in allowed if devices <= most]


def slowest_block_cost(
    layer_costs: Sequence[float], head_costs: Sequence[float], cuts: Sequence[int]
) -> float:
    """What the slowest block of the given cuts costs; the costs are those of `balanced_cuts`."""
    # Differences of sums from the first layer, as the searches over cuts take them: the cost of
    # their own result is then exactly within the bound.
    prefix = [0.0, *itertools.accumulate(layer_costs)]
    ranges = block_ranges(len(layer_costs), cuts)
    return max(prefix[end] - prefix[first] + head_costs[end - 1] for first, end in ranges)


def block_ranges(num_layers: int, cuts: Sequence[int]) -> list[tuple[int, int]]:
    """The (first, last + 1) layers of each block.

    Example:
      >>> block_ranges(num_layers=6, cuts=(1, 3))
      [(0, 2), (2, 4), (4, 6)]
    """
    bounds = [0, *(cut + 1 for cut in cuts), num_layers]
    return list(itertools.pairwise(bounds))


def check_num_blocks(num_layers: int, num_blocks: int, field: str = "partition.num_blocks") -> None:
    """Raises UserError unless K is within 1..L."""
    if not 1 <= num_blocks <= num_layers:
        raise UserError(
            f"{field}={num_blocks} must be between 1 and the network's {num_layers} layers"
        )
