"""The training methods: one file each, all of one signature (`Method`)."""

from dgl_jax.methods import async_dgl, backprop, dgl, sequential

METHODS = {
    "async_dgl": async_dgl.METHOD,
    "backprop": backprop.METHOD,
    "dgl": dgl.METHOD,
    "sequential": sequential.METHOD,
}
