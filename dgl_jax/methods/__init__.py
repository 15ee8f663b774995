"""The training methods: one file each, all of one signature (`Method`)."""

from dgl_jax.methods import (
    async_dgl,
    async_dgl_parallel,
    backprop,
    data_parallel,
    ddg,
    dgl,
    dni,
    features_replay,
    pipeline_backprop,
    sequential,
)

METHODS = {
    "async_dgl": async_dgl.METHOD,
    "async_dgl_parallel": async_dgl_parallel.METHOD,
    "backprop": backprop.METHOD,
    "cdni": dni.CDNI,
    "data_parallel": data_parallel.METHOD,
    "ddg": ddg.METHOD,
    "dgl": dgl.METHOD,
    "dni": dni.DNI,
    "features_replay": features_replay.METHOD,
    "pipeline_backprop": pipeline_backprop.METHOD,
    "sequential": sequential.METHOD,
}
