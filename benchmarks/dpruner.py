"""A model pruned for a domain: perplexity there and on general text; fills the tables of docs/dpruner.md.

    python benchmarks/dpruner.py --model out/SmolLM2-135M-Instruct --general c4.jsonl \\
        --domain medical=medquad/train.jsonl,medquad/valid.jsonl --domain legal=billsum.jsonl [--only "dpruner"] [--ablation]
    python benchmarks/dpruner.py --render

A domain is NAME=CALIBRATION[,EVALUATION], jsonl files with a `text` field; without the second, the last quarter of the first one's
documents is held out. Half of the linears' weights go. Every text gives 16 windows x 512 for calibration ("general + domain": 16
of each); perplexity is of 16 windows x 512, general: WikiText-2's test split. Rows go to benchmarks/results/dpruner.jsonl; what is
there already is not measured again."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jsonl import append, load

import compress
from compress import calibration, fit, running
from compress.checkpoint.reader import CheckpointReader
from compress.methods import dpruner
from compress.methods._masks import keep_highest, zeros
from compress.pipeline.resume import WorkDir, read_kept
from compress.pipeline.survey import Survey
from compress.types import Block

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "dpruner.jsonl"
PAGE = ROOT / "docs" / "dpruner.md"
GENERAL = ROOT / "benchmarks" / "data" / "wikitext2-test-head.txt"
WINDOWS, SEQLEN, EVALUATED, FEW = 16, 512, 16, 6
LITERAL: dict[str, Any] = {"c1": 1.0, "c2": 5e-4, "c3": 1.0, "general_weight": 0.0}
TERMS = {"gW": "\\|g W\\|", "gW2": "c2 (g W)²", "W3": "\\|W³\\|", "penalty": "penalty's share of \\|g W\\|"}
Job = tuple[str, str, dict[str, Any]]
Kept = Mapping[str, torch.Tensor]  # of one linear: its weight W, G as `general`, sums over windows of |gW| and (gW)² as `abs`, `sq`
JOBS: dict[str, Job] = {  # method, its calibration text, options
    "dense": ("", "general", {}),
    **{f"{m}, {text}": (m, text, {}) for text in ("general", "domain", "general + domain") for m in ("sparsegpt", "wanda")},
    "dpruner": ("dpruner", "both", {}),
    "dpruner --scope model": ("dpruner", "both", {"scope": "model"}),
    "dpruner --compensate": ("dpruner", "both", {"compensate": True}),
    "dpruner, the released formula": ("dpruner", "both", LITERAL),
}
MASKS: dict[str, tuple[str, Callable[[Kept], torch.Tensor]]] = {  # scope, score
    "nothing pruned": ("none", lambda k: k["W"]),
    "default: (gW)² and G": ("matrix", lambda k: one(k["sq"]) + one(k["general"])),
    "general_weight 4": ("matrix", lambda k: one(k["sq"]) + 4 * one(k["general"])),
    "general_weight 0": ("matrix", lambda k: k["sq"]),
    "general_weight 0, first order: \\|gW\\|": ("matrix", lambda k: k["abs"]),
    "G alone": ("matrix", lambda k: k["general"]),
    "\\|W\\|": ("matrix", lambda k: k["W"].abs()),
    "(gW)² and G, scope row": ("row", lambda k: one(k["sq"]) + one(k["general"])),
    "(gW)² and G, scope model": ("model", lambda k: k["sq"] + one(k["general"]) * k["sq"].mean()),
}


def split(spec: str, folder: Path) -> tuple[str, Path, Path]:
    """(name, calibration file, evaluation text) of a --domain."""
    name, _, files = spec.partition("=")
    first, _, second = files.partition(",")
    rows = [line for line in Path(first).read_text(encoding="utf-8").splitlines() if line.strip()]
    held = [line for line in Path(second).read_text(encoding="utf-8").splitlines() if line.strip()] if second else []
    if not second:
        cut = len(rows) * 3 // 4
        rows, held = rows[:cut], rows[cut:]
    first_part, rest = folder / f"{name}.jsonl", folder / f"{name}.txt"
    first_part.write_text("\n".join(rows) + "\n", encoding="utf-8")
    rest.write_text("\n\n".join(json.loads(line)["text"] for line in held), encoding="utf-8")
    return name, first_part, rest


def mix(model: Path, texts: list[Path], out: Path) -> Path:
    """The first windows of each text in one file."""
    tokenizer = calibration.load_tokenizer(model)
    parts = []
    for text in texts:
        found = calibration.load(text, tokenizer, nsamples=WINDOWS, seqlen=SEQLEN, seed=None, vocab=1 << 30)
        parts.append(tokenizer.decode(found.tokens.flatten()))
    out.write_text("\n\n".join(parts), encoding="utf-8")
    return out


def make(job: Job, model: Path, general: Path | None, domain: Path, folder: Path) -> tuple[Path, float]:
    """The pruned model of a job, and how long it took."""
    method, text, options = job
    if not method:
        return model, 0.0
    data: dict[str, Any] = {"dataset": general, "nsamples": WINDOWS}
    if text == "domain":
        data["dataset"] = domain
    elif text == "general + domain":
        data = {"dataset": mix(model, [general or calibration.BUILTIN, domain], folder / "mixed.txt"), "nsamples": 2 * WINDOWS}
    elif text == "both":
        data["domain_dataset"] = domain
    out = folder / "out"
    report = compress.prune(model, method, out, seqlen=SEQLEN, sparsity=0.5, **data, **options)
    return out, report.seconds


def perplexity(folder: Path, text: Path) -> float:
    """Of a model on the first windows of a text."""
    value: float = compress.evaluate(folder, text=text, seqlen=SEQLEN, windows=EVALUATED, batch_size=2)["perplexity"].value
    return value


def measure(name: str, job: Job, args: argparse.Namespace, domains: Mapping[str, tuple[Path, Path]]) -> None:
    """Append the rows of one job that are not there yet; a job that reads no domain text is made once."""
    there = {(r["domain"], r["job"]) for r in load(RESULTS)}
    missing = [d for d in domains if (d, name) not in there]
    groups = [[d] for d in missing] if job[1] != "general" else [missing] if missing else []
    for group in groups:
        with tempfile.TemporaryDirectory() as temporary:
            out, seconds = make(job, args.model, args.general, domains[group[0]][0], Path(temporary))
            general = perplexity(out, GENERAL)
            for domain in group:
                found = {"domain_ppl": perplexity(out, domains[domain][1]), "general_ppl": general, "seconds": round(seconds)}
                note({"model": args.model.name, "domain": domain, "job": name, **found})


# -- masks without artifacts: one collection, many scores ----------------------------------------------------------------


def one(x: torch.Tensor) -> torch.Tensor:
    """x at a mean of 1."""
    return x / x.mean().clamp(min=1e-30)


class Sums:
    """`types.Reducer`: sums over the windows of |gW| and (gW)² (O, I)."""

    def __init__(self, block: Block, _config: Any) -> None:
        self._weights, self._sums = block.weights, dict[str, torch.Tensor]()

    def add(self, name: str, x: torch.Tensor, dy: torch.Tensor) -> None:
        t = (dy.float().T @ x.float()).mul_(self._weights[name].float())
        for key, value in ((f"abs:{name}", t.abs()), (f"sq:{name}", t.square())):
            self._sums[key] = self._sums[key].add_(value) if key in self._sums else value

    def result(self) -> dict[str, torch.Tensor]:
        return self._sums


def collect(model: Path, general: Path | None, domain: Path, where: Path) -> None:
    """Survey and reverse walk into a work folder, which stays."""
    texts = {"dataset": general, "domain_dataset": domain, "nsamples": 2 * WINDOWS, "samples": 2 * WINDOWS, "seqlen": SEQLEN}
    ask = fit._ask(texts)
    ready = fit._prepare(model, "dpruner", "prune", ask)
    work = WorkDir(where, ready.mark, restart=False)
    run = running.Run(ready.job, ask, work, ready.tokens, ready.domain)
    run.survey = Survey(run._walk(run.tokens), work.path / "survey", work.job)
    run.survey.run()
    dpruner.reducer = Sums  # type: ignore[assignment]
    run._gradients()
    work.close()


def linears(model: Path, where: Path) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Every linear's name and what was collected of it, a block at a time."""
    reader = CheckpointReader(model)
    for index, path in enumerate(sorted((where / "reverse").glob("block-*.safetensors"))):
        kept = {**read_kept(path), **read_kept(where / "survey" / path.name)}
        for name in [key.removeprefix("sq:") for key in kept if key.startswith("sq:")]:
            full = f"model.layers.{index}.{name}"
            own = {key: kept[f"{key}:{name}"] for key in ("abs", "sq", "general")}
            yield full, {**own, "W": reader.read(f"{full}.weight").float()}


def masks(model: Path, where: Path, job: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every linear's pruned weight."""
    scope, score = MASKS[job]
    limit = 0.0
    if scope == "model":
        values = torch.cat([score(kept).flatten() for _, kept in linears(model, where)])
        limit = float(values.kthvalue(len(values) // 2).values)
    for name, kept in linears(model, where):
        if scope == "none":
            yield name, kept["W"]
            continue
        found = score(kept)
        flat = found if scope == "row" else found.view(1, -1)
        mask = found > limit if scope == "model" else keep_highest(flat, zeros(0.5, flat.shape[1])).view(found.shape)
        yield name, kept["W"] * mask


def ablation(args: argparse.Namespace, domain: str, files: tuple[Path, Path], wanted: list[str]) -> None:
    """Perplexity of every mask on a few windows; what was collected lies in --kept."""
    from transformers import AutoModelForCausalLM

    where = args.kept / domain
    if not (where / "reverse" / "block-00000.safetensors").exists():
        collect(args.model, args.general, files[0], where)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), calibration.load_tokenizer(args.model)
    there = {(r["domain"], r["job"]) for r in load(RESULTS)}
    if (domain, "terms") not in there:
        note({"model": args.model.name, "domain": domain, "job": "terms", "terms": terms(args.model, where)})
    for job in [j for j in wanted if (domain, j) not in there]:
        for name, W in masks(args.model, where, job):
            model.get_submodule(name).weight.data.copy_(W)
        values = [
            compress.evaluate(model, text=t, tokenizer=tokenizer, seqlen=SEQLEN, windows=FEW, batch_size=2)["perplexity"].value
            for t in (files[1], GENERAL)
        ]
        note({"model": args.model.name, "domain": domain, "job": job, "domain_ppl": values[0], "general_ppl": values[1]})


# -- rows and tables -------------------------------------------------------------------------------------------------------


def note(row: dict[str, Any]) -> None:
    """Append a row."""
    append(RESULTS, row)
    print(*(round(v, 3) if isinstance(v, float) else v for v in row.values()), file=sys.stderr, flush=True)


def terms(model: Path, where: Path) -> dict[str, list[float]]:
    """Least, median and greatest over the linears of the mean size of each term of the released formula, per window."""
    config, found = dpruner.Config(**LITERAL), dict[str, list[float]]()
    for _, kept in linears(model, where):
        W, windows = kept["W"].abs().clamp(min=1e-12), 2 * WINDOWS
        first = float(kept["abs"].mean()) / windows
        penalty = float((kept["general"] * kept["sq"] / W).mean()) / windows * config.penalty
        second = config.c2 * float(kept["sq"].mean()) / windows
        for key, value in (("gW", first), ("gW2", second), ("W3", float(W.pow(3).mean())), ("penalty", penalty / first)):
            found.setdefault(key, []).append(value)
    return {key: [f(values) for f in (min, statistics.median, max)] for key, values in found.items()}


def sizes(rows: list[dict[str, Any]]) -> str:
    """The table of the terms' sizes in the released formula."""
    lines = ["| | least | median | greatest |", "| --- | --- | --- | --- |"]
    for row in (r for r in rows if r["job"] == "terms"):
        for key, name in TERMS.items():
            lines.append(f"| {name}, {row['domain']} | " + " | ".join(f"{v:.1e}" for v in row["terms"][key]) + " |")
    return "\n".join(lines)


def render(rows: list[dict[str, Any]], jobs: Mapping[str, Any]) -> str:
    """One table: jobs down, domains across, perplexity there and on general text."""
    domains = list(dict.fromkeys(r["domain"] for r in rows if r["job"] in jobs))
    lines = ["| | " + " | ".join(f"{d} | general" for d in domains) + " |", "| --- |" + " --- | --- |" * len(domains)]
    for job in jobs:
        found = {r["domain"]: r for r in rows if r["job"] == job}
        cells = [f"{found[d]['domain_ppl']:.2f} | {found[d]['general_ppl']:.2f}" if d in found else " | " for d in domains]
        if found:
            lines.append(f"| {job} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(page: str, which: str, table: str) -> str:
    """The page with one of its tables replaced."""
    begin, end = f"<!-- begin: {which} -->", f"<!-- end: {which} -->"
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="a model pruned for a domain")
    parser.add_argument("--model", type=Path, default=ROOT / "out" / "SmolLM2-135M-Instruct")
    parser.add_argument("--general", type=Path, help="general calibration text; default: the built-in one")
    parser.add_argument("--domain", action="append", default=[], help="NAME=CALIBRATION[,EVALUATION]")
    parser.add_argument("--only", help="names of jobs, separated by semicolons")
    parser.add_argument("--ablation", action="store_true", help="the scores, not the methods")
    parser.add_argument("--kept", type=Path, default=ROOT / "out" / "dpruner", help="folder of what --ablation collects")
    parser.add_argument("--render", action="store_true", help="only write the tables into docs/dpruner.md")
    args = parser.parse_args()
    if args.render:
        page = write(write(PAGE.read_text(), "methods", render(load(RESULTS), JOBS)), "terms", sizes(load(RESULTS)))
        PAGE.write_text(write(page, "ablation", render(load(RESULTS), MASKS)))
        return
    wanted = [n.strip() for n in args.only.split(";")] if args.only else list(MASKS if args.ablation else JOBS)
    with tempfile.TemporaryDirectory() as folder:
        domains = {name: (first, rest) for name, first, rest in (split(spec, Path(folder)) for spec in args.domain)}
        if args.ablation:
            for name, files in domains.items():
                ablation(args, name, files, wanted)
            return
        for name in wanted:
            measure(name, JOBS[name], args, domains)


if __name__ == "__main__":
    main()
