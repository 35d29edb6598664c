"""The Hopper kernels of NSA's branches compile without a GPU, fit, and keep their products asynchronous."""

# ruff: noqa: E402 - what follows needs triton

import re
import subprocess

import pytest

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from zoo.kernels import hopper_compressed, hopper_compressed_backward, hopper_near, hopper_partial
from zoo.kernels.tiles import SHARED_BYTES

INDEX_POINTERS = {"place", "first", "begin", "full", "rest", "end", "walks", "queries", "table", "order"}
FLOAT_POINTERS = {"lse", "row_lse", "delta", "dk_ptr", "dv_ptr"}
FLOATS = {"scale", "scale_log2", "bias_factor"}
KERNELS = {
    "forward": (hopper_compressed.forward_kernel, hopper_compressed.FORWARD),
    "near": (hopper_near.near_kernel, hopper_near.NEAR),
    "partial": (hopper_partial.partial_kernel, hopper_partial.PARTIAL),
    "dq": (hopper_compressed_backward.dq_kernel, hopper_compressed_backward.DQ),
    "dkv": (hopper_compressed_backward.dkv_kernel, hopper_compressed_backward.DKV),
}


def build(name, dim, group=16, element="bf16", schedule=None):
    kernel, table = KERNELS[name]
    plan = schedule or table[dim]
    constants = {
        "GROUP": group, "D": dim, "BLOCK": 64, "STRIDE": 64, "RATIO": 1, "CONSUMERS": plan.consumers,
        "STAGES": plan.stages, "CONSUMER_REGISTERS": plan.consumer_registers,
        "PRODUCER_REGISTERS": plan.producer_registers, "G": 4, "TOP": 16,
    }  # fmt: skip

    def kind(name):
        if name in constants:
            return "constexpr"
        if name.endswith("_desc"):
            box = [1, 64, 1, dim] if name in ("k_desc", "v_desc") else [1, 64 // group, group, dim]
            if kernel is hopper_partial.partial_kernel and name in ("q_desc", "partial_desc"):
                box = [1, dim // 64 if name == "partial_desc" else 1, group, 64]
            dtype = {"bf16": gl.bfloat16, "fp16": gl.float16}[element]
            return f"tensordesc<{element}{box},{gl.NVMMASharedLayout.get_default_for(box, dtype)!r}>"
        if name in INDEX_POINTERS | FLOAT_POINTERS:
            return "*i64" if name == "order" else "*i32" if name in INDEX_POINTERS else "*fp32"
        return "fp32" if name in FLOATS else "i32"

    signature = {name: kind(name) for name in kernel.arg_names}
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    values = {places[name]: value for name, value in constants.items() if name in places}
    divisible = {places[name]: [["tt.divisibility", 16]] for name in signature if signature[name].startswith("*")}
    options = {"num_warps": 4, "maxnreg": plan.registers_at_launch}
    source = GluonASTSource(kernel, signature, values, divisible)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("dim", "group", "element"),
    [(128, 16, "bf16"), (128, 1, "fp16"), (64, 64, "bf16"), (64, 4, "bf16")],
)
def test_every_row_compiles_fits_and_stays_asynchronous(name, dim, group, element, tmp_path):
    group = max(group, hopper_partial.LEAST_GROUP) if name == "partial" else group
    built = build(name, dim, group, element)
    assert built.metadata.shared <= SHARED_BYTES["sm90"]
    source = tmp_path / "kernel.ptx"
    source.write_text(built.asm["ptx"])
    command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(source), "-o", str(tmp_path / "kernel.cubin")]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert "C75" not in log, log  # "wgmma.mma_async instructions are serialized", "setmaxnreg ignored"
    if name in ("near", "partial"):
        assert int(re.search(r"(\d+) bytes spill stores", log)[1]) <= 16, log


@pytest.mark.parametrize("name", ["forward", "near", "dq"])
def test_every_item_looks_up_which_slots_it_sees(name):
    """Gluon of triton 3.6 forgets what a loop carries where only bounds of inner loops ask for it: every item had the
    first one's. So each partition loads both ends' place and first block, or near's numbers of the item, within its
    loop over items, and none before.
    """
    text = build(name, 128).asm["ttgir"]
    partitions = re.split(r"\n    (?:default|partition\d+)[ (]", text)[1:]
    assert len(partitions) == KERNELS[name][1][128].consumers + 1
    for partition in partitions:
        before, within = partition.split("scf.for", 1)
        loads = [len(re.findall(r"tt\.load \S+ : !tt\.ptr<i32>", part)) for part in (before, within)]
        consumes, produces = (6, 3) if name == "near" else (4, 3)  # the producer needs no first row's place
        assert loads == [0, produces if partition is partitions[-1] else consumes], loads


def test_partial_carries_whose_turn_it_is_from_item_to_item():
    """As above: bounds of runs and items are loaded where they are needed, and `ahead`, which bounds a consumer's
    tiles, is carried beside place and parity of the ring and the item's number, because the tiles ask for it too."""
    text = build("partial", 128).asm["ttgir"]
    partitions = re.split(r"\n    (?:default|partition\d+)[ (]", text)[1:]
    assert len(partitions) == hopper_partial.PARTIAL[128].consumers + 1
    for partition in partitions:
        before, runs, items, tiles = partition.split("scf.for")
        assert [len(re.findall(r"tt\.load \S+ : !tt\.ptr<i32>", x)) for x in (before, runs)] == [0, 2]
        produces = partition is partitions[-1]
        assert len(re.findall(r"tt\.load \S+ : !tt\.ptr<i32>", items)) == (5 if produces else 2)
        carried = [re.search(r"iter_args\((.*?)\)", x)[1].count("=") for x in (runs, items, tiles)]
        assert carried == ([3, 3, 2] if produces else [4, 4, 2]), carried
