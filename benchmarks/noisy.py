"""Data on which scores should help: text of another domain mixed in, and wrong answers to questions.

``domain`` GSM8K with a third of the sequences replaced by Python source; questions and answers are supervised
``labels`` questions of GSM8K, a tenth of whose answers are another question's; the answers are supervised

The measure is the held-out loss on clean GSM8K. The reference model of ``excess`` is the same model, trained on as much
clean text from the other half of the problems. Every arm takes as many steps as cost the same as the standard arm's (by
the table of gradient modes); the clean arm, without noise, is the upper limit. Unweighted arms average over the
highest-scoring tokens only: weights would bring the noise back in. The same command continues with the seeds missing
from its result.
"""

import argparse
import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import _record
from benchmarks.gsm8k import read_problems
from cggr_core import CGGRModel
from cggr_core.experimental import RememberedScores
from cggr_train.data import IGNORED, split_supervised
from cggr_train.data.supervision import unsupervised
from cggr_train.demo.corpus import standard_library
from cggr_train.device import pick_device
from cggr_train.evaluate import heldout_loss
from cggr_train.presets import load_model
from cggr_train.tokenizer import load_tokenizer

SHARE = {"domain": 1 / 3, "labels": 0.1}


@dataclass(frozen=True)
class Arm:
    """How to train: arguments of ``CGGRModel``, the cost of a step in forwards, and whether its text is clean."""

    options: dict[str, Any]
    cost: float
    clean: bool = False
    remembers: bool = False


def arms(ratio: float) -> dict[str, Arm]:
    """Everything that is compared."""
    every = {"gradient": "exact", "min_tokens_ratio": 1.0, "selection": "random"}
    excess = {"min_tokens_ratio": ratio, "scoring": "excess"}
    best = {**excess, "selection": "topk", "unbiased": False}
    return {
        "standard": Arm(every, 3),
        "standard, clean": Arm(every, 3, clean=True),
        "random, kv": Arm({"gradient": "kv", "min_tokens_ratio": ratio, "selection": "random"}, 1 + 2 * ratio),
        "highest excess, exact": Arm({**best, "gradient": "exact"}, 3),
        "highest excess, kv": Arm({**best, "gradient": "kv"}, 1 + 3 * ratio),
        "sampled by excess, weighted, kv": Arm({**excess, "gradient": "kv", "selection": "sampled"}, 1 + 3 * ratio),
        "sampled by remembered excess, kv": Arm(
            {**excess, "gradient": "kv", "selection": "sampled", "unbiased": False}, 1 + 2 * ratio, remembers=True
        ),
    }


class Rows(NamedTuple):
    """Sequences ``[N, S]``, unsupervised tokens as :mod:`cggr_train.data.supervision` writes them."""

    train: Tensor
    clean: Tensor
    reference: Tensor
    heldout: Tensor


def make_rows(kind: str, arguments: argparse.Namespace, tokenizer: Any, seed: int) -> Rows:
    """The noisy training text, the same without noise, the reference model's, and the held-out text."""
    train, test = (read_problems(arguments.gsm8k / f"{name}.jsonl") for name in ("train", "test"))
    generator = random.Random(seed)
    generator.shuffle(train)
    number, length = min(arguments.sequences, len(train) // 2), arguments.length

    def row(problem: dict[str, str], answer: str) -> Tensor:
        prompt, said = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (
            problem["question"] + "\n", answer))  # fmt: skip
        ids = [*prompt, *said, tokenizer.eos_token_id][:length]
        found = unsupervised(torch.full((length,), tokenizer.eos_token_id))
        found[: len(ids)] = torch.tensor(ids)
        if kind == "labels":
            found[: len(prompt)] = unsupervised(found[: len(prompt)])
        return found

    own, other = train[:number], train[number : 2 * number]
    clean = torch.stack([row(problem, problem["answer"]) for problem in own])
    noisy = clean.clone()
    wrong = generator.sample(range(number), max(2, round(number * SHARE[kind])))
    if kind == "labels":
        for place, source in zip(wrong, [*wrong[1:], wrong[0]], strict=True):
            noisy[place] = row(own[place], own[source]["answer"])
    else:
        text = "\n\n".join(standard_library(max_characters=max(200_000, 6 * len(wrong) * length)))
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        starts = torch.randint(len(ids) - length, (len(wrong),), generator=torch.Generator().manual_seed(seed))
        for place, start in zip(wrong, starts.tolist(), strict=True):
            noisy[place] = torch.tensor(ids[start : start + length])
    heldout = [row(problem, problem["answer"]) for problem in test[: arguments.eval_sequences]]
    reference = [row(problem, problem["answer"]) for problem in other]
    return Rows(noisy, clean, torch.stack(reference), torch.stack(heldout))


@torch.no_grad()
def reference_nll(model: nn.Module, rows: Tensor, batch_size: int, device: torch.device) -> Tensor:
    """float32 ``[N, S]`` on the CPU: at each position, the nll of the next token, 0 where there is none."""
    model.eval()
    found = torch.zeros(rows.shape)
    for start in range(0, len(rows), batch_size):
        input_ids, labels = split_supervised(rows[start : start + batch_size].to(device))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        predicts = labels[:, 1:] != IGNORED
        losses = nn.functional.cross_entropy(logits[predicts].float(), labels[:, 1:][predicts], reduction="none")
        found[start : start + batch_size, :-1] = torch.zeros(predicts.shape, device=device).masked_scatter(
            predicts, losses
        ).cpu()  # fmt: skip
    return found


def train(
    base: nn.Module, arm: Arm, rows: Tensor, nll: Tensor | None, arguments: argparse.Namespace, seed: int, device: Any
) -> nn.Module:
    """A copy of the model, trained."""
    model: Any = copy.deepcopy(base).train()
    memory: Any = RememberedScores.empty(examples=len(rows), length=rows.shape[1]) if arm.remembers else None
    routed = CGGRModel(model, memory, seed=seed, **arm.options)
    steps = max(1, round(arguments.steps * 3 / arm.cost))
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, steps // 20)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / warmup) * (1 - n / steps))
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(rows), generator=generator)
                       for _ in range(1 + steps * arguments.batch_size // len(rows))])  # fmt: skip
    for step in range(steps):
        chosen = order[step * arguments.batch_size : (step + 1) * arguments.batch_size]
        input_ids, labels = split_supervised(rows[chosen].to(device))
        known: dict[str, Any] = {}
        if arm.options.get("scoring") == "excess" and nll is not None:
            known["reference_nll"] = nll[chosen].to(device)
        if arm.remembers:
            known["example_ids"] = chosen
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = routed(input_ids, labels=labels, **known)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad(set_to_none=True)
    return model


def earlier(name: str, folder: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a result with the same settings, to continue from; empty if there is no such result.

    A result is written when all arms of a seed are done, so each of its rows has one loss per seed.
    """
    if not (folder / f"{name}.json").exists():
        return {}
    result = _record.load(name, folder=folder)
    free = ("seconds", "seeds", "name", "device", "kinds")  # settings that may differ
    same = all(result["settings"].get(key) == value for key, value in settings.items() if key not in free)
    if not same:
        raise SystemExit(f"{folder / name}.json has other settings; pass another --name or --results")
    return {row: {key: value for key, value in found.items() if key in ("unit", "cost", "losses")}
            for row, found in result["rows"].items()}  # fmt: skip


def main() -> None:
    """Measure both kinds of noise, and write the result after every arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="folder of its tokenizer; without it the model's")
    parser.add_argument("--gsm8k", type=Path, required=True, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--name", default="noisy", help="of the result")
    parser.add_argument("--results", type=Path, default=_record.RESULTS)
    parser.add_argument("--kinds", nargs="+", choices=sorted(SHARE), default=sorted(SHARE))
    parser.add_argument("--steps", type=int, default=100, help="of the standard arm")
    parser.add_argument("--sequences", type=int, default=1600, help="of an epoch")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=320)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--eval-sequences", type=int, default=512)
    parser.add_argument("--device", default="auto")
    _record.add_seconds(parser)
    arguments = parser.parse_args()
    deadline = _record.deadline(arguments.seconds)
    device = pick_device(arguments.device)
    tokenizer = load_tokenizer(str(arguments.tokenizer or arguments.model))
    base: Any = load_model(str(arguments.model))
    base.to(device)
    settings = {key: value for key, value in vars(arguments).items() if not isinstance(value, Path)}
    settings |= {"seed": 0, "model": arguments.model.name, "share_of_noise": SHARE}
    every = arms(arguments.ratio)
    found = earlier(arguments.name, arguments.results, settings)
    done = {kind: len(found.get(f"{kind}: reference", {"losses": []})["losses"]) for kind in arguments.kinds}
    for kind in arguments.kinds:
        for seed in range(done[kind], arguments.seeds):
            if found and _record.is_over(deadline):
                print(f"{kind}, seed {seed}: time is up", flush=True)
                continue
            rows = make_rows(kind, arguments, tokenizer, seed)
            heldout = list(rows.heldout.split(arguments.batch_size))

            def tested(model: nn.Module, heldout: list[Tensor] = heldout) -> float:
                return heldout_loss(model, heldout, device=device, bfloat16=device.type == "cuda")

            reference = train(base, every["standard"], rows.reference, None, arguments, seed, device)
            nll = reference_nll(reference, rows.train, arguments.batch_size, device)
            found.setdefault(f"{kind}: reference", {"unit": "nat", "losses": []})["losses"].append(tested(reference))
            for name, arm in every.items():
                model = train(base, arm, rows.clean if arm.clean else rows.train, nll, arguments, seed, device)
                row = found.setdefault(f"{kind}: {name}", {"unit": "nat", "cost": arm.cost, "losses": []})
                row["losses"].append(tested(model))
                print(f"{kind}: {name}, seed {seed}: {row['losses'][-1]:.4f}", flush=True)
                del model
            summed = {name: {**row, **_record.summary(row["losses"])} for name, row in found.items()}
            control = f"{arguments.kinds[0]}: standard"
            _record.write(
                arguments.name, summed, settings=settings, control=control, device=device, folder=arguments.results
            )


if __name__ == "__main__":
    main()
