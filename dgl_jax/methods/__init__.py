"""The training methods: one file each, all of one signature (`Method`)."""

from dgl_jax.methods import backprop, dgl, sequential

METHODS = {
    "backprop": backprop.METHOD,
    "dgl": dgl.METHOD,
    "sequential": sequential.METHOD,
}
