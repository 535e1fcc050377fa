"""``tqcompile eval --tasks``: tasks of EleutherAI's lm-evaluation-harness, where it is installed."""

import importlib.util
from pathlib import Path
from typing import Any

from rich.console import Console

from tqcompile.commands import files
from tqcompile.commands.evaluate import check_causal
from tqcompile.errors import ConfigError


def run(
    directory: Path,
    tasks: list[str],
    limit: int | None,
    dtype: str = "auto",
    device: str = "cpu",
    json: Path | None = None,
) -> dict[str, Any]:
    """Results of ``tasks`` as the harness gives them: task -> metric -> value.

    Raises:
        ConfigError: lm_eval is not installed, no task is named, or it has no such task. ModelError: no causal language
            model.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs lm-eval, which is not installed here: pip install lm-eval")
    if not tasks or not all(tasks):
        raise ConfigError("--tasks names no task; pass names of lm-eval like arc_easy,hellaswag")
    settings = files.read_settings(directory)
    check_causal(settings, directory)
    files.check_file(json, "--json")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:  # before the weights are read
        raise ConfigError(f"--tasks: lm-eval has no task {', '.join(unknown)}; `lm-eval ls tasks` lists them")
    model, tokenizer = files.load_model(directory, dtype, device), files.load_tokenizer(directory)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    found = lm_eval.simple_evaluate(model=wrapped, tasks=tasks, limit=limit, task_manager=manager)
    result = {
        "model": str(directory),
        "quantized": files.is_quantized(settings),
        "limit": limit,
        "lm_eval": getattr(lm_eval, "__version__", None),
        "results": found["results"],
    }
    console = Console(highlight=False, markup=False)
    for task, metrics in result["results"].items():
        numbers = (f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))
        console.print(f"{task}: {', '.join(numbers)}")
    files.write_json(json, result)
    return result
