"""What an evaluation found: numbers with standard errors, beside the baseline's. Pure Python, no torch.

A task's recovery is r = compressed / baseline (the inverse for metrics where less is better). Its standard error is the
delta method's, r · sqrt((s_c / c)² + (s_b / b)²). That takes the two runs as independent; they answer the same items,
so the true error is smaller and the printed one is safe. Perplexities are compared window by window, without this.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from compress.errors import CompressError

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Score:
    """One number that lm-eval returned."""

    value: float
    stderr: float | None = None
    higher_is_better: bool = True
    samples: int | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """One row. `change` is a difference or, where `relative`, a share of the baseline (1.0: nothing lost)."""

    name: str
    value: float
    stderr: float | None = None
    baseline: float | None = None
    baseline_stderr: float | None = None
    change: float | None = None
    change_stderr: float | None = None
    relative: bool = False
    higher_is_better: bool = True
    samples: int | None = None


def recovery(compressed: Score, baseline: Score) -> tuple[float | None, float | None]:
    """What is left of the baseline's score, and its standard error (None where it is not defined)."""
    c, b = compressed.value, baseline.value
    if not compressed.higher_is_better:
        c, b, compressed, baseline = b, c, baseline, compressed
    if b == 0:
        return None, None
    if compressed.stderr is None or baseline.stderr is None:
        return c / b, None
    return c / b, math.hypot(compressed.stderr / b, c * baseline.stderr / b**2)


def task_metrics(
    scores: Mapping[str, Mapping[str, Score]], baseline: Mapping[str, Mapping[str, Score]] | None = None
) -> list[Metric]:
    """Rows for the scores of a model, `{task: {metric: Score}}`, beside the baseline's where there is one."""
    rows = []
    for task, metrics in scores.items():
        for metric, score in metrics.items():
            row = Metric(
                f"{task} {metric}",
                score.value,
                score.stderr,
                relative=True,
                higher_is_better=score.higher_is_better,
                samples=score.samples,
            )
            if before := (baseline or {}).get(task, {}).get(metric):
                left, error = recovery(score, before)
                row = replace(row, baseline=before.value, baseline_stderr=before.stderr, change=left, change_stderr=error)
            rows.append(row)
    return rows


@dataclass(frozen=True, slots=True)
class EvalReport:
    """The whole evaluation: what was compared, under which settings, and one `Metric` per row."""

    model: str
    baseline: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[Metric, ...] = ()

    def __getitem__(self, name: str) -> Metric:
        """The row called `name`, such as `perplexity` or `piqa acc_norm`."""
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise KeyError(f"{name}; the report has {[m.name for m in self.metrics]}")

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self), "metrics": [asdict(m) for m in self.metrics]}

    def to_json(self) -> str:
        """Readable JSON with sorted keys: equal reports give equal bytes."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> EvalReport:
        """Read a stored report; one of another schema is refused."""
        if value.get("schema") != SCHEMA:
            raise CompressError(
                f"evaluation report of schema {value.get('schema')!r}, this version reads {SCHEMA}",
                hint="evaluate again",
            )
        metrics = tuple(Metric(**m) for m in value["metrics"])
        return cls(value["model"], value["baseline"], dict(value["settings"]), metrics)

    @classmethod
    def from_json(cls, text: str) -> EvalReport:
        return cls.from_dict(json.loads(text))

    def render(self) -> str:
        """The report as a plain-text table, one row per metric."""
        names = ["metric", "compressed" if self.baseline else "model"]
        if self.baseline:
            names[1:1] = ["baseline"]
            names.append("change")
        rows = [names]
        for m in self.metrics:
            cells = [m.name, _plus_minus(m.value, m.stderr)]
            if self.baseline:
                cells[1:1] = [_plus_minus(m.baseline, m.baseline_stderr)]
                cells.append(_change(m))
            rows.append(cells)
        head = f"model     {self.model}\n" + (f"baseline  {self.baseline}\n" if self.baseline else "")
        settings = " ".join(f"{key}={self.settings[key]}" for key in _SHOWN if self.settings.get(key) is not None)
        return f"{head}{settings}\n\n{_table(rows)}\n" if settings else f"{head}\n{_table(rows)}\n"


_SHOWN = ("text", "seqlen", "windows", "limit", "dtype", "device")


def _plus_minus(value: float | None, stderr: float | None, pattern: str = "{:.4f}") -> str:
    if value is None:
        return "-"
    return pattern.format(value) + (f" ± {pattern.format(stderr).lstrip('+')}" if stderr is not None else "")


def _change(metric: Metric) -> str:
    if metric.relative:
        return _plus_minus(metric.change, metric.change_stderr, "{:.1%}")
    return _plus_minus(metric.change, metric.change_stderr, "{:+.4f}")


def _table(rows: Iterable[list[str]]) -> str:
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    lines = [[row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)] for row in rows]
    return "\n".join("  ".join(line) for line in lines)
