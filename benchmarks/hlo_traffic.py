"""Bytes that a compiled program moves, from its HLO text: a way to compare programs for a device that is not here.

Every instruction that runs counts its operands and results once per run (a loop's body as often as it is known to run). Of an operand
that a fusion only slices or gathers from, what it takes counts. Caches may serve some of it, so this is the traffic at most.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_ARRAY = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\((.*)$")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "after-all"}
_TAKES = ("slice", "dynamic-slice", "gather")
_COLLECTIVE = re.compile(r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)")


class Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    operands: list[str]
    rest: str


def array_bytes(shape: str) -> int:
    """Of an array or a tuple of arrays as HLO writes them, `(f32[8,2]{1,0}, pred[])`."""
    return sum(BYTES[dtype] * math.prod(int(d) for d in dims.split(",") if d) for dtype, dims in _ARRAY.findall(shape))


def traffic(text: str) -> Counter[str]:
    """Bytes by kind: matrix products, attention and other calls (by target), collectives, elementwise and reductions."""
    computations, entry = _parse(text)
    total: Counter[str] = Counter()
    _add(computations, entry, 1, total)
    return total


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    entry = current = ""
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():  # long tuples number their members in comments
        if header := _COMPUTATION.match(line):
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current and (found := _INSTRUCTION.match(line)):
            _, name, shape, op, rest = found.groups()
            computations[current].append(Instruction(name, shape, op, re.findall(r"%([\w.\-]+)", rest.split(")")[0]), rest))
    return computations, entry


def _add(computations: dict[str, list[Instruction]], name: str, times: int, total: Counter[str]) -> None:
    shapes = {i.name: i.shape for i in computations[name]}
    for i in computations[name]:
        called = re.search(r"(?:calls|to_apply|body)=%?([\w.\-]+)", i.rest)
        if i.op in _FREE or i.op.endswith("-done"):
            continue
        if i.op in ("while", "call", "async-start") and called:
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', i.rest)
            _add(computations, called[1], times * (int(trips[1]) if trips else 1), total)
            continue
        read = [array_bytes(shapes.get(o, "")) for o in i.operands]
        if i.op == "fusion" and called:
            read = [min(whole, _taken(computations[called[1]], k, whole)) for k, whole in enumerate(read)]
        total[_kind(i, computations.get(called[1], []) if called else [])] += times * (array_bytes(i.shape) + sum(read))


def _taken(fused: list[Instruction], index: int, whole: int) -> int:
    """Bytes of a fusion's parameter that it reads: all, unless every use is a slice or gather of it. The same slice counts once."""
    parameter = next(i for i in fused if i.op == "parameter" and i.rest.startswith(f"{index})"))
    names, taken = {parameter.name}, {}
    for i in fused:
        if names & set(i.operands):
            if i.op in ("bitcast", "convert"):
                names.add(i.name)
            elif i.op in _TAKES and i.operands[0] in names:
                region = re.search(r" slice={.*?}", i.rest)
                taken[region[0] if region else i.name] = whole * _elements(i.shape) // _elements(parameter.shape)
            else:
                return whole
    return min(whole, sum(taken.values()))


def _elements(shape: str) -> int:
    """Of one array."""
    return math.prod(int(d) for _, dims in _ARRAY.findall(shape) for d in dims.split(",") if d)


def _kind(i: Instruction, fused: list[Instruction]) -> str:
    rest = " ".join([i.rest, *(f.rest for f in fused)])  # a call may be fused with a slice of its operands
    target = re.search(r'custom_call_target="([^"]*)"', rest)
    if _COLLECTIVE.match(i.op):
        return "collectives"
    if i.op == "dot" or any(f.op == "dot" for f in fused) or (target and re.search("cublas|gemm|dot", target[1])):
        return "matrix products"
    return target[1] if target else "elementwise and reductions"
