"""The runs behind docs/evidence.md, on the GPUs at hand and within so many seconds.

``first``   SmolLM2 among other questions (``frontier context``), what ``kv`` misses there (``gradient_cosine``), and
            where scores should matter (``noisy``)
``second``  SmolLM2 on question and answer (``frontier answers``), and Qwen among other questions

Models are folders under ``--models``, each with weights or one GGUF file; that is written as safetensors once. A study
has GPUs of its own, the smaller runs share one; each has a log beside the results. What they leave is in ``--work``,
from where the same command goes on.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

MODELS = {"smollm2": "SmolLM2-135M-Instruct", "qwen05b": "Qwen2.5-Coder-0.5B-Instruct"}
PROBLEMS = 3000
"""Of the training problems: more than any arm comes to in its time."""
SMALL_RUNS = 3
"""At a time on one GPU."""
TIMED = "trying learning rates"
"""What a study says when its steps have been timed, and others may use its GPU."""
REPORT_SECONDS = 75.0
"""Kept back of the time, for reports and the archive."""
SMALL = (".json", ".jsonl", ".html", ".log", ".png")


@dataclass
class Job:
    """One run: a module of the benchmarks, its arguments, and the share of the GPUs that it asks for."""

    name: str
    module: str
    arguments: list[str]
    share: float
    model: str = "smollm2"
    stops_itself: bool = False
    gpus: list[int] = field(default_factory=list)


def frontier(setting: str, model: str, share: float, *arguments: str) -> Job:
    """A study of one setting; see :mod:`benchmarks.frontier`."""
    return Job(f"{setting}_{model}", "frontier", [setting, *arguments], share, model, stops_itself=True)


def cosine(name: str, *arguments: str, setting: str = "context") -> Job:
    """A table of cosines, or a training comparison; see :mod:`benchmarks.gradient_cosine`."""
    return Job(name, "gradient_cosine", [setting, "--name", name, *arguments], 0.0)


def jobs(stage: str) -> list[Job]:
    """The runs of a stage, the most telling ones first."""
    fewer = ("--problems", str(PROBLEMS))
    trained = (*fewer, "--train", "60", "--batches", "4")
    quick = (*fewer, "--timing-turns", "1", "--calibration-seconds", "2", "--rate-share", "0.35", "--evaluations", "6",
             "--without", "standard-equal-memory", "kv-0.25-sampled-gradnorm")  # fmt: skip
    if stage == "first":
        return [
            frontier("context", "smollm2", 0.75, "--steps", "45", "--memory-limit", "8GB", "--rates", "1e-4", "2e-4",
                     "--parallel", "5", "--questions", "330", "--eval-sequences", "96", *quick,
                     "--answers-of", "standard-checkpointed", "standard-b6", "kv-supervised"),
            cosine("gradient_cosine_context", *fewer, "--batches", "16"),
            cosine("gradient_training_margins", *trained, "--only", "supervised", "margin 32", "margin 128"),
            Job("noisy", "noisy", ["--steps", "50"], 0.0),
            cosine("gradient_training_layers", *trained, "--only", "lower 0.5 kv", "upper 0.5 kv"),
            cosine("gradient_training_stretches", *trained, "--only", "scattered 0.25", "stretch 32, 0.25"),
            cosine("gradient_cosine_answers", *fewer, "--batches", "16", setting="answers"),
        ]  # fmt: skip
    return [
        frontier("answers", "smollm2", 0.5, "--steps", "90", "--memory-limit", "8GB", "--parallel", "4",
                 "--questions", "660", "--eval-sequences", "256", *quick),
        frontier("context", "qwen05b", 0.5, "--steps", "45", "--batch-size", "8", "--memory-limit", "16GB",
                 "--parallel", "3", "--rates", "1e-5", "3e-5", "1e-4", "--questions", "256", "--eval-sequences", "64",
                 *quick, "kv-0.25-random-stretch32", "exact-0.25-sampled-gradnorm",
                 "--answers-of", "standard-checkpointed", "standard-b3", "kv-supervised"),
    ]  # fmt: skip


def folder_of(work: Path, name: str) -> Path:
    """Where a model stands as safetensors, which every worker loads in a second."""
    return work / "models" / MODELS[name]


def prepare(models: Path, gsm8k: Path, work: Path, name: str) -> None:
    """Write a model's folder, and the texts that are counted in its tokens; a folder that is there is whole."""
    folder = folder_of(work, name)
    if folder.exists():
        return
    from benchmarks.frontier import data_files
    from cggr_train.presets import load_model
    from cggr_train.tokenizer import load_tokenizer

    found = next((path for path in (models / name, models / MODELS[name]) if path.is_dir()), None)
    if found is None:
        raise SystemExit(f"--models {models} has no folder {name} or {MODELS[name]}")
    temporary = folder.with_name(f"{folder.name}.part")
    load_model(str(found)).save_pretrained(temporary)
    ready = models / f"{name}-tokenizer"  # reading one from a GGUF file takes long
    load_tokenizer(str(ready if ready.is_dir() else found)).save_pretrained(temporary)
    (temporary / "README.md").unlink(missing_ok=True)
    named = work / "names" / folder.name  # the texts' folder is called by the model's name
    named.parent.mkdir(parents=True, exist_ok=True)
    named.unlink(missing_ok=True)
    named.symlink_to(temporary.resolve())
    for setting in ("answers", "context"):
        data_files(
            setting, argparse.Namespace(gsm8k=gsm8k, work=work / "runs", model=named, length=None, problems=PROBLEMS)
        )
    temporary.rename(folder)


def log_of(job: Job, arguments: argparse.Namespace) -> Path:
    """What a run says."""
    return arguments.output / f"{job.name}.log"


def start(job: Job, arguments: argparse.Namespace, ends: float) -> subprocess.Popen[bytes]:
    """Start a run on its GPUs."""
    model = str(folder_of(arguments.work, job.model))
    command = [
        sys.executable, "-m", f"benchmarks.{job.module}", *job.arguments, "--model", model, "--gsm8k",
        str(arguments.gsm8k), "--work", str(arguments.work / "runs"), "--results", str(arguments.output),
    ]  # fmt: skip
    if job.stops_itself:
        command += ["--stop-after", str(max(10, round(ends - time.monotonic() - REPORT_SECONDS)))]
    command += arguments.extra
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "true"}
    if torch.cuda.is_available():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = seen.split(",") if seen else [str(number) for number in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[number] for number in job.gpus)
    with log_of(job, arguments).open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def archive(arguments: argparse.Namespace) -> Path:
    """Everything that is small of results, logs and studies, in one file."""
    path = arguments.output / f"frontier_{arguments.stage}.tar.gz"
    with tarfile.open(path.with_suffix(".part"), "w:gz") as tar:
        for root, name in ((arguments.output, "results"), (arguments.work / "runs", "runs")):
            for file in sorted(root.rglob("*")):
                left_out = {"data", "tokenizer"}.intersection(file.parts)
                if file.suffix in SMALL and not left_out and file.stat().st_size < 2**22:
                    tar.add(file, arcname=f"{name}/{file.relative_to(root)}")
    return path.with_suffix(".part").rename(path)


def main() -> None:
    """Run a stage, as many runs at a time as there are GPUs for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("first", "second"))
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--gsm8k", type=Path, required=True, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="results, logs, and an archive of both")
    parser.add_argument("--seconds", type=float, default=570.0, help="after which everything is at an end")
    parser.add_argument("--jobs", nargs="+", metavar="NAME", help="some of the stage's runs")
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="further arguments of every run")
    arguments = parser.parse_args()
    ends = time.monotonic() + arguments.seconds
    arguments.output.mkdir(parents=True, exist_ok=True)
    waiting = [job for job in jobs(arguments.stage) if arguments.jobs is None or job.name in arguments.jobs]
    spawn = multiprocessing.get_context("spawn")
    preparing = {
        name: spawn.Process(target=prepare, args=(arguments.models, arguments.gsm8k, arguments.work, name))
        for name in {job.model for job in waiting}
    }
    for process in preparing.values():
        process.start()
    free = list(range(torch.cuda.device_count() or 1))
    whole, shared = len(free), None
    running: dict[str, tuple[Job, subprocess.Popen[bytes]]] = {}
    told = 0.0
    while (waiting or running) and time.monotonic() < ends - 5:
        for job in list(waiting):
            if preparing[job.model].exitcode != 0:  # not done yet, or it failed
                continue
            small = [other for other, _ in running.values() if not other.share]
            if not job.share and shared is not None and len(small) < SMALL_RUNS:
                job.gpus = [shared]
            elif (job.share or shared is None) and len(free) >= (wanted := max(1, round(job.share * whole))):
                job.gpus, free = free[:wanted], free[wanted:]
                shared = shared if job.share else job.gpus[0]
            elif not (job.share or small or free) and (
                hosts := [host for host, _ in running.values() if TIMED in log_of(host, arguments).read_text()]
            ):
                job.gpus = hosts[0].gpus[:1]  # beside a study, one at a time
            else:
                continue
            waiting.remove(job)
            running[job.name] = job, start(job, arguments, ends)
            print(f"{job.name}: started on GPUs {job.gpus}", flush=True)
        for name, (job, run) in list(running.items()):
            if run.poll() is not None:
                print(f"{name}: ended with {run.returncode}", flush=True)
                del running[name]
                if job.share:
                    free += job.gpus
                elif job.gpus == [shared] and all(other.gpus != [shared] for other, _ in running.values()):
                    free, shared = [*free, *job.gpus], None
        if not running and all(process.exitcode for process in preparing.values()):
            break
        if time.monotonic() - told > 20:
            told = time.monotonic()
            left = round(ends - told)
            for name in running:
                lines = (arguments.output / f"{name}.log").read_text(errors="replace").strip().splitlines()
                print(f"[{left} s left] {name}: {lines[-1][:150] if lines else ''}", flush=True)
        time.sleep(0.5)
    for name, (_, run) in running.items():
        print(f"{name}: out of time", flush=True)
        run.kill()
        run.wait()
    for process in preparing.values():
        process.kill()
    for job in waiting:
        print(f"{job.name}: not run", flush=True)
    print(f"archive {archive(arguments)}", flush=True)


if __name__ == "__main__":
    main()
