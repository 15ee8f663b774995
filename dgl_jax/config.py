"""What a user may ask for: frozen dataclasses, and every check that needs no network or data.

A configuration file's ``get_config()`` starts from `default_config()`, a ConfigDict with
every field below; the scripts turn it into a `Config` once, with `from_dict`, which rejects
unknown names, wrong types and values out of range in one line each. Their ``--help`` is made of the
fields, too.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from typing import Any

from dgl_jax.errors import UserError

if typing.TYPE_CHECKING:
    from ml_collections import config_dict


def _field(default: Any, help_line: str) -> Any:
    """A field with its default and its line of ``--help``, which adds the choices."""
    return dataclasses.field(default=default, metadata={"help": help_line})


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """The training algorithm."""

    name: str = _field("dgl", "How blocks are trained; docs/methods has a page for each.")
    laps: int = _field(
        1, "sequential: the turns of each block, over which its updates are shared out."
    )
    # The paper says stale, the public code does current.
    weights: str = _field(
        "stale",
        "ddg: take delayed gradients at the weights of their forward pass, or at current ones.",
    )
    num_microbatches: int = _field(4, "pipeline_backprop: M, the parts that a batch is split into.")
    # See schedule.pipeline.
    pipeline_schedule: str = _field(
        "1f1b", "pipeline_backprop: the order in which a block works on the microbatches."
    )


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """Asynchronous DGL: who runs when, and the replay buffers between blocks."""

    order: str = _field("random", "async_dgl: how the next block is chosen.")
    slow_block: int = _field(0, "The block that runs less often where slowdown is above 1.")
    slowdown: float = _field(1.0, "S: how many times less often slow_block runs.")
    pmf: tuple[float, ...] = _field(
        (), "async_dgl: K probabilities of drawing each block; empty: from slow_block and slowdown."
    )
    buffer_size: int = _field(50, "M: mini-batches in each buffer.")
    buffer_dtype: str = _field(
        "float32", "How buffers store activations; int8 has a scale a channel."
    )
    # See replay.select_slot.
    policy: str = _field(
        "lifo_least_reused", "Which batch is read; official keeps a slip of the DGL authors' code."
    )
    max_reuse: int = _field(
        0, "Uses, the writing included, after which a batch is not read again; 0: no limit."
    )
    # See replay.PlanConfig, also for accounting.
    warm_up: str = _field(
        "once",
        "async_dgl: fill the buffers first: never, once, or (official) again at each drop of the rate.",
    )
    accounting: str = _field(
        "exact", "async_dgl: how epochs are counted; official: as the DGL authors' code does."
    )


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """The network that is cut into blocks."""

    name: str = _field(
        "cnn6",
        "cnn4, cnn6, cnn6_async, dni_cnn, mlp, mlp_zero_head, vgg13, vgg16, vgg19, "
        "resnet18, resnet50, resnet101, resnet110 or resnet152.",
    )
    form: str = _field(
        "cifar", "VGG and ResNet: the stem and head for images of this data set's size."
    )
    width_factor: float = _field(
        1.0, "Multiplies every layer's channels; SEDONA's CIFAR networks are 0.25."
    )
    dropout: float = _field(0.0, "Dropout rate in the fully connected layers of VGG's head.")
    dtype: str = _field(
        "float32",
        "What layers and heads compute in; parameters, statistics and losses stay float32.",
    )
    # he_normal also for kernels that would start at zero, as in SEDONA's code.
    kernel_init: str = _field(
        "own", "How kernels start: as each module says (own), or all from He's normal by fan-in."
    )
    # uniform is PyTorch's default until version 1.2.
    norm_init: str = _field(
        "own",
        "BatchNorm's weights start as ones (own), or from U(0, 1) as in DGL's small networks.",
    )
    scan_layers: bool = _field(
        False, "Run equal layers as a loop: a deep network compiles in a fraction of the time."
    )


@dataclasses.dataclass(frozen=True)
class PartitionConfig:
    """Where the network is cut."""

    strategy: str = _field("per_layer", "How the cuts are chosen.")
    num_blocks: int = _field(0, "K, for uniform, balanced and from_search.")
    cuts: tuple[int, ...] = _field((), "explicit: the layers, from 0, after which to cut.")
    cost: str = _field(
        "flops",
        "balanced, max_imbalance: a layer's FLOPs, measured time, or memory of its backward pass.",
    )
    # It decides the cuts whatever strategy and cuts say: `from_dict` sets strategy.
    from_search: str = _field(
        "", "search.json of a search, which decides the cuts whatever strategy and cuts say."
    )
    # False: a search on one data set also serves larger networks of another.
    search_heads: bool = _field(
        True, "from_search: take the search's heads too, with the options of auxiliary."
    )
    max_imbalance: float = _field(
        0.0,
        "from_search: the slowest block costs at most this times that of balanced cuts; 0: no bound.",
    )


@dataclasses.dataclass(frozen=True)
class AuxiliaryConfig:
    """The auxiliary head of every block but the last, which has the network's own head."""

    name: str = _field(
        "mlp_sr",
        "cnn, mlp, mlp_sr, pred, synthesizer, sepconv_1, sepconv_2, sepconv_3 or sepconv_4.",
    )
    max_hidden: int = _field(0, "A cap on the hidden width of the head's MLP; 0: none.")
    max_features: int = _field(
        2048, "pred: the block's output is pooled until it has no more features than this."
    )
    # 2048 on networks of full width.
    features: int = _field(512, "sepconv_*: the channels before the pool.")
    # 1 for networks of basic blocks.
    reduction: int = _field(4, "sepconv_*: by how much the block's channels are reduced.")
    per_block: tuple[str, ...] = _field((), "Instead of name: a head for each block but the last.")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The local loss of every block. The last block's is always the cross-entropy."""

    name: str = _field(
        "cross_entropy",
        "The loss; sim is similarity matching, predsim both, pred the cross-entropy too.",
    )
    per_block: tuple[str, ...] = _field((), "Instead of name: a loss for each block but the last.")
    similarity_weight: float = _field(
        0.99, "predsim: the weight of sim; the cross-entropy has the rest."
    )
    label_smoothing: float = _field(0.0, "Label smoothing of the cross-entropy.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Every block's own optimizer. Drops are in epochs from 0: lr falls when they begin."""

    name: str = _field("sgd", "The optimizer.")
    learning_rate: float = _field(0.1, "The learning rate at the start.")
    momentum: float = _field(0.9, "sgd: momentum; 0: none.")
    nesterov: bool = _field(False, "sgd: Nesterov's momentum.")
    b1: float = _field(0.9, "adam: decay of the mean of gradients.")
    b2: float = _field(0.999, "adam: decay of the mean of squared gradients.")
    weight_decay: float = _field(
        5e-4, "An L2 term added to the gradient, as PyTorch's optimizers add it."
    )
    weight_decay_on: str = _field("all", "The parameters that weight decay applies to.")
    schedule: str = _field("step", "How the learning rate changes.")
    drop_epochs: tuple[float, ...] = _field(
        (15.0, 30.0, 45.0), "step: the epochs, from 0, at whose start the learning rate drops."
    )
    drop_factor: float = _field(0.2, "step: what each drop multiplies the learning rate by.")
    min_learning_rate: float = _field(0.0, "cosine: the learning rate at the end.")
    # The official code resets it, as it makes a new optimizer.
    momentum_at_drop: str = _field("keep", "step: whether a drop keeps or resets the momentum.")


@dataclasses.dataclass(frozen=True)
class PlacementConfig:
    """Where blocks live and run."""

    kind: str = _field("fused", "One program for all blocks, or one program and mesh a block.")
    one_after_another: bool = _field(
        True,
        "dgl, fused: a block waits for the update of the one before: the least memory. False: the "
        "compiler may run blocks at once.",
    )
    num_devices: int = _field(
        0, "Devices to use; 0: one where fused, as many as there are where pipelined."
    )
    data_parallel: int = _field(1, "Devices over which every block splits its batch.")
    devices_per_block: tuple[int, ...] = _field(
        (), "Pipelined, instead of data_parallel: how many devices each block has for itself."
    )
    # With partition.strategy=balanced the cuts too; a stage's time is partition.cost / its devices.
    auto: bool = _field(
        False, "Pipelined: deal devices to blocks so that the slowest stage is as fast as can be."
    )
    # Where blocks are on N groups of devices, N - 1 more, as a step is so long on its way from the
    # first to the last.
    max_steps_in_flight: int = _field(
        4,
        "The most calls, of train.steps_per_call steps each, that are dispatched but not finished.",
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data set and how it is augmented."""

    name: str = _field("embedded", "embedded, arrays, or a TFDS name such as cifar10.")
    data_dir: str = _field("", "The folder of prepared TFDS sets, or the .npz file of arrays.")
    augment: bool = _field(True, "Crop (and flip) training images at random.")
    crop_padding: int = _field(
        4, "Black pixels on each side before a random crop, of sets in memory; 0: no crop."
    )
    flip: bool = _field(True, "Where augment is on, mirror half of the training images.")
    validation_fraction: float = _field(
        0.0, "The share of the training set held out; a search's decision variables learn on it."
    )
    image_size: int = _field(0, "Pixels a side of streamed images; 0: 224.")
    num_workers: int = _field(0, "Processes that decode streamed images; 0: threads of this one.")
    mean: tuple[float, ...] = _field(
        (), "The mean of each channel, of pixels in [0, 1]; empty: the data set's own."
    )
    std: tuple[float, ...] = _field((), "The standard deviation of each channel, as for mean.")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train. One of num_steps and num_epochs is given, the other 0."""

    batch_size: int = _field(128, "Training examples a step, over all devices together.")
    num_steps: int = _field(0, "Updates of each block; 0: num_epochs says how many.")
    num_epochs: float = _field(50.0, "Passes over the training set; 0: num_steps says how many.")
    log_every_steps: int = _field(20, "Steps between two lines of training metrics.")
    # Those left over at an epoch's end, or at a block's turn in sequential, run singly.
    steps_per_call: int = _field(
        1, "Steps in one program, which makes their batches itself: the host is idle meanwhile."
    )
    remat_blocks: tuple[int, ...] = _field(
        (), "Blocks whose layers are computed again in the backward pass: less memory, more time."
    )
    log_gradient_norm: bool = _field(
        False, "Log each block's gradient norm, and the sum of learning rate x its square."
    )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation of every block's head on the whole test (and validation) set."""

    every_epochs: float = _field(1.0, "Epochs between two evaluations.")
    batch_size: int = _field(500, "Examples an evaluation batch, over all devices together.")
    ensemble_last: int = _field(2, "How many of the last heads the log-softmax ensemble sums.")
    log_drift: bool = _field(
        False,
        "Log how far each block's outputs on a probe batch are from their final distribution.",
    )
    time_blocks: bool = _field(
        False, "Time each block's work of one step after training; takes more memory than training."
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints: the latest, and the best by the last block's accuracy."""

    every_steps: int = _field(
        0, "Steps between two checkpoints; 0: once an epoch, in a search twenty in all."
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run."""

    seed: int = _field(0, "Decides the first parameters, the order of the data and all draws.")
    precision: str = _field(
        "default",
        "Of float32 products: the platform's default (TF32 on an NVIDIA GPU, bfloat16 on a TPU), "
        "high, or highest (float32 everywhere).",
    )
    # No program of such a run donates its inputs: it takes more memory.
    trace: bool = _field(
        False, "Record when each block's program ran, for 40 steps: timeline.png, trace.json."
    )
    profile: bool = _field(
        False, "jax.profiler's trace of the same steps, in profile/; blocks are named in it."
    )
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

    candidates: tuple[str, ...] = _field(
        ("sepconv_1", "sepconv_2", "sepconv_3", "sepconv_4"),
        "The candidate heads at every place; their options are those of auxiliary.",
    )
    num_pretraining_steps: int = _field(40_000, "Steps of the weights before the outer steps.")
    num_outer_steps: int = _field(2_000, "Steps of the decision variables.")
    num_inner_steps: int = _field(
        5, "T: the steps of the weights through which the outer gradient looks."
    )
    # See sedona/hypergradient.py.
    hypergradient: str = _field("unrolled", "How the outer gradient is taken.")
    remat: bool = _field(
        True, "Compute inner steps again on the way back instead of holding them in memory."
    )
    batch_size: int = _field(128, "Training examples an inner step.")
    validation_batch_size: int = _field(1024, "Held-out examples an outer step.")
    learning_rate: float = _field(0.01, "Adam's learning rate on the decision variables.")
    b1: float = _field(0.5, "Adam's decay of the mean of outer gradients.")
    b2: float = _field(0.999, "Adam's decay of the mean of squared outer gradients.")
    weight_decay: float = _field(1e-6, "An L2 term on the decision variables.")
    num_snapshots: int = _field(
        50, "Snapshots of the weights, from pretraining, which the outer steps start from."
    )
    snapshots: str = _field(
        "spread",
        "When they are taken: over all of pretraining, or (official) at its end, snapshot_interval apart.",
    )
    snapshot_interval: int = _field(80, "Official snapshots: the steps between two.")
    snapshot_memory: str = _field("auto", "Where snapshots are kept; auto: by their size.")
    num_blocks: tuple[int, ...] = _field(
        (2, 4, 8), "The numbers of blocks, K, whose cuts and heads the summary has."
    )
    max_imbalance: float = _field(
        1.25,
        "The summary also has cuts whose slowest block costs at most this times that of balanced ones.",
    )
    backprop_steps: int = _field(
        64_000, "The length of a training by backprop, in which the search's cost is stated."
    )
    log_every_steps: int = _field(20, "Steps between two lines of metrics.")


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """A search."""

    seed: int = _field(0, "Decides the first parameters, the order of the data and all draws.")
    # The outer gradient is a difference of small numbers.
    precision: str = _field("highest", "Of float32 products: default, high or highest.")
    network: NetworkConfig = NetworkConfig()
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()
    loss: LossConfig = LossConfig()
    # Of the weights.
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    search: SearchSettings = SearchSettings()
    checkpoint: CheckpointConfig = CheckpointConfig()


# What may change when a run is resumed: sections and fields that change no number trained.
RESUMABLE = (
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


def default_config(config_class: type = Config) -> "config_dict.ConfigDict":
    """Returns a ConfigDict with every field of the dataclass at its default."""
    from ml_collections import config_dict  # Only configuration files need it.

    return config_dict.ConfigDict(dataclasses.asdict(config_class()))


def describe_fields(config_class: type = Config) -> dict[str, tuple[Any, str]]:
    """Every field by its dotted name: its default and a line of help, with the choices if any.

    Example:
      >>> describe_fields()["placement.kind"]
      ('fused', 'One program for all blocks, or one program and mesh a block. One of fused, pipelined.')
    """
    described = {}
    for name, field in _leaf_fields(config_class).items():
        choices = f" One of {', '.join(_CHOICES[name])}." if name in _CHOICES else ""
        described[name] = (field.default, field.metadata["help"] + choices)
    return described


def check_field_name(name: str, config_class: type = Config) -> None:
    """Checks a dotted field name, such as ``optimizer.learning_rate``.

    Raises:
      UserError: if there is no such field; the message has the closest names.
    """
    known = _leaf_fields(config_class)
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
    for name in _leaf_fields(type(config)):
        section, _, field = name.partition(".")
        if section in RESUMABLE or name in RESUMABLE:
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


def _leaf_fields(config_class: type, prefix: str = "") -> dict[str, dataclasses.Field]:
    fields = {}
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(field.type):
            fields |= _leaf_fields(field.type, f"{prefix}{field.name}.")
        else:
            fields[prefix + field.name] = field
    return fields


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
    for name in _leaf_fields(type(config)):
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
    if not placement.one_after_another and (
        (config.method.name, placement.kind) != ("dgl", "fused")
    ):
        raise UserError(
            "config.placement.one_after_another=False is for config.method.name=dgl with "
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
