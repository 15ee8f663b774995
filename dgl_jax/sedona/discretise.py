"""From decision variables to cuts and heads, for any number of blocks. Plain Python.

A network of L layers has L - 1 places for a cut, after each layer but the last. The search gives
each a row of alpha (local, from above) and a row of beta (one entry a candidate head).
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from dgl_jax.errors import UserError
from dgl_jax.partition import check_num_blocks

# A margin of probability below which chance decided between two cuts.
NEAR_TIE = 0.01


@dataclasses.dataclass(frozen=True)
class Grouping:
    """What a search chose.

    Attributes:
      cuts: K - 1 layers, 0-based, after which to cut.
      heads: for each cut the index of its candidate head.
      local_probabilities: softmax(alpha)'s local entry, of every place for a cut.
      margin: how much the least probable cut taken stands above the most probable place left
        out; None where there is no cut or no place left. Near 0, chance decided.
    """

    cuts: tuple[int, ...]
    heads: tuple[int, ...]
    local_probabilities: tuple[float, ...]
    margin: float | None


def discretise(
    alpha: Sequence[Sequence[float]], beta: Sequence[Sequence[float]], num_blocks: int
) -> Grouping:
    """Cuts after the K - 1 layers that are most probably local; each gets its best head.

    Args:
      alpha: [L - 1, 2], (local, from above).
      beta: [L - 1, M].
      num_blocks: K.

    Returns:
      The grouping. Of equal probabilities the lower layer is taken, of equal heads the first.

    Raises:
      UserError: if K is not within 1..L.

    Example:
      >>> alpha = [(0.0, 1.0), (2.0, 0.0), (1.0, 0.0)]
      >>> beta = [(0.0, 0.0), (0.0, 0.5), (0.5, 0.0)]
      >>> for num_blocks in (2, 3):
      ...     found = discretise(alpha, beta, num_blocks)
      ...     print(found.cuts, found.heads)
      (1,) (1,)
      (1, 2) (1, 0)

    Source: SEDONA, the released code's rule for a given K.
    Deviation: none.
    """
    check_num_blocks(len(alpha) + 1, num_blocks)
    probabilities = local_probabilities(alpha)
    # By what the softmax is of: probabilities of 1 but for rounding would all be equal.
    by_probability = sorted(range(len(alpha)), key=lambda j: alpha[j][1] - alpha[j][0])
    return _grouping(sorted(by_probability[: num_blocks - 1]), probabilities, beta)


def discretise_balanced(
    alpha: Sequence[Sequence[float]],
    beta: Sequence[Sequence[float]],
    num_blocks: int,
    layer_costs: Sequence[float],
    head_costs: Sequence[float],
    max_block_cost: float,
) -> Grouping:
    """The most probable cuts of which no block costs more than a bound.

    Exact, by dynamic programming over (blocks, layers): the greatest sum of local probabilities.

    Args:
      alpha: as in `discretise`.
      beta: as in `discretise`.
      num_blocks: K.
      layer_costs: L costs, of any one unit (FLOPs, seconds).
      head_costs: L costs, of the head of a block whose last layer is this one.
      max_block_cost: the bound. The least that K blocks can keep is that of
        `partition.balanced_cuts`.

    Raises:
      UserError: if K is not within 1..L, or no cuts keep the bound.

    Source: ours; the paper's rule bounds nothing, so one block may hold most of the network.
    """
    num_layers = len(alpha) + 1
    check_num_blocks(num_layers, num_blocks)
    probabilities = local_probabilities(alpha)
    prefix = [0.0, *itertools.accumulate(layer_costs)]

    def fits(first: int, last: int) -> bool:
        return prefix[last + 1] - prefix[first] + head_costs[last] <= max_block_cost

    # best[first]: of cutting layers first.. into k blocks the greatest sum, and the cuts.
    impossible = (-math.inf, ())
    best = [(0.0, ()) if fits(first, num_layers - 1) else impossible for first in range(num_layers)]
    for _ in range(num_blocks - 1):
        shorter, best = best, []
        for first in range(num_layers):
            options = [
                (probabilities[last] + shorter[last + 1][0], (last, *shorter[last + 1][1]))
                for last in range(first, num_layers - 1)
                if fits(first, last)
            ]
            best.append(max(options, key=lambda option: option[0], default=impossible))
    score, cuts = best[0]
    if score == -math.inf:
        raise UserError(
            f"max_block_cost={max_block_cost:g} is less than what {num_blocks} blocks of these "
            "layers can keep; raise it, or take another number of blocks"
        )
    return _grouping(cuts, probabilities, beta)


def local_probabilities(alpha: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """softmax(alpha)[:, 0]."""
    return tuple(1 / (1 + math.exp(min(above - local, 700.0))) for local, above in alpha)


def best_heads(beta: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """The index of each row's greatest entry; of equal ones the first."""
    return tuple(max(range(len(row)), key=lambda m, row=row: row[m]) for row in beta)


def _grouping(
    cuts: Sequence[int], probabilities: tuple[float, ...], beta: Sequence[Sequence[float]]
) -> Grouping:
    heads = best_heads([beta[cut] for cut in cuts])
    left = [p for layer, p in enumerate(probabilities) if layer not in cuts]
    taken = [probabilities[cut] for cut in cuts]
    margin = min(taken) - max(left) if taken and left else None
    return Grouping(tuple(cuts), heads, probabilities, margin)
