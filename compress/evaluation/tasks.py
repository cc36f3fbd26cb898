"""Tasks of the lm-eval harness on a model that is already in memory.

A task folder may hold its own YAML tasks, data beside them. lm-eval gives `data_files` to `datasets` as written,
that is, relative to the working directory; so `local_tasks` writes, into a temporary folder, one YAML per task that
includes the original by its absolute path and overrides only `dataset_kwargs`. `!function` there still works.
"""

from __future__ import annotations

import difflib
import json
import logging
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.evaluation.report import Score

BOOTSTRAP = 1000  # draws for metrics without a closed-form standard error
_FILE_KEYS = ("data_files", "data_dir")
_SURVEYS = ("get_git_commit_hash", "add_env_info")
_FETCHERS = ("datasets", "huggingface_hub", "httpx")


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | float | None = None,
    task_dir: str | Path | None = None,
    batch_size: int = 1,
) -> dict[str, dict[str, Score]]:
    """Score `model` on lm-eval tasks, groups or tags by name: `{task: {metric: Score}}`.

    `limit` keeps the first items of each task (a share below 1). `task_dir` adds a folder of YAML tasks. The softmax is
    float32 whatever the model's dtype; the answers to equal prompts are the same for any batch size up to rounding.
    """
    if limit is not None and limit <= 0:
        raise CompressError(f"limit {limit}: must be positive", usage=True)
    with _quiet(), tempfile.TemporaryDirectory(prefix="compress-tasks-") as scratch:
        manager = _manager(list(tasks), task_dir, Path(scratch))
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        from compress.evaluation.perplexity import evaluating

        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
        with evaluating(model), _random_state():
            try:
                found = simple_evaluate(
                    model=lm,
                    tasks=list(tasks),
                    limit=limit,
                    task_manager=manager,
                    log_samples=False,
                    bootstrap_iters=BOOTSTRAP,
                )
            except Exception as error:
                if not _is_data_error(error):
                    raise
                why = f"{type(error).__name__}: {_first_line(error)}"
                raise CompressError(
                    f"tasks {', '.join(tasks)}: the data could not be loaded ({why})",
                    hint="tasks of the harness come from the Hugging Face hub: check the network and HF_HUB_OFFLINE, "
                    "or use --task-dir with local tasks such as examples/tasks",
                ) from error
    return scores(found)


def scores(found: dict[str, Any]) -> dict[str, dict[str, Score]]:
    """Read lm-eval's `results`: keys are `metric,filter` and `metric_stderr,filter`; the filter `none` goes unnamed."""
    out: dict[str, dict[str, Score]] = {}
    for task, values in found["results"].items():
        samples = values.get("sample_len") or found.get("n-samples", {}).get(task, {}).get("effective")
        directions = found.get("higher_is_better", {}).get(task, {})
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            out.setdefault(task, {})[metric if kind == "none" else key] = Score(
                float(value),
                float(stderr) if isinstance(stderr, int | float) else None,  # "N/A" for a metric without one
                directions.get(metric) is not False,
                int(samples) if samples is not None else None,
            )
    return out


def _manager(tasks: list[str], task_dir: str | Path | None, scratch: Path) -> Any:
    """A TaskManager that knows `tasks`. To scan the harness's own 14,000 takes seconds: only when they are needed."""
    from lm_eval.tasks import TaskManager

    include = None
    if task_dir is not None:
        include = str(local_tasks(Path(task_dir), scratch))
        manager = TaskManager(include_path=include, include_defaults=False)
        if set(tasks) <= set(manager.all_subtasks):
            return manager
    manager = TaskManager(include_path=include)
    known = manager.all_tasks
    for name in tasks:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            raise CompressError(
                f"{name}: no such task",
                hint=f"did you mean {' or '.join(close)}?" if close else "`lm_eval ls tasks` lists the harness's tasks",
                usage=True,
            )
    return manager


def local_tasks(task_dir: Path, scratch: Path) -> Path:
    """Fill `scratch` with a YAML for each one below `task_dir`; data files lie beside the YAML that names them."""
    if not task_dir.is_dir():
        raise CompressError(f"{task_dir}: no such folder", hint="--task-dir takes a folder of lm-eval YAML tasks", usage=True)
    for number, path in enumerate(sorted(task_dir.resolve().rglob("*.yaml"))):
        wrapper: dict[str, Any] = {"include": str(path)}
        settings, folder = _dataset_kwargs(path)
        if settings:
            found = {key: _beside(folder, value) for key, value in settings.items() if key in _FILE_KEYS}
            wrapper["dataset_kwargs"] = {**settings, **found}
        (scratch / f"{number:05d}.yaml").write_text(json.dumps(wrapper), encoding="utf-8")  # JSON is YAML
    return scratch


def _dataset_kwargs(path: Path) -> tuple[dict[str, Any] | None, Path]:
    """The `dataset_kwargs` of a YAML task, and the folder of the file that says so (includes are followed)."""
    import yaml

    class Tolerant(yaml.SafeLoader):
        """Reads `!function` and other tags as nothing."""

    Tolerant.add_multi_constructor("!", lambda loader, suffix, node: None)
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=Tolerant)
    except (OSError, yaml.YAMLError) as error:
        raise CompressError(f"{path}: not readable as YAML ({_first_line(error)})", hint="mend or remove it") from error
    if not isinstance(config, dict):
        return None, path.parent
    if isinstance(config.get("dataset_kwargs"), dict):
        return config["dataset_kwargs"], path.parent
    includes = config.get("include") or []
    for include in reversed(includes if isinstance(includes, list) else [includes]):  # the last one wins
        settings, folder = _dataset_kwargs(path.parent / include)
        if settings:
            return settings, folder
    return None, path.parent


def _beside(folder: Path, value: Any) -> Any:
    """`value` with every relative path that exists in `folder` (or matches there, for a pattern) made absolute."""
    if isinstance(value, dict):
        return {key: _beside(folder, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_beside(folder, item) for item in value]
    if isinstance(value, str) and "://" not in value and not Path(value).is_absolute() and any(folder.glob(value)):
        return str(folder / value)
    return value


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness from warning about what is normal here (a model in memory), and from describing the machine.

    `simple_evaluate` asks git for the working folder's commit, which complains on stderr outside a repository, and
    spends seconds on a survey of the machine. Neither reaches our report.
    """
    from lm_eval import evaluator

    logger = logging.getLogger("lm_eval")
    level = logger.level
    surveys = {name: vars(evaluator)[name] for name in _SURVEYS if name in vars(evaluator)}
    logger.setLevel(logging.ERROR)
    for name in surveys:
        setattr(evaluator, name, lambda *_: None)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, survey in surveys.items():
            setattr(evaluator, name, survey)


@contextmanager
def _random_state() -> Iterator[None]:
    """The harness seeds every global generator, so that runs agree; give them back as they were."""
    import numpy
    import torch

    state, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(state)
        numpy.random.set_state(numpy_state)


def _is_data_error(error: Exception) -> bool:
    """A failed download or a missing file: mostly an OSError, else an error class of the libraries that fetch."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _FETCHERS


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "").strip()
