"""What the text of a compiled program says: its collectives with their bytes, and its kernels."""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)
KERNELS = ("fusion", "custom-call")

# Instructions that run other computations as they stand, and how they name them.
_RUN_OTHERS = ("while", "call", "conditional", "async-start")
_OTHERS = re.compile(
    r"\b(?:(?:body|to_apply|calls|true_computation|false_computation)=(%[\w.-]+)"
    r"|branch_computations=\{([^}]*)\})"
)
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_NAMED = re.compile(r"^  (?:ROOT )?%?([\w.-]+) = ")
_OPCODE = re.compile(r" ?([a-z][a-z0-9-]*)\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,<=]*)\]")
_OPERAND = re.compile(r"%([\w.-]+)")


class Instruction(NamedTuple):
    """One line of a computation; ``arguments`` is the text within the operation's brackets."""

    name: str
    type: str
    opcode: str
    arguments: str
    attributes: str


def collectives(text: str) -> dict[str, dict[str, int]]:
    """The collectives of a program by kind.

    Args:
      text: ``compiled.as_text()``.

    Returns:
      For each kind that there is, ``count``, and ``bytes``: what one device puts in, summed over
      the collectives. Those in a loop's body count once.
    """
    found = {}
    for instructions in _computations(text)[0].values():
        types = {instruction.name: instruction.type for instruction in instructions}
        for instruction in instructions:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            operands = _OPERAND.findall(instruction.arguments)
            row = found.setdefault(kind, {"count": 0, "bytes": 0})
            row["count"] += 1
            row["bytes"] += sum(num_bytes(types[operand]) for operand in operands)
    return dict(sorted(found.items()))


def kernels(text: str) -> dict[str, int]:
    """How many fusions and custom calls there are, once each.

    Counted are those of the entry computation, and of the bodies of loops, branches and calls
    (command buffers, too) within it. What is inside of a fusion is part of it.

    Args:
      text: ``compiled.as_text()``.
    """
    computations, entry = _computations(text)
    counts = collections.Counter(
        instruction.opcode for instruction in _run(computations, entry, set())
    )
    return {kind: counts[kind] for kind in KERNELS}


def num_bytes(type_text: str) -> int:
    """Of an array's type, or of all in a tuple's.

    Example:
      >>> num_bytes("(f32[8,4]{1,0}, bf16[3]{0}, pred[])")
      135
    """
    total = 0
    for dtype, sizes in _ARRAY.findall(type_text):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype).group())
        count = math.prod(int(size.removeprefix("<=")) for size in sizes.split(",") if size)
        total += -(-bits * count // 8)
    return total


def _run(
    computations: dict[str, list[Instruction]], name: str, seen: set[str]
) -> Iterator[Instruction]:
    if name in seen:
        return
    seen.add(name)
    for instruction in computations[name]:
        yield instruction
        if instruction.opcode in _RUN_OTHERS:
            for names in _OTHERS.findall(instruction.attributes):
                for other in _OPERAND.findall("".join(names)):
                    yield from _run(computations, other, seen)


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation by its name, and the entry's name."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif line == "}":
            current = None
        elif current is not None:
            current.append(_instruction(line))
    return computations, entry


def _instruction(line: str) -> Instruction:
    named = _NAMED.match(line)
    start = named.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opcode = _OPCODE.match(line, end)
    close = _closing(line, opcode.end() - 1)
    return Instruction(
        named.group(1),
        line[start:end],
        opcode.group(1),
        line[opcode.end() : close],
        line[close + 1 :],
    )


def _closing(line: str, start: int) -> int:
    """Where the bracket that opens at ``start`` closes."""
    depth = 0
    for place in range(start, len(line)):
        depth += (line[place] == "(") - (line[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"no closing bracket: {line}")
