"""`benchmark.py memory`: what a fused step of DGL needs beside backprop's, from the compiler.

Nothing is run: the programs are compiled, and XLA says how many bytes of temporaries each has.
Blocks run one after another (config.placement.one_after_another).
"""

import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import flags

from benchmarks import setting, step
from dgl_jax.block import make_block_step
from dgl_jax.config import Config
from dgl_jax.errors import UserError
from dgl_jax.optim import make_optimizer
from dgl_jax.pipeline import make_fused_step
from dgl_jax.schedule import UPDATE
from dgl_jax.tables import markdown
from dgl_jax.types import Batch

_CUTS = flags.DEFINE_list(
    "cuts", [], "memory: further groupings, cuts joined by a dash: 16 for one cut, 10-30 for two."
)
_BUDGET = flags.DEFINE_float(
    "memory_gib", 16.0, "memory: of the device whose largest batch is stated.", lower_bound=0.1
)
_REMAT = flags.DEFINE_bool("remat_rows", False, "memory: backprop with remat too.")

_MIB, _GIB = 2**20, 2**30


def memory(folder: pathlib.Path) -> list[str]:
    """Compiles one network's variants after the other."""
    content = setting.machine() | {
        "batch_size": setting.BATCH_SIZE.value,
        "image_size": setting.IMAGE_SIZE.value,
        "memory_gib": _BUDGET.value,
        "device": jax.devices()[0].device_kind,
        "rows": [],
    }
    for network, name, width_factor in step.networks():
        for variant, config in _variants(
            functools.partial(step.variant_config, name, width_factor)
        ):
            content["rows"].append({"network": network, "variant": variant} | _measure(config))
            table = memory_table(content)
            _write(folder, content, table)  # After each: compiling takes its time.
    print(table)
    return []


def _variants(make: Callable[..., Config]) -> Iterator[tuple[str, Config]]:
    """(name, configuration) of each row."""
    yield "backprop", make("1")
    if _REMAT.value:
        yield "backprop, remat", make("1", remat_blocks=(0,))
    for blocks in step.BLOCKS.value:
        yield f"uniform, K={blocks}" if blocks != "per_layer" else "per layer", make(blocks)
        if blocks != "per_layer":
            balanced = {"strategy": "balanced", "cost": "memory"}
            yield f"balanced, K={blocks}", make(blocks, **balanced)
    for cuts in _CUTS.value:
        if not all(word.isdecimal() for word in cuts.split("-")):
            raise UserError(f"--cuts={cuts} must be whole numbers joined by dashes; try 10-30")
        cuts = tuple(map(int, cuts.split("-")))
        yield f"cuts {cuts}", make(str(len(cuts) + 1), strategy="explicit", cuts=cuts)


def _measure(config: Config) -> dict[str, Any]:
    blocks, cuts = step.configured(config)
    optimizer = make_optimizer(config.optimizer, 10**6, 10**6)
    given, labels, key = step.shapes(blocks, optimizer)
    states, inputs = zip(*given, strict=True)
    operations = [(block.index, UPDATE) for block in blocks]
    keys = [key] * len(blocks)
    fused_step = make_fused_step(blocks, optimizer, operations)
    fused = _analysis(fused_step, states, Batch(inputs[0], labels), keys)
    if len(blocks) == 1:
        alone = [fused]
    else:
        alone = [
            _analysis(make_block_step(block, optimizer), state, x, labels, key)
            for block, (state, x) in zip(blocks, given, strict=True)
        ]
    return {
        "cuts": list(cuts),
        "temp_bytes": fused.temp_size_in_bytes,
        "argument_bytes": fused.argument_size_in_bytes,
        "block_temp_bytes": [analysis.temp_size_in_bytes for analysis in alone],
    }


def _analysis(fn, *args):
    compiled = jax.jit(fn, donate_argnums=0).lower(*args).compile()
    return compiled.memory_analysis()


def memory_table(content: dict[str, Any]) -> str:
    """One row a network and variant."""
    header = ["network", "variant", "cuts", "temporaries, MiB", "/ backprop"]
    header += [f"images in {content['memory_gib']:g} GiB", "over backprop"]
    header += ["largest block alone, MiB", "all / largest"]
    rows = []
    budget = content["memory_gib"] * _GIB
    for row in content["rows"]:
        base = next(
            r
            for r in content["rows"]
            if (r["network"], r["variant"]) == (row["network"], "backprop")
        )
        images, base_images = (
            max(0, budget - r["argument_bytes"]) / r["temp_bytes"] * content["batch_size"]
            for r in (row, base)
        )
        largest = max(row["block_temp_bytes"])
        cuts = row["cuts"]
        rows.append(
            [
                row["network"],
                row["variant"],
                ", ".join(map(str, cuts)) if len(cuts) < 8 else "",
                f"{row['temp_bytes'] / _MIB:.0f}",
                f"{row['temp_bytes'] / base['temp_bytes']:.3f}",
                f"{images:.0f}",
                f"{100 * (images / base_images - 1):+.0f} %",
                f"{largest / _MIB:.0f}",
                f"{row['temp_bytes'] / largest:.3f}",
            ]
        )
    return markdown(header, rows)


def _write(folder: pathlib.Path, content: dict[str, Any], table: str) -> None:
    title = f"Memory of a step: batches of {content['batch_size']}, {content['image_size']} pixels"
    notes = (
        f"{content['device']}, {setting.on_what(content)}. Temporaries: XLA's own plan of the "
        "compiled fused step, its blocks one after another, without parameters, statistics and the "
        "optimizer's state. Images: as many as fit beside those, if all temporaries grew with the "
        "batch (gradients do not: with more images in memory they count for less). With remat, "
        "equal layers are loops. Largest block alone: the temporaries of the program of that "
        "block only. Balanced: cuts by "
        "config.partition.cost=memory. MLP-SR-aux heads."
    )
    setting.write(folder, "memory", content, title, [table, notes])
