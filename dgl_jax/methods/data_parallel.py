"""Backprop with every batch split over the devices: what most users would do with several.

The method is `backprop`'s, to the letter. What differs is where it runs: the weights are on each
of ``config.placement.num_devices`` devices (0: as many as there are), the batch is split over
them by sharding, and the compiler adds the exchange of gradients. Gradients and BatchNorm's
statistics are of the whole batch, so the numbers are those of one device but for rounding.
`placement.over_all` makes that placement; a run's `train_and_evaluate` asks it to.

Example:
  >>> from dgl_jax.config import PlacementConfig
  >>> from dgl_jax.placement import over_all
  >>> placement = over_all(PlacementConfig(num_devices=4))
  >>> placement.data_parallel, METHOD is backprop.METHOD
  (4, True)
"""

from dgl_jax.methods import backprop

METHOD = backprop.METHOD
