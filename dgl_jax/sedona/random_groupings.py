"""Random cuts and heads: what a search has to beat at equal cost. Plain Python."""

import math
import random
from collections.abc import Iterator, Sequence

from dgl_jax.partition import check_num_blocks


def count_groupings(num_layers: int, num_blocks: int, num_candidates: int) -> int:
    """In how many ways L layers can be cut into K blocks with one of M heads at each cut.

    Example:
      >>> count_groupings(num_layers=8, num_blocks=4, num_candidates=2)  # 35 x 2 x 2 x 2.
      280

    Raises:
      UserError: if K is not within 1..L.
    """
    check_num_blocks(num_layers, num_blocks)
    return math.comb(num_layers - 1, num_blocks - 1) * num_candidates ** (num_blocks - 1)


def draw_groupings(
    num_layers: int, num_blocks: int, candidates: Sequence[str], seed: int
) -> Iterator[tuple[tuple[int, ...], tuple[str, ...]]]:
    """Draws different groupings, each with equal probability, until there are no more.

    Args:
      num_layers: L.
      num_blocks: K.
      candidates: the heads' names, all different.
      seed: of the draw; the first N do not depend on how many are drawn.

    Yields:
      (cuts, heads): K - 1 increasing cuts and for each a head.

    Example:
      >>> for cuts, heads in sorted(draw_groupings(3, 2, ("mlp", "pred"), seed=0)):
      ...     print(cuts, heads)
      (0,) ('mlp',)
      (0,) ('pred',)
      (1,) ('mlp',)
      (1,) ('pred',)

    Raises:
      UserError: if K is not within 1..L.
    """
    total = count_groupings(num_layers, num_blocks, len(candidates))
    rng, drawn = random.Random(seed), set()
    while len(drawn) < total:
        cuts = tuple(sorted(rng.sample(range(num_layers - 1), num_blocks - 1)))
        heads = tuple(rng.choice(candidates) for _ in cuts)
        if (cuts, heads) not in drawn:
            drawn.add((cuts, heads))
            yield cuts, heads
