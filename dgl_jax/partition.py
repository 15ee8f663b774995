"""Where to cut: layers and a number of blocks in, cuts out. Plain Python.

A cut is the 0-based layer after which the network is cut: cuts (1, 3) of six layers give the
blocks 0-1, 2-3 and 4-5. ``num_blocks`` is K, ``num_layers`` is L.
"""

import itertools
import math
from collections.abc import Sequence

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
      K - 1 cuts. Among equally fast ones, those that come first in lexicographic order.

    Raises:
      UserError: if K is not within 1..L.
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
    """The (first, last + 1) layers of each block."""
    bounds = [0, *(cut + 1 for cut in cuts), num_layers]
    return list(itertools.pairwise(bounds))


def check_num_blocks(num_layers: int, num_blocks: int, field: str = "partition.num_blocks") -> None:
    """Raises UserError unless K is within 1..L."""
    if not 1 <= num_blocks <= num_layers:
        raise UserError(
            f"{field}={num_blocks} must be between 1 and the network's {num_layers} layers"
        )
