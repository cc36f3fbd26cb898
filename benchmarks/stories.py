"""The shipped checkpoint at groups of 32: RTN, AWQ and AWQ --quality on held-out TinyStories text.

    python benchmarks/stories.py

Calibration: the first 32 windows x 256 of examples/data/tinystories-calibration.txt. Evaluation: every window x 256 of
tinystories-valid.txt, float32, exact path. The official llm-awq code under the same protocol (tests/golden) is printed beside.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import compress

ROOT = Path(__file__).resolve().parents[1]
MODEL, DATA = ROOT / "examples" / "stories15M", ROOT / "examples" / "data"


def main() -> None:
    golden = json.loads((ROOT / "tests" / "golden" / "awq_stories15M.json").read_text())["end_to_end"]
    text = DATA / "tinystories-valid.txt"
    calibration = {"dataset": DATA / "tinystories-calibration.txt", "nsamples": 32, "seqlen": 256}
    dense = compress.evaluate(MODEL, text=text, batch_size=9)["perplexity"].value
    print(f"dense                 {dense:8.3f}   official evaluation {golden['dense']['perplexity']:.3f}")
    with tempfile.TemporaryDirectory() as folder:
        for bits in (4, 3):
            jobs = {
                "rtn": ("rtn", {}),
                "awq": ("awq", calibration),
                "awq --quality": ("awq", {**calibration, "quality": True}),
            }
            for name, (method, options) in jobs.items():
                out = Path(folder) / f"{name}-{bits}"
                report = compress.quantize(MODEL, method, out, bits=bits, group_size=32, **options)
                value = compress.evaluate(out, text=text, batch_size=9)["perplexity"].value
                theirs = golden.get(f"{name.split()[0]}_w{bits}", {}).get("perplexity", float("nan"))
                print(f"{name:14s} W{bits} g32 {value:8.3f}   llm-awq {theirs:8.3f}   {report.seconds:5.1f} s", flush=True)


if __name__ == "__main__":
    main()
