"""The Triton kernels of chapter 08: interpreted on a CPU (in single and half precision), compiled on a GPU.

The interpreter multiplies the bit patterns of bfloat16, so that type is tested only compiled. What a CPU can also
show is that the kernels compile for GPUs that are not there, within the shared memory of each.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

import noise2tokens.flash_attention as api  # noqa: E402
from noise2tokens.flash_attention import flash_attention, flash_attention_varlen  # noqa: E402
from noise2tokens.flash_attention import kernel as kernels  # noqa: E402
from noise2tokens.flash_attention.experiment import sweep_tiles  # noqa: E402
from noise2tokens.flash_attention.kernel import kernel_attention, kernel_attention_varlen  # noqa: E402
from noise2tokens.flash_attention.tiled import plain_attention, tiled_attention  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.cuda),
]


def draw(shape, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()


def inputs(batch, heads, kv_heads, queries, keys, dim, value_dim, dtype):
    shapes = [(heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim)]
    return [draw((batch, *shape), seed, dtype) for seed, shape in enumerate(shapes)]


def exact(*tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def assert_attention(attention, plain, arguments):
    """Output and gradients are at most twice as wrong as those of the plain way at the same precision.

    Two units in the last place are allowed beside, on the scale of the largest of the four results: the gradient of a
    query that sees one key is zero, and comes out as the rounding error of larger numbers.
    """
    runs = []
    for function, x in ((attention, arguments), (plain, arguments), (plain, exact(*arguments))):
        o = function(*x)
        grad = draw(o.shape, 7, arguments[0].dtype).to(o.dtype)
        runs.append([o.detach(), *torch.autograd.grad(o, x, grad)])
    scale = max(reference.abs().max() for reference in runs[2])
    for ours, theirs, reference in zip(*runs, strict=True):
        assert ours.dtype == theirs.dtype and not ours.isnan().any()
        allowed = 2 * (theirs.double() - reference).abs().max()
        allowed += 2 * torch.finfo(ours.dtype).eps * scale
        assert (ours.double() - reference).abs().max() <= allowed


CASES = [
    # batch, heads, kv_heads, queries, keys, dim, value_dim
    (1, 1, 1, 1, 1, 16, 16),
    (2, 2, 1, 17, 17, 16, 16),
    (1, 1, 1, 127, 129, 32, 32),
    (1, 2, 1, 50, 33, 64, 64),
    (1, 4, 2, 33, 70, 24, 40),
    (1, 2, 1, 1, 100, 128, 128),
    (1, 1, 1, 20, 40, 256, 192),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_kernel_is_no_worse_than_the_plain_way(case, causal, dtype):
    queries, keys, dim = case[3:6]
    seen = slice(max(0, queries - keys) if causal else 0, None)  # elsewhere the plain way is nan
    assert_attention(
        lambda *x: kernel_attention(*x, causal, dim**-0.5)[0][:, :, seen],
        lambda q, k, v: plain_attention(q[:, :, seen], k, v, causal),
        inputs(*case, dtype),
    )


@pytest.mark.parametrize("causal", [False, True])
def test_lse_and_its_gradient(causal):
    q, k, v = inputs(1, 2, 1, 40, 40, 16, 16, torch.float32)
    reference = exact(q, k, v)
    gradients = []
    for attention, x in ((kernel_attention, (q, k, v)), (tiled_attention, reference)):
        o, lse = attention(*x, causal, 0.3)
        gradients.append([lse, *torch.autograd.grad(lse.sin().sum() + o.sum(), x)])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_rows_that_see_no_key_are_zero_and_pass_no_gradient():
    x = inputs(1, 2, 1, 70, 20, 16, 16, torch.float32)
    o, lse = kernel_attention(*x, True, 0.25)
    assert (o[:, :, :50] == 0).all() and (lse[:, :, :50] == -torch.inf).all()
    assert lse[:, :, 50:].isfinite().all()
    gradients = torch.autograd.grad(o.sum(), x)
    reference = exact(*x)
    expected = torch.autograd.grad(tiled_attention(*reference, True, 0.25)[0].sum(), reference)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # NumPy's, on rows that are computed and not stored
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_huge_logits_do_not_overflow(sign):
    """Both signs: the zeros beyond the last key are then far above, or far below, every real score."""
    q, k, v = inputs(1, 1, 1, 33, 45, 16, 16, torch.float32)
    q = (q.detach().abs() * 1e3 * sign).requires_grad_()
    k = k.detach().abs().requires_grad_()
    o, _ = kernel_attention(q, k, v, False, 1.0)
    expected = plain_attention(*exact(q, k, v), False, 1.0)
    torch.testing.assert_close(o.double(), expected, rtol=1e-4, atol=1e-4)
    assert all(x.isfinite().all() for x in torch.autograd.grad(o.sum(), (q, k, v)))


def packed(lengths_q, lengths_k, dtype):
    q = draw((sum(lengths_q), 4, 16), 0, dtype)
    k, v = (draw((sum(lengths_k), 2, 16), seed, dtype) for seed in (1, 2))
    offsets = [
        F.pad(torch.tensor(n).cumsum(0), (1, 0)).to(DEVICE, torch.int32)
        for n in (lengths_q, lengths_k)
    ]
    return (q, k, v), offsets


def one_by_one(q, k, v, lengths_q, lengths_k, causal):
    parts = zip(
        *(x.split(n) for x, n in ((q, lengths_q), (k, lengths_k), (v, lengths_k))), strict=True
    )
    outputs = [plain_attention(*(x.transpose(0, 1)[None] for x in part), causal) for part in parts]
    return torch.cat([o[0].transpose(0, 1) for o in outputs])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_do_not_see_each_other(causal, dtype):
    lengths_q, lengths_k = [3, 0, 1, 40], [3, 0, 9, 41]
    x, offsets = packed(lengths_q, lengths_k, dtype)
    assert_attention(
        lambda *x: kernel_attention_varlen(*x, *offsets, 40, 41, causal, 0.25)[0],
        lambda *x: one_by_one(*x, lengths_q, lengths_k, causal),
        x,
    )


def test_lse_of_packed_sequences():
    x, offsets = packed([3, 37], [5, 40], torch.float32)
    _, lse = kernel_attention_varlen(*x, *offsets, 37, 40, True, 0.25)
    _, expected = api._tiled_varlen(*x, *offsets, True, 0.25)
    torch.testing.assert_close(lse, expected)


def test_strides_do_not_matter():
    """Heads and length exchanged in memory, a last axis that is not contiguous, and a gradient that is expanded."""
    q, k, v = (x.detach() for x in inputs(2, 2, 2, 20, 30, 16, 16, torch.float32))
    expected = kernel_attention(q, k, v, True, 0.25)[0]
    laid_out = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k)]
    laid_out.append(v.mT.contiguous().mT.requires_grad_())
    o, _ = kernel_attention(*laid_out, True, 0.25)
    torch.testing.assert_close(o, expected)
    assert o.stride(1) < o.stride(2), "the output is laid out like q"
    gradients = torch.autograd.grad(o.sum(), laid_out)
    reference = exact(q, k, v)
    for a, b in zip(
        gradients,
        torch.autograd.grad(plain_attention(*reference, True).sum(), reference),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_public_functions_take_the_kernel_where_it_runs(monkeypatch):
    taken = []
    monkeypatch.setattr(api, "kernel_runs_on", lambda device: True)
    for name in ("kernel_attention", "kernel_attention_varlen"):
        function = getattr(kernels, name)
        monkeypatch.setattr(
            kernels,
            name,
            lambda *args, name=name, function=function: taken.append(name) or function(*args),
        )
    q, k, v = inputs(1, 2, 1, 5, 5, 16, 16, torch.float32)
    torch.testing.assert_close(flash_attention(q, k, v, True), plain_attention(q, k, v, True))
    x, offsets = packed([2, 3], [2, 3], torch.float32)
    flash_attention_varlen(*x, *offsets, 3, 3)
    assert taken == ["kernel_attention", "kernel_attention_varlen"]
    for refused in (
        [x.detach().double() for x in (q, k, v)],
        [q, k[:, :, :0], v[:, :, :0]],
    ):
        flash_attention(*refused)
    assert len(taken) == 2, "double precision and empty keys are for the tiled version"
    with pytest.raises(ValueError, match="at most 256, got 264 and 264"):
        flash_attention(*[torch.zeros(1, 1, 4, 264, device=DEVICE)] * 3)


def test_kernel_is_not_taken_on_a_cpu():
    assert not api.kernel_runs_on(torch.device("cpu"))


COMPILE = r"""
import re, subprocess, sys, tempfile, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import triton
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from noise2tokens.flash_attention import kernel as K

arch, shared, itemsize, dim = map(int, sys.argv[1:])
element = {2: "*bf16", 4: "*fp32"}[itemsize]
tiles = K.tiles_for(dim, itemsize, shared)
for kernel, tile in zip((K._forward, K._backward_keys, K._backward_queries), tiles):
    sizes = dict(BLOCK_Q=tile.queries, BLOCK_K=tile.keys, CAUSAL=True, PACKED=True)
    sizes |= dict(DIM=dim, PAD=dim, VALUE_DIM=dim, VALUE_PAD=dim)
    kinds = {name: "i32" for name in kernel.arg_names} | {name: "constexpr" for name in sizes}
    kinds |= {name: element for name in ("q", "k", "v", "o", "grad_o", "grad_q", "grad_k", "grad_v")}
    kinds |= dict(lse="*fp32", delta="*fp32", scale="fp32", scale_log2="fp32")
    kinds |= dict(cu_seqlens_q="*i32", cu_seqlens_k="*i32")
    kinds = {name: kinds[name] for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if kinds[name].startswith("*") or name.startswith("stride")
    }
    compiled = triton.compile(
        ASTSource(kernel, kinds, sizes, aligned),
        target=GPUTarget("cuda", arch, 32),
        options=dict(num_warps=tile.warps, num_stages=tile.stages),
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    stack = int(re.search(r"STACK:(\d+)", usage.stdout)[1])
    assert stack < 100, (kernel.__name__, tile, stack)
    assert compiled.metadata.shared <= shared, (kernel.__name__, tile, compiled.metadata.shared)
    products = "wgmma" if arch == 90 else "mma.sync"
    assert itemsize == 4 or products in compiled.asm["ptx"] or (arch, dim) == (90, 256)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("arch", "shared", "itemsize"),
    [(90, 227, 2), (80, 163, 2), (89, 99, 2), (89, 99, 4)],
    ids=["H100", "A100", "consumer", "single precision"],
)
def test_compiles_for_gpus_that_are_not_here(arch, shared, itemsize, dim):
    """Through PTX to machine code, with the tiles of the table, in the shared memory that the GPU has, and with next to
    no registers spilled to its stack."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    numbers = map(str, (arch, shared * 1024, itemsize, dim))
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, *numbers], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.cuda
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("length", [1024, 1333])
def test_compiled_kernel_on_full_tiles(length, dim, causal):
    """Lengths at which full tiles, masked tiles and the pipeline of loads all take part."""
    assert_attention(
        lambda *x: flash_attention(*x, causal=causal),
        lambda *x: plain_attention(*x, causal),
        inputs(2, 4, 2, length, length, dim, dim, torch.bfloat16),
    )


@pytest.mark.cuda
def test_compiled_kernel_gives_the_same_bits_twice():
    x = inputs(2, 4, 2, 700, 700, 64, 64, torch.float16)
    runs = [torch.autograd.grad(flash_attention(*x, causal=True).sum(), x) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(
    DEVICE.type != "cpu", reason="what the interpreter takes has no place in a GPU's table"
)
def test_a_sweep_measures_each_tile_in_its_kernel_and_leaves_the_table_alone(monkeypatch):
    table, used = list(kernels.INTERPRETED), []
    options = kernels._options
    monkeypatch.setattr(kernels, "_options", lambda tile: used.append(tuple(tile)) or options(tile))
    candidates = {
        "forward": [(16, 16, 1, 1), (48, 16, 1, 1)],  # 48: no power of two
        "backward over keys": [(16, 64, 1, 1)],
        "backward over queries": [(64, 32, 1, 1)],
    }
    found = sweep_tiles(candidates, (1, 2, 40, 16), DEVICE, 0.01)
    assert list(found) == list(candidates) and kernels.INTERPRETED == table
    times = found["forward"]["seconds"]
    assert times["(16, 16, 1, 1)"] > 0 and "power of 2" in times["(48, 16, 1, 1)"]
    for which, (name, tiles) in enumerate(candidates.items()):
        assert found[name]["fastest"] == list(tiles[0]) and tiles[0] in used
        assert found[name]["table"] == list(table[which])
