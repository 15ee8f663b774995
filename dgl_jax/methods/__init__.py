"""The training methods: one file each, all of one signature (`Method`)."""

from dgl_jax.methods import async_dgl, backprop, dgl, dni, sequential

METHODS = {
    "async_dgl": async_dgl.METHOD,
    "backprop": backprop.METHOD,
    "cdni": dni.CDNI,
    "dgl": dgl.METHOD,
    "dni": dni.DNI,
    "sequential": sequential.METHOD,
}
