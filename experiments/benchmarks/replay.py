"""`benchmark.py replay`: the replay buffers of the asynchronous methods.

A buffer is a ring of M mini-batches on the device. For several M and each dtype: the time to write
a mini-batch, to read one, and of a block's whole turn as `async_dgl` runs it (it reads from the
buffer below, updates and writes to its own), beside XLA's account of the memory that they need.
Nothing may leave the device meanwhile: an implicit transfer is an error.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import setting
from dgl_jax import replay_buffer
from dgl_jax.auxiliary import make_heads
from dgl_jax.block import Block
from dgl_jax.config import Config, LossConfig, OptimizerConfig, PlacementConfig, ReplayConfig
from dgl_jax.errors import UserError
from dgl_jax.losses import make_loss_fn
from dgl_jax.methods import METHODS, async_dgl
from dgl_jax.models.network import Network
from dgl_jax.optim import make_optimizer
from dgl_jax.pipeline import init_states
from dgl_jax.placement import BlockPlacement, make_placements
from dgl_jax.schedule import UPDATE
from dgl_jax.tables import markdown, spread
from dgl_jax.types import BlockState

_BUFFER_SIZES = flags.DEFINE_list("buffer_sizes", ["1", "10", "50", "200"], "replay: M.")
_ACTIVATIONS = flags.DEFINE_list(
    "activations", ["128", "16", "16", "128"], "replay: B,H,W,C of a mini-batch; M of 200: 9 GiB."
)

_DTYPES = ("float32", "bfloat16", "int8")
_OPTIMIZER = make_optimizer(OptimizerConfig(schedule="constant"), 1, 1)


def replay(folder: pathlib.Path) -> list[str]:
    """Measures all sizes and dtypes; returns what failed: nothing, or it raises."""
    sizes = setting.whole_numbers(_BUFFER_SIZES, 1)
    shape = [int(word) for word in _ACTIVATIONS.value if word.isdecimal()]
    if len(_ACTIVATIONS.value) != 4 or len(shape) != 4 or 0 in shape:
        raise UserError(
            f"--activations={','.join(_ACTIVATIONS.value)} must be four whole numbers, B,H,W,C; "
            f"try {','.join(_ACTIVATIONS.default)}"
        )
    content = setting.machine() | {"device": jax.devices()[0].device_kind, "activations": shape}
    layers = tuple(nn.Dense(shape[-1]) for _ in range(3))
    (head,) = make_heads(["pred"], setting.NUM_CLASSES)
    network = Network("small", layers, head)
    blocks = METHODS["async_dgl"].make_blocks(network, (0, 1), head, make_loss_fn(LossConfig()))
    placements = make_placements(PlacementConfig(), len(blocks))
    states = init_states(blocks, _OPTIMIZER, jax.random.key(0), shape[1:], placements)
    rows = []
    for dtype in _DTYPES:
        rows += _measure(dtype, sizes, shape, blocks[1], states[1], placements[1])
    _write(folder, content | {"rows": rows})
    return []


def _measure(
    dtype: str,
    sizes: Sequence[int],
    shape: Sequence[int],
    block: Block,
    state: BlockState,
    placement: BlockPlacement,
) -> list[dict[str, Any]]:
    """One row a size; all sizes' programs take turns."""
    rows, turns = [], {}
    for size in sizes:
        config = ReplayConfig(buffer_size=size, buffer_dtype=dtype)
        own_state = jax.tree.map(jnp.copy, state)  # It is donated.
        row, runs = _programs(config, shape, block, own_state, placement)
        rows.append(row)
        turns |= {(size, name): run for name, run in runs.items()}
    with jax.transfer_guard("disallow"):
        seconds = setting.interleaved_seconds(turns, setting.ROUNDS.value, setting.STEPS.value)
    for row in rows:
        for name in ("write", "read", "turn"):
            row[name]["seconds"] = seconds[row["buffer_size"], name]
    return rows


def _programs(
    config: ReplayConfig,
    shape: Sequence[int],
    block: Block,
    state: BlockState,
    placement: BlockPlacement,
) -> tuple[dict[str, Any], dict[str, Callable[[int], None]]]:
    """What XLA says of the programs, and functions that run each so many times."""
    below, own = replay_buffer.init_buffers(
        [jax.ShapeDtypeStruct(shape, jnp.float32)] * 2, config, placement
    )
    slots = list(np.arange(config.buffer_size, dtype=np.int32))
    slots, key = jax.device_put((slots, jax.random.key(0)), placement.state)
    batch = np.ones(shape, np.float32), np.zeros(shape[0], np.int32)
    x, labels = jax.device_put(batch, placement.batch)

    turn = async_dgl.make_turn(Config(replay=config), block, _OPTIMIZER, UPDATE)
    write = jax.jit(replay_buffer.write, donate_argnums=0).lower(own, slots[0], x, labels).compile()
    read = jax.jit(replay_buffer.read).lower(below, slots[0]).compile()
    turn = jax.jit(turn, donate_argnums=(0, 1))
    turn = turn.lower(state, own, below, slots[0], slots[0], key).compile()
    row = {"buffer_dtype": config.buffer_dtype, "buffer_size": config.buffer_size}
    row["ring_bytes"] = replay_buffer.nbytes(own)
    row["mini_batch_bytes"] = row["ring_bytes"] // config.buffer_size
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    for name, program in {"write": write, "read": read, "turn": turn}.items():
        memory = program.memory_analysis()
        row[name] = {
            "temp_bytes": memory.temp_size_in_bytes,
            # Of the ring: a turn's state is updated in place too.
            "alias_bytes": memory.alias_size_in_bytes - (state_bytes if name == "turn" else 0),
        }
    count = 0

    def next_slot():
        nonlocal count
        count += 1
        return slots[count % len(slots)]

    def run_write(number):
        nonlocal own
        for _ in range(number):
            own = write(own, next_slot(), x, labels)
        jax.block_until_ready(own)

    def run_read(number):
        for _ in range(number):
            held = read(below, next_slot())
        jax.block_until_ready(held)

    def run_turn(number):
        nonlocal own, state
        for _ in range(number):
            slot = next_slot()
            state, own, _ = turn(state, own, below, slot, slot, key)
        jax.block_until_ready((state, own))

    return row, {"write": run_write, "read": run_read, "turn": run_turn}


def _write(folder: pathlib.Path, content: dict[str, Any]) -> None:
    mebibytes = lambda number: f"{number / 2**20:.3g}"
    columns = ["dtype", "M", "ring, MiB", "mini-batch, MiB", "write, ms", "read, ms", "turn, ms"]
    columns += ["temporaries of write, MiB", "of read", "of turn", "in place"]
    rows = []
    for row in content["rows"]:
        cells = [row["buffer_dtype"], str(row["buffer_size"])]
        cells += [mebibytes(row["ring_bytes"]), mebibytes(row["mini_batch_bytes"])]
        for name in ("write", "read", "turn"):
            cells.append(spread([1e3 * value for value in row[name]["seconds"]], ".2f"))
        cells += [mebibytes(row[name]["temp_bytes"]) for name in ("write", "read", "turn")]
        in_place = all(row[name]["alias_bytes"] >= row["ring_bytes"] for name in ("write", "turn"))
        rows.append([*cells, "yes" if in_place else "no"])
    notes = (
        f"{setting.on_what(content)}; device {content['device']}. Medians of "
        f"{setting.ROUNDS.value} rounds of {setting.STEPS.value}, the sizes of a dtype in turn, "
        "and their range. A turn: read from the buffer below, update one linear layer and its "
        "head, write to the own buffer. In place: the donated buffer, and so the whole ring, is "
        "the output's memory. No implicit transfer between host and device was allowed."
    )
    table = markdown(columns, rows)
    title = f"Replay buffers of mini-batches {'x'.join(map(str, content['activations']))}"
    setting.write(folder, "replay", content, title, [table, notes])
    print(table)
