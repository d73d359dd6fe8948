"""What Triton's compiler makes of a kernel, on any machine: registers, spills, memory, PTX."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

# Per multiprocessor, from the CUDA programming guide's table of compute capabilities: 64 Ki registers, handed
# out to a warp in units of 8 a thread; shared memory, of which the system keeps 1 KiB a block.
REGISTERS = 64 * 1024
SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024}
RESERVED_SHARED_MEMORY = 1024
WARPS = 64


@dataclass
class MachineCode:
    registers: int
    stack: int
    shared: int
    ptx: str

    def resident(self, target: int, warps: int) -> int:
        """How many programs of so many warps one multiprocessor holds."""
        registers = -(-self.registers // 8) * 8 * 32 * warps
        memory = self.shared + RESERVED_SHARED_MEMORY
        return min(REGISTERS // registers, SHARED_MEMORY[target] // memory, WARPS // warps)


def compile_kernel(
    kernel: Any,
    target: int,
    types: dict[str, str],
    constants: dict[str, Any],
    aligned: set[str],
    **options: Any,
) -> MachineCode:
    """types: the run-time arguments. aligned: multiples of 16, as the launcher would find them."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return MachineCode(int(found[1]), int(found[2]), compiled.metadata.shared, compiled.asm["ptx"])
