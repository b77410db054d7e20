"""Judges one class: CGGR matches transformers and the autograd reference, refuses the class, or fails."""

import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import cggr_core
from cggr_core import CGGRModel, Selection, loss_coefficients
from cggr_core.routing.architectures import describe
from cggr_core.targets import align_labels
from tests.support.reference_routing import gradients, reference_loss, relative_error
from tests.support.sweep.cases import LENGTHS, Case, cases, kept_tokens, one_document_a_row
from tests.support.sweep.tiny import tiny_model

ENGINES = ("interleaved", "two_pass")
ROUTED = tuple((gradient, engine) for gradient in ("kv", "detached") for engine in ENGINES)
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4
_CORE = str(Path(cggr_core.__file__).parent)
Step = tuple[Tensor, dict[str, Tensor]]


def judge(name: str, model_type: str, *, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> dict[str, Any]:
    """Try one class on every case.

    Args:
        name: The class.
        model_type: Its type.
        lengths: Of the cases.
        seed: Of weights and texts.

    Returns:
        JSON-ready: ``class``, ``model_type``, ``built`` (``None``, or why not) and ``found``, a list of mappings with
        ``mode`` (``"exact"``, ``"kv interleaved"``, ...), ``layout``, ``length``, ``verdict`` (``"exact"``,
        ``"refused"``, ``"wrong"``, or ``"none"`` where there is nothing to compare with) and ``detail``.
    """
    report: dict[str, Any] = {"class": name, "model_type": model_type, "built": None, "found": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = tiny_model(name, model_type, seed=seed)
            _plain(model, next(cases(lengths, seed=seed)))
        except Exception as error:  # whatever a model of a class that nobody has seen before may raise
            report["built"] = _said(error)
            return report
        for case in cases(lengths, seed=seed):
            for mode, verdict, detail in _judge_case(model, case, seed):
                line = {"mode": mode, "layout": case.layout, "length": case.length}
                report["found"].append({**line, "verdict": verdict, "detail": detail})
    return report


def _judge_case(model: PreTrainedModel, case: Case, seed: int) -> list[tuple[str, str, str]]:
    modes = ["exact", *(f"{gradient} {engine}" for gradient, engine in ROUTED)]
    try:
        plain, again = _plain(model, case), _plain(model, case)
    except Exception as error:
        return [(mode, "none", f"the model itself does not run: {_said(error)}") for mode in modes]
    if not bool(plain[0].isfinite()) or _difference(plain, again):
        return [(mode, "none", "the model itself gives no number, or another one each time") for mode in modes]
    found = [("exact", *_verdict(lambda: _step(CGGRModel(model, gradient="exact", min_tokens_ratio=1.0), case), plain))]
    references: dict[str, Step | str] = {}
    for gradient, engine in ROUTED:
        if gradient not in references:
            references[gradient] = _reference(model, case, gradient, seed)
        # Without a reference CGGR keeps tokens of its own choice: whether it refuses is still seen.
        chosen = {} if isinstance(references[gradient], str) else {"selection": _selection(model, case, seed)}

        def routed(gradient: str = gradient, engine: str = engine, chosen: dict[str, Any] = chosen) -> Step:
            return _step(CGGRModel(model, gradient=gradient, engine=engine, selection="random"), case, **chosen)

        found.append((f"{gradient} {engine}", *_verdict(routed, references[gradient])))
    return found


def _verdict(run: Callable[[], Step], wanted: Step | str) -> tuple[str, str]:
    try:
        torch.manual_seed(0)
        step = run()
    except (ValueError, TypeError, NotImplementedError) as error:
        if traceback.extract_tb(error.__traceback__)[-1].filename.startswith(_CORE):
            return "refused", str(error)
        return "wrong", _said(error)
    except Exception as error:
        return "wrong", _said(error)
    if isinstance(wanted, str):
        return "none", wanted
    difference = _difference(step, wanted)
    return ("wrong", difference) if difference else ("exact", "")


def _difference(found: Step, wanted: Step) -> str:
    error = float((found[0] - wanted[0]).abs() / wanted[0].abs().clamp(min=1e-6))
    if not error <= LOSS_TOLERANCE:
        return f"loss {float(found[0]):.6g}, expected {float(wanted[0]):.6g}"
    error = relative_error(found[1], wanted[1])
    if not error <= GRADIENT_TOLERANCE:
        return f"gradients differ by {error:.1e} of their norm"
    return ""


def _plain(model: PreTrainedModel, case: Case) -> Step:
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    loss = model(**case.inputs, labels=case.labels).loss
    loss.backward()
    return loss.detach(), gradients(model)


def _step(wrapped: CGGRModel, case: Case, **more: Any) -> Step:
    wrapped.model.zero_grad(set_to_none=True)
    loss = wrapped(labels=case.labels, **case.inputs, **more)
    loss.backward()
    return loss.detach(), gradients(wrapped.model)


def _aligned(model: PreTrainedModel, case: Case) -> Any:
    """Targets as the model's own loss takes them, whatever CGGR thinks of it."""
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**case.inputs, labels=case.labels)
    # At starting weights both alignments give nearly the same loss: the nearer one is the model's.
    found = []
    for shifted in (True, False):
        targets = align_labels(case.labels, shifted=shifted, vocab_size=10**6)
        nll = torch.nn.functional.cross_entropy(output.logits.transpose(1, 2), targets.tokens, reduction="none")
        loss = (nll * targets.countable).sum() / targets.countable.sum()
        if torch.allclose(loss, output.loss, rtol=1e-4):
            found.append((float((loss - output.loss).abs()), targets))
    if found:
        return min(found, key=lambda pair: pair[0])[1], describe(model)
    raise ValueError("the model's own loss is not the mean cross-entropy of its logits, shifted or not")


def _selection(model: PreTrainedModel, case: Case, seed: int) -> Selection:
    countable = _aligned(model, case)[0].countable
    mask, weight = kept_tokens(countable, seed=seed)
    return Selection.from_mask(mask, weight=weight, countable=countable, capacity=int(mask.sum(1).max()))


def _reference(model: PreTrainedModel, case: Case, gradient: str, seed: int) -> Step | str:
    """The step by autograd, or why there is none."""
    try:
        targets, architecture = _aligned(model, case)
        selection = _selection(model, case, seed)
        coefficients = torch.zeros(case.labels.shape).scatter_(
            1, selection.index, loss_coefficients(selection, targets.countable)
        )
        everything = coefficients, targets.tokens
        kept, tokens, inputs = selection.mask, targets.tokens, case.inputs
        if gradient == "detached" and case.layout == "packed":  # with the reference's cache nobody looks for packing
            inputs, (kept, coefficients, tokens) = one_document_a_row(case, kept, coefficients, tokens)
        torch.manual_seed(0)
        loss, _ = reference_loss(model, architecture.layers, kept, coefficients, tokens, gradient=gradient, **inputs)
        torch.manual_seed(0)
        with torch.no_grad():
            expected, _ = reference_loss(
                model, architecture.layers, selection.mask, *everything, gradient="exact", **case.inputs
            )
        if not torch.allclose(loss, expected, rtol=1e-4):
            return "the model gives other logits where the reference stops gradients"
        loss.backward()
    except Exception as error:
        model.zero_grad(set_to_none=True)
        return f"the reference does not run: {_said(error)}"
    return loss.detach(), gradients(model)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
