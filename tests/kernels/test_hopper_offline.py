"""The Hopper kernels compile without a GPU, fit its shared memory, and ptxas keeps their products asynchronous."""

# ruff: noqa: E402 - what follows needs triton

import subprocess

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from zoo import tuning
from zoo.kernels import hopper_backward, hopper_forward, hopper_loss
from zoo.kernels.hopper_band import Schedule
from zoo.kernels.tiles import SHARED_BYTES

ELEMENT_POINTERS = {"out", "dout", "dq_ptr"}
FLOAT_POINTERS = {"suffix", "total", "lse", "dlse", "rows", "key_side"}
INDEX_POINTERS = {"starts", "ends", "firsts", "lasts"}
FLOATS = {"scale", "scale_log2", "bias_factor"}
KERNELS = {
    "forward": (hopper_forward.forward_kernel, hopper_forward.TABLE),
    "dq": (hopper_backward.dq_kernel, hopper_backward.DQ_TABLE),
    "dkv": (hopper_backward.dkv_kernel, hopper_backward.DKV_TABLE),
}


def build(kernel, schedule, dim, element="bf16", gated=True, bounded=False, pruned=False, group=1):
    layout = gl.NVMMASharedLayout.get_default_for([1, 64, 1, dim], {"bf16": gl.bfloat16, "fp16": gl.float16}[element])
    constants = {
        "CONSUMERS": schedule.consumers, "D": dim, "GROUP": group, "STAGES": schedule.stages, "GATED": gated,
        "BOUNDED": bounded, "PRUNED": pruned, "A_SHARED": schedule.in_shared, "HOPEFUL": element == "bf16",
        "WITH_DLSE": True,
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
    "switches",
    [
        {},
        {"gated": False},
        {"bounded": True},
        {"pruned": True},
        {"bounded": True, "pruned": True, "group": 4},
        {"element": "fp16"},
    ],
    ids=str,
)
def test_every_row_compiles_fits_and_stays_asynchronous(name, dim, switches, tmp_path):
    kernel, table = KERNELS[name]
    built = build(kernel, table[dim], dim, **switches)
    assert built.metadata.shared <= SHARED_BYTES["sm90"]
    log = assemble(built.asm["ptx"], tmp_path)
    assert "C75" not in log, log  # "wgmma.mma_async instructions are serialized", "setmaxnreg ignored"


ROWS = {"TABLE": "forward", "DQ_TABLE": "dq", "DKV_TABLE": "dkv"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "dim", "values"),
    [
        (table, dim, values)
        for table, by_dim in tuning.CANDIDATES.items()
        for dim, some in by_dim.items()
        for values in some
    ],
)
def test_every_candidate_compiles_fits_and_stays_asynchronous(table, dim, values, tmp_path):
    """What `zoo bench kernels --tune` tries: one that could not be a row wastes its time on the device."""
    built = build(KERNELS[ROWS[table]][0], Schedule(*values), dim)
    assert built.metadata.shared <= SHARED_BYTES["sm90"]
    log = assemble(built.asm["ptx"], tmp_path)
    assert "C75" not in log, log


def assemble(ptx, folder):
    """What ptxas says about it."""
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(source), "-o", str(folder / "kernel.cubin")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stderr


@pytest.mark.parametrize("element", ["bf16", "fp16"])
@pytest.mark.parametrize("tiles", [4, 13, 28])
def test_a_row_of_the_loss_fits_as_often_as_it_is_meant_to_and_comes_in_whole_copies(tiles, element, tmp_path):
    kernel = hopper_loss.cross_entropy_kernel
    constants = {"BLOCK": hopper_loss.COLUMNS, "TILES": tiles}
    pointers = {"logits_ptr": f"*{element}", "targets_ptr": "*i64", "loss_ptr": "*fp32"}
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    divisible = {places[name]: [["tt.divisibility", 16]] for name in [*pointers, "stride_row", "width"]}
    values = {places[name]: value for name, value in constants.items()}
    options = {"num_warps": hopper_loss.WARPS, "maxnreg": hopper_loss.registers()}
    source = GluonASTSource(kernel, signature, values, divisible)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    reserved = 1024  # by the system, of every program
    assert built.metadata.shared <= SHARED_BYTES["sm90"]
    assert hopper_loss.resident(tiles) * (built.metadata.shared + reserved) <= hopper_loss.ROOM
    assert sum("cp.async.cg" in line and "0x10" in line for line in built.asm["ptx"].splitlines()) == 2 * tiles
    assert " 0 bytes spill stores" in assemble(built.asm["ptx"], tmp_path)


@pytest.mark.parametrize(
    ("width", "programs"), [(16384, 2), (32000, 2), (50304, 2), (57344, 2), (57360, 1), (114688, 1)]
)
def test_rows_of_the_loss_that_are_held(width, programs):
    assert hopper_loss.takes(torch.empty(2, width, dtype=torch.bfloat16))
    assert hopper_loss.resident(-(-width // hopper_loss.COLUMNS)) == programs


@pytest.mark.parametrize("width", [11, 8192, 50257, 50296, 114704, 128256])
def test_rows_of_the_loss_that_are_not_held(width):
    assert not hopper_loss.takes(torch.empty(2, width, dtype=torch.bfloat16))


def test_rows_of_the_loss_that_begin_between_copies():
    wide = torch.empty(2, 50320, dtype=torch.bfloat16)
    assert hopper_loss.takes(wide[:, 16:])
    assert not hopper_loss.takes(wide[:, 4:50308])
    assert not hopper_loss.takes(torch.empty(2, 50312, dtype=torch.bfloat16)[:, :50304])
