"""`benchmark.py compile_for`: the project's programs, compiled for devices that need not be there.

The target's own compiler says what each program needs. Nothing is run, and no accelerator is
needed: GPUs take the packages of requirements-aot-cuda.txt, TPUs those of requirements-aot-tpu.txt.

A word of --methods is a method, or one of init, evaluation, drift, blocks_alone, data and search;
after colons, fields of the configuration: dgl:placement.kind=pipelined:train.remat_blocks=0-1, a
tuple's numbers joined by dashes. By default it is all that a run can start, small.
"""

import ast
import collections
import dataclasses
import hashlib
import itertools
import json
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import flags
from tqdm import auto as tqdm

from benchmarks import hlo, programs, setting, targets
from dgl_jax.config import (
    ONE_BLOCK_METHODS,
    Config,
    SearchConfig,
    check_field_name,
    default_config,
    from_dict,
)
from dgl_jax.errors import UserError
from dgl_jax.methods import METHODS
from dgl_jax.models import make_network
from dgl_jax.tables import markdown

_SMALL_SEARCH = "search.num_inner_steps=2:search.candidates=sepconv_1-mlp"
# Every program of the project.
_ALL = (
    "init",
    "backprop",
    "backprop:train.log_gradient_norm=True",
    "backprop:train.steps_per_call=4",
    "backprop:train.remat_blocks=0",
    "backprop:network.dtype=bfloat16",
    "data_parallel:placement.num_devices=4",
    "dgl",
    "dgl:placement.one_after_another=False",
    "dgl:train.remat_blocks=0-1",
    "dgl:network.dtype=bfloat16",
    "dgl:network.scan_layers=True",
    "dgl:train.log_gradient_norm=True",
    "dgl:train.steps_per_call=4",
    "dgl:placement.data_parallel=4",
    "dgl:loss.name=predsim",
    "dgl:auxiliary.name=sepconv_2",
    "dgl:optimizer.name=adam",
    "dgl:placement.kind=pipelined",
    "dgl:placement.kind=pipelined:placement.num_devices=4:placement.data_parallel=2",
    "dgl:placement.kind=pipelined:placement.devices_per_block=1-2",
    "sequential",
    "sequential:train.steps_per_call=4",
    "sequential:placement.kind=pipelined",
    "ddg:placement.kind=pipelined",
    "ddg:method.weights=current:placement.kind=pipelined",
    "features_replay:placement.kind=pipelined",
    "features_replay:placement.data_parallel=4",
    "dni",
    "cdni",
    "cdni:placement.data_parallel=4",
    "pipeline_backprop:method.pipeline_schedule=gpipe:placement.kind=pipelined",
    "pipeline_backprop:method.pipeline_schedule=1f1b:placement.kind=pipelined",
    "pipeline_backprop:placement.num_devices=4:placement.data_parallel=2:placement.kind=pipelined",
    *(
        f"{method}:replay.buffer_size=5:replay.buffer_dtype={dtype}{kind}"
        for method, kind in (
            ("async_dgl", ""),
            ("async_dgl_parallel", ":placement.kind=pipelined"),
        )
        for dtype in ("float32", "bfloat16", "int8")
    ),
    "async_dgl:replay.buffer_size=5:placement.data_parallel=4",
    "evaluation",
    "evaluation:placement.kind=pipelined",
    "evaluation:placement.data_parallel=4",
    "drift",
    "blocks_alone",
    "data",
    "data:placement.data_parallel=4",
    *(
        f"search:{_SMALL_SEARCH}:search.hypergradient={estimator}"
        for estimator in ("unrolled", "first_order", "finite_difference", "official")
    ),
    f"search:{_SMALL_SEARCH}:search.remat=False",
)
# What is no method is of runs of this one.
_METHOD_OF_PARTS = "dgl"
# Those that take train.remat_blocks.
_WITH_REMAT = ("backprop", "data_parallel", "dgl", "sequential")
_NUM_CLASSES = {"cifar": 10, "tiny_imagenet": 200, "imagenet": 1000}

# What the compiler says of a program; bytes are of one device.
_SIZES = ("argument", "output", "alias", "temp", "peak")
_MEASURED = (
    *(f"{name}_bytes" for name in _SIZES),
    "flops",
    "bytes_accessed",
    "kernels",
    "collectives",
    "compile_seconds",
)

_TARGET = flags.DEFINE_string(
    "target", "h200", "compile_for: h200, a TPU's topology such as v5e:2x2, or cpu."
)
_NETWORKS = flags.DEFINE_list(
    "networks", ["cnn4:0.25"], "compile_for: the networks, each with the factor of its width."
)
_METHODS = flags.DEFINE_list(
    "methods", ["all"], "compile_for: methods and other parts, see above; all: all that there are."
)
_NUM_BLOCKS = flags.DEFINE_list(
    "num_blocks", ["2"], "compile_for: numbers of blocks; per_layer: one a layer."
)
_STRATEGY = flags.DEFINE_enum(
    "strategy", "uniform", ["uniform", "balanced"], "compile_for: where a network is cut."
)
_CUTS = flags.DEFINE_list(
    "cuts", [], "compile_for: further groupings, cuts joined by a dash: 16 for one, 10-30 for two."
)
_DTYPES = flags.DEFINE_list(
    "dtypes", ["float32"], "compile_for: of computing, float32 and bfloat16."
)
_REMAT = flags.DEFINE_list("remat", ["off"], "compile_for: off, on: train.remat_blocks, all.")
_ONE_AFTER_ANOTHER = flags.DEFINE_list(
    "one_after_another", ["on"], "compile_for: off, on: placement.one_after_another."
)
_FORM = flags.DEFINE_enum(
    "form", "cifar", list(_NUM_CLASSES), "compile_for: whose stem and head a network has."
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """What some programs are of; the first fields of their rows."""

    network: str
    method: str
    blocks: str
    dtype: str
    remat: bool
    one_after_another: bool
    form: str
    image_size: int
    batch_size: int


def compile_for(folder: pathlib.Path) -> list[str]:
    """Compiles one program after the other; returns those that do not compile."""
    target = _TARGET.value
    targets.check(target)
    configs = {variant: _config(variant) for variant in _variants()}
    content = _earlier(folder) | setting.machine()
    content["commands"] = list(dict.fromkeys([*content.get("commands", []), content["command"]]))
    rows = content.setdefault("rows", [])
    # A program that comes out of a cache says nothing of compiling.
    jax.config.update("jax_enable_compilation_cache", False)
    versions, failures = targets.versions(target), []
    bar = tqdm.tqdm(_programs(configs, targets.devices(target)), desc=target, unit="program")
    for variant, program, failure in bar:
        place = {"target": target, **dataclasses.asdict(variant), "program": program.name}
        bar.set_postfix_str(f"{_what(place)}, {program.name}")
        if failure:
            row = place | dict.fromkeys(_MEASURED) | {"failure": failure}
        else:
            row = place | _measure(program, {"target": target, "versions": versions}, rows)
        indices = [index for index, other in enumerate(rows) if place.items() <= other.items()]
        if indices:
            rows[indices[0]] = row
        else:
            rows.append(row)
        _write(folder, content)  # After each: the next may take the machine with it.
        if row["failure"]:
            failures.append(f"{variant.network}, {_what(row)}, {program.name}: {row['failure']}")
    print(_tables(rows)[-1])
    return failures


def _variants() -> Iterator[Variant]:
    """All combinations of the flags, but those that make no difference."""
    for flag in (_REMAT, _ONE_AFTER_ANOTHER):
        for word in flag.value:
            if word not in ("on", "off"):
                raise UserError(f"--{flag.name}={word} must be on or off")
    methods = itertools.chain(*(_ALL if word == "all" else [word] for word in _METHODS.value))
    groupings = [*_NUM_BLOCKS.value, *(f"cuts {cuts}" for cuts in _CUTS.value)]
    seen = set()
    for network, dtype, method, blocks, remat, one_after_another in itertools.product(
        _NETWORKS.value, _DTYPES.value, methods, groupings, _REMAT.value,
        _ONE_AFTER_ANOTHER.value,
    ):  # fmt: skip
        what, *fields = method.split(":")
        if what not in programs.PARTS:
            raise UserError(
                f"--methods={method}: {what!r} must be one of {', '.join(programs.PARTS)}"
            )
        is_dgl = what == "dgl" and "placement.kind=pipelined" not in fields
        variant = Variant(
            network=network,
            method=method,
            blocks="1" if what in (*ONE_BLOCK_METHODS, "search") else blocks,
            dtype="float32" if what == "search" else dtype,
            remat=remat == "on" and what in _WITH_REMAT,
            one_after_another=one_after_another == "on" or not is_dgl,
            form=_FORM.value,
            image_size=setting.IMAGE_SIZE.value,
            batch_size=setting.BATCH_SIZE.value,
        )
        if variant not in seen:
            seen.add(variant)
            yield variant


def _config(variant: Variant) -> Config | SearchConfig:
    """The configuration of a run that starts such programs."""
    what, *fields = variant.method.split(":")
    kind = SearchConfig if what == "search" else Config
    given = default_config(kind)
    name, _, width_factor = variant.network.partition(":")
    try:
        given.network.name, given.network.width_factor = name, float(width_factor or 1)
    except ValueError:
        raise UserError(
            f"--networks={variant.network} must be a name, or NAME:WIDTH_FACTOR; try {name}:0.25"
        ) from None
    given.network.form, given.network.dtype = variant.form, variant.dtype
    if kind is SearchConfig:
        given.search.batch_size = given.search.validation_batch_size = variant.batch_size
        given.data.validation_fraction = 0.5
    else:
        given.method.name = what if what in METHODS else _METHOD_OF_PARTS
        given.train.batch_size = given.eval.batch_size = variant.batch_size
        given.train.num_epochs, given.train.num_steps = 0.0, 10**6
        given.placement.one_after_another = variant.one_after_another
        num_blocks = _partition(given.partition, variant)
        given.train.remat_blocks = tuple(range(num_blocks)) if variant.remat else ()
    for field in fields:
        path, has_value, word = field.partition("=")
        if not has_value:
            raise UserError(f"--methods={variant.method}: {field} must be FIELD=VALUE")
        check_field_name(path, kind)
        section, _, leaf = path.rpartition(".")
        holder = given[section] if section else given
        holder[leaf] = _value(word, holder[leaf])
    return from_dict(given.to_dict(), kind)


def _partition(given: Any, variant: Variant) -> int:
    """Sets it, and returns K."""
    blocks = variant.blocks
    if blocks.startswith("cuts "):
        words = blocks.removeprefix("cuts ").split("-")
        if not all(word.isdecimal() for word in words):
            raise UserError(f"--cuts={blocks[5:]} must be whole numbers joined by dashes; try 1-3")
        given.strategy, given.cuts = "explicit", tuple(map(int, words))
        return len(words) + 1
    if blocks == "per_layer":
        given.strategy = blocks
        name = variant.network.partition(":")[0]
        return len(make_network(name, 10, form=variant.form).layers)
    if not blocks.isdecimal() or blocks == "0":
        raise UserError(f"--num_blocks={blocks} must be a number above 0, or per_layer; try 2")
    given.strategy, given.num_blocks = _STRATEGY.value, int(blocks)
    return int(blocks)


def _value(word: str, default: Any) -> Any:
    """What a field is given by a word."""
    if isinstance(default, tuple):
        return tuple(_value(part, None) for part in word.split("-") if part)
    if isinstance(default, str):
        return word
    try:
        return ast.literal_eval(word)
    except (SyntaxError, ValueError):
        return word


def _programs(
    configs: Mapping[Variant, Config | SearchConfig], devices: list[jax.Device]
) -> list[tuple[Variant, programs.Program, str]]:
    """All programs with their variants; where a run can't begin, one program and why."""
    found = []
    for variant, config in tqdm.tqdm(configs.items(), desc="tracing", unit="variant"):
        what, num_classes = variant.method.partition(":")[0], _NUM_CLASSES[variant.form]
        try:
            recorded = programs.record(what, config, devices, variant.image_size, num_classes)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 whatever it is, the table says it
            nothing = programs.Program("none", lambda: (), (), {})
            found.append((variant, nothing, _first_line(error)))
            continue
        counts = collections.Counter()
        for program in recorded:
            counts[program.name] += 1
            if counts[program.name] > 1:
                name = f"{program.name} {counts[program.name]}"
                program = dataclasses.replace(program, name=name)
            found.append((variant, program, ""))
    return found


def _measure(
    program: programs.Program, where: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the compiler says of a program; taken from a row of the same program, if there is one.

    Args:
      program: what is compiled.
      where: the target, and versions of its compiler.
      rows: those that there are.
    """
    row = dict.fromkeys(_MEASURED) | {"failure": ""} | where
    try:
        lowered = program.lower()
        text = lowered.as_text()
        row["num_devices"] = program.num_devices()
        row["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        for other in rows:
            same = all(other.get(name) == row[name] for name in (*where, "sha256", "failure"))
            if same:
                return row | {name: other[name] for name in _MEASURED}
        start = time.perf_counter()
        compiled = lowered.compile()
        row["compile_seconds"] = time.perf_counter() - start
        return row | _analysis(compiled)
    except Exception as error:  # noqa: BLE001 whatever it is, the table says it
        return row | {"failure": _first_line(error)}


def _analysis(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """What the compiler says, of one device; nothing of what it does not know."""
    found, memory = {}, compiled.memory_analysis()
    if memory is not None:
        for name in ("argument", "output", "alias", "temp"):
            found[f"{name}_bytes"] = getattr(memory, f"{name}_size_in_bytes")
        found["peak_bytes"] = (
            found["argument_bytes"]
            + found["output_bytes"]
            - found["alias_bytes"]
            + found["temp_bytes"]
        )
    cost = compiled.cost_analysis() or {}
    for name, key in (("flops", "flops"), ("bytes_accessed", "bytes accessed")):
        if cost.get(key, -1) >= 0:
            found[name] = cost[key]
    text = compiled.as_text()
    if text is not None:
        found |= {"kernels": hlo.kernels(text), "collectives": hlo.collectives(text)}
    return found


def _earlier(folder: pathlib.Path) -> dict[str, Any]:
    """What an earlier command has left in the folder."""
    path = folder / "compile_for.json"
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); delete it, or give another --out") from None


def _write(folder: pathlib.Path, content: dict[str, Any]) -> None:
    compilers = {json.dumps(row["versions"]) for row in content["rows"] if "versions" in row}
    compilers = [
        ", ".join(f"{name} {version}" for name, version in json.loads(text).items())
        for text in sorted(compilers)
    ]
    notes = (
        f"By {'; '.join(compilers)}; {content['num_cpus']} CPUs compiled. Nothing was run. All "
        "figures are the compiler's, of one device. Peak: arguments and outputs, those outputs "
        "that take a donated argument's memory (aliased) counted once, and temporaries; without "
        "the program's code, and on a GPU without what cuDNN asks for when it runs. FLOPs, bytes "
        "accessed, kernels and collectives count what is in a loop's body once. Kernels: fusions "
        "and custom calls of the entry computation and of the loops, branches and calls in it. "
        "Collectives: how many, and what one device puts in. -: the compiler does not say."
    )
    *earlier, _ = content["commands"]
    parts = [*_tables(content["rows"]), notes, *(f"    {command}" for command in earlier)]
    title = "What the compilers of accelerators say of the project's programs"
    setting.write(folder, "compile_for", content, title, parts)


def _tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A heading and a table for each target and size of batches."""
    parts, groups = [], {}
    for row in rows:
        key = (row["target"], row["batch_size"], row["image_size"], row["form"])
        groups.setdefault(key, []).append(row)
    for (target, batch_size, image_size, _), group in groups.items():
        parts.append(f"## {target}: batches of {batch_size}, {image_size} pixels")
        parts.append(compile_for_table(group))
    return parts


def compile_for_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One row a program."""
    header = ["network", "what", "program", "devices", "arguments, MiB", "outputs", "aliased"]
    header += ["temporaries", "peak", "temporaries / backprop's", "peak / backprop's", "GFLOP"]
    header += ["GB accessed", "fusions", "custom calls", "collectives", "compiling, s"]
    backprop = {
        (row["network"], row["dtype"]): row
        for row in rows
        if (row["method"], row["remat"], row["program"]) == ("backprop", False, "step")
    }
    cells = []
    for row in rows:
        first = [row["network"], _what(row), row["program"]]
        if row["failure"]:
            cells.append([*first, *["-"] * (len(header) - 4), row["failure"]])
            continue
        base = backprop.get((row["network"], row["dtype"]))
        has_base = row["program"] == "step" and base is not None and row["num_devices"] == 1
        kernels = row["kernels"] or {}
        cells.append(
            [
                *first,
                str(row["num_devices"]),
                *(_number(row[f"{name}_bytes"], 2**20) for name in _SIZES),
                *(_ratio(row, base, name) if has_base else "" for name in ("temp", "peak")),
                *(_number(row[name], 1e9) for name in ("flops", "bytes_accessed")),
                *(str(kernels.get(kind, "-")) for kind in hlo.KERNELS),
                _collectives(row["collectives"]),
                _number(row["compile_seconds"], 1),
            ]
        )
    return markdown(header, cells)


def _what(row: Mapping[str, Any]) -> str:
    """The variant of a row, in words."""
    what, *fields = row["method"].split(":")
    words = [what]
    if row["blocks"].isdecimal():
        words += [f"K={row['blocks']}"] if row["blocks"] != "1" else []
    else:
        words.append(row["blocks"].replace("_", " "))
    words += [field.rpartition(".")[2] for field in fields]
    words += [row["dtype"]] if row["dtype"] != "float32" else []
    words += ["remat"] if row["remat"] else []
    words += [] if row["one_after_another"] else ["blocks at once"]
    return ", ".join(words)


def _number(value: float | None, unit: float) -> str:
    if value is None:
        return "-"
    number = value / unit
    return "< 0.001" if 0 < number < 0.001 else f"{number:.4g}"


def _ratio(row: Mapping[str, Any], base: Mapping[str, Any], name: str) -> str:
    value, other = row[f"{name}_bytes"], base[f"{name}_bytes"]
    return f"{value / other:.3f}" if value is not None and other else "-"


def _collectives(found: Mapping[str, Mapping[str, int]] | None) -> str:
    if found is None:
        return "-"
    return ", ".join(
        f"{kind}: {row['count']}, {row['bytes'] / 2**20:.3g} MiB" for kind, row in found.items()
    )


def _first_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    return next(line for line in text.splitlines() if line)
