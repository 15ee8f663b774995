"""The training methods: one file each, all of one signature.

A method says which blocks a network becomes and in what order they run:
``make_method(network, cuts, auxiliary_head, loss_fn) -> Method``.
"""

from dgl_jax.methods import backprop, dgl

METHODS = {"backprop": backprop.make_method, "dgl": dgl.make_method}
