"""The Hopper kernels compile without a GPU, fit its shared memory, and ptxas keeps their products asynchronous."""

# ruff: noqa: E402 - what follows needs triton

import subprocess

import pytest

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from zoo.kernels import hopper_backward, hopper_forward
from zoo.kernels.tiles import SHARED_BYTES

ELEMENT_POINTERS = {"out", "dout", "dq_ptr"}
FLOAT_POINTERS = {"suffix", "total", "lse", "dlse", "rows", "key_side"}
INDEX_POINTERS = {"starts", "ends"}
FLOATS = {"scale", "scale_log2", "bias_factor"}
KERNELS = {
    "forward": (hopper_forward.forward_kernel, hopper_forward.TABLE),
    "dq": (hopper_backward.dq_kernel, hopper_backward.DQ_TABLE),
    "dkv": (hopper_backward.dkv_kernel, hopper_backward.DKV_TABLE),
}


def build(kernel, schedule, dim, element="bf16", gated=True, bounded=0, group=1):
    layout = gl.NVMMASharedLayout.get_default_for([1, 64, 1, dim], {"bf16": gl.bfloat16, "fp16": gl.float16}[element])
    constants = {
        "CONSUMERS": schedule.consumers, "D": dim, "GROUP": group, "STAGES": schedule.stages, "GATED": gated,
        "BOUNDED": bounded, "A_SHARED": schedule.in_shared, "HOPEFUL": element == "bf16", "WITH_DLSE": True,
        "CONSUMER_REGISTERS": schedule.consumer_registers, "PRODUCER_REGISTERS": schedule.producer_registers,
    }  # fmt: skip

    def kind(name):
        if name in constants:
            return "constexpr"
        if name.endswith("_desc"):
            return f"tensordesc<{element}[1, 64, 1, {dim}],{layout!r}>"
        if name in ELEMENT_POINTERS | FLOAT_POINTERS | INDEX_POINTERS:
            return "*" + (element if name in ELEMENT_POINTERS else "fp32" if name in FLOAT_POINTERS else "i32")
        return "fp32" if name in FLOATS else "i32"

    signature = {name: kind(name) for name in kernel.arg_names}
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    values = {places[name]: value for name, value in constants.items() if name in places}
    divisible = {places[name]: [["tt.divisibility", 16]] for name in signature if signature[name].startswith("*")}
    options = {"num_warps": 4, "maxnreg": schedule.registers_at_launch}
    source = GluonASTSource(kernel, signature, values, divisible)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    "switches", [{}, {"gated": False}, {"bounded": 1}, {"bounded": 2, "group": 4}, {"element": "fp16"}], ids=str
)
def test_every_row_compiles_fits_and_stays_asynchronous(name, dim, switches, tmp_path):
    kernel, table = KERNELS[name]
    built = build(kernel, table[dim], dim, **switches)
    assert built.metadata.shared <= SHARED_BYTES["sm90"]
    source = tmp_path / "kernel.ptx"
    source.write_text(built.asm["ptx"])
    command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(source), "-o", str(tmp_path / "kernel.cubin")]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert "C75" not in log, log  # "wgmma.mma_async instructions are serialized", "setmaxnreg ignored"
