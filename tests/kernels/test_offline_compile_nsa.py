"""Every NSA kernel compiles for the devices of its tables, without a GPU, and fits their shared memory."""

# ruff: noqa: E402 - what follows needs triton

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zoo.kernels import (
    nsa_choice,
    nsa_compressed,
    nsa_count,
    nsa_inverse,
    nsa_mix,
    nsa_near,
    nsa_places,
    nsa_pool,
    nsa_runs,
    nsa_selected,
    nsa_selected_backward,
)
from zoo.kernels.tiles import SHARED_BYTES

CAPABILITY = {"sm80": 80, "sm86": 86, "sm90": 90}
WIDE = {
    "lse_ptr", "dlse_ptr", "row_lse_ptr", "delta_ptr", "partial_lse_ptr", "item_dk_ptr", "item_dv_ptr",
}  # fmt: skip
INDEX = {
    "place_ptr", "first_ptr", "index_ptr", "begin_ptr", "end_ptr", "bounds_ptr", "block_ptr", "first_key_ptr",
    "first_block_ptr", "key_ptr", "room_ptr", "item_ptr", "query_ptr", "number_ptr",
    "cu_ptr", "start_ptr",
}  # fmt: skip


def build(kernel, architecture, element, constants, warps, stages, wide=frozenset(), registers=None):
    signature, divisible = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            kind = "fp32" if name in WIDE | set(wide) else element
            kind = "i64" if name == "order_ptr" else "i32" if name in INDEX else kind
            signature[name] = f"*{kind}"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        if signature[name] != "constexpr" and name.endswith("_ptr") | name.startswith("stride_"):
            divisible[position,] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    target = GPUTarget("cuda", CAPABILITY[architecture], 32)
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
    return triton.compile(ASTSource(kernel, signature, values, divisible), target=target, options=options)


def build_compressed(name, architecture, dim, group=16, element="bf16", tile=None, ratio=1, overlap=1, shift=0):
    table = nsa_compressed.SM90 if architecture == "sm90" else nsa_compressed.OTHER
    rows, slots, warps, stages = tile or table[name][max(64, dim * (2 if element == "fp32" else 1))]
    constants = {
        "GROUP": group, "D": dim, "BLOCK_D": dim, "BLOCK": 64 // ratio * overlap, "STRIDE": 64 // ratio, "RATIO": ratio,
    }  # fmt: skip
    if name == "choose":
        constants |= {
            "SELECT": 64, "OVERLAP": overlap, "SHIFT": shift, "TOP": 16, "KEPT": 16,
            "TOKENS": max(1, rows // group, 16 // group), "PADDED_GROUP": group, "BLOCK_J": slots,
        }  # fmt: skip
        sort = max(16, min(128, nsa_choice.SORTED // constants["TOKENS"]))
        constants |= {"BLOCK_C": 2 * sort, "BLOCK_S": sort, "SHORT": 32, "RUN": nsa_choice.RUN}
    else:
        constants |= {"BLOCK_R": rows, "BLOCK_K": slots}
    kernel = getattr(nsa_choice if name == "choose" else nsa_compressed, f"_{name}")
    wide = {"dkdv": {"dk_ptr", "dv_ptr"}, "choose": set()}.get(name, set())
    registers = nsa_choice.registers(warps) if name == "choose" else None
    return build(kernel, architecture, element, constants, warps, stages, wide, registers)


def build_selected(name, architecture, dim, group=16, element="bf16", tile=None, block=64, single=False):
    table = nsa_selected.SM90 if architecture == "sm90" else nsa_selected.OTHER
    rows, *keys, warps, stages = tile or table[name][max(64, dim * (2 if element == "fp32" else 1))]
    constants = {
        "G": 4, "TOP": 16, "GROUP": group, "D": dim, "BLOCK_D": dim, "BLOCK": block, "BLOCK_K": keys[0] if keys else 64,
        "BLOCK_R": rows,
    }  # fmt: skip
    if name == "near":
        constants |= {"BLOCK_TOP": 16}
    if name == "partial":
        constants |= {"SINGLE": single} | ({"order_ptr": None, "bounds_ptr": None} if single else {})
        constants |= {"begin_ptr": None, "block_ptr": None} if single else {}
    kernel = getattr(nsa_selected_backward if name == "grads" else nsa_selected, f"_{name}")
    return build(kernel, architecture, element, constants, warps, stages, {"lse_ptr"} if name == "near" else set())


ROWS = [("sm90", 128, "bf16")]
SLOW_ROWS = [
    ("sm90", 64, "bf16"), ("sm90", 256, "bf16"), ("sm80", 64, "bf16"),
    ("sm90", 128, "fp32"), ("sm90", 256, "fp32"), ("sm80", 128, "bf16"), ("sm80", 256, "bf16"), ("sm86", 64, "bf16"),
    ("sm86", 128, "bf16"), ("sm86", 256, "bf16"), ("sm86", 128, "fp32"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "dim", "element"), [*ROWS, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW_ROWS)]
)
def test_every_row_compiles_and_fits(architecture, dim, element):
    for name in ("forward", "choose", "dq", "dkdv"):
        built = build_compressed(name, architecture, dim, element=element)
        assert built.metadata.shared <= SHARED_BYTES[architecture], name
    for name in ("near", "partial", "grads"):
        built = build_selected(name, architecture, dim, element=element)
        assert built.metadata.shared <= SHARED_BYTES[architecture], name


def test_grads_never_have_32_rows_in_one_stage():
    """Such a tile goes wrong on an H200, and nothing short of running it there shows it (docs/kernels.md)."""
    tables = [x for x in vars(nsa_selected).values() if isinstance(x, dict) and "grads" in x]
    assert len(tables) >= 2
    for rows, _, stages in (row for table in tables for row in table["grads"].values()):
        assert (rows, stages) != (32, 1)


@pytest.mark.parametrize("group", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_other_groups_compile(group):
    for name in ("forward", "choose"):
        assert build_compressed(name, "sm90", 64, group).metadata.shared <= SHARED_BYTES["sm90"]
    for name in ("near", "partial"):
        assert build_selected(name, "sm90", 64, group, block=32).metadata.shared <= SHARED_BYTES["sm90"]


@pytest.mark.parametrize("group", [1, 16])
@pytest.mark.parametrize(
    ("architecture", "dim"),
    [
        ("sm90", 128),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in (("sm86", 64), ("sm86", 128), ("sm86", 256))),
    ],
)
def test_the_tiles_of_a_step_compile_and_fit(architecture, dim, group):
    for name, table in nsa_compressed.STEP.items():
        built = build_compressed(name, architecture, dim, group, tile=table[dim])
        assert built.metadata.shared <= SHARED_BYTES[architecture], name


def test_overlapping_blocks_compile():
    for shift in (0, 3):
        built = build_compressed("choose", "sm90", 128, ratio=4, overlap=2, shift=shift)
        assert built.metadata.shared <= SHARED_BYTES["sm90"]


def test_the_small_kernels_compile():
    for far in (True, False):
        keys = {"G": 4, "TOP": 16, "BLOCK": 64, "FAR": far, "BLOCK_P": nsa_inverse.KEYS}
        build(nsa_inverse._keys, "sm90", "bf16", keys, 4, 3)
        counted = {"G": 4, "TOP": 16, "BLOCK": 64, "FAR": far, "BLOCK_TOP": 16, "TOKENS": 64, "SLOTS": 32}
        build(nsa_count._count, "sm90", "bf16", counted, 16, 3)
        build(nsa_count._place, "sm90", "bf16", counted | {"SUMMED": nsa_count.SUMMED}, 16, 3)
    for tokens, padded, each in ((12, 16, 16), (192, 256, 1)):
        walk = {"G": 4, "TOP": 16, "BLOCK": 64, "BLOCK_TOP": 16, "TOKENS": tokens, "BLOCK_T": padded, "EACH": each}
        build(nsa_near._walks, "sm90", "bf16", walk | {"WALK": nsa_near.WALK}, 4, 3)
    for absent in ("cu_ptr", "start_ptr"):
        build(nsa_places._locate, "sm90", "bf16", {absent: None, "SELECT": 64, "BLOCK_N": nsa_places.TOKENS}, 4, 3)
    summed = {"SUMMED": nsa_inverse.SUMMED}
    build(nsa_inverse._list, "sm90", "bf16", summed | {"BLOCK_N": nsa_inverse.LISTED}, 4, 3)
    cut = {"BLOCK_N": nsa_runs.COUNTED, "G": 4, "TOP": 16, "BLOCK": 64, "ITEM": nsa_runs.ITEM}
    build(nsa_runs._cut, "sm90", "bf16", summed | cut, 4, 3)
    for tile in (None, (16, 4, 2)):
        build_selected("partial", "sm90", 128, tile=tile, single=True)
    sizes = {"G": 4, "TOP": 16, "GROUP": 16, "D": 128, "BLOCK_D": 128, "BLOCK": 64}
    rows = sizes | {"BLOCK_TOP": 16, "BLOCK_R": 8}
    alone = dict.fromkeys(("gates_ptr", "compressed_ptr", "window_ptr", "mixed_ptr"))
    for near in (True, False):
        for mix in (alone | {"KEEP": True}, {"KEEP": True}, {"KEEP": False}):
            build(nsa_selected._merge, "sm90", "bf16", rows | mix | {"NEAR": near}, 4, 3, {"lse_ptr"})
    build(nsa_selected_backward._sum_pairs, "sm90", "bf16", rows, 4, 3)
    build(nsa_selected_backward._sum_items, "sm90", "bf16", sizes | {"BLOCK_K": 64}, 4, 3, {"dk_ptr", "dv_ptr"})
    for absent in (["third"], []):
        mix = {"D": 128, "BLOCK_D": 128, "BLOCK_R": 32} | {f"{name}_ptr": None for name in absent}
        build(nsa_mix._mix, "sm90", "bf16", mix, 4, 3)
        build(nsa_mix._mix_backward, "sm90", "bf16", mix | {f"d{name}_ptr": None for name in absent}, 4, 3)
    numbers = {"D": 128, "BLOCK_D": 128, "BLOCK_R": nsa_compressed.DELTA_ROWS, "WITH_DLSE": False, "dlse_ptr": None}
    build(nsa_compressed._row_numbers, "sm90", "bf16", numbers, 4, 3)
    for heads in (4, 64):
        pool = {"H": heads, "D": 128, "BLOCK": 64, "BLOCK_R": nsa_pool.ROWS, "BLOCK_W": nsa_pool.WIDTH}
        build(nsa_pool._pool, "sm90", "bf16", pool, 4, 3)
        build(nsa_pool._pool_backward, "sm90", "bf16", pool, 4, 3)
        alone = dict.fromkeys(("other_x_ptr", "other_means_ptr"))
        build(nsa_pool._pool, "sm90", "bf16", pool | alone, 4, 3)
        alone = dict.fromkeys(("other_dmeans_ptr", "other_dx_ptr"))
        build(nsa_pool._pool_backward, "sm90", "bf16", pool | alone, 4, 3)
