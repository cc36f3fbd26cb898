"""Evaluation against independent computations, on the real example checkpoint and its text."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compress.errors import CompressError
from compress.evaluation import EvalReport, Metric, Score, evaluate
from compress.evaluation import perplexity as perplexity_module
from compress.evaluation.divergence import compare, divergence, mean_stderr
from compress.evaluation.perplexity import perplexity, windows
from compress.evaluation.report import recovery, task_metrics
from compress.evaluation.tasks import local_tasks, run_tasks, scores

EXAMPLES = Path(__file__).parent.parent / "examples"
CHECKPOINT = EXAMPLES / "stories15M"
TEXT = EXAMPLES / "data" / "tinystories-valid.txt"
TASKS = EXAMPLES / "tasks"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Small matrices gain nothing from threads, which on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def perturbed(model):
    """The model with 5% noise on every linear of the blocks."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in other.model.layers.parameters():
        if parameter.dim() == 2:
            noise = torch.randn(parameter.shape, generator=generator) * parameter.data.std() * 0.05
            parameter.data += noise
    return other


@pytest.fixture(scope="module")
def ids(tokenizer):
    return windows(TEXT.read_text(encoding="utf-8"), tokenizer, 128, limit=5)


@pytest.fixture
def offline(monkeypatch):
    """No network, in this process too: the libraries read their switches at import."""
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def direct_logp(model, ids):
    """Float64 log-probabilities `[N, T - 1, V]`, one window at a time, straight from the definition."""
    with torch.no_grad():
        logits = torch.cat([model(row[None]).logits for row in ids])[:, :-1].double()
    return logits - torch.logsumexp(logits, -1, keepdim=True)


def test_windows_tile_the_text_without_special_tokens(tokenizer):
    text = TEXT.read_text(encoding="utf-8")
    flat = tokenizer.encode(text, add_special_tokens=False)
    cut = windows(text, tokenizer, 200)
    assert cut.dtype == torch.int64
    assert cut.shape == (len(flat) // 200, 200)
    assert cut.flatten().tolist() == flat[: cut.numel()]
    assert torch.equal(windows(text, tokenizer, 200, limit=3), cut[:3])


def test_a_text_shorter_than_a_window_is_an_error_with_a_hint(tokenizer):
    with pytest.raises(CompressError, match="one window needs 64") as caught:
        windows("Once upon a time.", tokenizer, 64)
    assert "at most" in caught.value.hint


def test_perplexity_equals_the_float64_definition(model, ids):
    logp = direct_logp(model, ids)
    nll = -logp.gather(-1, ids[:, 1:, None])[..., 0]
    ppl, mean, per_window = perplexity(model, ids)
    assert ppl == pytest.approx(math.exp(nll.mean().item()), rel=1e-5)  # float32 rounding of the softmax
    assert mean == pytest.approx(nll.mean().item(), rel=1e-5)
    assert per_window == pytest.approx(nll.mean(1).tolist(), rel=1e-5)


def test_perplexity_does_not_depend_on_batch_or_chunk_size(model, ids, monkeypatch):
    whole = perplexity(model, ids, batch_size=1)[0]
    assert perplexity(model, ids, batch_size=4)[0] == pytest.approx(whole, rel=1e-5)
    monkeypatch.setattr(perplexity_module, "CHUNK_ELEMENTS", 7 * 32000)  # 7 positions: does not divide 127
    assert perplexity(model, ids, batch_size=2)[0] == pytest.approx(whole, rel=1e-5)


def test_progress_counts_windows_and_training_mode_is_put_back(model, ids):
    seen = []
    model.train()
    try:
        perplexity(model, ids, batch_size=2, progress=lambda done, total: seen.append((done, total)))
        assert model.training
    finally:
        model.eval()
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_a_nan_loss_stops_with_the_window(model, ids):
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(CompressError, match="window 0: the loss is nan"):
        perplexity(broken, ids)


def test_a_model_does_not_diverge_from_itself(model, ids):
    run = divergence(model, model, ids)
    assert run.kl == [0.0] * 5
    assert run.agreement == [1.0] * 5
    assert run.baseline_nll == run.model_nll


def test_divergence_equals_the_definition(model, perturbed, ids):
    p, q = direct_logp(model, ids), direct_logp(perturbed, ids)
    run = divergence(model, perturbed, ids, batch_size=2)
    kl = (p.exp() * (p - q)).sum(-1).mean(1)
    assert kl.min() > 0
    assert run.kl == pytest.approx(kl.tolist(), rel=1e-3)  # small differences of float32 log-probabilities
    assert run.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean(1).tolist(), abs=1 / 127)
    assert run.model_nll == pytest.approx(perplexity(perturbed, ids)[2], rel=1e-6)
    assert run.baseline_nll == pytest.approx(perplexity(model, ids)[2], rel=1e-6)


def test_divergence_of_two_known_distributions():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    kl, same = compare(p, q + 3.0)  # a shift of the logits changes nothing
    assert kl.item() == pytest.approx(0.25 * math.log(2), rel=1e-6)
    assert same.item() == 0.0


def test_vocabularies_of_different_size_cannot_be_compared(model, ids):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32016)
    with pytest.raises(CompressError, match="32000 tokens, the model 32016"):
        divergence(model, LlamaForCausalLM(small), ids[:1])


def test_mean_and_standard_error():
    assert mean_stderr([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, math.sqrt(5 / 3 / 4)))
    assert mean_stderr([2.0]) == (2.0, None)


def test_recovery_and_its_standard_error_match_a_simulation():
    value, error = recovery(Score(0.60, 0.01), Score(0.75, 0.02))
    assert value == pytest.approx(0.8)
    assert error == pytest.approx(0.8 * math.sqrt((0.01 / 0.6) ** 2 + (0.02 / 0.75) ** 2))
    draws = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(0)).double()
    ratio = (0.60 + 0.01 * draws[0]) / (0.75 + 0.02 * draws[1])
    assert error == pytest.approx(ratio.std().item(), rel=0.02)  # first order; the second is about (s_b / b)²


def test_recovery_is_inverted_where_less_is_better_and_undefined_at_zero():
    ratio = recovery(Score(20.0, None, higher_is_better=False), Score(10.0, None, higher_is_better=False))
    assert ratio == (0.5, None)
    assert recovery(Score(0.5, 0.1), Score(0.0, 0.0)) == (None, None)
    assert recovery(Score(0.0, 0.1), Score(0.5, 0.1)) == pytest.approx((0.0, 0.2))


def test_lm_eval_results_are_read_with_filters_and_missing_errors():
    found = {
        "results": {
            "a": {"alias": "a", "sample_len": 20, "acc,none": 0.5, "acc_stderr,none": 0.1},
            "b": {
                "alias": "b",
                "em,strict": 0.25,
                "em_stderr,strict": "N/A",
                "ppl,none": 3.0,
                "ppl_stderr,none": "N/A",
            },
            "group": {"alias": "group", " ": " "},
        },
        "higher_is_better": {"b": {"ppl": False, "em": True}},
        "n-samples": {"b": {"original": 9, "effective": 5}},
    }
    assert scores(found) == {
        "a": {"acc": Score(0.5, 0.1, True, 20)},
        "b": {"em,strict": Score(0.25, None, True, 5), "ppl": Score(3.0, None, False, 5)},
    }


def test_local_tasks_run_offline_from_any_folder(model, tokenizer, offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["blimp_mini", "piqa_mini", "openbookqa_mini"]
    generators = torch.get_rng_state()
    found = run_tasks(model, tokenizer, names, limit=20, task_dir=TASKS.resolve(), batch_size=8)
    assert torch.equal(torch.get_rng_state(), generators)
    assert sorted(found) == sorted(names)
    assert set(found["blimp_mini"]) == {"acc"}
    assert set(found["piqa_mini"]) == set(found["openbookqa_mini"]) == {"acc", "acc_norm"}
    for metrics in found.values():
        for score in metrics.values():
            assert score.samples == 20
            assert 0 <= score.value <= 1
            assert score.stderr == pytest.approx(math.sqrt(score.value * (1 - score.value) / 19), abs=1e-6)


def test_blimp_scores_equal_a_direct_count(model, tokenizer, offline):
    pairs = [json.loads(line) for line in (TASKS / "blimp_mini.jsonl").read_text(encoding="utf-8").splitlines()][:20]

    def likelihood(sentence):
        tokens = torch.tensor([[1, *tokenizer.encode(" " + sentence, add_special_tokens=False)]])
        return direct_logp(model, tokens)[0].gather(-1, tokens[0, 1:, None]).sum().item()

    right = sum(likelihood(pair["good"]) > likelihood(pair["bad"]) for pair in pairs)
    found = run_tasks(model, tokenizer, ["blimp_mini"], limit=20, task_dir=TASKS)
    assert found["blimp_mini"]["acc"].value == pytest.approx(right / 20)


def test_data_files_are_found_beside_the_yaml_that_names_them(tmp_path):
    source, scratch = tmp_path / "tasks", tmp_path / "scratch"
    (source / "deep").mkdir(parents=True)
    scratch.mkdir()
    (source / "rows.jsonl").write_text("{}\n")
    (source / "shared").write_text("doc_to_text: !function f.g\ndataset_kwargs: {data_files: [rows.jsonl, hub.jsonl]}\n")
    (source / "deep" / "one.yaml").write_text("include: ../shared\ntask: one\n")
    (source / "two.yaml").write_text("task: two\n")
    local_tasks(source, scratch)
    one, two = (json.loads((scratch / f"0000{i}.yaml").read_text()) for i in range(2))
    files = one["dataset_kwargs"]["data_files"]
    assert Path(files[0]).samefile(source / "rows.jsonl")
    assert files[1] == "hub.jsonl"  # not there: left for the hub
    assert two == {"include": str((source / "two.yaml").resolve())}


def test_an_unknown_task_names_the_nearest(model, tokenizer):
    with pytest.raises(CompressError, match="piqa_mimi: no such task") as caught:
        run_tasks(model, tokenizer, ["piqa_mimi"], task_dir=TASKS)
    assert "piqa_mini" in caught.value.hint
    assert caught.value.exit_code == 2


def test_a_hub_task_without_network_is_one_clear_error(model, tokenizer, offline, tmp_path):
    (tmp_path / "far.yaml").write_text(
        "task: far\ndataset_path: no-one/nothing\noutput_type: multiple_choice\nvalidation_split: validation\n"
        'doc_to_text: ""\ndoc_to_target: 0\ndoc_to_choice: [a, b]\n'
    )
    with pytest.raises(CompressError, match="tasks far: the data could not be loaded") as caught:
        run_tasks(model, tokenizer, ["far"], task_dir=tmp_path)
    assert "network" in caught.value.hint


def test_evaluate_compares_two_models_in_memory(model, perturbed, tokenizer, ids, offline):
    report = evaluate(
        perturbed, baseline=model, text=TEXT, seqlen=128, windows=5, tasks="piqa_mini", limit=10, task_dir=TASKS,
        tokenizer=tokenizer,
    )  # fmt: skip
    row = report["perplexity"]
    assert row.value == pytest.approx(perplexity(perturbed, ids)[0], rel=1e-6)
    assert row.baseline == pytest.approx(perplexity(model, ids)[0], rel=1e-6)
    assert row.change == pytest.approx(row.value - row.baseline)
    assert row.change_stderr < row.stderr  # paired by window
    assert report["KL"].value > 0
    assert 0 < report["top-1 agreement"].value < 1
    piqa = report["piqa_mini acc"]
    assert piqa.change == pytest.approx(piqa.value / piqa.baseline)
    assert report.settings["windows"] == 5
    assert report.settings["dtype"] == "float32"
    assert EvalReport.from_json(report.to_json()) == report


def test_the_report_of_an_artifact_is_stored_in_it_and_nowhere_else(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    for file in CHECKPOINT.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    before = evaluate(folder, text=TEXT, seqlen=64, windows=2)
    assert not (folder / "report.json").exists()  # no manifest: not ours to write into
    (folder / "manifest.json").write_text("{}")
    report = evaluate(folder, baseline=CHECKPOINT, text=TEXT, seqlen=64, windows=2)
    stored = (folder / "report.json").read_text(encoding="utf-8")
    assert stored == report.to_json()
    assert EvalReport.from_json(stored) == report
    assert str(tmp_path) not in stored
    assert (report.model, report.baseline) == ("small", "stories15M")
    assert report["perplexity"].value == report["perplexity"].baseline == before["perplexity"].value
    assert not list(folder.glob("*.tmp"))


def test_the_harness_is_quiet_and_surveys_nothing(model, tokenizer, offline, tmp_path, monkeypatch, capfd):
    from lm_eval import evaluator

    survey = evaluator.add_env_info
    monkeypatch.chdir(tmp_path)  # outside any git repository
    run_tasks(model, tokenizer, ["piqa_mini"], limit=1, task_dir=TASKS.resolve())
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "fatal" not in captured.err
    assert evaluator.add_env_info is survey


def test_the_window_length_defaults_to_the_context_and_may_not_exceed_it(model, tokenizer):
    assert evaluate(model, text=TEXT, windows=1, tokenizer=tokenizer).settings["seqlen"] == 256
    with pytest.raises(CompressError, match="seqlen 512: the model's context is 256"):
        evaluate(model, text=TEXT, seqlen=512, tokenizer=tokenizer)


def test_nothing_to_evaluate_is_a_usage_error(model):
    with pytest.raises(CompressError, match="nothing to evaluate") as caught:
        evaluate(model)
    assert caught.value.exit_code == 2


def test_a_model_in_memory_needs_its_tokenizer(model):
    with pytest.raises(CompressError, match="needs its tokenizer"):
        evaluate(model, text=TEXT)


def test_a_report_survives_json_and_an_unknown_schema_is_refused():
    rows = task_metrics({"t": {"acc": Score(0.6, 0.01, True, 9)}}, {"t": {"acc": Score(0.75, 0.02, True, 9)}})
    report = EvalReport("small", "large", {"limit": 9}, tuple(rows))
    assert EvalReport.from_json(report.to_json()) == report
    assert report.to_json() == EvalReport.from_dict(json.loads(report.to_json())).to_json()
    with pytest.raises(CompressError, match="schema 2"):
        EvalReport.from_dict({**report.to_dict(), "schema": 2})


def test_the_table_shows_baseline_change_and_errors():
    rows = (
        Metric("perplexity", 11.0, 0.5, 10.0, 0.4, 1.0, 0.1, higher_is_better=False),
        Metric("KL", 0.02),
        *task_metrics({"t": {"acc": Score(0.6, 0.01)}}, {"t": {"acc": Score(0.75, 0.02)}}),
    )
    assert EvalReport("small", "large", {"seqlen": 128, "dtype": "float32"}, rows).render() == (
        "model     small\n"
        "baseline  large\n"
        "seqlen=128 dtype=float32\n"
        "\n"
        "metric              baseline        compressed            change\n"
        "----------  ----------------  ----------------  ----------------\n"
        "perplexity  10.0000 ± 0.4000  11.0000 ± 0.5000  +1.0000 ± 0.1000\n"
        "KL                         -            0.0200                 -\n"
        "t acc        0.7500 ± 0.0200   0.6000 ± 0.0100      80.0% ± 2.5%\n"
    )


def test_importing_evaluation_imports_no_torch():
    code = "import sys, compress.evaluation; print([m for m in ('torch', 'transformers', 'lm_eval') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=EXAMPLES.parent)
    assert done.stdout.strip() == "[]"
