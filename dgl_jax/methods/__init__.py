"""The training methods: one file each, all of one signature (`Method`)."""

from dgl_jax.methods import backprop, dgl, dni, sequential

METHODS = {
    "backprop": backprop.METHOD,
    "cdni": dni.CDNI,
    "dgl": dgl.METHOD,
    "dni": dni.DNI,
    "sequential": sequential.METHOD,
}
