"""What the compiler makes of the GPU filter, for a GPU that need not be here: `python -m benchmarks.gpu_kernel`.

Compiles the kernel for a compute capability and reads the outcome: the tensor-core instruction, registers and stack
of a thread (a stack means spills), shared memory of a program, and how many programs fit on a multiprocessor.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
import triton.compiler
from triton.backends.compiler import GPUTarget

from matcher_service.index.gpu import kernel

SHARED_BYTES_MAX = 232_448  # of a program, compute capability 9.0
_REGISTERS = 65_536  # of a multiprocessor
_SLAB_BYTES = 4 << 20
_POINTERS = {
    "codes": "*i8",
    "slab_at": "*i64",
    "slab_rows": "*i32",
    "slab_law": "*i32",
    "probes": "*i8",
    "cuts": "*i32",
    "tiles": "*i64",
    "survivors": "*i64",
    "lost": "*i64",
}
_COUNTS = {"probe_count": "i32", "capacity": "i32", "lost_capacity": "i32"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one shape and width. So many `programs` fit on a multiprocessor at once."""

    rows: int
    probes: int
    warps: int
    stages: int
    width: int
    product: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    programs: int
    instructions: int


def compiled(tile: kernel.Tile, width: int, capability: int = 90, *, listed: bool = False) -> Outcome:
    """Compile the kernel and read what came of it."""
    constants = kernel.constants(tile, width, _SLAB_BYTES // width, listed=listed)
    types = {**_POINTERS, **_COUNTS, **dict.fromkeys(constants, "constexpr")}
    names = list(types)
    made = triton.compile(
        triton.compiler.ASTSource(
            fn=kernel.filter_rows,
            signature=types,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in (*_POINTERS, "probe_count")},
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tools / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    products = set(re.findall(r"\b((?:wgmma\.mma_async|mma)\.sync\.aligned\.\S+)", made.asm["ptx"]))
    registers, stack = (int(found) for found in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    shared = int(made.metadata.shared)
    fit = min((SHARED_BYTES_MAX + 1024) // (shared + 1024), _REGISTERS // (32 * tile.warps * (-(-registers // 8) * 8)))
    return Outcome(
        tile.rows,
        tile.probes,
        tile.warps,
        tile.stages,
        width,
        " ".join(sorted(products)),
        registers,
        stack,
        shared,
        fit,
        len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="compute capability times ten")
    parser.add_argument("--width", type=int, nargs="+", default=[512], help="codes of a row")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    outcomes = [
        compiled(tile, width, given.capability)
        for width in given.width
        for tile in (kernel.FEW, kernel.SOME, kernel.MANY)
    ]
    if given.json:
        print(json.dumps([asdict(one) for one in outcomes], indent=1))
        return
    columns = list(asdict(outcomes[0]))
    print("| " + " | ".join(name.replace("_", " ") for name in columns) + " |")
    print("|" + "--:|" * len(columns))
    for one in outcomes:
        print("| " + " | ".join(str(value) for value in asdict(one).values()) + " |")


if __name__ == "__main__":
    main()
