"""Pruning, attacked: options of the second step, other calibration, kills in the removal, pruned twice, damaged artifacts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, tree
from safetensors.torch import load_file, save_file

import compress
from compress import audit
from compress.checkpoint import manifest
from compress.errors import CompressError
from compress.methods import dpruner
from compress.types import Block, Progress

SMALL: dict[str, Any] = {"nsamples": 4, "seqlen": 16}
BOTH: dict[str, Any] = {"pattern": "2:4", "then_bits": 4, "then_group_size": 32}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return path


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--then-bits", 5], "--then-bits 5: --bits 5 is not supported"),
        (["--then-bits", 4, "--then-group-size", 96], "cannot be split into groups of 96"),
        (["-m", "wanda", "--dataset", "unread", "--then-bits", 4, "--then-group-size", 96], "cannot be split into groups of 96"),
        (["--then-bits", 4, "--then-group-size", 2, "--pattern", "2:4"], "no multiple of 4"),
        (["--then-bits", 4, "--then-method", "rsq", "--then-group-size", 32], "a rotation would fill its zeros"),
        (["-m", "armor", "--then-bits", 4, "--then-method", "awq", "--block", 16, "--then-group-size", 32], "only the cores"),
    ],
)
def test_the_second_step_is_checked_before_the_first(
    args: list[object], why: str, pico: Callable[..., Path], tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    own = [] if "-m" in args else ["-m", "magnitude"]
    done = cli("prune", pico("llama", torch.bfloat16), *own, *args, "--seqlen", 16, "-o", tmp_path / "out")
    assert (done.code, why in done.err, "hint:" in done.err) == (2, True, True), done.err
    assert not any(tmp_path.iterdir())


def test_a_dry_run_of_both_steps_is_exact(pico: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    from compress.fit import dry_run

    source = pico("llama", torch.bfloat16)
    told = dry_run(source, "magnitude", verb="prune", **SMALL, **BOTH)
    report = compress.prune(source, "magnitude", tmp_path / "out", dataset=text, **SMALL, **BOTH)
    assert told.exact
    assert told.artifact_bytes == report.bytes


def test_another_calibration_is_another_job_also_where_only_the_second_step_reads_it(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, out = pico("llama", torch.bfloat16), tmp_path / "out"
    compress.prune(source, "magnitude", out, dataset=text, **SMALL, **BOTH)
    before = tree(out)
    assert compress.prune(source, "magnitude", out, dataset=text, **SMALL, **BOTH).resumed
    with pytest.raises(CompressError, match="result of another job"):
        compress.prune(source, "magnitude", out, dataset=text, **{**SMALL, "nsamples": 2}, **BOTH)
    assert tree(tmp_path) == {f"out/{name}": data for name, data in before.items()}
    compress.prune(source, "magnitude", out, dataset=text, resume=False, **{**SMALL, "nsamples": 2}, **BOTH)
    assert tree(out).keys() == before.keys()
    assert tree(out) != before


def test_what_a_kill_leaves_of_the_pruned_artifact_is_removed(pico: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source, out, between = pico("llama", torch.bfloat16), tmp_path / "out", tmp_path / "out.pruned.partial"
    compress.prune(source, "magnitude", out, dataset=text, **SMALL, **BOTH)
    compress.prune(source, "magnitude", between, pattern="2:4", dataset=text, **SMALL)
    (between / "model.safetensors").unlink()
    before = tree(out)
    assert compress.prune(source, "magnitude", out, dataset=text, **SMALL, **BOTH).resumed
    assert tree(tmp_path) == {f"out/{name}": data for name, data in before.items()}


def test_ignored_linears_stay_dense_through_both_steps(pico: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source = pico("llama", torch.bfloat16)
    compress.prune(source, "magnitude", tmp_path / "out", dataset=text, ignore=("re:.*q_proj",), **SMALL, **BOTH)
    assert not any(name.endswith("q_proj") for name in manifest.read(tmp_path / "out")["linears"])


def test_the_default_share_and_the_greatest_one_are_of_the_model(
    pico: Callable[..., Path], tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    source = pico("llama", torch.bfloat16)
    assert compress.prune(source, "magnitude", tmp_path / "half", of_model=True).zeros_model == pytest.approx(0.5, abs=1e-3)
    job = ["prune", source, "-m", "magnitude", "--of-model", "-o"]
    done = cli(*job, tmp_path / "most", "--sparsity", 0.99)
    assert (done.code, "--sparsity 0.99 of the model is" in done.err) == (2, True), done.err
    most = done.err.split("at most --sparsity ")[1].split()[0]
    assert cli(*job, tmp_path / "most", "--sparsity", most).code == 0


def test_a_pruned_artifact_pruned_again_records_its_new_mask(
    pico: Callable[..., Path], text: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    compress.prune(pico("llama", torch.bfloat16), "magnitude", tmp_path / "one", pattern="2:4")
    compress.prune(tmp_path / "one", "sparsegpt", tmp_path / "two", pattern="1:4", dataset=text, **SMALL)
    first, again = (manifest.read(tmp_path / f)["linears"] for f in ("one", "two"))
    compress.prune(tmp_path / "one", "sparsegpt", tmp_path / "dense", pattern="1:4", dataset=text, format="dense", **SMALL)
    (tmp_path / "dense" / "manifest.json").unlink()
    compress.quantize(tmp_path / "dense", "rtn", tmp_path / "q", group_size=32, keep_zeros=True)
    for name, entry in manifest.read(tmp_path / "q")["linears"].items():
        assert again[name]["mask_sha256"] == entry["mask_sha256"] != first[name]["mask_sha256"]
        assert again[name]["density"] <= 0.25
    assert cli("verify", tmp_path / "two", "--deep", "--source", tmp_path / "one").code == 0


def test_a_dense_artifact_that_breaks_its_pattern_is_noticed(pico: Callable[..., Path], tmp_path: Path) -> None:
    from compress.audit import verify

    for family in ("llama", "gpt2"):
        out = tmp_path / family
        compress.prune(pico(family, torch.bfloat16), "magnitude", out, pattern="2:4", format="dense")
        assert verify(out) == []
        tensors = load_file(out / "model.safetensors")
        name = f"{next(iter(manifest.read(out)['linears']))}.weight"
        tensors[name].view(-1)[:] = 1
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        known = manifest.read(out)
        (out / manifest.FILE).write_text(json.dumps({**known, "files": manifest.file_table(out)}))
        assert [name.removesuffix(".weight") in why and "more than 2 of 4" in why for why in verify(out)] == [True]


def test_a_quantized_pruned_artifact_says_what_it_was_made_from(
    pico: Callable[..., Path], text: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    source, out = pico("llama", torch.bfloat16), tmp_path / "out"
    compress.prune(source, "magnitude", out, dataset=text, **SMALL, **BOTH)
    done = cli("verify", out, "--deep", "--source", source)
    assert (done.code, "made from a pruned artifact" in done.err) == (1, True), done.err
    compress.prune(source, "magnitude", tmp_path / "pruned", pattern="2:4")  # as the hint says
    done = cli("verify", out, "--deep", "--source", tmp_path / "pruned")
    assert done.code == 0, done.err
    assert "by magnitude, 2:4" in cli("inspect", out).out


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m.pop("linears"), "linears is missing"),
        (lambda m: m.update(linears={}), "names no linear"),
        (lambda m: next(iter(m["linears"].values())).pop("shape"), "no proper shape"),
        (lambda m: next(iter(m["linears"].values())).update(shape=[4, -4]), "no proper shape"),
        (lambda m: next(iter(m["linears"].values())).update(params={}), "has params"),
    ],
    ids=["none", "empty", "no-shape", "shape", "params"],
)
def test_a_manifest_that_was_edited_is_named_by_every_command(
    change: Callable[[dict[str, Any]], object], why: str, pico: Callable[..., Path], tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    out = tmp_path / "out"
    compress.prune(pico("llama", torch.bfloat16), "magnitude", out)
    known = manifest.read(out)
    change(known)
    (out / manifest.FILE).write_text(json.dumps(known))
    for command in (["verify", out], ["quantize", out, "-m", "rtn", "--group-size", 32, "-o", tmp_path / "q"]):
        done = cli(*command)
        assert (done.code, why in done.err, "hint:" in done.err) == (1, True, True), done.err


def test_a_tensor_of_another_dtype_is_named_before_the_artifact_is_quantized(
    pico: Callable[..., Path], tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    out = tmp_path / "out"
    compress.prune(pico("llama", torch.bfloat16), "magnitude", out, pattern="2:4")
    tensors = load_file(out / "model.safetensors")
    name = next(n for n in tensors if n.endswith(".meta"))
    tensors[name] = tensors[name].to(torch.int32)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    done = cli("quantize", out, "-m", "rtn", "--group-size", 32, "-o", tmp_path / "q")
    assert (done.code, f"{name} is I32" in done.err) == (1, True), done.err


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["-m", "armor", "--lr", "inf"], "--lr inf is not in"),
        (["-m", "armor", "--block", "2"], "--block 2 is not at least 4"),
        (["-m", "dpruner", "--c2", "1e300"], "--c2 is not in 0..1e+12"),
        (["-m", "dpruner", "--lr", "1e12"], "a penalty beyond fp32"),
        (["-m", "dpruner", "--domain-dataset", "nothing.txt"], "--domain-dataset nothing.txt: no such file"),
        (["-m", "magnitude", "--pattern", "٢:٤"], "is not N:M"),
    ],
)
def test_more_bad_options(
    args: list[str], why: str, pico: Callable[..., Path], tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    done = cli("prune", pico("llama"), *args, "-o", tmp_path / "out", "--nsamples", 2, "--seqlen", 8)
    assert (done.code, why in done.err, "hint:" in done.err) == (2, True, True), done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [{"sparsity": "0.5"}, {"sparsity": True}, {"pattern": 24}, {"recover": 1.5}, {"scope": None}, {"target_bpw": 3.0}],
)
def test_an_option_of_another_type_or_verb_is_an_error_from_python_too(
    options: dict[str, Any], pico: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(CompressError, match=next(iter(options))):
        compress.prune(pico("llama"), "magnitude", tmp_path / "out", **options)


def test_steps_of_one_window_keep_no_gradient() -> None:
    weights = {"a": torch.ones(3, 4)}
    block = Block(0, weights, {}, (("a",),), (), frozenset(), {"a": {"nnz": 6}})
    reducer = dpruner.Important(block, dpruner.Config(general_weight=0.0, lam=0.0))
    reducer.add("a", torch.ones(2, 4), torch.ones(2, 3))
    assert not reducer._step
    assert torch.equal(reducer.result()["score:a"], torch.full((3, 4), 4 * 5e-4))


def test_a_folder_of_a_stranger_is_never_taken_for_what_a_kill_left(
    pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, out, between = pico("llama", torch.bfloat16), tmp_path / "out", tmp_path / "out.pruned.partial"
    compress.prune(source, "magnitude", out, dataset=text, **SMALL, **BOTH)
    between.mkdir()
    (between / "mine.txt").write_text("keep")
    compress.prune(source, "magnitude", out, dataset=text, **SMALL, **BOTH)
    assert (between / "mine.txt").read_text() == "keep"
    shutil.rmtree(out)
    with pytest.raises(CompressError, match="not an artifact of compress"):
        compress.prune(source, "magnitude", out, dataset=text, **SMALL, **BOTH)
    assert (between / "mine.txt").read_text() == "keep"


# -- one lock, fp32, the disk, the range of fp16 ---------------------------------------------------------------------------


def test_one_lock_covers_both_steps(
    pico: Callable[..., Path], text: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    """While the first step runs, and between the steps, no other run may begin at this OUT, with or without --then-bits."""
    source, out = pico("llama", torch.bfloat16), tmp_path / "out"
    tried: dict[str, list[tuple[int, bool]]] = {"prune": [], "quantize": []}
    then = ["--then-bits", 4, "--then-group-size", 32, "--pattern", "2:4"]

    def watch(p: Progress) -> None:
        step = "quantize" if (tmp_path / "out.pruned.partial" / manifest.FILE).is_file() else "prune"
        if p.block == 0:
            for args in (["prune", source, "-m", "magnitude", *then], ["quantize", source, "-m", "rtn", "--group-size", 32]):
                done = cli(*args, "--dataset", text, "--nsamples", 4, "--seqlen", 16, "-o", out)
                tried[step].append((done.code, "another run is working here" in done.err))

    compress.prune(source, "magnitude", out, dataset=text, progress=watch, **SMALL, **BOTH)
    assert tried == {"prune": [(1, True)] * 2, "quantize": [(1, True)] * 2}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert compress.prune(source, "magnitude", out, dataset=text, **SMALL, **BOTH).resumed
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_first_step_that_fails_leaves_the_second_s_folder_free(pico: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source, out = pico("llama", torch.bfloat16), tmp_path / "out"

    def stop(p: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress.prune(source, "magnitude", out, dataset=text, progress=stop, **SMALL, **BOTH)
    assert not (tmp_path / "out.partial").exists()
    compress.quantize(source, "rtn", out, group_size=32)


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.pipeline import resume

    real, left = resume.fcntl.flock, [1]

    def removed(fd: int, how: int) -> None:
        real(fd, how)
        if left:
            left.pop()
            (tmp_path / "w" / "lock").unlink()

    monkeypatch.setattr(resume.fcntl, "flock", removed)
    with resume.Lock(tmp_path / "w"), pytest.raises(CompressError, match="another run"):
        resume.Lock(tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("method", "options"),
    [("magnitude", {}), ("magnitude", {"pattern": "2:4"}), ("armor", {"mode": "paper", "iters": 5, "block": 16}),
     ("sparsegpt", {"recover": 1})],
)  # fmt: skip
def test_an_fp32_checkpoint_s_dense_export_keeps_fp32_values(
    method: str, options: dict[str, Any], pico: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """What the sparse kinds round to fp16 (their layout) a dense export does not; the masks are the same."""
    common = {"dataset": text, **SMALL, **options}
    compress.prune(pico("llama"), method, tmp_path / "dense", format="dense", **common)
    found = load_file(tmp_path / "dense" / "model.safetensors")
    names = [f"{n}.weight" for n in manifest.read(tmp_path / "dense")["linears"]]
    assert all(found[n].dtype == torch.float32 and not torch.equal(found[n], found[n].half().float()) for n in names)
    if method == "magnitude":
        before = load_file(pico("llama") / "model.safetensors")
        assert all(torch.equal(found[n], before[n] * (found[n] != 0)) for n in names)
        compress.prune(pico("llama"), method, tmp_path / "sparse", **common)
        masks = [{n: e["mask_sha256"] for n, e in manifest.read(tmp_path / f)["linears"].items()} for f in ("dense", "sparse")]
        assert masks[0] == masks[1]


def test_a_resumed_dense_export_of_fp32_has_the_same_bytes(pico: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dataset": text, "format": "dense", "recover": 1, **SMALL}
    compress.prune(pico("llama"), "sparsegpt", tmp_path / "whole", **options)

    def stop(p: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress.prune(pico("llama"), "sparsegpt", tmp_path / "out", progress=stop, **options)
    assert compress.prune(pico("llama"), "sparsegpt", tmp_path / "out", **options).resumed
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("mode", ["still", "train"])
def test_a_disk_too_small_for_what_the_walks_keep_is_noticed_before_the_work(
    mode: str, pico: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """74k weights of the linears: the artifact takes 0.2 MB, G, scores and, in training, weights and gradients the rest."""
    source = pico("llama", torch.bfloat16)
    data: dict[str, Any] = {"dataset": text, "domain_dataset": text, "mode": mode, "epochs": 1, **SMALL}
    report = compress.prune(source, "dpruner", tmp_path / "one", **data)
    weights = sum(e["shape"][0] * e["shape"][1] for e in manifest.read(tmp_path / "one")["linears"].values())
    spooled = weights * (10 if mode == "still" else 22)
    for free, fits in ((report.bytes + spooled + 2000, True), (report.bytes + spooled - 2000, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(free, 0, free))  # type: ignore[attr-defined]
        if fits:
            compress.prune(source, "dpruner", tmp_path / "two", **data)
        else:
            with pytest.raises(CompressError, match="of it only for the time of the run"):
                compress.prune(source, "dpruner", tmp_path / "three", **data)
    assert not (tmp_path / "three").exists()


def test_a_core_beyond_fp16_s_range_moves_into_the_wrappers_exactly() -> None:
    from compress.formats import armor as form
    from compress.methods import _armor, armor

    g = torch.Generator().manual_seed(0)
    mask = torch.tensor([True, True, False, False]).repeat(8, 4)
    S = torch.randn(8, 16, generator=g) * mask * 1e6
    A, B = (torch.linalg.qr(torch.randn(n, b, b, generator=g))[0] for n, b in ((2, 4), (2, 8)))
    packed = armor._pack(_armor.Factors(A, B, S, mask), torch.ones(16), torch.ones(8), 2, 4, torch.float16, "fc")
    assert form.problems(packed) == []
    W, want = form.dequantize(packed), _armor.reconstruct(_armor.Factors(A, B, S, mask))
    assert float((W - want).norm() / want.norm()) < 2e-3  # three factors in fp16
    with pytest.raises(CompressError, match=r"does not fit into torch\.float16"):
        armor._pack(_armor.Factors(A, B, S * 1e30, mask), torch.ones(16), torch.ones(8), 2, 4, torch.float16, "fc")


def test_fp32_values_beyond_fp16_are_an_error_that_says_what_to_do(pico: Callable[..., Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(pico("llama"), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 70_000.0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match=r"up_proj: a weight does not fit into torch\.float16") as error:
        compress.prune(model, "magnitude", tmp_path / "out")
    assert "bfloat16" in str(error.value.hint)
    compress.prune(model, "magnitude", tmp_path / "dense", format="dense")
    assert float(load_file(tmp_path / "dense" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"][0, 0]) == 70_000.0


def test_a_last_block_of_one_column_is_written_and_read(pico: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """64 inputs in blocks of 7 leave one: a tensor of a single element, with the stride of what it was cut from."""
    compress.prune(pico("llama"), "armor", tmp_path / "out", block=7, ragged=True, dataset=text, nsamples=2, seqlen=32)
    assert audit.verify(tmp_path / "out") == []
    assert torch.isfinite(compress.load(tmp_path / "out")(torch.tensor([[5, 17, 99]])).logits).all()
