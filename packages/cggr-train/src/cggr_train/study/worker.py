"""A process that runs a study's measurements one after the other, as requested on its standard input.

``python -m cggr_train.study.worker FOLDER DEVICE THREADS PARENT`` reads one JSON object per line, each with ``do`` and
the arguments of that measurement, and prints JSON objects: any number of ``{"event": "progress", …}``, then
``{"event": "result", …}``, ``{"event": "stopped"}`` or ``{"event": "error", …}``. It ends with its standard input, and
immediately if PARENT, the process that started it, is gone, so that it cannot write into the folder of a resumed study.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from cggr_train.errors import InputError, RunError
from cggr_train.interrupt import StopRequest
from cggr_train.memory import free_memory, is_out_of_memory
from cggr_train.study.context import StudyContext
from cggr_train.study.estimators import compare_gradients
from cggr_train.study.fitting import fit_arm
from cggr_train.study.kept import kept_shares
from cggr_train.study.timing import time_steps
from cggr_train.study.training import train_run

Tell = Callable[..., None]

PARENT_SECONDS = 0.25


def serve(context: StudyContext, requests: TextIO, tell: Tell, stop: Callable[[], bool]) -> None:
    """Answer every request; see the module's description."""
    for line in requests:
        request: dict[str, Any] = json.loads(line)
        try:
            result = answer(context, request, tell, stop)
        except (InputError, RunError) as error:
            tell("error", kind="input" if isinstance(error, InputError) else "run", message=str(error))
            continue
        if result is None:
            tell("stopped")
            return
        tell("result", result=result)


def answer(
    context: StudyContext, request: dict[str, Any], tell: Tell, stop: Callable[[], bool]
) -> dict[str, Any] | None:
    """Handle one request; if memory runs out, the result is ``out_of_memory`` with a message."""
    try:
        return _measure(context, request, tell, stop)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        words = str(error).split(". ")[0].splitlines()
    free_memory(context.device)  # the error, and the step's tensors with it, has been released by now
    return {"out_of_memory": words[0] if words else "memory ran out"}


def _measure(
    context: StudyContext, request: dict[str, Any], tell: Tell, stop: Callable[[], bool]
) -> dict[str, Any] | None:
    arms = [dataclasses.replace(context.arms[name], **request.get("changes", {})) for name in request["arms"]]
    weights = Path(request["weights"]) if request.get("weights") else None
    match request["do"]:
        case "time":
            return time_steps(context, arms[0], seconds=request["seconds"])
        case "train":
            return train_run(
                context, arms[0], request["seed"], points=request["points"], warmup_steps=request["warmup_steps"],
                eval_sequences=request["eval_sequences"],
                save_model=request["save_model"], stop=stop, accuracy_at=request.get("accuracy_at"),
                tuning=request.get("tuning", False),
                tell=lambda **values: tell("progress", **values),
            )  # fmt: skip
        case "fit":
            return fit_arm(context, arms[0], limit=request["limit"])
        case "gradients":
            return compare_gradients(context, arms[0], weights=weights, seed=request["seed"])
        case "kept":
            assert weights is not None
            return {"arms": kept_shares(context, arms, weights=weights, seed=request["seed"])}
        case unknown:
            raise ValueError(f"the request {unknown!r} is not one of time, train, fit, gradients and kept")


def exit_with_parent(parent: int) -> None:
    """End this process when its parent changes."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


def main(folder: str, device: str, threads: str, parent: str) -> None:
    """Serve the study in ``folder`` until the standard input ends."""
    from transformers.utils.logging import disable_progress_bar

    threading.Thread(target=exit_with_parent, args=(int(parent),), daemon=True).start()
    disable_progress_bar()
    # library output goes to stderr: stdout is reserved for answers
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(int(threads))
    where = torch.device(device)
    if where.index is not None:
        torch.accelerator.set_device_index(where.index)

    def tell(event: str, **values: Any) -> None:
        answers.write(json.dumps({"event": event, **values}) + "\n")
        answers.flush()

    with StopRequest() as stop:
        try:
            serve(StudyContext(Path(folder), where), sys.stdin, tell, lambda: stop.requested)
        except BrokenPipeError:
            sys.exit(1)  # the requester is gone


if __name__ == "__main__":
    main(*sys.argv[1:])
