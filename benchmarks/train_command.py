"""Steps of ``cggr train`` with and without captured passes: their time throughout a run, and whether they train alike.

``python -m benchmarks.train_command --model FOLDER --data train.jsonl --field question,answer`` (one CUDA device)
trains a model with each method, first with ``--no-cuda-graph`` and then with the command's default, and compares losses
and the time per step of every 20 steps. ``--config nano --device cpu`` tries the script out.
"""

import argparse
import io
import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from benchmarks import _record
from cggr_train.fine_tuning import defaults, local_model
from cggr_train.learner import Routing
from cggr_train.log import read_log
from cggr_train.presets import load_model
from cggr_train.run import start_run
from cggr_train.settings import TrainSettings
from cggr_train.tokenizer import load_tokenizer

WINDOW = 20
"""Number of steps per log record, and per time in the result."""
METHODS: dict[str, tuple[str, Routing]] = {
    "standard": ("standard", Routing()),
    "kv, supervised tokens": ("cggr", Routing("kv", selection="supervised")),
    "kv, random quarter": ("random", Routing("kv", 0.25)),
    "kv, sampled quarter": ("cggr", Routing("kv", 0.25, "sampled", "gradnorm")),
}
GRAPHS = {"one operation at a time": False, "by default": "auto"}


def trained(options: argparse.Namespace, method: str, routing: Routing, cuda_graph: Any) -> dict[str, Any]:
    """Losses and seconds of a step in each window, and the peak memory of a run."""
    model = options.model
    chosen = defaults(model, learning_rate=None, weight_decay=None, field=options.field, answer=None)
    settings = TrainSettings(
        data=tuple(options.data), model=model, config=None if model else options.config, field=chosen.field,
        answer=chosen.answer, method=method, routing=routing, length=options.length, batch_size=options.batch,
        steps=options.steps, learning_rate=chosen.learning_rate, weight_decay=chosen.weight_decay, log_every=WINDOW,
        eval_every=10**6, save_every=10**6, eval_sequences=options.batch, device=options.device, cuda_graph=cuda_graph,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        start_run(settings, Path(folder) / "run", Console(file=io.StringIO()))
        log = [record for record in read_log(Path(folder) / "run" / "log.jsonl") if record["event"] == "train"]
    ends = [0.0, *(record["seconds"] for record in log)]
    seconds = [(after - before) / WINDOW for before, after in itertools.pairwise(ends)]
    return {
        "losses": [record["loss"] for record in log],
        "windows": seconds,
        "peak": log[-1]["peak_memory_bytes"],
    }


def weights_ready(folder: str, saved: Path) -> str:
    """The model of a folder saved as safetensors: transformers takes half a minute over a GGUF file, at every run."""
    source = local_model(folder)
    load_model(source).save_pretrained(saved)
    load_tokenizer(source).save_pretrained(saved)
    return str(saved)


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of a model; without it, one is trained from scratch")
    parser.add_argument("--config", default="nano", help="size of that one")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--field", default="text", help="with question,answer, only the answers are supervised")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--name", default="train_command")
    parser.add_argument("--output", type=Path, default=_record.RESULTS, help="folder of the result")
    _record.add_seconds(parser)
    options = parser.parse_args()
    disable_progress_bar()
    until = _record.deadline(options.seconds)
    named = options.config if options.model is None else Path(options.model).name
    with tempfile.TemporaryDirectory() as folder:
        if options.model is not None:
            options.model = weights_ready(options.model, Path(folder))
            print("the weights are ready", flush=True)
        _compare(options, named, until)


def _compare(options: argparse.Namespace, named: str, until: float) -> None:
    rows: dict[str, dict[str, Any]] = {}
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    settings = {"seed": 0, "model": named, "data": [Path(path).name for path in options.data]}
    settings |= {key: getattr(options, key) for key in ("field", "length", "batch", "steps", "methods")}
    for name in options.methods:
        method, routing = METHODS[name]
        before: dict[str, Any] | None = None
        for graph, value in GRAPHS.items():
            if rows and _record.is_over(until):
                return
            run = trained(options, method, routing, value)
            windows = run["windows"]
            late = windows[len(windows) // 2 :]  # by then, everything is compiled and captured that will be
            row = {"unit": "s", **_record.summary(late), "windows": windows, "total": sum(windows) * WINDOW}
            row |= {"losses": run["losses"], "peak_memory_bytes": run["peak"]}
            if before is not None:
                earlier = before["windows"]
                row["speedup"] = statistics.median(earlier[len(earlier) // 2 :]) / statistics.median(late)
                row["speedup_of_all_steps"] = sum(earlier) / sum(windows)
                pairs = zip(run["losses"], before["losses"], strict=True)
                row["largest_relative_difference_of_losses"] = max(abs(a - b) / abs(b) for a, b in pairs)
            before = run
            rows[f"{name}, {graph}"] = row
            _record.write(options.name, rows, settings=settings, control=next(iter(rows)), device=device,
                          folder=options.output)  # fmt: skip
            draw(_record.load(options.name, folder=options.output), options.output / f"{options.name}.png")
            told = {key: row[key] for key in ("speedup", "speedup_of_all_steps") if key in row}
            times = " ".join(f"{seconds * 1e3:.0f}" for seconds in windows)
            print(f"{name}, {graph}: {row['median'] * 1e3:.1f} ms, by window: {times} {told or ''}", flush=True)


def draw(result: dict[str, Any], path: Path) -> None:
    """Plot the time per step of every window of steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.subplots()
    looks = itertools.product(range(len(METHODS)), ("--", "-"))
    for (name, row), (method, look) in zip(result["rows"].items(), looks, strict=False):
        steps = [WINDOW * (number + 1) for number in range(len(row["windows"]))]
        axes.plot(steps, [1e3 * seconds for seconds in row["windows"]], look, color=f"C{method}", label=name)
    axes.set_xlabel("step")
    axes.set_ylabel(f"ms per step, mean of {WINDOW}")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{result['benchmark']}: {result['environment']['device']}", fontsize=9, loc="left")
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
