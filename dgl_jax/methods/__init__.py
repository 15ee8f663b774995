"""The training methods: one file each, all of one signature (`Method`)."""

from dgl_jax.methods import backprop, ddg, dgl, features_replay, sequential

METHODS = {
    "backprop": backprop.METHOD,
    "ddg": ddg.METHOD,
    "dgl": dgl.METHOD,
    "features_replay": features_replay.METHOD,
    "sequential": sequential.METHOD,
}
