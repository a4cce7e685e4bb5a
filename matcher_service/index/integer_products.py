"""Products of stored float16 rows and coded probes in integers, by ONNX Runtime: exact, and several times as fast as
float32 ones.

Rows are coded as they are read, a block at a time in the cache, so their codes take no memory: float16 to float32, over
the scale, rounded, and uint8 around `MIDDLE`. The product's sums are int32 and so the same in any order
(`integer_bound.py`). Processors without instructions for products of bytes add two of them in 16 bits first, where a
sum too large is cut off; what probes may be coded as is therefore found out once, by a product of the largest codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from matcher_service.index.integer_bound import CODE_MAX, MIDDLE, CutOffs, Law, code_probes
from matcher_service.terms import Float32

_AT_ONCE = 1 << 21
BLOCK_ROWS = 1024  # coded at once: 2 MiB of float32 at 512 dimensions, below interpreter.LARGE_BLOCK_BYTES
_HALVED = CODE_MAX // 2  # two products of a byte and such a code, added, are below 2^15

UInt8 = NDArray[np.uint8]
Int8 = NDArray[np.int8]
Int32 = NDArray[np.int32]


@cache
def probe_code_max() -> int:
    """The largest code of a probe whose products this processor adds without cutting off."""
    rows = np.full((128, 512), MIDDLE + CODE_MAX, np.uint8)
    rows[1::2] = MIDDLE - CODE_MAX
    for most in (CODE_MAX, _HALVED):
        if all(_exact(rows, most, probes) for probes in (1, 8, 100)):
            return most
    raise RuntimeError("this onnxruntime multiplies integers wrongly on this processor; install another release of it")


def _exact(rows: UInt8, most: int, probes: int) -> bool:
    codes = np.full((rows.shape[1], probes), most, np.int8)
    codes[:, 1::2] *= -1
    found = np.empty((len(rows), probes), np.int32)
    sums_of_codes_into(found, rows, codes)
    expected = (rows[:, :1].astype(np.int32) - MIDDLE) * codes.sum(axis=0, dtype=np.int32)
    return np.array_equal(found, expected)


class Sums:
    """The sums of `stored`, float16 [n, d] in C order and finite, with coded `probes`, float32 [k, d]; `codes` uint8
    [n, d] are those of the rows on the scale of their `law` (None: they are made as needed). `cuts` gives the cut-offs
    that the sums of what reaches a floor reach."""

    def __init__(self, stored: NDArray[np.float16], codes: UInt8 | None, law: Law, probes: Float32) -> None:
        self._stored = stored
        self._codes = codes
        self._scale = law.scale
        coded = code_probes(probes, probe_code_max())
        self._probes: Int8 = np.ascontiguousarray(coded.codes.T)
        self.cuts = CutOffs(coded, law)

    def blocks(self, run: slice) -> Iterator[tuple[int, Int32]]:
        """Sums int32 [m, k] of some rows of a run after the others, with the first of them. To be used before the next
        are asked for."""
        probes = self._probes.shape[1]
        at_once = max(1, _AT_ONCE // (BLOCK_ROWS * probes)) * BLOCK_ROWS
        held = np.empty((min(at_once, run.stop - run.start), probes), np.int32)
        for first in range(run.start, run.stop, at_once):
            stop = min(first + at_once, run.stop)
            sums = held[: stop - first]
            if self._codes is None:
                sums_into(sums, self._stored[first:stop], self._scale, self._probes)
            else:
                sums_of_codes_into(sums, self._codes[first:stop], self._probes)
            yield first, sums


def sums_into(out: Int32, stored: NDArray[np.float16], scale: float, codes: Int8) -> None:
    """The products of the codes of `stored`, float16 [m, d] in C order of finite numbers within 127 times `scale` (a
    float32 number), with those of probes, int8 [d, n] in C order: into `out`, int32 [m, n] in C order."""
    at = np.array(scale, np.float32)
    for first in range(0, len(stored), BLOCK_ROWS):
        block = slice(first, min(first + BLOCK_ROWS, len(stored)))
        _run(_session(True), {"stored": stored[block], "scale": at, "codes": codes}, out[block])


def sums_of_codes_into(out: Int32, coded: UInt8, codes: Int8) -> None:
    """The same of rows that are coded, uint8 [m, d] in C order."""
    _run(_session(False), {"coded": coded, "codes": codes}, out)


def _run(session: onnxruntime.InferenceSession, read: dict[str, NDArray[Any]], out: Int32) -> None:
    binding = session.io_binding()
    for name, array in read.items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("sums", "cpu", 0, np.int32, out.shape, out.ctypes.data)
    session.run_with_iobinding(binding)


@cache
def _session(codes_rows: bool) -> onnxruntime.InferenceSession:
    """Runs in the thread that calls it, and gives back all memory that it took: rows and probes are in it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(_graph(codes_rows), options, providers=["CPUExecutionProvider"])


# --- the graph, as ONNX has it in Protocol Buffers (onnx.proto: field numbers and values are those of its messages) ---

_VERSION_OF_FORMAT, _VERSION_OF_OPERATORS = 8, 13
_FLOAT, _UINT8, _INT8, _INT32, _FLOAT16 = 1, 2, 3, 6, 10
_ATTRIBUTE_OF_INTEGER = 2


def _graph(codes_rows: bool) -> bytes:
    to_float = _text(1, "to") + _number(3, _FLOAT) + _number(20, _ATTRIBUTE_OF_INTEGER)
    coding = [
        _node("Cast", ["stored"], "wide", to_float),
        _node("QuantizeLinear", ["wide", "scale", "middle"], "coded"),
        _field(11, _value("stored", _FLOAT16, ["rows", "dimension"])),
        _field(11, _value("scale", _FLOAT, [])),
    ]
    graph = b"".join(
        (
            *(coding if codes_rows else [_field(11, _value("coded", _UINT8, ["rows", "dimension"]))]),
            _node("MatMulInteger", ["coded", "codes", "middle"], "sums"),
            _text(2, "sums"),
            _field(5, _number(2, _UINT8) + _text(8, "middle") + _field(9, bytes([MIDDLE]))),
            _field(11, _value("codes", _INT8, ["dimension", "probes"])),
            _field(12, _value("sums", _INT32, ["rows", "probes"])),
        )
    )
    return _number(1, _VERSION_OF_FORMAT) + _field(7, graph) + _field(8, _number(2, _VERSION_OF_OPERATORS))


def _node(operator: str, inputs: list[str], output: str, attribute: bytes = b"") -> bytes:
    named = b"".join(_text(1, one) for one in inputs) + _text(2, output) + _text(4, operator)
    return _field(1, named + (_field(5, attribute) if attribute else b""))


def _value(name: str, kind: int, shape: list[str]) -> bytes:
    dimensions = b"".join(_field(1, _text(2, one)) for one in shape)
    return _text(1, name) + _field(2, _field(1, _number(1, kind) + _field(2, dimensions)))


def _text(number: int, value: str) -> bytes:
    return _field(number, value.encode())


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])
