"""Sparse kinds on disk: round trips, the table of 2:4 codes, violations, sizes, frozen bytes, damage."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress import registry
from compress.checkpoint import dtypes
from compress.errors import CompressError
from compress.formats import armor, bitmask, int_grouped, sparse24, sparse24_int
from compress.types import Packed

F16, BF16 = torch.float16, torch.bfloat16
PATTERNS = [(2, 4), (1, 4), (4, 8), (3, 5), (1, 2), (1, 1), (16, 32), (3, 64)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pattern_mask(O: int, I: int, n: int, m: int, seed: int = 0) -> torch.Tensor:
    """(O, I) bool, n of every m."""
    return (torch.rand(O, I // m, m, generator=generator(seed)).argsort(-1) < n).view(O, I)


def values(O: int, I: int, E: torch.dtype = F16, seed: int = 0) -> torch.Tensor:
    """(O, I) with zeros among them, sized so that outputs are about 1."""
    W = torch.randn(O, I, generator=generator(seed)) / I**0.5
    return (W * (torch.rand(O, I, generator=generator(seed + 1)) < 0.9) + 0.0).to(E)  # no negative zeros


def random_sparse24(O: int, I: int, n: int = 2, m: int = 4, E: torch.dtype = F16, seed: int = 0) -> Packed:
    mask = pattern_mask(O, I, n, m, seed)
    return sparse24.pack(values(O, I, E, seed) * mask, mask, n=n, m=m)


def random_bitmask(O: int, I: int, density: float = 0.5, E: torch.dtype = F16, seed: int = 0) -> Packed:
    mask = torch.rand(O, I, generator=generator(seed)) < density
    return bitmask.pack(values(O, I, E, seed) * mask, mask)


def random_int(
    O: int, I: int, bits: int, group: int, symmetric: bool, n: int = 2, m: int = 4, E: torch.dtype = F16, seed: int = 0
) -> Packed:
    """An `int_grouped` weight whose pruned codes, and some others, are the zero-point."""
    g = generator(seed)
    G = 1 if group == -1 else I // group
    zero = None if symmetric else torch.randint(0, 1 << bits, (O, G), generator=g, dtype=torch.uint8)
    z = torch.full((O, G), 1 << (bits - 1), dtype=torch.uint8) if zero is None else zero
    q = torch.randint(0, 1 << bits, (O, I), generator=g, dtype=torch.uint8)
    q = torch.where(pattern_mask(O, I, n, m, seed), q, z.repeat_interleave(I // G, 1))
    scale = ((torch.rand(O, G, generator=g) + 0.5) / (2**bits * I**0.5)).to(E)
    return int_grouped.pack(q, scale, zero, bits=bits, group_size=group)


def random_armor(O: int, I: int, b_in: int, b_out: int, core: Packed | None = None, E: torch.dtype = F16) -> Packed:
    """Blocks near the identity around a core, by default 2:4."""
    core = core or random_sparse24(O, I, E=E)
    pre, post = (
        (torch.eye(b) + 0.3 * torch.randn(-(-size // b), b, b, generator=generator(b)) / b**0.5).to(E)
        for size, b in ((I, b_in), (O, b_out))
    )
    return armor.pack(core, pre, post)


def held_to_spec(packed: Packed, dtype: str) -> None:
    """The tensors are exactly those that spec promised, for every kind in the registry."""
    form = registry.by_kind(packed.kind)
    config = {key: value for key, value in packed.params.items() if key != "nnz"}
    spec = form.spec(packed.params, packed.shape, dtype)
    params = form.complete(config, spec) if hasattr(form, "complete") else config
    assert params == packed.params
    assert {k: (dtypes.NAME[t.dtype], tuple(t.shape)) for k, t in packed.tensors.items()} == spec
    assert all(t.is_contiguous() for t in packed.tensors.values())
    assert form.problems(packed) == []


def same(a: Packed, b: Packed) -> bool:
    """Equal in every bit."""
    facts = [(p.kind, p.version, dict(p.params), p.shape, p.tensors.keys(), [t.dtype for t in p.tensors.values()]) for p in (a, b)]
    return facts[0] == facts[1] and all(torch.equal(octets(t), octets(b.tensors[name])) for name, t in a.tensors.items())


def octets(t: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, for comparisons that tell -0.0 from 0.0."""
    return t.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 9), st.sampled_from(PATTERNS), st.sampled_from([F16, BF16]), st.integers(0, 2**31))
def test_values_of_any_pattern_unpack_to_themselves(O: int, G: int, nm: tuple[int, int], E: torch.dtype, seed: int) -> None:
    n, m = nm
    I, mask = G * m, pattern_mask(O, G * m, n, m, seed)
    W = values(O, I, E, seed) * mask + 0.0
    packed = sparse24.pack(W, mask, n=n, m=m)
    held_to_spec(packed, dtypes.NAME[E])
    kept, again = sparse24.unpack(packed)
    assert torch.equal(again, mask)
    assert torch.equal(octets(kept), octets(W[mask]))
    assert torch.equal(octets(sparse24.dequantize(packed)), octets(W.float()))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 7), st.integers(1, 40), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.sampled_from([F16, BF16]),
    st.integers(0, 2**31),
)  # fmt: skip
def test_values_under_any_mask_unpack_to_themselves(O: int, I: int, density: float, E: torch.dtype, seed: int) -> None:
    mask = torch.rand(O, I, generator=generator(seed)) < density
    W = values(O, I, E, seed) * mask + 0.0
    packed = bitmask.pack(W, mask)
    held_to_spec(packed, dtypes.NAME[E])
    kept, again = bitmask.unpack(packed)
    assert torch.equal(again, mask)
    assert torch.equal(octets(kept), octets(W[mask]))
    assert torch.equal(octets(bitmask.dequantize(packed)), octets(W.float()))


@pytest.mark.parametrize(("n", "m", "I", "group"), [(2, 4, 48, 16), (1, 4, 12, 4), (4, 8, 64, -1), (3, 5, 30, 15)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("O", [1, 21])
def test_codes_go_from_int_grouped_and_back_bit_for_bit(
    O: int, bits: int, symmetric: bool, n: int, m: int, I: int, group: int
) -> None:
    base = random_int(O, I, bits, group, symmetric, n, m)
    packed = sparse24_int.from_int_grouped(base, {**base.params, "n": n, "m": m})
    held_to_spec(packed, "F16")
    assert same(sparse24_int.to_int_grouped(packed), base)
    W, want = sparse24_int.dequantize(packed), int_grouped.dequantize(base)
    assert torch.equal(W, want)
    q, mask, scale, zero = sparse24_int.unpack(packed)
    assert W[~mask].count_nonzero() == 0
    assert same(sparse24_int.pack(q, mask, scale, zero, bits=bits, group_size=group, n=n, m=m), packed)


@pytest.mark.parametrize("quantized", [True, False])
def test_armor_unpacks_to_its_core_and_blocks_and_multiplies_the_three(quantized: bool) -> None:
    core = random_sparse24(30, 48, E=BF16)
    if quantized:
        base = random_int(30, 48, 4, 16, False, E=BF16)
        core = sparse24_int.from_int_grouped(base, {"n": 2, "m": 4})
    packed = random_armor(30, 48, 12, 15, core, BF16)
    held_to_spec(packed, "BF16")
    assert packed.params == {**core.params, **({"core": "sparse24_int"} if quantized else {}), "b_in": 12, "b_out": 15}
    again, pre, post = armor.unpack(packed)
    assert same(again, core)
    assert torch.equal(pre, packed.tensors["pre"])
    assert torch.equal(post, packed.tensors["post"])
    S = registry.by_kind(core.kind).dequantize(core).double()
    A, B = (torch.block_diag(*blocks.double()) for blocks in (post, pre))
    torch.testing.assert_close(armor.dequantize(packed).double(), A @ S @ B, rtol=1e-5, atol=1e-6)  # fp32 sums of 15 terms


@pytest.mark.parametrize(("O", "I", "b_in", "b_out"), [(30, 48, 20, 13), (7, 44, 44, 4), (30, 48, 32, 15), (5, 12, 8, 5)])
def test_blocks_of_armor_need_not_divide_and_no_padding_is_stored(O: int, I: int, b_in: int, b_out: int) -> None:
    packed = random_armor(O, I, b_in, b_out)
    held_to_spec(packed, "F16")
    sizes = [sum(packed.tensors[n].numel() for n in packed.tensors if n.startswith(name)) for name in ("pre", "post")]
    assert sizes == [size // b * b * b + (size % b) ** 2 for size, b in ((I, b_in), (O, b_out))]
    core, pre, post = armor.unpack(packed)
    assert same(armor.pack(core, pre, post), packed)
    A, B = (
        torch.block_diag(*packed.tensors[name].double(), *([packed.tensors[rest].double()] if rest in packed.tensors else []))
        for name, rest in (("post", "post_rest"), ("pre", "pre_rest"))
    )
    S = sparse24.dequantize(core).double()
    torch.testing.assert_close(armor.dequantize(packed).double(), A @ S @ B, rtol=1e-5, atol=1e-6)  # fp32 sums
    opened = armor.trainable(packed)
    assert same(opened.rebuild(opened.parts), packed)
    torch.testing.assert_close(opened.weight(opened.parts), armor.dequantize(packed))


CODES = {(0, 1): 0b0100, (0, 2): 0b1000, (1, 2): 0b1001, (0, 3): 0b1100, (1, 3): 0b1101, (2, 3): 0b1110}
FILLED = {(): (2, 3), (0,): (0, 2), (1,): (1, 2), (2,): (2, 3), (3,): (2, 3)}  # PyTorch's packer


def one_group(columns: tuple[int, ...]) -> torch.Tensor:
    """(1, 4) fp16 with non-zeros in `columns`."""
    W = torch.zeros(1, 4, dtype=F16)
    W[0, list(columns)] = 1.5
    return W


@pytest.mark.parametrize("columns", [*CODES, *FILLED])
def test_groups_have_the_codes_of_semi_structured_kernels(columns: tuple[int, ...]) -> None:
    W = one_group(columns)
    mask = sparse24.complete_mask(W, 2, 4)
    assert tuple(mask[0].nonzero().flatten().tolist()) == FILLED.get(columns, columns)
    assert int(sparse24.pack(W, mask, n=2, m=4).tensors["meta"]) == CODES[FILLED.get(columns, columns)]


def test_two_groups_share_a_byte_and_the_first_is_its_low_nibble() -> None:
    W = torch.cat((one_group((0, 1)), one_group((1, 3)), one_group((2, 3))), 1)
    packed = sparse24.pack(W, W != 0, n=2, m=4)
    assert packed.tensors["meta"].tolist() == [[CODES[0, 1] | CODES[1, 3] << 4, CODES[2, 3]]]


def test_positions_of_other_patterns_are_codes_of_fewest_bits() -> None:
    mask = torch.tensor([[1, 0, 1, 0, 1, 0, 1, 1, 1, 0]], dtype=torch.bool)  # 3:5, positions 0 2 4, 1 2 3, 3 bits each
    meta = sparse24.pack(torch.zeros(1, 10, dtype=F16), mask, n=3, m=5).tensors["meta"]
    assert int.from_bytes(bytes(meta[0].tolist()), "little") == sum(p << 3 * i for i, p in enumerate((0, 2, 4, 1, 2, 3)))
    mask = torch.tensor([[0, 1, 1, 0]], dtype=torch.bool)  # 1:2, 1 bit each
    assert sparse24.pack(torch.zeros(1, 4, dtype=F16), mask, n=1, m=2).tensors["meta"].tolist() == [[0b01]]


def test_a_mask_has_its_first_column_in_the_lowest_bit_and_rows_start_at_bytes() -> None:
    mask = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    packed = bitmask.pack(mask.to(F16), mask)
    assert packed.tensors["mask"].tolist() == [[0b10000001, 0b01], [0b00000010, 0b10]]
    assert packed.tensors["row_offsets"].tolist() == [0, 3, 5]


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_a_completed_mask_covers_all_that_is_not_zero_with_exact_counts(n: int, m: int) -> None:
    W = values(5, 3 * m) * pattern_mask(5, 3 * m, n, m)
    W[:, m : 2 * m], W[3] = 0, 0
    mask = sparse24.complete_mask(W, n, m)
    assert (mask.view(5, 3, m).sum(-1) == n).all()
    assert not ((W != 0) & ~mask).any()
    if (n, m) != (2, 4):
        assert torch.equal(mask[3, :m], torch.arange(m) >= m - n)  # the highest free columns


def test_a_group_with_too_many_weights_is_named_and_never_cut() -> None:
    W = values(3, 12, BF16) * 0
    W[1, 4:7] = 1
    for make in (sparse24.complete_mask, lambda W, n, m: sparse24.pack(W, W != 0, n=n, m=m)):
        with pytest.raises(CompressError, match=r"row [01], columns [04] to [37]: [03] weights .*2:4 keeps 2"):
            make(W, 2, 4)
    with pytest.raises(CompressError, match="row 1, columns 4 to 7: 3 weights that are not zero, 2:4 keeps 2"):
        sparse24.complete_mask(W, 2, 4)


def test_a_weight_outside_the_mask_is_named_and_never_dropped() -> None:
    mask = pattern_mask(3, 8, 2, 4)
    W = values(3, 8) * mask
    row, column = (~mask).nonzero()[4].tolist()
    W[row, column] = 0.25
    for pack in (lambda: sparse24.pack(W, mask, n=2, m=4), lambda: bitmask.pack(W, mask)):
        with pytest.raises(CompressError, match=f"row {row}, column {column}: the weight 0.25 lies outside the mask"):
            pack()


def test_codes_that_break_the_pattern_are_named_and_never_dropped() -> None:
    base = random_int(4, 16, 4, 8, True)
    q, scale, zero = int_grouped.unpack(base)
    q[2, 8:11] = 3
    broken = int_grouped.pack(q, scale, zero, bits=4, group_size=8)
    with pytest.raises(CompressError, match=r"row 2, columns 8 to 11: [34] weights that are not zero, 2:4 keeps 2"):
        sparse24_int.from_int_grouped(broken, {"n": 2, "m": 4})


def test_params_that_do_not_fit_a_linear_are_refused_before_work_starts() -> None:
    integers = {"bits": 4, "symmetric": True, "n": 2, "m": 4}
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: sparse24.spec({"n": 2, "m": 4}, (8, 10), "F16"), "10 inputs cannot be split into groups of 4"),
        (lambda: sparse24.spec({"n": 5, "m": 4}, (8, 12), "F16"), "5:4 is no pattern"),
        (lambda: sparse24.spec({"n": 2, "m": 65}, (8, 65), "F16"), "2:65 is no pattern"),
        (lambda: sparse24.complete_mask(torch.zeros(2, 10), 2, 4), "10 inputs"),
        (lambda: sparse24_int.spec({**integers, "group_size": 6}, (8, 12), "F16"), "group_size 6 is no multiple of 4"),
        (lambda: sparse24_int.spec({**integers, "group_size": 8}, (8, 12), "F16"), "12 inputs cannot be split into groups of 8"),
        (lambda: armor.spec({"n": 2, "m": 4, "b_in": 16, "b_out": 4}, (8, 12), "F16"), "12 inputs .* blocks of 16"),
        (lambda: armor.spec({"n": 2, "m": 4, "b_in": 4, "b_out": 0}, (8, 12), "F16"), "8 outputs .* blocks of 0"),
        (lambda: armor.spec({"core": "awq", "n": 2, "m": 4, "b_in": 4, "b_out": 4}, (8, 12), "F16"), "the core is 'awq'"),
    ]
    for make, why in cases:
        with pytest.raises(CompressError, match=why):
            make()


def test_a_negative_zero_is_stored_as_zero() -> None:
    mask = pattern_mask(3, 8, 2, 4)
    W = torch.full((3, 8), -0.0, dtype=BF16)
    for packed in (sparse24.pack(W, mask, n=2, m=4), bitmask.pack(W, mask)):
        assert not packed.tensors["values"].signbit().any()
        assert not registry.by_kind(packed.kind).dequantize(packed).signbit().any()
        assert len(packed.tensors["values"].flatten()) == 12  # kept, though they are zero


def test_empty_groups_rows_and_weights_are_kept() -> None:
    W = values(4, 16)
    W[1], W[2, 4:8] = 0, 0
    W *= pattern_mask(4, 16, 2, 4)
    pattern = sparse24.pack(W, sparse24.complete_mask(W, 2, 4), n=2, m=4)
    for packed in (pattern, bitmask.pack(W, W != 0), bitmask.pack(W * 0, W > 9)):
        form = registry.by_kind(packed.kind)
        assert form.problems(packed) == []
        assert torch.equal(form.dequantize(packed), W.float() * (packed.params.get("nnz") != 0))


def test_values_of_an_fp32_checkpoint_are_fp16() -> None:
    for form in (sparse24, bitmask, armor):
        assert [form.value_dtype(name) for name in ("F32", "F16", "BF16")] == ["F16", "F16", "BF16"]


def test_offsets_are_int64_where_int32_could_overflow() -> None:
    params = {"nnz": 7}
    assert bitmask.spec(params, (1 << 15, (1 << 16) - 1), "F16")["row_offsets"][0] == "I32"
    assert bitmask.spec(params, (1 << 15, 1 << 16), "F16")["row_offsets"][0] == "I64"


def test_sizes_follow_the_formulas() -> None:
    O, I = 64, 256
    assert random_sparse24(O, I).tensors["meta"].shape == (O, I // 8)
    assert sparse24.bits_per_weight(random_sparse24(O, I)) == 9.0  # 9/16 of 16-bit
    assert sparse24.bits_per_weight(random_sparse24(O, I, 1, 4)) == 4 + 0.5
    assert sparse24.bits_per_weight(random_sparse24(O, I, 4, 8)) == 8 + 1.5
    half = random_bitmask(O, I)
    want = 16 * half.params["nnz"] / (O * I) + 1 + 32 * (O + 1) / (O * I)
    assert bitmask.bits_per_weight(half) == pytest.approx(want)
    assert want == pytest.approx(9.1, abs=0.2)
    codes = sparse24_int.from_int_grouped(random_int(O, I, 4, 64, True), {"n": 2, "m": 4})
    assert sparse24_int.bits_per_weight(codes) == pytest.approx(2 + 1 + 16 / 64 + 128 / (O * I))
    blocks = random_armor(O, I, 32, 16)
    assert armor.bits_per_weight(blocks) == pytest.approx(9 + 16 * 32 / O + 16 * 16 / I)


def digests(packed: Packed) -> dict[str, str]:
    return {name: hashlib.sha256(t.numpy().tobytes()).hexdigest()[:16] for name, t in packed.tensors.items()}


def fixed() -> dict[str, Packed]:
    """Weights that no random generator made."""
    k = torch.arange(20 * 48)
    pairs = torch.tensor(list(CODES))
    mask = torch.zeros(240, 4, dtype=torch.bool).scatter_(1, pairs[torch.arange(240) * 5 % 6], True).view(20, 48)
    W = ((k * 37 % 101 - 50) / 64).to(F16).view(20, 48)
    three = torch.tensor([True, False, True, True, False]).repeat(20, 9)
    zero = (k[:60] * 3 % 16).view(20, 3).to(torch.uint8)
    q = torch.where(mask, (k * 5 % 16).view(20, 48).to(torch.uint8), zero.repeat_interleave(16, 1))
    base = int_grouped.pack(q, ((1 + k[:60]) / 64).to(F16).view(20, 3), zero, bits=4, group_size=16)
    any_mask = (k * 7 % 5 < 2).view(20, 48)
    core = sparse24.pack(W * mask, mask, n=2, m=4)
    pre, post = (((k[: 48 * 12] % 23 - 11) / 8).to(F16).view(4, 12, 12), ((k[: 20 * 10] % 19 - 9) / 8).to(F16).view(2, 10, 10))
    return {
        "2:4": core,
        "3:5": sparse24.pack(W[:, :45] * three, three, n=3, m=5),
        "bitmask": bitmask.pack(W * any_mask, any_mask),
        "int": sparse24_int.from_int_grouped(base, {"n": 2, "m": 4}),
        "armor": armor.pack(core, pre, post),
        "armor, ragged": armor.pack(core, *(((k[:b * b * n] % 23 - 11) / 8).to(F16).view(n, b, b) for n, b in ((4, 14), (2, 12)))),
    }


def test_bytes_of_a_fixed_input_are_frozen() -> None:
    assert {name: digests(packed) for name, packed in fixed().items()} == {
        "2:4": {
            "values": "8e4420be2aa68a76",
            "meta": "5c8b506132a4b1b4",
        },
        "3:5": {
            "values": "7663edcc879e3944",
            "meta": "b29332d97e6ed191",
        },
        "bitmask": {
            "mask": "fb2505bd8625d078",
            "row_offsets": "14cd48ef7c727c7e",
            "values": "a3de20a30b263237",
        },
        "int": {
            "weight_packed": "9c7c3f2733b0ea46",
            "weight_scale": "e02580e6bdec601e",
            "weight_shape": "024659c8af6652ff",
            "weight_zero_point": "ebb9b48dbd8b6c60",
            "meta": "fe0b91770aaf51d7",
        },
        "armor": {
            "values": "8e4420be2aa68a76",
            "meta": "5c8b506132a4b1b4",
            "pre": "51e28a7d9e355fc7",
            "post": "84c4d0d3d38156c7",
        },
        "armor, ragged": {
            "values": "8e4420be2aa68a76",
            "meta": "5c8b506132a4b1b4",
            "pre": "bd01675285149dbc",
            "pre_rest": "7dfdd2ea4629aa3d",
            "post": "ac32068e7b72f3ec",
            "post_rest": "f1f7d5642a5f1561",
        },
    }


@pytest.mark.parametrize(
    ("name", "tensor", "at", "value", "why"),
    [
        ("2:4", "meta", (3, 0), 0b0000, r"positions \[0, 0\] in row 3, group 0: not 2 ascending ones below 4"),
        ("3:5", "meta", (0, 0), 0b111, r"positions \[7, .* in row 0, group 0: not 3 ascending ones below 5"),
        ("2:4", "values", (1, 1), float("nan"), "values holds NaN or Inf"),
        ("bitmask", "values", (1,), float("inf"), "values holds NaN or Inf"),
        ("bitmask", "row_offsets", (0,), 1, "row_offsets starts at 1, not 0"),
        ("bitmask", "row_offsets", (5,), 0, "row_offsets gives row 4 -?[0-9]+ values, the mask keeps [0-9]+"),
        ("bitmask", "row_offsets", (20,), 0, "row_offsets ends at 0, there are 384 values"),
        ("bitmask", "mask", (2, 0), 0, "row_offsets gives row 2"),
        ("int", "weight_scale", (1, 1), float("nan"), "weight_scale holds NaN or Inf"),
        ("int", "meta", (3, 0), 0b0000, "in row 3, group 0"),
        ("armor", "pre", (0, 0, 0), float("nan"), "pre holds NaN or Inf"),
        ("armor", "meta", (3, 0), 0b0000, "in row 3, group 0"),
        ("armor, ragged", "pre_rest", (0, 0), float("nan"), "pre_rest holds NaN or Inf"),
    ],
)
def test_damage_is_named(name: str, tensor: str, at: tuple[int, ...], value: float, why: str) -> None:
    whole = fixed()[name]
    damaged = whole.tensors[tensor].clone()
    damaged[at] = value
    packed = Packed(whole.kind, whole.version, whole.params, {**whole.tensors, tensor: damaged}, whole.shape)
    found = registry.by_kind(packed.kind).problems(packed)
    assert re.search(why, "; ".join(found)), found


@pytest.mark.parametrize("name", ["2:4", "bitmask", "int", "armor", "armor, ragged"])
def test_a_tensor_of_another_shape_is_named(name: str) -> None:
    whole = fixed()[name]
    for tensor in whole.tensors.keys() - {"weight_shape"}:
        if (name, tensor) == ("bitmask", "values"):
            continue  # any length is a shape: the offsets tell
        short = {**whole.tensors, tensor: whole.tensors[tensor][:-1]}
        found = registry.by_kind(whole.kind).problems(Packed(whole.kind, whole.version, whole.params, short, whole.shape))
        assert any(f"{tensor} is " in problem for problem in found), (tensor, found)
