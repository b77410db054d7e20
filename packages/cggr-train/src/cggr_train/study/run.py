"""A study from start to finish.

```
<study>/settings.json, study.json, arms.json   what was asked for, and what is compared
<study>/tokenizer/, tokens/                     shared by all runs
<study>/results.jsonl                           one record per measurement, as soon as it is done
<study>/runs/<arm>-seed<n>/                     of runs in flight: checkpoints; of the first standard run: its model
<study>/report.html                             tables, plots, verdict
```

Every record is written when its measurement is complete, so a killed study continues with what is missing, and
interrupted runs continue from their checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from cggr_train.checkpoint import latest_checkpoint
from cggr_train.data import TokenStore
from cggr_train.errors import InputError
from cggr_train.exact_match import right_answers
from cggr_train.folder_lock import FolderLock
from cggr_train.learner import build_learner
from cggr_train.log import JsonlLog
from cggr_train.prepare import prepare
from cggr_train.recorded import check_recordable
from cggr_train.study.arms import plan_arms, save_arms
from cggr_train.study.pool import places
from cggr_train.study.settings import STUDY, StudySettings
from cggr_train.study.stages import RESULTS, Stages, StudyResult


def start_study(settings: StudySettings, folder: Path, console: Console) -> StudyResult:
    """Run a study from the beginning.

    Args:
        settings: What to compare.
        folder: The study's folder; made if missing, refused if it already holds a study.
        console: Where progress, table and verdict are shown.

    Raises:
        InputError: If any input is invalid; nothing is measured in that case.
        RunError: If a worker fails, or the standard run diverges.
    """
    where = places(settings.train.device, settings.parallel)
    with FolderLock(folder) as lock:
        lock.take()
        prepare_study(settings, folder, console)
        return Stages(settings, folder, console).run(where)


def prepare_study(settings: StudySettings, folder: Path, console: Console) -> None:
    """Write everything that the workers read: settings, arms, tokenizer, tokens.

    Raises:
        InputError: If any input is invalid.
    """
    from cggr_core.experimental import RememberedScores

    if (folder / STUDY).exists():
        raise InputError(f"{folder} already holds a study; continue it with --resume {folder}, or give another --out")
    if latest_checkpoint(folder / "checkpoints") is not None:
        raise InputError(f"{folder} holds a run of cggr train, whose files a study would overwrite; give another --out")
    where = places(settings.train.device, settings.parallel)
    device = where[0][0]
    _check_fp8(settings, device)
    if settings.train.cuda_graph is True:  # before the text is read
        check_recordable(device, "standard", settings.train.routing)
    model, tokenizer, tokens = prepare(settings.train, folder, console)
    supervised = reached_share(tokens, settings.train.length)
    margins = {margin: reached_share(tokens, settings.train.length, margin) for margin in settings.context_margins}
    if settings.accuracy:  # report what cannot be compared before any training
        rows = torch.from_numpy(tokens.heldout.reshape(-1, settings.train.length).astype("int64"))
        right_answers(rows[: settings.questions], tokenizer, after=settings.answer_after)
    arms = plan_arms(
        settings.train.routing, gradients=settings.gradients, ratios=settings.ratios, selections=settings.selections,
        scorings=settings.scorings, batch_size=settings.train.batch_size, batch_sizes=settings.batch_sizes,
        routers=settings.routers, context_precisions=settings.context_precisions, controls=settings.controls,
        supervised=supervised, context_margins=margins, num_layers=model.config.num_hidden_layers,
    )  # fmt: skip
    for arm in arms:  # refuses invalid input before anything is measured
        memory = RememberedScores.empty(examples=1, length=settings.train.length) if arm.remembers else None
        build_learner(model, arm.method, arm.routing, seed=0, memory=memory)
        if settings.train.cuda_graph is True:
            check_recordable(device, arm.method, arm.routing)
    save_arms(folder, arms)
    JsonlLog(folder / RESULTS).write(event="study", supervised=supervised, **_environment(where))
    settings.save(folder)


def resume_study(folder: Path, console: Console) -> StudyResult:
    """Measure what is missing in ``folder`` and write the report; for a complete study, only write the report.

    Raises:
        InputError: If the folder holds no study.
        RunError: If a worker fails, or the standard run diverges.
    """
    settings = StudySettings.load(folder)
    with FolderLock(folder) as lock:
        lock.take()
        study = Stages(settings, folder, console)
        done = sum(record["event"] == "run" for record in study.records)
        runs = len(study.arms) * settings.seeds
        console.print(f"resuming {folder}: {done} of {runs} runs are done", highlight=False, soft_wrap=True)
        return study.run(places(settings.train.device, settings.parallel))


def _check_fp8(settings: StudySettings, device: torch.device) -> None:
    from cggr_core.backends import has_fp8_products

    if "fp8" in settings.context_precisions and not has_fp8_products(device):
        raise InputError(
            "--context-precision fp8 needs a GPU with FP8 matrix products (compute capability 9.0 or higher), but the "
            f"device is {device}. Emulated FP8 steps are slower, which would distort a comparison at equal time; leave "
            "it out"
        )


def reached_share(tokens: TokenStore, length: int, margin: int = 0) -> float:
    """Share of the predicting positions that are supervised or at most ``margin`` before a supervised one."""
    if tokens.train.dtype.kind == "u":
        return 1.0
    rows = tokens.train[: len(tokens.train) // length * length].reshape(-1, length)
    counts = np.cumsum(rows[:, 1:] >= 0, axis=1, dtype=np.int32)
    # of the positions before each one; a margin does not cross rows
    before = np.pad(np.pad(counts, ((0, 0), (1, 0))), ((0, 0), (0, margin)), mode="edge")
    return float((before[:, margin + 1 :] > before[:, : length - 1]).mean())


def _environment(where: list[tuple[torch.device, int]]) -> dict[str, Any]:
    from cggr_train.doctor import device_name, versions

    return {
        "devices": [device_name(device) for device in dict.fromkeys(device for device, _ in where)],
        "workers": len(where),
        "threads": where[0][1],
        "versions": versions(),
    }
