"""The GPU kernels of grouped integers in Triton's interpreter, which runs them on a CPU, against fp64. What no test here sees: the
assembly that decodes on a GPU (tests/test_triton_compile.py compiles it; benchmarks/gpu.sh runs it)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compress_kernels import gpu_dense, gpu_table, gpu_tune, int_grouped, int_grouped_outliers
from compress_kernels.gpu_table import Choice
from compress_kernels.int_grouped import fused, triton
from compress_kernels.int_grouped_outliers import reference as outliers_reference
from compress_kernels.int_grouped_outliers import triton as triton_outliers
from test_kernels import Weight, dense, random_weight, relative

pytest.importorskip("triton")
TYPES = (torch.float16, torch.bfloat16, torch.float32)
# outputs rounded once (the interpreter cuts bf16 off instead), and fp32 sums of some hundred terms
CLOSE = {torch.float16: 5e-4, torch.bfloat16: 6e-3, torch.float32: 1e-6}


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COMPRESS_BACKEND", "triton")
    monkeypatch.setenv("COMPRESS_GPU_TABLE", "/nowhere")
    gpu_table.forget()
    yield
    gpu_table.forget()


def inputs(M: int, I: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(M, I, generator=torch.Generator().manual_seed(M)).to(dtype)


def always(monkeypatch: pytest.MonkeyPatch, how: Choice) -> None:
    monkeypatch.setattr(gpu_table, "choose", lambda *_: how)


def run(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    tensors, params, shape = weight
    p = int_grouped.prepare(tensors, params, shape, x.dtype)
    assert p.path == "triton"
    return int_grouped.linear(x, p, bias)


@pytest.mark.parametrize(
    ("bits", "group_size", "O", "I", "M"),
    [
        (4, 32, 129, 224, 3),
        (4, 64, 130, 320, 1),
        (4, 128, 257, 384, 17),  # three groups
        (4, -1, 100, 200, 16),
        (2, 32, 128, 288, 3),
        (2, 64, 140, 192, 1),
        (2, 128, 130, 384, 16),
        (2, -1, 16, 300, 2),
        (3, 32, 130, 288, 1),
        (3, 64, 128, 320, 3),
        (3, 128, 20, 384, 2),
        (3, -1, 129, 257, 17),
        (8, 32, 130, 96, 3),
        (8, 64, 256, 192, 1),
        (8, 128, 130, 384, 16),
        (8, -1, 40, 75, 3),
    ],
)
def test_products_agree_with_fp64(bits: int, group_size: int, O: int, I: int, M: int) -> None:
    for number, dtype in enumerate(TYPES):
        symmetric = (number + bits + M) % 2 == 0
        stored = (torch.bfloat16, torch.float32, torch.float16)[(number + O) % 3]
        weight = random_weight(O, I, bits, group_size, symmetric, stored)
        x = inputs(M, I, dtype)
        assert relative(run(weight, x), F.linear(x.double(), dense(weight).double())) < CLOSE[dtype]


@pytest.mark.parametrize(
    ("M", "how"),
    [
        *((M, Choice("fused", 16, 128, split=3)) for M in (1, 3, 16, 17, 64)),
        (17, Choice("fused", 64, 64, split=5)),
        (64, Choice("fused", 64, 64, split=2)),
        (33, Choice("fused", 32, 64)),
    ],
)
def test_splits_and_blocks_change_nothing_but_the_order_of_sums(M: int, how: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(130, 640, 4, 128, False, torch.float16)
    bias = torch.linspace(-1, 1, 130).half()
    x = inputs(M, 2 * 640, torch.float16)[:, ::2]  # not contiguous
    always(monkeypatch, how)
    tensors, params, shape = weight
    p = int_grouped.prepare(tensors, params, shape, x.dtype)
    y = int_grouped.linear(x.view(1, M, 640), p, bias)
    assert y.shape == (1, M, 130)
    assert relative(y[0], F.linear(x.double(), dense(weight).double(), bias.double())) < CLOSE[torch.float16]
    assert p.gpu is not None
    assert not p.gpu.locks.any()  # counters are back at 0 for the next launch
    assert torch.equal(int_grouped.linear(x.view(1, M, 640), p, bias), y)


def test_nan_stays_in_its_row_and_zero_rows_give_zero() -> None:
    x = inputs(5, 256, torch.float16)
    x[1, 200], x[3] = float("nan"), 0
    y = run(random_weight(140, 256, 4, 128, False, torch.float16), x)
    assert y[1].isnan().all()
    assert not y[[0, 2, 4]].isnan().any()
    assert not y[3].any()


def test_no_rows_give_no_outputs() -> None:
    assert run(random_weight(16, 128, 4, 128, True), torch.empty(2, 0, 128, dtype=torch.float16)).shape == (2, 0, 16)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_decoded_weights_equal_the_reference_bit_for_bit(bits: int, stored: torch.dtype) -> None:
    weight = tensors, params, shape = random_weight(300, 320, bits, 64, False, stored)
    w = int_grouped.prepare(tensors, params, shape, torch.float16).gpu
    assert w is not None
    for dtype in (torch.float16, torch.float32):
        out = torch.full((172, 320), float("nan"), dtype=dtype)
        assert torch.equal(triton.dequantize(w, 1, out), dense(weight)[128:].to(dtype))


@pytest.mark.parametrize("biased", [True, False])
def test_long_inputs_go_through_a_scratch_weight_in_slabs(biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch, Choice("scratch", slab=2 * 256 * 128))  # 128 rows of 300 at a time
    weight = random_weight(300, 256, 4, 128, False, torch.float16)
    x, bias = inputs(70, 256, torch.float16), torch.linspace(-1, 1, 300).half() if biased else None
    want = F.linear(x.double(), dense(weight).double(), None if bias is None else bias.double())
    assert relative(run(weight, x, bias), want) < 1e-3  # weights rounded to fp16, as the reference's are


def test_slabs_by_turns_in_two_buffers_and_a_dense_copy_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = outlying(400, 256, 4)
    w = prepared_outliers(weight).gpu
    x, bias = inputs(70, 256, torch.float16), torch.linspace(-1, 1, 400).half()
    copy = triton.dequantize(w, 0, torch.full((512, 256), float("nan"), dtype=torch.float16))
    assert not copy[400:].any()  # rows of padding are zeros
    found = []
    for how in (Choice("scratch"), Choice("scratch", slab=256 * 256, ahead=True), Choice("dense")):  # 128 of 400 rows at a time
        y = torch.full((70, 400), float("nan"), dtype=torch.float16)
        triton.run(x, replace(w, dense=copy), bias, y, how)
        found.append(y)
    assert all(torch.equal(y, found[0]) for y in found)
    want = F.linear(x.double(), outliers_reference.dequantize(weight[0], 4, (400, 256)).double(), bias.double())
    assert relative(found[0], want) < 1e-3
    y = torch.empty_like(found[0])
    triton.run(x, w, bias, y, Choice("dense"))  # without a copy the weight is decoded
    assert torch.equal(y, found[0])


def test_positions_beyond_32_bits_are_never_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    w = int_grouped.prepare(*random_weight(16, 128, 4, 128, True), torch.float16).gpu
    assert w is not None
    far = torch.empty_strided((3, 128), (1 << 30, 1), dtype=torch.float16, device="meta")  # the third row begins at 2^31
    y = torch.empty(3, 16, dtype=torch.float16)
    assert triton._beyond(far, w, y, Choice("fused"))
    assert not triton._beyond(far[:2], w, y[:2], Choice("fused"))
    assert "2^31" in str(triton.can_run(8, 128, (1 << 16, 1 << 16), torch.float16, torch.device("cpu")))


def test_dense_copies_are_made_where_memory_is_named_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(130, 256, 4, 128, True)
    for text, kept in (("", False), ("100K", False), ("0.2M", True), ("131072", True), ("all", True)):
        monkeypatch.setenv("COMPRESS_GPU_DENSE", text or "0")
        p = int_grouped.prepare(*weight, torch.float16)
        assert (p.gpu.dense is not None) == kept, text
        assert gpu_dense.used(torch.device("cpu")) == kept * 256 * 256 * 2
        del p
    for text in ("-1", "8X", "nan"):
        monkeypatch.setenv("COMPRESS_GPU_DENSE", text)
        with pytest.raises(ValueError, match="COMPRESS_GPU_DENSE is"):
            int_grouped.prepare(*weight, torch.float16)


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype", "device", "why"),
    [
        (4, 128, torch.float16, "meta", "needs a GPU"),
        (4, 128, torch.float64, "cpu", "float64"),
        (5, 128, torch.float16, "cpu", "5 bits"),
        (4, 16, torch.float16, "cpu", "groups of 16"),
    ],
)
def test_the_path_says_why_it_cannot_run(bits: int, group_size: int, dtype: torch.dtype, device: str, why: str) -> None:
    reason = triton.can_run(bits, group_size, (256, 256), dtype, torch.device(device))
    assert reason is not None
    assert why in reason


def test_the_interpreter_serves_nobody_who_did_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPRESS_BACKEND")
    tensors, params, shape = random_weight(16, 128, 4, 128, True)
    assert int_grouped.prepare(tensors, params, shape, torch.bfloat16).path != "triton"


@pytest.mark.parametrize("with_outliers", [True, False])
def test_the_op_passes_torchs_own_checks_and_compiles(with_outliers: bool) -> None:
    weight = random_weight(130, 256, 4, 128, False, torch.float16)
    x = inputs(2, 256, torch.float16)
    if with_outliers:
        p = prepared_outliers(outlying(130, 256, 4))
        kind, w = int_grouped_outliers, p.gpu
    else:
        p = int_grouped.prepare(*weight, torch.float16)
        kind, w = int_grouped, p.gpu
    parts = (None,) * 5 if w.outliers is None else w.outliers[:5]
    args = (x, w.words, w.stats, w.scale, torch.ones(130).half(), w.locks, None, *parts, 130, 4, 128, w.bf16, False)
    torch.library.opcheck(triton._op, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))
    compiled = torch.compile(lambda x: kind.linear(x, p), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), kind.linear(x, p))


# -- outliers --------------------------------------------------------------------------------------------------------------


def outlying(
    O: int, I: int, bits: int, share: float = 0.02, rows: list[int] | None = None, dtype: torch.dtype = torch.float16
) -> Weight:
    """A weight with outliers, drawn at random; a third of the columns in each of `rows`."""
    tensors, params, shape = random_weight(O, I, bits, 128, False, torch.float16)
    g = torch.Generator().manual_seed(O)
    kept = torch.rand(O, I, generator=g) < share
    for row in rows or []:
        kept[row] = torch.rand(I, generator=g) < 0.35
    indptr = F.pad(kept.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    index = kept.nonzero()[:, 1].to(torch.uint16)
    value = torch.randn(len(index), generator=g).to(dtype) * 0.3
    from compress_kernels import bits as bitpack

    q = bitpack.unpack(tensors["weight_packed"], bits, I)
    zero = int_grouped.reference.zeros(tensors["weight_zero_point"], bits, O).repeat_interleave(128, 1)[:, :I]
    tensors["weight_packed"] = bitpack.pack(torch.where(kept, zero, q), bits)
    return {**tensors, "outlier_indptr": indptr, "outlier_index": index, "outlier_value": value}, params, shape


def prepared_outliers(weight: Weight, dtype: torch.dtype = torch.float16) -> int_grouped_outliers.Prepared:
    p = int_grouped_outliers.prepare(*weight, dtype)
    assert p.path == "triton"
    return p


@pytest.mark.parametrize(("M", "split"), [(1, 1), (3, 2), (17, 3)])
@pytest.mark.parametrize("rows", [[], [5, 140]], ids=["even", "skewed"])
def test_outliers_are_added_in_the_same_launch(M: int, split: int, rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch, Choice("fused", 16, 64 if split == 2 else 128, split=split))
    for value in (torch.float16, torch.bfloat16):
        weight = outlying(150, 1024, 4, 0.01, rows, value)
        p = prepared_outliers(weight)
        assert p.gpu is not None
        assert p.gpu.outliers is not None
        assert (len(p.gpu.outliers.runs) > 0) == bool(rows)
        x = inputs(M, 1024, torch.float16)
        want = F.linear(x.double(), outliers_reference.dequantize(weight[0], 4, (150, 1024)).double())
        assert relative(int_grouped_outliers.linear(x, p), want) < CLOSE[torch.float16]


def test_padding_of_outliers_reads_nothing() -> None:
    weight = outlying(130, 256, 4)
    x = inputs(2, 256, torch.float16)
    x[:, 0] = float("inf")  # the column that padding names
    y = int_grouped_outliers.linear(x, prepared_outliers(weight))
    want = F.linear(x.double(), outliers_reference.dequantize(weight[0], 4, (130, 256)).double())
    assert torch.equal(y.isnan() | y.isinf(), want.isnan() | want.isinf())


def test_outliers_lie_over_decoded_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = outlying(150, 1024, 4, 0.01, [5, 140])
    w = prepared_outliers(weight).gpu
    assert w is not None
    out = triton.dequantize(w, 0, torch.empty(150, 1024, dtype=torch.float16))
    assert torch.equal(out, outliers_reference.dequantize(weight[0], 4, (150, 1024)).half())


def test_a_long_row_does_not_pad_the_others() -> None:
    lengths = torch.full((128,), 10)
    lengths[7] = 4000
    indptr = F.pad(lengths.cumsum(0), (1, 0))
    index = torch.cat([torch.arange(int(n)) for n in lengths])
    s = triton_outliers.prepare(indptr, index, torch.ones(len(index), dtype=torch.float16), (128, 4096))
    assert s.entries.numel() == 128 * 16
    assert len(s.runs) == 16
    assert set(s.run_rows.tolist()) == {7}


def test_outliers_beyond_16_bits_of_columns_are_refused() -> None:
    reason = triton_outliers.can_run(4, 128, (16, 1 << 17), torch.float16, torch.device("cpu"))
    assert reason is not None
    assert "65536" in reason


# -- fused weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_outliers", [True, False])
def test_fused_weights_give_each_ones_outputs_in_one_launch(with_outliers: bool) -> None:
    sizes = (256, 100, 130)
    if with_outliers:
        weights = [prepared_outliers(outlying(O, 256, 4, rows=[3])).gpu for O in sizes]
    else:
        weights = [int_grouped.prepare(*random_weight(O, 256, 4, 128, False, torch.float16), torch.float16).gpu for O in sizes]
    biases = [torch.randn(256).half(), None, torch.ones(130).half()]
    x = inputs(3, 256, torch.float16)
    whole, members = fused.fuse(weights)
    parts = fused.linear(x, whole, members, biases)
    wanted = [triton.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    for member, bias, part, want in zip(members, biases, parts, wanted, strict=True):
        assert torch.equal(part, want)
        assert torch.equal(triton.linear(x, member, bias), want)
        for name in ("words", "stats"):
            assert getattr(member, name).untyped_storage().data_ptr() == getattr(whole, name).untyped_storage().data_ptr()
    again, parts = fused.fuse(members[1:])  # views are weights like others
    assert torch.equal(torch.cat(fused.linear(x, again, parts, biases[1:]), 1), torch.cat(wanted[1:], 1))


def test_weights_that_differ_are_not_fused() -> None:
    a, b = (int_grouped.prepare(*random_weight(16, 256, bits, 128, True), torch.float16).gpu for bits in (4, 3))
    with pytest.raises(ValueError, match="their bits differ"):
        fused.fuse([a, b])


def test_a_loaded_artifact_runs_on_it(pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import compress
    from compress.modules import CompressedLinear

    compress.quantize(pico("llama"), "rtn", tmp_path / "out", bits=4, group_size=32)
    ids = torch.arange(1, 6)[None]
    logits = {}
    for path in ("triton", "tiled"):
        monkeypatch.setenv("COMPRESS_BACKEND", path)
        model = compress.load(tmp_path / "out", dtype="float32")
        assert {m.path for m in model.modules() if isinstance(m, CompressedLinear)} == {path}
        with torch.no_grad():
            logits[path] = model(ids).logits
    torch.testing.assert_close(logits["triton"], logits["tiled"], rtol=1e-4, atol=1e-4)  # fp32 sums in another order


# -- tables ----------------------------------------------------------------------------------------------------------------


def test_a_measured_table_decides_and_the_rules_serve_other_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "bits": 4,
        "group": 128,
        "O": 256,
        "I": 512,
        "M": 16,
        "path": "fused",
        "BM": 16,
        "BN": 64,
        "warps": 4,
        "stages": 3,
        "split": 2,
    }
    path = gpu_tune.write(tmp_path / "table.json", "a GPU", [], [row, {**row, "M": 256, "path": "scratch"}])
    monkeypatch.setenv("COMPRESS_GPU_TABLE", str(path))
    cpu = torch.device("cpu")
    assert gpu_table.choose(4, 128, (256, 512), 3, cpu) == Choice("fused", 16, 64, 4, 3, 2)
    assert gpu_table.choose(4, 128, (256, 512), 17, cpu).path == "scratch"
    assert gpu_table.choose(4, 128, (256, 512), 999, cpu).path == "scratch"
    assert gpu_table.choose(4, 64, (256, 512), 3, cpu) == gpu_table.default(4, (256, 512), 3, 8, 99 << 10)
    # where a dense copy is kept, the way that was not slower than dense; beyond the last row, which is no launch, that one
    slow = {**row, "us": 3.0, "dense_us": 2.0}
    fast = {**row, "us": 1.0, "dense_us": 2.0}
    gpu_tune.write(path, "a GPU", [], [fast, {**slow, "M": 64}, {**slow, "M": 256, "path": "scratch"}])
    assert [gpu_table.choose(4, 128, (256, 512), M, cpu, True).path for M in (16, 17, 64, 256, 999)] == ["fused", *["dense"] * 4]
    assert [gpu_table.choose(4, 128, (256, 512), M, cpu).path for M in (16, 17, 64, 256, 999)] == ["fused"] * 3 + ["scratch"] * 2
    gpu_tune.write(path, "a GPU", [], [row])
    assert gpu_table.choose(4, 128, (256, 512), 5000, cpu).path == "scratch"  # by the rules: one launch was measured for 16 only
    assert gpu_table.choose(4, 128, (512, 512), 5000, cpu, True).path == "dense"
    gpu_tune.write(path, "a GPU", [], [row, {**row, "M": 256, "path": "scratch"}])
    again = gpu_tune.write(path, "a GPU", gpu_table.read(path)["rows"], [{**row, "O": 512}])  # other weights' rows stay
    assert [r["O"] for r in gpu_table.read(again)["rows"]] == [256, 256, 512]


@pytest.mark.parametrize("damage", ["{", '{"rows": [{}]}', '{"rows": [{"bits": 4, "group": 128, "O": 1, "I": 1, "path": "x"}]}'])
def test_a_damaged_table_is_named(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "table.json").write_text(damage)
    monkeypatch.setenv("COMPRESS_GPU_TABLE", str(tmp_path / "table.json"))
    with pytest.raises(ValueError, match=r"table\.json is no table"):
        gpu_table.choose(4, 128, (256, 512), 3, torch.device("cpu"))


def test_rules_fill_the_gpu_and_every_candidate_can_be_run() -> None:
    assert gpu_table.default(4, (4096, 4096), 1, 132).split == 8  # 32 tiles for 132 multiprocessors
    for shape in gpu_tune.SHAPES:
        how = gpu_table.default(4, shape, 1, 132)
        waves = shape[0] / 128 * how.split / (2 * 132)
        assert waves / -(-waves // 1) > 0.75
    assert gpu_table.default(4, (4096, 4096), 4096, 132).path == "scratch"
    assert gpu_table.default(3, (4096, 4096), 32, 84, 99 << 10).stages == 3  # four do not fit a consumer GPU's shared memory
    assert gpu_table.default(3, (4096, 4096), 100, 84, 99 << 10).BM == 64
    for M in (1, 17, 64, 65, 512, 4096):
        for how in gpu_table.candidates(4, M):
            gpu_table.choice(json.loads(json.dumps({f: getattr(how, f) for f in Choice.__slots__})))
    with pytest.raises(ValueError, match="cannot be run"):
        gpu_table.choice({"path": "fused", "BM": 17})


def test_weights_for_timing_are_laid_out_as_prepared_ones() -> None:
    for bits in (2, 3, 4, 8):
        made = gpu_tune.random_weight(256, 512, bits, 128, False, torch.float16, torch.device("cpu"))
        real = int_grouped.prepare(*random_weight(256, 512, bits, 128, False, torch.float16), torch.float16).gpu
        assert real is not None
        for name in ("words", "stats", "locks"):
            assert getattr(made, name).shape == getattr(real, name).shape
            assert getattr(made, name).dtype == getattr(real, name).dtype
        x = inputs(1, 512, torch.float16)
        assert triton.linear(x, replace(made)).isfinite().all()


def test_tuning_writes_a_table_that_is_then_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, told = tmp_path / "table.json", []
    monkeypatch.setenv("COMPRESS_GPU_TABLE", str(path))
    ways = [Choice("fused", 16, 64, split=2), Choice("scratch", slab=1 << 16, ahead=True)]
    monkeypatch.setattr(gpu_table, "candidates", lambda *_: ways)
    cpu = torch.device("cpu")
    gpu_tune.tune((4,), (128,), ((256, 256), (128, 256)), (2, 70), progress=told.append, device=cpu)
    assert [(r["O"], r["M"]) for r in told] == [(256, 2), (256, 70), (128, 2), (128, 70)]
    assert all(r["us"] > 0 and r["dense_us"] > 0 for r in told)
    for r in told:
        assert gpu_table.choose(4, 128, (r["O"], 256), r["M"], cpu) == gpu_table.choice(r)
        assert gpu_table.choose(4, 128, (r["O"], 256), r["M"], cpu) in ways
    gpu_tune.tune((4,), (128,), ((512, 256),), (2,), seconds=-1.0, device=cpu)  # no time: what was measured stays
    assert len(gpu_table.read(path)["rows"]) == 4
    with pytest.raises(RuntimeError, match="no CUDA device"):
        gpu_tune.tune()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--kinds", "int5"], "no kernel on a GPU"),
        (["--shapes", "4096"], "no shape"),
        (["--shapes", "100x256"], "cannot be measured"),
        (["--group-size", "48"], "no kernel on a GPU"),
    ],
)
def test_the_command_that_tunes_refuses_what_has_no_kernel(
    options: list[str], why: str, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress import devices

    monkeypatch.setattr(devices, "pick", lambda _: "cuda")
    done = cli("bench", "tune", *options)
    assert done.code == 2
    assert why in done.err
    assert "hint:" in done.err


def test_a_product_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """No number is read back and no way is tried out, whatever the path: a CUDA graph can hold it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    class Kernel:  # a launch: the interpreter's own copies are not the product's
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **kwargs: launched.append(grid)

    whole, members = fused.fuse([prepared_outliers(outlying(O, 256, 4, rows=[3])).gpu for O in (256, 100)])
    code = triton.device_code()
    for name in ("product", "dense", "put"):
        monkeypatch.setattr(code, name, Kernel())
    monkeypatch.setattr(gpu_tune, "measure", None)
    names, biases = set[str](), [None, torch.ones(100).half()]
    launched: list[tuple[int, ...]] = []
    for M in (1, 17, 70):
        x = inputs(M, 256, torch.float16)
        for how in (Choice("fused", split=2), Choice("scratch", slab=1 << 16, ahead=True)):
            always(monkeypatch, how)
            with Watch():
                fused.linear(x, whole, members, biases)
    assert len(launched) == 3 + 3 * 2 * 3  # one; or a decoded slab and its outliers for each of three tiles
    assert not names & {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "_to_copy", "equal"}
