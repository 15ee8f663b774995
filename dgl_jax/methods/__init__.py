"""The training methods: one file each, all of one signature (`Method`)."""

from dgl_jax.methods import async_dgl_parallel, backprop, dgl, sequential

METHODS = {
    "async_dgl_parallel": async_dgl_parallel.METHOD,
    "backprop": backprop.METHOD,
    "dgl": dgl.METHOD,
    "sequential": sequential.METHOD,
}
