"""Every row of the tile table compiles, without a GPU, and fits the shared memory of the device it is for."""

# ruff: noqa: E402 - what follows needs triton

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zoo.kernels import FORGOTTEN, KEPT_TILE, UNITS, gate, loss, narrow, norm, pieces, prune, qkv, swiglu, window
from zoo.kernels.tiles import CHUNK, SHARED_BYTES, TABLE, Tile

CAPABILITY = {"sm80": 80, "sm86": 86, "sm90": 90}
INDEX_POINTERS = {"start_ptr", "end_ptr", "first_tile_ptr", "last_tile_ptr"}
OTHER_POINTERS = {"targets_ptr": "i64", "starts_ptr": "i1", "forgot_ptr": "i64", "since_ptr": "i64", "limit_ptr": "i64"}
NOT_ALIGNED = {"stride_kb", "stride_kt"}  # of a narrow projection
FLOAT32_POINTERS = {
    "suffix_ptr",
    "total_ptr",
    "row_lse_ptr",
    "delta_ptr",
    "key_side_ptr",
    "query_side_ptr",
    "sums_ptr",
    "lse_ptr",
    "dlse_ptr",
    "grad_ptr",
    "loss_ptr",
    "keep_ptr",
    "weight_ptr",
    "q_weight_ptr",
    "k_weight_ptr",
    "cos_ptr",
    "sin_ptr",
    "dgates_ptr",
    "partial_ptr",
    "reach_ptr",
    "largest_ptr",
    "product_ptr",
}
FLOATS = {"scale", "eps", "least"}


def build(kernel, architecture, element, constants, warps=4, stages=1, multiples=()):
    """Compiles for pointers, strides and `multiples` that are multiples of 16, as those of whole tensors are, but for
    what the kernel is not to be specialised on."""
    signature, divisible = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            kind = "i32" if name in INDEX_POINTERS else "fp32" if name in FLOAT32_POINTERS else element
            signature[name] = f"*{OTHER_POINTERS.get(name, kind)}"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        aligned = name.endswith("_ptr") or (name.startswith("stride_") and name not in NOT_ALIGNED) or name in multiples
        aligned &= not kernel.params[position].do_not_specialize
        if signature[name] != "constexpr" and aligned:
            divisible[position,] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    target = GPUTarget("cuda", CAPABILITY[architecture], 32)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(ASTSource(kernel, signature, values, divisible), target=target, options=options)


def build_window(kernel, architecture, width, tile: Tile, element="bf16", gated=True, windowed=True, bounded=False,
                 pruned=False):  # fmt: skip
    absent = set() if bounded else {"start_ptr", "end_ptr"}
    absent |= set() if pruned else {"first_tile_ptr", "last_tile_ptr"}
    absent |= set() if gated else {"suffix_ptr", "total_ptr", "key_side_ptr", "query_side_ptr"}
    constants = {name: None for name in absent if name in kernel.arg_names} | {
        "GROUP": 1, "D": width, "BLOCK_D": width, "BLOCK_Q": tile.queries, "BLOCK_K": tile.keys, "CHUNK": CHUNK,
        "GATED": gated, "WINDOWED": windowed, "BOUNDED": bounded, "PRUNED": pruned,
        "KEPT_TILE": KEPT_TILE,
    }  # fmt: skip
    return build(kernel, architecture, element, constants, tile.warps, tile.stages)


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=[pytest.mark.slow] * (row[0] == "sm86" or row[1] == 512)) for row in TABLE], ids=str
)
def test_every_row_compiles_and_fits(row):
    architecture, width, window_class = row
    tiles = TABLE[row]
    element = "fp32" if width == 512 else "bf16"  # head_dim counts 16-bit elements
    width = 256 if width == 512 else width
    for kernel, tile in (
        (window._forward, tiles.forward), (window._dkdv, tiles.dkdv), (window._dq, tiles.dq),
    ):  # fmt: skip
        built = build_window(kernel, architecture, width, tile, element, windowed=window_class == "narrow")
        assert built.metadata.shared <= SHARED_BYTES[architecture], kernel.__name__


@pytest.mark.parametrize(
    "switches",
    [{"gated": False}, {"bounded": True}, {"pruned": True}, {"bounded": True, "pruned": True}, {"element": "fp32"}],
    ids=str,
)
def test_every_switch_compiles(switches):
    tiles = TABLE["sm90", 128, "narrow"]
    for kernel, tile in ((window._forward, tiles.forward), (window._dkdv, tiles.dkdv), (window._dq, tiles.dq)):
        assert build_window(kernel, "sm90", 64, tile, **switches).metadata.shared <= SHARED_BYTES["sm90"]


@pytest.mark.parametrize("architecture", ["sm80", "sm90"])
def test_the_small_kernels_compile(architecture):
    shape = {"CHUNK": CHUNK, "HEADS": gate.HEADS, "EPS": 1e-3, "ACTIVATE": True}
    build(gate._prefix, architecture, "bf16", shape)
    build(gate._bounded_backward, architecture, "bf16", shape)
    switches = {"D": 64, "BLOCK_D": 64, "BLOCK_Q": window.ROWS, "GATED": True, "WITH_DLSE": True}
    build(window._rows, architecture, "bf16", switches)


@pytest.mark.parametrize("architecture", ["sm80", "sm90"])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("heads", [1, 8, 16])
def test_the_gates_backward_compiles(heads, aligned, architecture):
    """Loads of 16 bytes where lengths allow and a thread has several elements: not where there is one head."""
    shape = {"CHUNK": CHUNK, "HEADS": heads, "ALIGNED": aligned}
    wide = aligned and heads > 1
    built = build(gate._segment_sums, architecture, "bf16", shape)
    assert ("ld.global.v4" in built.asm["ptx"]) == wide
    for segments in gate.SEGMENTS:
        switches = {"EPS": 1e-3, "ACTIVATE": True, "BOUNDED": False, "SEGMENTS": segments}
        built = build(gate._segment_backward, architecture, "bf16", shape | switches)
        assert ("ld.global.v4" in built.asm["ptx"]) == wide
        assert built.metadata.shared <= SHARED_BYTES[architecture]


@pytest.mark.parametrize("heads", [1, 12, 16])
def test_rows_of_all_lengths_share_few_compilations(heads, monkeypatch):
    """What Triton compiles anew for: constants, and of other numbers whether they are 1 or multiples of 16."""
    seen: dict[str, set] = {"_segment_sums": set(), "_segment_backward": set()}

    class Launch:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(gate, name)

        def __getitem__(self, grid):
            return self

        def __call__(self, *values, **constants):
            found = dict(constants)
            for parameter, value in zip(self.kernel.params, values, strict=False):
                if isinstance(value, int) and not parameter.do_not_specialize:
                    found[parameter.name] = (value == 1, value % 16 == 0)
            seen[self.name].add(tuple(sorted(found.items())))

    for name in seen:
        monkeypatch.setattr(gate, name, Launch(name))
    for length in (1, 16, 100, 300, 1024, 5000, 16384, 20000, 40000, 70000):
        for queries in {1, length // 2, length} - {0}:
            z, u = torch.empty(1, length, 2 * heads, device="meta").chunk(2, -1)
            sides = (torch.empty(1, heads, length, device="meta"), torch.empty(1, heads, queries, device="meta"))
            gate.prefix_backward(*sides, (z, u), None)
    assert len(seen["_segment_sums"]) <= 2
    assert len(seen["_segment_backward"]) <= 4


@pytest.mark.parametrize("architecture", ["sm80", "sm90"])
@pytest.mark.parametrize("group", [1, 4])
def test_the_choice_of_tiles_compiles(group, architecture):
    head = {"GROUP": group, "D": 64, "BLOCK_D": 64, "TILE": KEPT_TILE, "UNITS": UNITS, "FORGOTTEN": FORGOTTEN}
    for activate in (False, True):
        gates = {"EPS": 1e-3, "ACTIVATE": activate}
        built = build(prune._measure, architecture, "bf16", head | gates, multiples=("stride_kb", "stride_kt"))
        assert built.asm["ptx"].count("ld.global.v4") == 8  # 64 bytes a thread, of k and of q
    build(prune._limits, architecture, "bf16", {"GROUP": group, "BLOCK": prune.SCANNED})
    build(prune._search, architecture, "bf16", {"GROUP": group, "BLOCK": prune.SEARCHED}, warps=2)


@pytest.mark.parametrize("architecture", ["sm80", "sm90"])
def test_the_loss_compiles(architecture):
    for tiles in (7, 0):  # a row of 50304, held in registers, and one read again
        switches = {"NEEDS_GRAD": True, "BLOCK": loss.COLUMNS, "HELD": tiles}
        build(loss.cross_entropy_kernel, architecture, "bf16", switches, warps=32)


@pytest.mark.parametrize("architecture", ["sm80", "sm90"])
def test_swiglu_compiles(architecture):
    for kernel in (swiglu.swiglu_forward_kernel, swiglu.swiglu_backward_kernel):
        build(kernel, architecture, "bf16", {"BLOCK": swiglu.BLOCK})


@pytest.mark.parametrize("architecture", ["sm86", "sm90"])
@pytest.mark.parametrize(("width", "element"), [(768, "bf16"), (2048, "fp32"), (4096, "bf16"), (8192, "bf16")])
def test_norms_compile(width, element, architecture):
    block = triton.next_power_of_2(width)
    rows = max(1, norm.ELEMENTS // block)
    build(norm._forward, architecture, element, {"ROWS": rows, "BLOCK": block}, norm._warps(block))
    tile = norm.backward_tile(width, 4 if element == "fp32" else 2)
    warps = tile.pop("num_warps")
    for more in ({"MORE": True}, {"MORE": False, "dtotal_ptr": None}):
        built = build(norm._backward, architecture, element, tile | more, warps, multiples=("width",))
        assert ("cp.async" in built.asm["ptx"]) == (tile["STAGES"] > 1)  # rows are read ahead
        assert built.metadata.shared <= SHARED_BYTES[architecture]


@pytest.mark.parametrize("architecture", ["sm80", "sm90"])
def test_adding_pieces_up_compiles(architecture):
    tile = {"PIECES": pieces.PIECES, "COLUMNS": pieces.COLUMNS}
    built = build(pieces.add_up_kernel, architecture, "fp32", tile, warps=8, multiples=("width",))
    assert "ld.global.v4" in built.asm["ptx"]


@pytest.mark.parametrize("architecture", ["sm80", "sm90"])
@pytest.mark.parametrize("kind", ["plain", "one kv head", "documents, by head", "no norm"])
def test_qkv_compile(kind, architecture):
    special, norm, groups = kind.startswith("documents"), kind != "no norm", 1 if kind == "one kv head" else 12
    gates = 24 if norm else 0
    absent = (set() if special else {"starts_ptr"}) | (
        set() if norm else {"q_weight_ptr", "k_weight_ptr", "cos_ptr", "sin_ptr", "partial_ptr"}
    )
    switches = {
        "H": 12, "G": groups, "D": 64, "NORM": norm, "PER_HEAD": special, "ROTATE": norm, "CUT": special,
        "ROWS_Q": 1, "ROWS_KV": 16 if groups == 1 else 1, "HALF": 32, "RUN": qkv.RUN, "STAGES": qkv.STAGES,
    }  # fmt: skip
    columns = {"GATES": gates, "OUT": -(-((12 + 2 * groups) * 64 + gates + 2 * groups) // 64) * 64}
    columns["SPARE"] = columns["OUT"] - (12 + 2 * groups) * 64 - gates - 2 * groups
    for kernel, more in ((qkv.qkv_forward_kernel, {}), (qkv.qkv_backward_kernel, columns)):
        constants = switches | more | {name: None for name in absent if name in kernel.arg_names}
        built = build(kernel, architecture, "bf16", constants, warps=2)
        assert built.metadata.shared <= SHARED_BYTES[architecture]


@pytest.mark.parametrize("architecture", ["sm80", "sm90"])
def test_narrow_products_compile(architecture):
    shape = {"PIECES": True, "ROWS": narrow.ROWS, "INNER": narrow.INNER, "PIECE": narrow.PIECE, "WIDTH": 64}
    built = build(narrow.narrow_kernel, architecture, "fp32", shape, narrow.WARPS, narrow.STAGES)
    assert built.metadata.shared <= SHARED_BYTES[architecture]
