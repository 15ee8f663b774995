"""The training methods: one file each, all of one signature (`Method`)."""

from dgl_jax.methods import (
    async_dgl,
    async_dgl_parallel,
    backprop,
    ddg,
    dgl,
    dni,
    features_replay,
    sequential,
)

METHODS = {
    "async_dgl": async_dgl.METHOD,
    "async_dgl_parallel": async_dgl_parallel.METHOD,
    "backprop": backprop.METHOD,
    "cdni": dni.CDNI,
    "ddg": ddg.METHOD,
    "dgl": dgl.METHOD,
    "dni": dni.DNI,
    "features_replay": features_replay.METHOD,
    "sequential": sequential.METHOD,
}
