"""Where a run's network is cut, which heads its blocks have, and how many devices.

What `config.partition`, `config.auxiliary` and `config.placement` ask for: by a rule, by hand, or
from a search.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
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
from dgl_jax.block import Block
from dgl_jax.config import LOCAL_METHODS, ONE_BLOCK_METHODS, Config, SearchConfig
from dgl_jax.errors import UserError
from dgl_jax.losses import local_losses, make_loss_fns
from dgl_jax.methods import METHODS
from dgl_jax.models import make_network
from dgl_jax.models.network import Network
from dgl_jax.partition import (
    balanced_cuts,
    balanced_cuts_and_devices,
    block_ranges,
    deal_devices,
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


def choose_cuts_heads_and_devices(
    config: Config,
    network: Network,
    num_classes: int,
    image_shape: Sequence[int],
    resolved: Mapping[str, Any] | None = None,
) -> tuple[tuple[int, ...], tuple[str, ...], tuple[int, ...]]:
    """The cuts, heads and numbers of devices that a configuration asks for.

    Args:
      config: of the run.
      network: that of ``config.network``.
      num_classes: of the data.
      image_shape: the shape of one example.
      resolved: what an earlier run of the same folder came to. Its cuts and heads are kept:
        measured costs may differ by now, and a search's file be gone. So is how devices were
        dealt, where there are as many as there were.

    Returns:
      The cuts and the names of heads as `choose_cuts_and_heads`, and the number of devices of
      each block; () where `placement.make_placements` knows without costs.

    Raises:
      UserError: as `choose_cuts_and_heads`, and if there are fewer devices than blocks to deal
        them to.
    """
    placement, partition = config.placement, config.partition
    if not placement.auto:
        return *_cuts_and_heads(config, network, num_classes, image_shape, resolved), ()
    num_devices = placement.num_devices or len(jax.devices())
    is_pipeline = config.method.name == "pipeline_backprop"
    num_microbatches = config.method.num_microbatches if is_pipeline else 1
    sizes = (config.train.batch_size // num_microbatches, config.eval.batch_size)
    allowed = [n for n in range(1, num_devices + 1) if not any(size % n for size in sizes)]
    if not resolved and partition.strategy == "balanced" and config.method.name != "backprop":
        costs = _costs_at_every_cut(config, network, num_classes, image_shape)
        cuts, devices = balanced_cuts_and_devices(
            *costs, partition.num_blocks, num_devices, allowed
        )
        return cuts, (config.auxiliary.name,) * len(cuts), devices
    cuts, names = _cuts_and_heads(config, network, num_classes, image_shape, resolved)
    dealt = tuple((resolved or {}).get("dealt_devices") or ())
    if dealt and resolved["num_devices"] == num_devices and set(dealt) <= set(allowed):
        return cuts, names, dealt
    block_costs = _block_costs(config, network, cuts, names, num_classes, image_shape)
    return cuts, names, deal_devices(block_costs, num_devices, allowed)


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

    Example:
      >>> from dgl_jax.config import from_dict
      >>> config = from_dict({"partition": {"strategy": "uniform", "num_blocks": 3}})
      >>> network = configured_network(config, num_classes=10)  # cnn6, of six layers.
      >>> choose_cuts_and_heads(config, network, num_classes=10, image_shape=(28, 28, 1))
      ((1, 3), ('mlp_sr', 'mlp_sr'))

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
    costs = _costs_at_every_cut(config, network, num_classes, image_shape)
    return balanced_cuts(*costs, partition.num_blocks)


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


def configured_blocks(
    config: Config,
    network: Network,
    cuts: Sequence[int],
    head_names: Sequence[str],
    num_classes: int,
) -> tuple[Block, ...]:
    """The blocks that the configured method makes of a network.

    Args:
      config: its method, loss, heads' options, and how blocks are computed.
      network: of `configured_network`.
      cuts: of `choose_cuts_heads_and_devices`.
      head_names: likewise, one a cut.
      num_classes: of the data set.

    Example:
      >>> config = Config()
      >>> network = configured_network(config, num_classes=10)
      >>> blocks = configured_blocks(config, network, (1, 3), ("mlp_sr", "pred"), num_classes=10)
      >>> [(len(block.layers), type(block.head).__name__) for block in blocks]
      [(2, 'MLPSRAux'), (2, 'PredAux'), (2, 'PooledMLP')]

    Raises:
      UserError: as `make_classifiers`, or if ``train.remat_blocks`` names a block that is none.
    """
    losses = local_losses(config.loss, len(cuts) + 1)
    classifiers = make_classifiers(config, head_names, num_classes)
    heads = tuple(map(head_for_loss, losses, classifiers, itertools.repeat(compute_dtype(config))))
    loss_fns = make_loss_fns(config.loss, len(cuts) + 1, num_classes)
    blocks = METHODS[config.method.name].make_blocks(network, cuts, heads, loss_fns)
    remat = config.train.remat_blocks
    for block in remat:
        if not 0 <= block < len(blocks):
            raise UserError(
                f"config.train.remat_blocks={remat}: {block} must be one of the {len(blocks)} "
                f"block(s); use 0 to {len(blocks) - 1}"
            )
    options = {
        "scan_layers": config.network.scan_layers,
        "kernel_init": config.network.kernel_init,
        "norm_init": config.network.norm_init,
    }
    return tuple(
        dataclasses.replace(block, remat=block.index in remat, **options) for block in blocks
    )


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


def _cuts_and_heads(
    config: Config,
    network: Network,
    num_classes: int,
    image_shape: Sequence[int],
    resolved: Mapping[str, Any] | None,
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Those of an earlier run, or chosen now."""
    if not resolved:
        return choose_cuts_and_heads(config, network, num_classes, image_shape)
    return resolved_cuts_and_heads(config, resolved)


def resolved_cuts_and_heads(
    config: Config, resolved: Mapping[str, Any]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Those of an earlier run, from what its config.json says under ``resolved``."""
    cuts = tuple(resolved["cuts"])
    return cuts, tuple(resolved["heads"]) or (config.auxiliary.name,) * len(cuts)


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


def _costs_at_every_cut(
    config: Config, network: Network, num_classes: int, image_shape: Sequence[int]
) -> tuple[list[float], list[float]]:
    """`_costs` with the one head of ``config.auxiliary.name``."""
    names = (config.auxiliary.name,) * (len(network.layers) - 1)
    return _costs(config, names, network, num_classes, image_shape)


def _block_costs(
    config: Config,
    network: Network,
    cuts: tuple[int, ...],
    names: Sequence[str],
    num_classes: int,
    image_shape: Sequence[int],
) -> list[float]:
    """What each block of the given cuts and heads costs."""
    losses = local_losses(config.loss, len(cuts) + 1)
    classifiers = make_classifiers(config, names, num_classes)
    heads = tuple(map(head_for_loss, losses, classifiers, itertools.repeat(compute_dtype(config))))
    blocks = METHODS[config.method.name].make_blocks(network, cuts, heads, None)
    head_at = {cut: block.head for cut, block in zip(cuts, blocks)}
    layer_costs, head_costs = cost.layer_and_head_costs(
        network,
        [head_at.get(layer) for layer in range(len(network.layers) - 1)],
        image_shape,
        config.train.batch_size,
        config.partition.cost,
    )
    return [
        sum(layer_costs[first:end]) + head_costs[end - 1]
        for first, end in block_ranges(len(network.layers), cuts)
    ]


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
