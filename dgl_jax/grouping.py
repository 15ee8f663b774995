"""Where a run's network is cut and which heads its blocks have.

What `config.partition` and `config.auxiliary` ask for: by a rule, by hand, or from a search.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from absl import logging

from dgl_jax import cost
from dgl_jax.auxiliary import (
    AUXILIARY,
    OPTIONS,
    head_for_loss,
    make_heads,
    options_that_apply,
)
from dgl_jax.config import LOCAL_METHODS, ONE_BLOCK_METHODS, Config, SearchConfig
from dgl_jax.errors import UserError
from dgl_jax.methods import METHODS
from dgl_jax.models import make_network
from dgl_jax.models.network import Network
from dgl_jax.partition import (
    balanced_cuts,
    explicit_cuts,
    per_layer_cuts,
    slowest_block_cost,
    uniform_cuts,
)
from dgl_jax.sedona.discretise import (
    NEAR_TIE,
    Grouping,
    best_heads,
    discretise,
    discretise_balanced,
)
from dgl_jax.sedona.result import SearchResult, load_result


def choose_cuts_and_heads(
    config: Config, network: Network, num_classes: int, image_shape: Sequence[int]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The cuts and heads that a configuration asks for, by a rule or from a search's file.

    Args:
      config: of the run.
      network: that of ``config.network``.
      num_classes: of the data.
      image_shape: the shape of one example.

    Returns:
      The cuts, and for each the name of the head below it; where the method's blocks have no
      auxiliary heads, the names mean nothing.

    Raises:
      UserError: a wrong number of heads, an unknown one, or a file that does not fit.
    """
    partition, auxiliary = config.partition, config.auxiliary
    if partition.strategy == "from_search" and config.method.name not in ONE_BLOCK_METHODS:
        result = load_result(partition.from_search, config.network.name, len(network.layers))
        has_heads = partition.search_heads and config.method.name in LOCAL_METHODS
        if has_heads:
            given = f"config.partition.from_search={partition.from_search}"
            _check_heads(result.candidates, given)
        grouping = _grouping_of_search(config, result, has_heads, network, num_classes, image_shape)
        cuts = grouping.cuts
        if has_heads and cuts:
            return cuts, tuple(result.candidates[head] for head in grouping.heads)
    else:
        cuts = choose_cuts(config, network, num_classes, image_shape)
    names = auxiliary.per_block or (auxiliary.name,) * len(cuts)
    given = f"config.auxiliary.per_block={names}"
    if len(names) != len(cuts):
        raise UserError(
            f"{given} must have a head for each block but the last; "
            f"give {len(cuts)} for {len(cuts) + 1} blocks"
        )
    _check_heads(auxiliary.per_block, given)
    return cuts, names


def choose_cuts(
    config: Config, network: Network, num_classes: int, image_shape: Sequence[int]
) -> tuple[int, ...]:
    """The cuts of every ``config.partition.strategy`` but ``from_search``."""
    num_layers, partition = len(network.layers), config.partition
    if config.method.name in ONE_BLOCK_METHODS:
        return ()
    if partition.strategy == "explicit":
        return explicit_cuts(num_layers, partition.cuts)
    if partition.strategy == "uniform":
        return uniform_cuts(num_layers, partition.num_blocks)
    if partition.strategy == "per_layer":
        return per_layer_cuts(num_layers)
    if partition.num_blocks == 1:
        return ()
    names = (config.auxiliary.name,) * (num_layers - 1)
    layer_costs, head_costs = _costs(config, names, network, num_classes, image_shape)
    return balanced_cuts(layer_costs, head_costs, partition.num_blocks)


def make_classifiers(config: Config, names: Sequence[str], num_classes: int) -> tuple[Any, ...]:
    """The heads of these names, with the options of ``config.auxiliary``.

    Raises:
      UserError: as `make_heads`; a search's heads take those options that they have.
    """
    options = {option: getattr(config.auxiliary, option) for option in OPTIONS}
    if config.partition.from_search and config.partition.search_heads:
        options = options_that_apply(names, options)
    # Without cuts, too, a mistake in the one name is found.
    made = names or (config.auxiliary.name,)
    return make_heads(made, num_classes, dtype=compute_dtype(config), **options)[: len(names)]


def configured_network(config: Config | SearchConfig, num_classes: int) -> Network:
    """The network that ``config.network`` asks for."""
    options = config.network
    return make_network(
        options.name,
        num_classes,
        form=options.form,
        width_factor=options.width_factor,
        dropout=options.dropout,
        dtype=compute_dtype(config),
    )


def compute_dtype(config: Config | SearchConfig) -> Any:
    """What layers and heads compute in; None for that of input and parameters."""
    return jnp.bfloat16 if config.network.dtype == "bfloat16" else None


def _grouping_of_search(
    config: Config,
    result: SearchResult,
    has_heads: bool,
    network: Network,
    num_classes: int,
    image_shape: Sequence[int],
) -> Grouping:
    """A search's result for K blocks, within the bound on the slowest block if there is one."""
    partition, num_blocks = config.partition, config.partition.num_blocks
    if partition.max_imbalance:
        names = (config.auxiliary.name,) * len(result.beta)
        if has_heads:
            names = tuple(result.candidates[head] for head in best_heads(result.beta))
        costs = _costs(config, names, network, num_classes, image_shape)
        fastest = slowest_block_cost(*costs, balanced_cuts(*costs, num_blocks))
        grouping = discretise_balanced(
            result.alpha, result.beta, num_blocks, *costs, partition.max_imbalance * fastest
        )
    else:
        grouping = discretise(result.alpha, result.beta, num_blocks)
    # A negative one was the bound's doing.
    if grouping.margin is not None and 0 <= grouping.margin < NEAR_TIE:
        logging.warning(
            "config.partition.from_search=%s: at K=%d the last cut taken is only %.2g more "
            "probable than the best one left out: chance decided between them.",
            partition.from_search,
            num_blocks,
            grouping.margin,
        )
    return grouping


def _costs(
    config: Config,
    names: Sequence[str],
    network: Network,
    num_classes: int,
    image_shape: Sequence[int],
) -> tuple[list[float], list[float]]:
    """The costs of all layers, and of what the method puts at every place for a cut.

    That is the head of this name, a synthesizer, or nothing.
    """
    classifiers = make_classifiers(config, names, num_classes)
    dtype = compute_dtype(config)
    heads = [head_for_loss(config.loss.name, head, dtype) for head in classifiers]
    every_cut = per_layer_cuts(len(network.layers))
    *blocks, _ = METHODS[config.method.name].make_blocks(network, every_cut, heads, None)
    return cost.layer_and_head_costs(
        network,
        [block.head for block in blocks],
        image_shape,
        config.train.batch_size,
        config.partition.cost,
    )


def _check_heads(names: Sequence[str], given: str) -> None:
    for name in names:
        if name not in AUXILIARY:
            raise UserError(
                f"{given}: the head {name!r} is unknown; choose from {', '.join(AUXILIARY)}"
            )
