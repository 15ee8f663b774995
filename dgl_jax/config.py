"""What a user may ask for: frozen dataclasses, and every check that needs no network or data.

A configuration file's ``get_config()`` starts from `default_config()`, a ConfigDict with
every field below; the scripts turn it into a `Config` once, with `from_dict`, which rejects
unknown names, wrong types and values out of range in one line each.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from dgl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """The training algorithm."""

    name: str = "dgl"
    # sequential: how often each block's turn comes; the updates of a block are shared out.
    laps: int = 1
    # ddg: delayed gradients are taken at the "stale" weights of their forward pass (the paper),
    # or at the "current" ones (the public code).
    weights: str = "stale"
    # pipeline_backprop: M, the parts of a batch that go through the blocks one after the other;
    # and in which order each block works on them: gpipe or 1f1b, see schedule.pipeline.
    num_microbatches: int = 4
    pipeline_schedule: str = "1f1b"


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """Asynchronous DGL: who runs when, and the replay buffers between blocks."""

    # async_dgl: blocks are drawn at "random", or in "round_robin".
    order: str = "random"
    # S: this block is drawn (async_dgl) or works (async_dgl_parallel) S times less often.
    slow_block: int = 0
    slowdown: float = 1.0
    # async_dgl: how often each block is drawn, K probabilities; empty: by slow_block, slowdown.
    pmf: tuple[float, ...] = ()
    # M: mini-batches in each buffer.
    buffer_size: int = 50
    # float32, bfloat16 or int8 (with a scale a channel).
    buffer_dtype: str = "float32"
    # lifo_least_reused, official or fifo: see replay.select_slot.
    policy: str = "lifo_least_reused"
    # A batch is not read again once it has been used so often, writing included; 0: no limit.
    max_reuse: int = 0
    # async_dgl: none, once or official; and exact or official: see replay.PlanConfig.
    warm_up: str = "once"
    accounting: str = "exact"


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """The network that is cut into blocks."""

    name: str = "cnn6"
    # For VGG and ResNet: the stem and head for images of CIFAR's, Tiny-ImageNet's or
    # ImageNet's size.
    form: str = "cifar"
    # Multiplies every layer's channels. SEDONA's CIFAR networks are 0.25.
    width_factor: float = 1.0
    # Dropout rate in the fully connected layers of VGG's head.
    dropout: float = 0.0
    # What layers and heads compute in; parameters, statistics and losses stay float32.
    dtype: str = "float32"
    # How kernels of layers and heads start: "own", each as its module says, or "he_normal", all
    # from He's normal distribution by fan-in, as in SEDONA's code, also those that start at zero.
    kernel_init: str = "own"
    # How the weights of BatchNorm start: "own", as ones, or "uniform", from U(0, 1), as in DGL's
    # small networks: PyTorch's default until version 1.2.
    norm_init: str = "own"
    # Whether runs of equal layers are loops: a deep network compiles faster.
    scan_layers: bool = False


@dataclasses.dataclass(frozen=True)
class PartitionConfig:
    """Where the network is cut."""

    # uniform, explicit, per_layer, balanced or from_search.
    strategy: str = "per_layer"
    # For uniform, balanced and from_search.
    num_blocks: int = 0
    # For explicit: the 0-based layers after which to cut.
    cuts: tuple[int, ...] = ()
    # For balanced and max_imbalance: what a layer costs, its "flops", its measured "time", or the
    # "memory" that its backward pass keeps.
    cost: str = "flops"
    # The file of a search's result (sedona/result.py). Where one is given, it decides the cuts
    # whatever strategy and cuts say: `from_dict` sets strategy to from_search.
    from_search: str = ""
    # from_search: whether it decides the heads too, whatever `auxiliary` says but for the heads'
    # options: a search on one data set also serves larger networks of another.
    search_heads: bool = True
    # from_search: how many times as much as in the most balanced cuts the slowest block may cost;
    # 0 for the paper's rule, which bounds nothing.
    max_imbalance: float = 0.0


@dataclasses.dataclass(frozen=True)
class AuxiliaryConfig:
    """The auxiliary head of every block but the last, which has the network's own head."""

    name: str = "mlp_sr"
    # A cap on the hidden width of the head's MLP; 0 for none.
    max_hidden: int = 0
    # pred: the block's output is pooled until it has no more than so many features.
    max_features: int = 2048
    # sepconv_*: the channels before the pool (2048 on networks of full width), and by how much
    # the block's channels are reduced (1 for networks of basic blocks).
    features: int = 512
    reduction: int = 4
    # Instead of `name`, a head for each block but the last.
    per_block: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The local loss of every block. The last block's is always the cross-entropy."""

    # cross_entropy (PredSim's "pred"), sim (similarity matching), or predsim (both, weighted).
    name: str = "cross_entropy"
    # Instead of `name`, a loss for each block but the last.
    per_block: tuple[str, ...] = ()
    # predsim: the weight of sim; the cross-entropy has the rest.
    similarity_weight: float = 0.99
    # Of the cross-entropy's targets.
    label_smoothing: float = 0.0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Every block's own optimizer. Drops are in epochs from 0: lr falls when they begin."""

    # sgd or adam.
    name: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    b1: float = 0.9
    b2: float = 0.999
    # An L2 term added to the gradient, as PyTorch's optimizers do.
    weight_decay: float = 5e-4
    # all parameters, or kernels only.
    weight_decay_on: str = "all"
    # constant, step or cosine.
    schedule: str = "step"
    drop_epochs: tuple[float, ...] = (15.0, 30.0, 45.0)
    drop_factor: float = 0.2
    min_learning_rate: float = 0.0
    # At a drop the optimizer's momentum is kept, or reset as when the official code makes a
    # new optimizer.
    momentum_at_drop: str = "keep"


@dataclasses.dataclass(frozen=True)
class PlacementConfig:
    """Where blocks live and run."""

    # fused: one program for all blocks. pipelined: one program and one mesh a block.
    kind: str = "fused"
    # Fused dgl: a block waits until the one before has made its update, which takes the least
    # memory; else the compiler may run blocks at once.
    one_after_another: bool = False
    # Devices to use; 0 for one (fused) or as many as there are (pipelined).
    num_devices: int = 0
    # Devices over which every block splits its batch.
    data_parallel: int = 1
    # Pipelined: instead, devices of each block for itself, over which it splits its batch.
    devices_per_block: tuple[int, ...] = ()
    # Pipelined: or these are chosen, with partition.strategy=balanced together with the cuts, so
    # that the slowest stage (partition.cost of a block / its devices) is as fast as it can be.
    auto: bool = False
    # Calls dispatched but not finished, at the most: of a step each, or of train.steps_per_call.
    # Where blocks are on N groups of devices, N - 1 more, as a step is so long on its way from the
    # first to the last.
    max_steps_in_flight: int = 4


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data set and how it is augmented."""

    # embedded, arrays, or a TFDS name such as cifar10.
    name: str = "embedded"
    # TFDS's data directory, or the .npz file of `arrays`.
    data_dir: str = ""
    augment: bool = True
    crop_padding: int = 4
    flip: bool = True
    validation_fraction: float = 0.0
    # Of streamed images; 0 for 224.
    image_size: int = 0
    num_workers: int = 0
    # Of each channel, of pixels in [0, 1]; empty for the data set's own.
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train. One of num_steps and num_epochs is given, the other 0."""

    batch_size: int = 128
    num_steps: int = 0
    num_epochs: float = 50.0
    # Between two lines of training metrics.
    log_every_steps: int = 20
    # Steps that are one program, which makes their batches itself: the host is idle meanwhile. Those
    # left over at an epoch's end, or at a block's turn in sequential, run singly.
    steps_per_call: int = 1
    # Blocks whose layers are computed again in the backward pass: less memory, more time.
    remat_blocks: tuple[int, ...] = ()
    # Each block's gradient norm, and the running sum of learning rate x its square.
    log_gradient_norm: bool = False


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation of every block's head on the whole test (and validation) set."""

    every_epochs: float = 1.0
    batch_size: int = 500
    # How many of the last heads the log-softmax ensemble sums.
    ensemble_last: int = 2
    # How far each block's outputs on a fixed probe batch are from their final distribution.
    log_drift: bool = False
    # Whether each block's work of one step is timed at the end, block by block. It compiles a
    # program a block, which keeps its inputs: more memory than training takes.
    time_blocks: bool = False


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints: the latest, and the best by the last block's accuracy."""

    # 0: once an epoch; in a search, twenty in all.
    every_steps: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run."""

    seed: int = 0
    # Of float32 matrix products and convolutions: "default" is the platform's fast one (TF32 on an
    # NVIDIA GPU, bfloat16 on a TPU), "highest" is float32 everywhere, "high" lies between.
    precision: str = "default"
    # When each block's program ran, for some steps: timeline.png, trace.json, busy fractions. No
    # program of the run donates its inputs then: it takes more memory.
    trace: bool = False
    # jax.profiler's trace of the same steps, in profile/; blocks are named in it.
    profile: bool = False
    method: MethodConfig = MethodConfig()
    replay: ReplayConfig = ReplayConfig()
    network: NetworkConfig = NetworkConfig()
    partition: PartitionConfig = PartitionConfig()
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    placement: PlacementConfig = PlacementConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """SEDONA's search: pretraining, then outer steps that learn the decision variables."""

    # The candidate heads at every place; their options are config.auxiliary's.
    candidates: tuple[str, ...] = ("sepconv_1", "sepconv_2", "sepconv_3", "sepconv_4")
    num_pretraining_steps: int = 40_000
    num_outer_steps: int = 2_000
    # T: the steps of the weights through which the outer gradient looks.
    num_inner_steps: int = 5
    # unrolled, first_order, finite_difference or official: see sedona/hypergradient.py.
    hypergradient: str = "unrolled"
    # Whether inner steps are computed again on the way back instead of held in memory.
    remat: bool = True
    batch_size: int = 128
    validation_batch_size: int = 1024
    # Adam on the decision variables.
    learning_rate: float = 0.01
    b1: float = 0.5
    b2: float = 0.999
    weight_decay: float = 1e-6
    # Snapshots of the weights, from pretraining, which the outer steps start from.
    num_snapshots: int = 50
    # spread: over the whole of pretraining. official: the last ones, snapshot_interval apart.
    snapshots: str = "spread"
    snapshot_interval: int = 80
    # Where they are kept: device, host, or auto (by their size).
    snapshot_memory: str = "auto"
    # What the summary says of: K, by the paper's rule, and with the slowest block bounded to so
    # many times that of the most balanced cuts.
    num_blocks: tuple[int, ...] = (2, 4, 8)
    max_imbalance: float = 1.25
    # The length of one training by backprop, in which the search's cost is stated.
    backprop_steps: int = 64_000
    log_every_steps: int = 20


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """A search."""

    seed: int = 0
    # As in training, but "highest": the outer gradient is a difference of small numbers.
    precision: str = "highest"
    network: NetworkConfig = NetworkConfig()
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()
    loss: LossConfig = LossConfig()
    # Of the weights.
    optimizer: OptimizerConfig = OptimizerConfig()
    # validation_fraction: the share on which the decision variables learn.
    data: DataConfig = DataConfig()
    search: SearchSettings = SearchSettings()
    checkpoint: CheckpointConfig = CheckpointConfig()


# What may change when a run is resumed: sections and fields that change no number trained.
_RESUMABLE = (
    "placement",
    "trace",
    "profile",
    "eval",
    "checkpoint",
    "data.num_workers",
    "train.log_every_steps",
    "train.log_gradient_norm",
    "search.num_blocks",
    "search.max_imbalance",
    "search.snapshot_memory",
    "search.backprop_steps",
    "search.log_every_steps",
)

_METHODS = (
    "backprop",
    "dgl",
    "sequential",
    "async_dgl",
    "async_dgl_parallel",
    "dni",
    "cdni",
    "ddg",
    "features_replay",
    "data_parallel",
    "pipeline_backprop",
)
# Those whose one block is the whole network.
ONE_BLOCK_METHODS = ("backprop", "data_parallel")
# Those whose blocks have auxiliary heads and local losses.
LOCAL_METHODS = ("dgl", "sequential", "async_dgl", "async_dgl_parallel")
# Those whose steps can be one program.
_IN_ONE_PROGRAM = ("backprop", "data_parallel", "dgl", "sequential")
# Those that keep a forward pass's residuals until a gradient comes.
_KEEP_RESIDUALS = ("ddg", "pipeline_backprop")
NOT_TRACED = ("async_dgl", "async_dgl_parallel", "dni", "cdni")
_LOSSES = ("cross_entropy", "pred", "sim", "predsim")

_CHOICES = {
    "precision": ("default", "high", "highest"),
    "method.name": _METHODS,
    "method.weights": ("stale", "current"),
    "method.pipeline_schedule": ("gpipe", "1f1b"),
    "replay.order": ("random", "round_robin"),
    "replay.buffer_dtype": ("float32", "bfloat16", "int8"),
    "replay.policy": ("lifo_least_reused", "official", "fifo"),
    "replay.warm_up": ("none", "once", "official"),
    "replay.accounting": ("exact", "official"),
    "partition.strategy": ("uniform", "explicit", "per_layer", "balanced", "from_search"),
    "partition.cost": ("flops", "memory", "time"),
    "network.form": ("cifar", "tiny_imagenet", "imagenet"),
    "network.dtype": ("float32", "bfloat16"),
    "network.kernel_init": ("own", "he_normal"),
    "network.norm_init": ("own", "uniform"),
    "loss.name": _LOSSES,
    "optimizer.name": ("sgd", "adam"),
    "optimizer.weight_decay_on": ("all", "kernels"),
    "optimizer.schedule": ("constant", "step", "cosine"),
    "optimizer.momentum_at_drop": ("keep", "reset"),
    "placement.kind": ("fused", "pipelined"),
    "search.hypergradient": ("unrolled", "first_order", "finite_difference", "official"),
    "search.snapshots": ("spread", "official"),
    "search.snapshot_memory": ("auto", "device", "host"),
}

# The least value of a field, and whether that value itself is allowed.
_MINIMUM = {
    "seed": (0, True),
    "method.laps": (1, True),
    "method.num_microbatches": (1, True),
    "replay.slow_block": (0, True),
    "replay.slowdown": (1, True),
    "replay.buffer_size": (1, True),
    "replay.max_reuse": (0, True),
    "network.width_factor": (0, False),
    "network.dropout": (0, True),
    "partition.num_blocks": (0, True),
    "partition.max_imbalance": (0, True),
    "auxiliary.max_hidden": (0, True),
    "auxiliary.max_features": (1, True),
    "auxiliary.features": (1, True),
    "auxiliary.reduction": (1, True),
    "loss.similarity_weight": (0, True),
    "loss.label_smoothing": (0, True),
    "optimizer.learning_rate": (0, False),
    "optimizer.momentum": (0, True),
    "optimizer.b1": (0, True),
    "optimizer.b2": (0, True),
    "optimizer.weight_decay": (0, True),
    "optimizer.drop_factor": (0, False),
    "optimizer.min_learning_rate": (0, True),
    "placement.num_devices": (0, True),
    "placement.data_parallel": (1, True),
    "placement.max_steps_in_flight": (1, True),
    "data.crop_padding": (0, True),
    "data.validation_fraction": (0, True),
    "data.image_size": (0, True),
    "data.num_workers": (0, True),
    "train.batch_size": (1, True),
    "train.num_steps": (0, True),
    "train.num_epochs": (0, True),
    "train.log_every_steps": (1, True),
    "train.steps_per_call": (1, True),
    "eval.every_epochs": (0, False),
    "eval.batch_size": (1, True),
    "eval.ensemble_last": (1, True),
    "checkpoint.every_steps": (0, True),
    "search.num_pretraining_steps": (1, True),
    "search.num_outer_steps": (1, True),
    "search.num_inner_steps": (1, True),
    "search.batch_size": (1, True),
    "search.validation_batch_size": (1, True),
    "search.learning_rate": (0, False),
    "search.b1": (0, True),
    "search.b2": (0, True),
    "search.weight_decay": (0, True),
    "search.num_snapshots": (1, True),
    "search.snapshot_interval": (1, True),
    "search.backprop_steps": (1, True),
    "search.log_every_steps": (1, True),
}

_BELOW_ONE = (
    "network.dropout",
    "loss.label_smoothing",
    "optimizer.momentum",
    "optimizer.b1",
    "optimizer.b2",
    "data.validation_fraction",
    "search.b1",
    "search.b2",
)


def default_config(config_class: type = Config) -> config_dict.ConfigDict:
    """Returns a ConfigDict with every field of the dataclass at its default."""
    return config_dict.ConfigDict(dataclasses.asdict(config_class()))


def check_field_name(name: str, config_class: type = Config) -> None:
    """Checks a dotted field name, such as ``optimizer.learning_rate``.

    Raises:
      UserError: if there is no such field; the message has the closest names.
    """
    known = _leaf_names(config_class)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(
            name, known, n=1, cutoff=0.3
        )
        hint = f"did you mean config.{close[0]}?" if close else "see dgl_jax/config.py"
        raise UserError(f"config.{name} is not a known field; {hint}")


def from_dict(mapping: Mapping[str, Any], config_class: type = Config) -> Any:
    """Turns nested mappings (a ConfigDict, a loaded JSON) into checked frozen dataclasses.

    Raises:
      UserError: an unknown name, a wrong type, or a value out of range.

    Example:
      >>> config = from_dict({"method": {"name": "ddg"}, "partition": {"strategy": "per_layer"}})
      >>> config.method.weights, config.train.batch_size
      ('stale', 128)
      >>> from_dict({"sead": 1})
      Traceback (most recent call last):
      dgl_jax.errors.UserError: config.sead is not a known field; did you mean config.seed?
    """
    config = _build(config_class, dict(mapping), prefix="", root=config_class)
    if config_class is Config:
        config = _with_search(config)
    _check_values(config)
    if config_class is Config:
        _check_together(config)
    elif config_class is SearchConfig:
        _check_search_together(config)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `from_dict`; tuples become lists, as JSON has them."""
    mapping = dataclasses.asdict(config)
    return {
        section: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        if isinstance(values, dict)
        else values
        for section, values in mapping.items()
    }


def check_same_run(
    config: Config | SearchConfig, previous: Mapping[str, Any], workdir: str
) -> None:
    """Checks that a run's folder was made by the configuration that now wants to go on with it.

    Args:
      config: the present one.
      previous: the folder's config.json, as loaded.
      workdir: the folder, for the message.

    Raises:
      UserError: naming the first field that differs.
    """
    present, default = to_dict(config), to_dict(type(config)())
    for name in _leaf_names(type(config)):
        section, _, field = name.partition(".")
        if section in _RESUMABLE or name in _RESUMABLE:
            continue
        now = present[section][field] if field else present[section]
        # A folder may be older than a field.
        then = previous.get(section, default[section])
        then = then.get(field, default[section][field]) if field else then
        if now != then:
            raise UserError(
                f"config.{name}={now!r}, but workdir={workdir} holds a run with {then!r}; "
                "use that value to go on with it, or another --workdir"
            )


def _leaf_names(config_class: type, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(field.type):
            names += _leaf_names(field.type, f"{prefix}{field.name}.")
        else:
            names.append(prefix + field.name)
    return names


def _build(config_class: type, mapping: dict[str, Any], prefix: str, root: type) -> Any:
    fields = {field.name: field.type for field in dataclasses.fields(config_class)}
    values = {}
    for name, value in mapping.items():
        if name not in fields:
            check_field_name(prefix + name, root)
        elif dataclasses.is_dataclass(fields[name]):
            if not isinstance(value, Mapping):
                raise UserError(
                    f"config.{prefix}{name}={value!r} must be a group of fields; "
                    f"set config.{prefix}{name}.FIELD"
                )
            values[name] = _build(fields[name], dict(value), f"{prefix}{name}.", root)
        else:
            values[name] = _convert(prefix + name, value, fields[name])
    return config_class(**values)


def _convert(name: str, value: Any, kind: Any) -> Any:
    """Converts lists to tuples and ints to floats; anything else must fit exactly."""
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (tuple, list)):
            raise UserError(f"config.{name}={value!r} must be a tuple; try ({value!r},)")
        return tuple(_convert(name, item, typing.get_args(kind)[0]) for item in value)
    if kind is float and type(value) is int:
        value = float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"config.{name}={value} must be a finite number")
    if type(value) is not kind:
        raise UserError(
            f"config.{name}={value!r} must be of type {kind.__name__}, not {type(value).__name__}"
        )
    return value


def _with_search(config: Config) -> Config:
    """A search's file takes the place of the cuts, and of the heads unless they are to stay."""
    partition, auxiliary = config.partition, config.auxiliary
    if not partition.from_search:
        return config
    partition = dataclasses.replace(partition, strategy="from_search", cuts=())
    if partition.search_heads:
        auxiliary = dataclasses.replace(auxiliary, per_block=())
    return dataclasses.replace(config, partition=partition, auxiliary=auxiliary)


def _check_values(config: Any) -> None:
    for name in _leaf_names(type(config)):
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        if name in _CHOICES and value not in _CHOICES[name]:
            raise UserError(f"config.{name}={value!r} must be one of {', '.join(_CHOICES[name])}")
        if name in _MINIMUM:
            minimum, inclusive = _MINIMUM[name]
            if value < minimum or (value == minimum and not inclusive):
                rule = (
                    f"at least {minimum}; try {minimum}" if inclusive else f"greater than {minimum}"
                )
                raise UserError(f"config.{name}={value} must be {rule}")
        if name in _BELOW_ONE and value >= 1:
            raise UserError(f"config.{name}={value} must be less than 1")


def _check_method(config: Config) -> None:
    """Fields that belong to one method, and what a method can't do."""
    method, loss, kind = config.method, config.loss, config.placement.kind
    is_async = method.name in ("async_dgl", "async_dgl_parallel")
    for field, owner in (
        ("laps", "sequential"),
        ("weights", "ddg"),
        ("num_microbatches", "pipeline_backprop"),
        ("pipeline_schedule", "pipeline_backprop"),
    ):
        value, default = getattr(method, field), getattr(MethodConfig, field)
        if value != default and method.name != owner:
            raise UserError(
                f"config.method.{field}={value} is used by {owner} only, not by {method.name}; "
                f"set config.method.{field}={default}"
            )
    if config.replay != ReplayConfig() and not is_async:
        field, value = next(
            (field.name, getattr(config.replay, field.name))
            for field in dataclasses.fields(ReplayConfig)
            if getattr(config.replay, field.name) != field.default
        )
        raise UserError(
            f"config.replay.{field}={value} is used by async_dgl and async_dgl_parallel only, "
            f"not by {method.name}; leave it out"
        )
    wanted = {"async_dgl": "fused", "dni": "fused", "cdni": "fused"}
    wanted |= {"data_parallel": "fused"}
    wanted |= dict.fromkeys(("async_dgl_parallel", "pipeline_backprop"), "pipelined")
    if wanted.get(method.name, kind) != kind:
        raise UserError(
            f"config.placement.kind={kind} is not for config.method.name={method.name}; "
            f"set config.placement.kind={wanted[method.name]}"
        )
    if config.replay.max_reuse == 1:
        raise UserError(
            "config.replay.max_reuse=1 must be at least 2, as writing a batch counts as its first "
            "use; try 2 (each batch is read once) or 0 (no limit)"
        )
    if method.name == "async_dgl_parallel":
        for field in ("order", "pmf", "warm_up", "accounting"):
            value = getattr(config.replay, field)
            if value != getattr(ReplayConfig(), field):
                raise UserError(
                    f"config.replay.{field}={value} is used by async_dgl only: the workers of "
                    f"{method.name} draw no blocks; leave it out"
                )
        # Programs over several devices that two threads start on the same devices, in whatever
        # order, can wait for each other for ever; and evaluation is a thread too.
        if config.placement.data_parallel > 1:
            raise UserError(
                f"config.placement.data_parallel={config.placement.data_parallel} is not for "
                f"{method.name}, where each worker has one device; set "
                "config.placement.data_parallel=1"
            )
    for name in loss.per_block:
        if name not in _LOSSES:
            raise UserError(
                f"config.loss.per_block={loss.per_block}: {name!r} must be one of "
                f"{', '.join(_LOSSES)}"
            )
    has_local_losses = method.name in LOCAL_METHODS
    names = loss.per_block or (loss.name,)
    matching = [name for name in names if name in ("sim", "predsim")]
    if loss.per_block and loss.name != LossConfig.name:
        raise UserError(
            f"config.loss.name={loss.name} is not used with config.loss.per_block="
            f"{loss.per_block}; leave one of them out"
        )
    if matching:
        if not has_local_losses:
            raise UserError(
                f"config.loss.name={matching[0]} is a local loss, but the blocks of "
                f"config.method.name={method.name} have none; set config.loss.name=cross_entropy"
            )
        if config.train.batch_size < 2:
            raise UserError(
                f"config.train.batch_size={config.train.batch_size}: the {matching[0]} loss "
                "compares the examples of a batch; try 128"
            )
    if loss.per_block and not has_local_losses:
        raise UserError(
            f"config.loss.per_block={loss.per_block} is for local losses, but the blocks of "
            f"config.method.name={method.name} have none; leave it out"
        )
    _check_head_at_every_cut("loss", loss.per_block, config.partition)
    if loss.similarity_weight != LossConfig.similarity_weight and "predsim" not in matching:
        raise UserError(
            f"config.loss.similarity_weight={loss.similarity_weight} is used by predsim only; "
            "leave it out, or set config.loss.name=predsim"
        )
    if loss.similarity_weight > 1:
        raise UserError(f"config.loss.similarity_weight={loss.similarity_weight} must be at most 1")


def _check_head_at_every_cut(
    section: str, per_block: tuple[str, ...], partition: PartitionConfig
) -> None:
    if per_block and partition.strategy == "balanced":
        raise UserError(
            f"config.{section}.per_block={per_block}: config.partition.strategy=balanced weighs "
            "the same head at every cut; set it to explicit and give config.partition.cuts"
        )
    if per_block and partition.max_imbalance:
        raise UserError(
            f"config.{section}.per_block={per_block}: config.partition.max_imbalance="
            f"{partition.max_imbalance:g} weighs heads before it is known which block they are "
            "for; set config.partition.max_imbalance=0.0"
        )


def _check_auxiliary(config: Config) -> None:
    auxiliary = config.auxiliary
    if not auxiliary.per_block:
        return
    if auxiliary.name != AuxiliaryConfig.name:
        raise UserError(
            f"config.auxiliary.name={auxiliary.name} is not used with "
            f"config.auxiliary.per_block={auxiliary.per_block}; leave one of them out"
        )
    if config.method.name not in LOCAL_METHODS:
        raise UserError(
            f"config.auxiliary.per_block={auxiliary.per_block} is for blocks with local losses, "
            f"but those of config.method.name={config.method.name} have none; leave it out"
        )
    _check_head_at_every_cut("auxiliary", auxiliary.per_block, config.partition)


def _check_search(partition: PartitionConfig) -> None:
    if partition.strategy == "from_search" and not partition.from_search:
        raise UserError(
            "config.partition.strategy=from_search needs a search's result; give its file as "
            "config.partition.from_search"
        )
    for field in ("search_heads", "max_imbalance"):
        value = getattr(partition, field)
        if value != getattr(PartitionConfig, field) and not partition.from_search:
            raise UserError(
                f"config.partition.{field}={value} is used with config.partition.from_search "
                "only; leave it out"
            )
    if 0 < partition.max_imbalance < 1:
        raise UserError(
            f"config.partition.max_imbalance={partition.max_imbalance} must be at least 1, as no "
            "cuts are more balanced than the most balanced; try 1.5, or 0 for no bound"
        )


def _check_together(config: Config) -> None:
    _check_search(config.partition)
    _check_method(config)
    _check_auxiliary(config)
    if config.trace and config.method.name in NOT_TRACED:
        raise UserError(
            f"config.trace=True is not for config.method.name={config.method.name}; leave it out, "
            "or set config.profile=True instead"
        )
    train, partition, placement = config.train, config.partition, config.placement
    if (train.num_steps > 0) == (train.num_epochs > 0):
        raise UserError(
            f"config.train.num_steps={train.num_steps} and config.train.num_epochs="
            f"{train.num_epochs:g}: exactly one must be positive; set the other to 0"
        )
    if train.steps_per_call > 1:
        _check_steps_per_call(config)
    if config.method.name in _KEEP_RESIDUALS and (config.network.scan_layers or train.remat_blocks):
        raise UserError(
            f"config.method.name={config.method.name} keeps what a layer's backward pass needs by "
            "itself; leave config.network.scan_layers and config.train.remat_blocks out"
        )
    is_data_parallel = config.method.name == "data_parallel"
    field, split = "data_parallel", placement.data_parallel
    if is_data_parallel:
        field, split = "num_devices", placement.num_devices or 1  # 0: known later, checked there.
        if placement.data_parallel not in (1, placement.num_devices):
            raise UserError(
                f"config.placement.data_parallel={placement.data_parallel} is not used by "
                "data_parallel, whose batches are split over config.placement.num_devices; set "
                "that, and leave the other out"
            )
    _check_devices(config)
    for section, size in (("train", train.batch_size), ("eval", config.eval.batch_size)):
        if size % split:
            raise UserError(
                f"config.{section}.batch_size={size} must be divisible by "
                f"config.placement.{field}={split}; try {size // split * split or split}"
            )
    if config.method.name == "pipeline_backprop":
        _check_microbatches(config)
    if placement.num_devices % placement.data_parallel:
        raise UserError(
            f"config.placement.num_devices={placement.num_devices} must be a multiple of "
            f"config.placement.data_parallel={placement.data_parallel}"
        )
    is_too_many = placement.num_devices > placement.data_parallel and not is_data_parallel
    if placement.kind == "fused" and is_too_many:
        raise UserError(
            f"config.placement.num_devices={placement.num_devices}: a fused run uses "
            f"config.placement.data_parallel={placement.data_parallel} devices; raise that, "
            "or set config.placement.kind=pipelined"
        )
    if placement.one_after_another and (config.method.name, placement.kind) != ("dgl", "fused"):
        raise UserError(
            "config.placement.one_after_another=True is for config.method.name=dgl with "
            "config.placement.kind=fused; leave it out"
        )
    by_number = ("uniform", "balanced", "from_search")
    if partition.strategy in by_number and partition.num_blocks < 1:
        raise UserError(
            f"config.partition.num_blocks={partition.num_blocks} must be at least 1 "
            f"with config.partition.strategy={partition.strategy}"
        )
    if partition.num_blocks and partition.strategy in ("explicit", "per_layer"):
        raise UserError(
            f"config.partition.num_blocks={partition.num_blocks} is not used with "
            f"config.partition.strategy={partition.strategy}; set that to uniform or balanced"
        )
    if partition.cuts and partition.strategy != "explicit":
        raise UserError(
            f"config.partition.cuts={partition.cuts} is used with strategy explicit only; "
            "set config.partition.strategy=explicit"
        )
    _check_optimizer_and_data(config.optimizer, config.data)


def _check_steps_per_call(config: Config) -> None:
    train, field = config.train, f"config.train.steps_per_call={config.train.steps_per_call}"
    if config.method.name not in _IN_ONE_PROGRAM or config.placement.kind != "fused":
        raise UserError(
            f"{field} is for config.placement.kind=fused and config.method.name one of "
            f"{', '.join(_IN_ONE_PROGRAM)}; leave it at 1"
        )
    if config.trace:
        raise UserError(f"{field}: config.trace=True shows single steps; leave one of them out")
    if train.log_every_steps % train.steps_per_call:
        size = train.steps_per_call
        raise UserError(
            f"config.train.log_every_steps={train.log_every_steps} must be a multiple of {field}; "
            f"try {-(-train.log_every_steps // size) * size}"
        )


def _check_microbatches(config: Config) -> None:
    size, num_microbatches = config.train.batch_size, config.method.num_microbatches
    devices = math.lcm(config.placement.data_parallel, *config.placement.devices_per_block)
    parts = num_microbatches * devices
    remedy = f"try config.train.batch_size={size // parts * parts or parts}"
    if size % num_microbatches:
        raise UserError(
            f"config.train.batch_size={size} must be divisible by "
            f"config.method.num_microbatches={num_microbatches}; {remedy}"
        )
    if size % parts:
        raise UserError(
            f"config.train.batch_size={size} makes {num_microbatches} microbatches of "
            f"{size // num_microbatches}, which must be divisible by the {devices} devices that "
            f"share a block's; {remedy}"
        )


def _check_devices(config: Config) -> None:
    """Devices dealt to blocks, by hand or automatically."""
    placement = config.placement
    numbers = placement.devices_per_block
    asked = f"config.placement.devices_per_block={numbers}"
    if numbers and placement.auto:
        raise UserError(f"{asked} is not used with config.placement.auto=True; leave one out")
    if not numbers:
        if not placement.auto:
            return
        asked = "config.placement.auto=True"
    if placement.kind != "pipelined":
        raise UserError(
            f"{asked} deals devices to blocks that are programs of their own; set "
            "config.placement.kind=pipelined"
        )
    if placement.data_parallel > 1:
        raise UserError(
            f"config.placement.data_parallel={placement.data_parallel} is not used with {asked}, "
            "which has each block's own number; set config.placement.data_parallel=1"
        )
    if config.method.name == "async_dgl_parallel" and (placement.auto or max(numbers) > 1):
        raise UserError(
            f"{asked} is not for async_dgl_parallel, where each worker has one device; leave it "
            "out, and set config.partition.strategy=balanced for even blocks"
        )
    if min(numbers, default=1) < 1:
        raise UserError(f"{asked} must each be at least 1; give every block a device")
    if 0 < placement.num_devices < sum(numbers):
        raise UserError(
            f"{asked} makes {sum(numbers)} devices, which exceeds config.placement.num_devices="
            f"{placement.num_devices}; leave num_devices out"
        )
    multiple = math.lcm(*numbers)
    for section, size in (("train", config.train.batch_size), ("eval", config.eval.batch_size)):
        if size % multiple:
            raise UserError(
                f"config.{section}.batch_size={size} must be divisible by each of {asked}; "
                f"try {size // multiple * multiple or multiple}"
            )


def _check_optimizer_and_data(optimizer: OptimizerConfig, data: DataConfig) -> None:
    if optimizer.momentum_at_drop == "reset" and optimizer.schedule != "step":
        raise UserError(
            "config.optimizer.momentum_at_drop=reset needs config.optimizer.schedule=step, "
            f"not {optimizer.schedule}"
        )
    if optimizer.nesterov and optimizer.name != "sgd":
        raise UserError(f"config.optimizer.nesterov=True does not apply to {optimizer.name}")
    drops = optimizer.drop_epochs
    if any(drop <= 0 for drop in drops) or list(drops) != sorted(set(drops)):
        raise UserError(
            f"config.optimizer.drop_epochs={drops} must be positive and strictly increasing"
        )
    if any(value <= 0 for value in data.std):
        raise UserError(f"config.data.std={data.std} must be positive")


def _check_search_together(config: SearchConfig) -> None:
    search, auxiliary, loss = config.search, config.auxiliary, config.loss
    _check_optimizer_and_data(config.optimizer, config.data)
    if config.network.dtype != "float32":
        raise UserError(
            f"config.network.dtype={config.network.dtype}: in it the outer gradient is lost in "
            "rounding; set config.network.dtype=float32"
        )
    if not 1 <= search.max_imbalance:
        raise UserError(f"config.search.max_imbalance={search.max_imbalance} must be at least 1")
    if not search.candidates:
        raise UserError(
            "config.search.candidates=() must name a head or more; try ('mlp_sr',) to search "
            "cuts alone"
        )
    if len(set(search.candidates)) < len(search.candidates):
        raise UserError(f"config.search.candidates={search.candidates} must differ")
    if (auxiliary.name, auxiliary.per_block) != (AuxiliaryConfig.name, ()):
        raise UserError(
            f"config.auxiliary.name={auxiliary.name}, config.auxiliary.per_block="
            f"{auxiliary.per_block}: a search's heads are config.search.candidates; set those"
        )
    if loss.name not in ("cross_entropy", "pred") or loss.per_block:
        raise UserError(
            f"config.loss.name={loss.name}, config.loss.per_block={loss.per_block}: a search "
            "mixes logits, so its losses are cross-entropies; leave both out"
        )
    if not config.data.validation_fraction:
        raise UserError(
            "config.data.validation_fraction=0.0 must be above 0, as decision variables learn on "
            "the examples held out; try 0.4"
        )
    num_snapshots, num_steps = search.num_snapshots, search.num_pretraining_steps
    first = num_steps - (num_snapshots - 1) * search.snapshot_interval
    if num_snapshots > num_steps or (search.snapshots == "official" and first < 1):
        raise UserError(
            f"config.search.num_snapshots={num_snapshots} do not fit into "
            f"config.search.num_pretraining_steps={num_steps}; take fewer snapshots"
        )
    if any(num_blocks < 1 for num_blocks in search.num_blocks):
        raise UserError(f"config.search.num_blocks={search.num_blocks} must each be at least 1")
