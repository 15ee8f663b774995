"""The programs that runs start, on devices that need not be there; nothing is run.

A `Recorder` lets the project's own runners, data sets and probes go through their steps with shapes
for arrays. Whatever they give `jax.jit` is written down: the function, the shapes and shardings that
it is called with, what is donated and where its outputs go.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Self
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from dgl_jax import cost, drift, evaluation, replay_buffer
from dgl_jax.auxiliary import OPTIONS, make_heads
from dgl_jax.block import Block
from dgl_jax.config import Config, SearchConfig
from dgl_jax.data import in_memory
from dgl_jax.data.shardings import replicated
from dgl_jax.data.sources import Arrays
from dgl_jax.grouping import choose_cuts, configured_blocks, configured_network
from dgl_jax.losses import make_loss_fn
from dgl_jax.methods import METHODS, async_dgl_parallel
from dgl_jax.optim import make_optimizer
from dgl_jax.pipeline import Runner, init_states
from dgl_jax.placement import BlockPlacement, make_placements, over_all
from dgl_jax.schedule import calls
from dgl_jax.sedona.hypergradient import ESTIMATORS, make_hypergradient
from dgl_jax.sedona.inner import make_inner_step
from dgl_jax.sedona.outer import OuterState, make_outer_optimizer, make_outer_step
from dgl_jax.sedona.relaxation import init_state, init_variables, relax, relaxed_network
from dgl_jax.types import Batch, BlockState, DeviceStream, TrainState

# A training set in memory: CIFAR's size.
_NUM_IMAGES = 50_000


@dataclasses.dataclass(frozen=True)
class Program:
    """What a run gives `jax.jit`, and calls it with.

    Attributes:
      name: its name in traces, or the function's.
      fn: a function of arrays.
      arguments: trees of `jax.ShapeDtypeStruct`s with shardings.
      options: of `jax.jit`.
    """

    name: str
    fn: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def lower(self) -> jax.stages.Lowered:
        """What a compiler is given."""
        return jax.jit(self.fn, **self.options).lower(*self.arguments)

    def num_devices(self) -> int:
        """Those that it runs on."""
        where = jax.tree.leaves((self.arguments, self.options.get("out_shardings")))
        return max(len(getattr(leaf, "sharding", leaf).device_set) for leaf in where)


class Recorder:
    """Within it `jax.jit` takes shapes for arrays, and what is put on a device is a shape there.

    All devices count as this process's own. While a function is traced, JAX is as it is.

    Attributes:
      programs: in the order of their first calls.
    """

    def __init__(self):
        self.programs: list[Program] = []
        self._is_recording = True
        fetched = lambda tree: jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), tree)
        self._patches = [
            mock.patch.object(owner, name, value)
            for owner, name, value in (
                (jax, "jit", lambda fn, **options: _Jitted(self, fn, options)),
                (jax, "named_call", _named_call),
                (jax, "device_put", _put),
                (jax, "device_get", fetched),
                (jax.numpy, "zeros", _zeros),
                (replay_buffer, "check_memory", lambda *_: None),
                (NamedSharding, "is_fully_addressable", True),
                (NamedSharding, "addressable_devices", property(lambda where: where.device_set)),
            )
        ]

    def __enter__(self) -> Self:
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_) -> None:
        for patch in self._patches:
            patch.stop()

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Within, JAX is as it is."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is called within is not written down."""
        before, self._is_recording = self._is_recording, False
        try:
            yield
        finally:
            self._is_recording = before

    def note(self, program: Program) -> None:
        """Writes a program down."""
        if self._is_recording:
            self.programs.append(program)


class _Jitted:
    """Stands for a jitted function: takes and returns shapes."""

    def __init__(self, recorder: Recorder, fn: Callable[..., Any], options: dict[str, Any]):
        self._recorder, self._fn, self._options = recorder, fn, options
        self._outputs: dict[Any, Any] = {}

    def __call__(self, *arguments):
        leaves, structure = jax.tree.flatten(arguments)
        kind = structure, tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)
        if kind not in self._outputs:
            with self._recorder.outside():
                outputs = jax.eval_shape(self._fn, *arguments)
            where = self._options.get("out_shardings")
            if where is None:
                where = replicated(leaves[0].sharding)
            self._outputs[kind] = _put(outputs, where)
            self._recorder.note(Program(_name(self._fn), self._fn, arguments, self._options))
        return self._outputs[kind]

    def lower(self, *arguments):
        """Of a program that is compiled before it is called."""
        self(*arguments)
        return self

    def compile(self):
        """The same."""
        return self


_real_named_call, _real_zeros = jax.named_call, jnp.zeros


def _name(fn: Callable[..., Any]) -> str:
    fn = getattr(fn, "func", fn)  # Of a functools.partial.
    return getattr(fn, "name_in_traces", fn.__name__)


def _named_call(fn, *, name):
    called = _real_named_call(fn, name=name)
    called.name_in_traces = name
    return called


def _put(tree: Any, where: Any) -> Any:
    """Shapes, with a sharding for the whole tree or each part of it."""
    put = lambda sharding, part: jax.tree.map(
        lambda leaf: _struct(leaf.shape, leaf.dtype, sharding), part
    )
    return jax.tree.map(put, where, tree)


def _zeros(shape, dtype=None, *, device=None):
    return _real_zeros(shape, dtype) if device is None else _struct(shape, dtype, device)


def _struct(shape, dtype, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What `train.train_and_evaluate` makes before its loop; arrays are shapes."""

    recorder: Recorder
    config: Config
    blocks: tuple[Block, ...]
    optimizer: optax.GradientTransformation
    key: jax.Array
    placements: tuple[BlockPlacement, ...]
    states: tuple[BlockState, ...]
    batch: Batch


def record(
    what: str,
    config: Config | SearchConfig,
    devices: list[jax.Device],
    image_size: int,
    num_classes: int,
) -> list[Program]:
    """The programs of one of `PARTS`.

    Args:
      what: a key of `PARTS`.
      config: of the run, or for ``search`` of the search.
      devices: those that the run would have.
      image_size: H and W.
      num_classes: of the data.

    Raises:
      UserError: as a run does.
    """
    network = configured_network(config, num_classes)
    if isinstance(config, SearchConfig):
        with Recorder() as recorder:
            _search(recorder, config, network, devices, image_size, num_classes)
        return recorder.programs
    if what == "data_parallel":
        config = dataclasses.replace(config, placement=over_all(config.placement))
    image_shape = (image_size, image_size, 3)
    cuts = choose_cuts(config, network, num_classes, image_shape)
    heads = (config.auxiliary.name,) * len(cuts)
    blocks = configured_blocks(config, network, cuts, heads, num_classes)
    placements = make_placements(config.placement, len(blocks), devices=devices)
    optimizer = make_optimizer(config.optimizer, config.train.num_steps, 1000)
    key, where = jax.random.key(config.seed), placements[0].batch
    size = config.train.batch_size
    with Recorder() as recorder:
        with contextlib.nullcontext() if what == "init" else recorder.aside():
            states = init_states(blocks, optimizer, key, image_shape, placements)
        images = _struct((size, *image_shape), np.float32, where)
        batch = Batch(images, _struct((size,), np.int32, where))
        PARTS[what](_Run(recorder, config, blocks, optimizer, key, placements, states, batch))
    return recorder.programs


def _training(run: _Run) -> None:
    """All of a short run's steps."""
    runner = _runner(run)
    state = TrainState(run.states, runner.init_memory(run.states, run.batch.images))
    steps_per_call = run.config.train.steps_per_call
    num_updates = max(len(run.blocks) + 1, 2 * steps_per_call)
    schedule = METHODS[run.config.method.name].make_schedule(
        run.config, len(run.blocks), num_updates, num_updates
    )
    stream = None
    if steps_per_call > 1:
        with run.recorder.aside():
            dataset_stream = _dataset(run).stream
            source = dataset_stream.source_at(0)
        stream = DeviceStream(lambda step: source, dataset_stream.batch)
    for tasks_of_steps in calls(schedule, 0, steps_per_call, num_updates):
        if len(tasks_of_steps) > 1:
            state, _ = runner.steps(state, tasks_of_steps, stream)
        else:
            state, _ = runner.step(state, tasks_of_steps[0], lambda step: run.batch)


def _workers(run: _Run) -> None:
    """Of async_dgl_parallel: its runner's steps wait for threads."""
    inputs = {"activations": {"x": run.batch.images}, "labels": run.batch.labels}
    works = async_dgl_parallel.make_works(
        run.config, run.blocks, run.optimizer, run.key, run.placements
    )
    for work, state in zip(works, run.states, strict=True):
        work.feed(state, inputs)
        _, inputs, _ = work.update(state, inputs)


def _evaluation(run: _Run) -> None:
    """All heads' logits of a batch, and what is counted of them."""
    evaluate = evaluation.make_evaluate(
        _runner(run).logits, run.placements[-1], run.config.eval.ensemble_last
    )
    with run.recorder.aside():
        batch = next(_dataset(run).eval_batches("test"))
    evaluate(run.states, [batch])


def _drift(run: _Run) -> None:
    probe = drift.make_probe(run.blocks, run.placements)
    with run.recorder.aside():
        images, _, mask = next(_dataset(run).eval_batches("test"))
    probe(run.states, images, mask)


def _blocks_alone(run: _Run) -> None:
    """What `config.eval.time_blocks` times."""
    make_work = METHODS[run.config.method.name].make_block_work
    works = [make_work(run.config, block, run.optimizer) for block in run.blocks]
    cost.block_step_seconds(run.blocks, works, run.states, run.batch, run.placements, repeats=1)


def _data(run: _Run) -> None:
    """A set in memory: its order, a training batch, an evaluation batch."""
    dataset = _dataset(run)
    dataset.batch_at(0)
    next(dataset.eval_batches("test"))


def _runner(run: _Run) -> Runner:
    method = METHODS[run.config.method.name]
    return method.make_runner(run.config, run.blocks, run.optimizer, run.key, run.placements)


def _dataset(run: _Run) -> in_memory.Dataset:
    data, image_shape = run.config.data, run.batch.images.shape[1:]
    # A view of one zero: as large as it says, without the memory.
    zeros = lambda *shape, dtype: np.broadcast_to(np.zeros((), dtype), shape)
    images = zeros(_NUM_IMAGES, *image_shape, dtype=np.uint8)
    labels = zeros(_NUM_IMAGES, dtype=np.int32)
    return in_memory.make_dataset(
        Arrays("zeros", 10, images, labels, images, labels),
        batch_size=run.config.train.batch_size, eval_batch_size=run.config.eval.batch_size,
        seed=run.config.seed, validation_fraction=0.0, held_out=False, augment=data.augment,
        crop_padding=data.crop_padding, flip=data.flip, statistics=((0.5,) * 3, (0.25,) * 3),
        sharding=run.placements[0].batch,
    )  # fmt: skip


def _search(recorder, config, network, devices, image_size, num_classes) -> None:
    """A step of pretraining and an outer step, as `search.search` makes them."""
    settings = config.search
    options = {option: getattr(config.auxiliary, option) for option in OPTIONS}
    candidates = make_heads(settings.candidates, num_classes, **options)
    relaxed = relaxed_network(network, candidates, make_loss_fn(config.loss))
    optimizer = make_optimizer(config.optimizer, settings.num_pretraining_steps, 1000)
    outer_optimizer = make_outer_optimizer(settings)
    placements = make_placements(Config().placement, 1, devices=devices)
    where = placements[0].state

    def batch(size):
        images = _struct((size, image_size, image_size, 3), np.float32, where)
        return Batch(images, _struct((size,), np.int32, where))

    def init(key, x):
        variables = init_variables(len(network.layers), len(settings.candidates))
        outer_state = OuterState(variables, outer_optimizer.init(variables))
        return init_state(relaxed, optimizer, key, x), outer_state, relax(variables)

    key = jax.device_put(jax.random.key(config.seed), where)
    train, validation = batch(settings.batch_size), batch(settings.validation_batch_size)
    with recorder.aside():
        weights, outer_state, undecided = jax.jit(init)(key, train.images)
    pretraining_step = jax.jit(make_inner_step(relaxed, optimizer), donate_argnums=0)
    pretraining_step(weights, undecided, train, key)
    hypergradient = make_hypergradient(
        ESTIMATORS[settings.hypergradient], relaxed, optimizer, remat=settings.remat
    )
    outer_step = make_outer_step(relaxed, optimizer, outer_optimizer, hypergradient)
    batches = [train] * (settings.num_inner_steps + 1)
    jax.jit(outer_step, donate_argnums=(0, 1))(outer_state, weights, batches, validation, key)


# What is compiled for a word of --methods: a method's training, or another part of the project.
PARTS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(METHODS, _training),
    "async_dgl_parallel": _workers,
    "init": lambda run: None,
    "evaluation": _evaluation,
    "drift": _drift,
    "blocks_alone": _blocks_alone,
    "data": _data,
    "search": _search,
}
