"""The training methods: one file each, all of one signature (`Method`)."""

from dgl_jax.methods import async_dgl, async_dgl_parallel, backprop, dgl, dni, sequential

METHODS = {
    "async_dgl": async_dgl.METHOD,
    "async_dgl_parallel": async_dgl_parallel.METHOD,
    "backprop": backprop.METHOD,
    "cdni": dni.CDNI,
    "dgl": dgl.METHOD,
    "dni": dni.DNI,
    "sequential": sequential.METHOD,
}
