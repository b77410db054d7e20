"""DPO, KTO and supervised SFT: TRL's own loss and gradient, prompts forward-only in every layer."""

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import pad
from transformers import MixtralConfig, MixtralForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from cggr_core import select
from cggr_train import CGGRConfig
from tests.support.trl_kit import PROMPTS, QUIET, build, error, model_for, step, stopped_by_hand

pytestmark = QUIET

PAIRS = [
    {"prompt": text, "chosen": f"    return a * {n}\n", "rejected": "    return b" + " + 1" * n + "\n"}
    for n, text in enumerate(PROMPTS)
]
SINGLES = [
    {"prompt": text, "completion": f"    return a * {n}" + " - b" * n + "\n", "label": n % 2 == 0}
    for n, text in enumerate(PROMPTS)
]


@pytest.fixture
def make(tmp_path, tokenizer):
    def made(kind, config, cggr=None, **values):
        rows = {DPOTrainer: PAIRS, KTOTrainer: SINGLES, SFTTrainer: [dict(row) for row in SINGLES]}[kind]
        if kind is SFTTrainer:
            rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
        elif "peft_config" not in values:
            with torch.random.fork_rng():
                values["ref_model"] = model_for(tokenizer)
                for parameter in values["ref_model"].parameters():  # another policy, so that ratios are not all 1
                    parameter.data.mul_(0.9)
        return build(
            kind, config, tmp_path, tokenizer, cggr=cggr, train_dataset=Dataset.from_list(rows), max_length=32, **values
        )

    return made


def batch_of(made):
    return next(iter(made.get_train_dataloader()))


def labelled(inputs) -> torch.Tensor:
    """Positions whose next token is in the loss."""
    mask = inputs["completion_mask"].bool() if "completion_mask" in inputs else inputs["labels"] != -100
    return pad(mask[:, 1:], (0, 1))


CASES = {
    "dpo": (DPOTrainer, DPOConfig, {}),
    "dpo, several losses": (DPOTrainer, DPOConfig, {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5]}),
    "dpo, weighted": (DPOTrainer, DPOConfig, {"use_weighting": True}),
    "dpo, length": (DPOTrainer, DPOConfig, {"ld_alpha": 0.5}),
    "kto": (KTOTrainer, KTOConfig, {}),
    "kto, apo": (KTOTrainer, KTOConfig, {"loss_type": "apo_zero_unpaired"}),
    "sft": (SFTTrainer, SFTConfig, {}),
    "sft, dft": (SFTTrainer, SFTConfig, {"loss_type": "dft"}),
}


@pytest.mark.parametrize("gradient", ["exact", "kv", "detached"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_trls_loss_with_the_gradient_of_the_labelled_tokens(make, name, gradient):
    kind, config, values = CASES[name]
    plain = make(kind, config, **values)
    made = make(kind, config, CGGRConfig(gradient=gradient, selection="supervised"), **values)
    inputs = batch_of(plain)
    keep = labelled(inputs)
    with stopped_by_hand(
        plain.model, keep if gradient != "exact" else torch.ones_like(keep), detached=gradient == "detached"
    ):
        wanted, expected = step(plain, inputs)
    logged = {key: values[-1] for key, values in plain._metrics["train"].items()}
    found, ours = step(made, inputs)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert error(ours, expected) <= 1e-5
    assert {key: values[-1] for key, values in made._metrics["train"].items()} == pytest.approx(logged, rel=1e-5)
    assert "entropy" in logged
    assert made._task_loss.metrics["kept_tokens"] == made._task_loss.metrics["countable_tokens"] == keep.sum()
    if gradient == "kv":
        assert error(ours, step(plain, inputs)[1]) >= 1e-3


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_random_tokens_are_the_same_ones_however_a_step_is_split(make, name, monkeypatch):
    """Of DPO's micro-batches, each has the chosen rows of its pairs, followed by the rejected ones."""
    kind, config, values = CASES[name]
    kept = []
    for rows, accumulated in ((4, 1), (2, 2)):
        made = make(
            kind, config, CGGRConfig(selection="random", min_tokens_ratio=0.5),
            per_device_train_batch_size=rows, gradient_accumulation_steps=accumulated, **values,
        )  # fmt: skip
        loss, found = made._task_loss, []
        own = loss._random
        monkeypatch.setattr(loss, "_random", lambda *args, own=own, found=found: found.append(own(*args)) or found[-1])
        made.train()
        masks = [mask.view(2, -1, mask.shape[1]) if name == "dpo" else mask[None] for mask, _ in found]
        width = max(mask.shape[2] for mask in masks)
        kept.append(torch.cat([pad(mask, (0, width - mask.shape[2])) for mask in masks], dim=1))
    width = max(mask.shape[2] for mask in kept)
    one, several = (pad(mask, (0, width - mask.shape[2])) for mask in kept)
    assert one.any() and one.equal(several)


@pytest.mark.parametrize("name", ["sft", "dpo"])
@pytest.mark.parametrize("gradient", ["kv", "detached"])
def test_a_margin_before_the_labelled_tokens_is_reached(make, name, gradient):
    kind, config, values = CASES[name]
    plain = make(kind, config, **values)
    made = make(
        kind, config, CGGRConfig(gradient=gradient, selection="supervised", context_margin=3), **values
    )  # fmt: skip
    inputs = batch_of(plain)
    labels = labelled(inputs)
    keep = labels.clone()
    for row, place in labels.nonzero().tolist():
        keep[row, max(0, place - 3) : place] = True
    assert keep.sum() > labels.sum()
    with stopped_by_hand(plain.model, keep, detached=gradient == "detached"):
        wanted, expected = step(plain, inputs)
    found, ours = step(made, inputs)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert error(ours, expected) <= 1e-5
    assert made._task_loss.metrics["kept_tokens"] == labels.sum()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"gradient": "exact"}, "gradient='exact' already reaches all tokens"),
        ({"selection": "random"}, "it needs selection='supervised', but selection is 'random'"),
    ],
)
def test_a_margin_that_nothing_reads_is_refused(make, settings, why):
    with pytest.raises(ValueError, match=f"context_margin=3 would have no effect: {why}"):
        make(DPOTrainer, DPOConfig, CGGRConfig(context_margin=3, **settings))


LOSSES = (
    "aot", "aot_unpaired", "apo_down", "apo_zero", "bco_pair", "discopop", "exo_pair", "hinge", "nca_pair", "robust",
    "sppo_hard",
)  # fmt: skip
DIVERGENCES = ("alpha_divergence", "forward_kl", "js_divergence")


@pytest.mark.parametrize(
    "values",
    [{"loss_type": [name], "label_smoothing": 0.1} for name in LOSSES]
    + [{"f_divergence_type": n} for n in DIVERGENCES],
    ids=LOSSES + DIVERGENCES,
)
def test_every_loss_of_dpo(make, values):
    plain, made = make(DPOTrainer, DPOConfig, **values), make(DPOTrainer, DPOConfig, CGGRConfig(), **values)
    inputs = batch_of(plain)
    with stopped_by_hand(plain.model, labelled(inputs)):
        wanted, expected = step(plain, inputs)
    found, ours = step(made, inputs)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert error(ours, expected) <= 1e-5


def test_the_prompt_of_a_pair_is_run_once(make, monkeypatch):
    made = make(DPOTrainer, DPOConfig, CGGRConfig())
    engine, seen = made._task_loss.forward()._engine, []
    own = engine.context
    monkeypatch.setattr(engine, "context", lambda batch, **options: seen.append(batch.shape) or own(batch, **options))
    inputs = batch_of(made)
    step(made, inputs)
    first = int(labelled(inputs).any(0).float().argmax())
    assert seen == [(len(inputs["input_ids"]) // 2, first)] and first > 2


@pytest.mark.parametrize("kind", [DPOTrainer, KTOTrainer])
def test_a_random_share_leaves_the_loss_as_it_is(make, kind):
    config = {DPOTrainer: DPOConfig, KTOTrainer: KTOConfig}[kind]
    plain = make(kind, config)
    made = make(kind, config, CGGRConfig(selection="random", min_tokens_ratio=0.5, selection_seed=4))
    inputs = batch_of(plain)
    countable = labelled(inputs)
    order = torch.arange(len(countable))
    if kind is DPOTrainer:  # both rows of a pair are drawn one after the other
        order = order.view(2, -1).T.flatten()
    drawn = select(torch.zeros(countable.shape), countable[order], ratio=0.5, selection="random", seed=4, draw=0)
    width = countable.shape[1]
    weight = torch.zeros(len(countable), width + 1)
    weight = weight.scatter_(1, drawn.index.masked_fill(~drawn.valid, width), drawn.weight)[:, :width]
    kept, weight = drawn.mask[order.argsort()], weight[order.argsort()]
    own = plain.model.forward

    def weighted(*args, **kwargs):
        output = own(*args, **kwargs)
        if torch.is_grad_enabled():
            value = output.log_probs
            output["log_probs"] = value.detach() + weight[:, :-1] * (value - value.detach())
        return output

    plain.model.__dict__["forward"] = weighted
    with stopped_by_hand(plain.model, kept):
        wanted, expected = step(plain, inputs)
    found, ours = step(made, inputs)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert error(ours, expected) <= 1e-5


@pytest.mark.parametrize("name", ["dpo", "kto", "sft"])
def test_it_trains_and_saves_a_model(make, tmp_path, name):
    from transformers import LlamaForCausalLM

    kind, config, _ = CASES[name]
    made = make(kind, config, CGGRConfig(selection="supervised"), max_steps=2, save_strategy="steps", save_steps=2)
    made.train()
    record = made.state.log_history[0]
    assert record["keep_ratio"] == 1.0 and record["rows_skipped"] == 0
    assert 0 < record["update_share"] <= 1
    assert {"entropy", "num_tokens"} <= record.keys()
    loaded, information = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2", output_loading_info=True)
    assert not any(information[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(p.equal(q) for p, q in zip(loaded.parameters(), made.model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked for by peft
def test_adapters_with_the_base_as_reference(make):
    from peft import LoraConfig

    adapters = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False, exclude_modules=["lm_head"])
    plain = make(DPOTrainer, DPOConfig, peft_config=adapters)
    made = make(DPOTrainer, DPOConfig, CGGRConfig(gradient="exact"), peft_config=adapters)
    made.model.load_state_dict(plain.model.state_dict())
    inputs = batch_of(plain)
    wanted, expected = step(plain, inputs)
    found, ours = step(made, inputs)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert error(ours, expected) <= 1e-5
    routed = make(DPOTrainer, DPOConfig, CGGRConfig(), peft_config=adapters)
    routed.model.load_state_dict(plain.model.state_dict())
    assert step(routed, inputs)[0] == pytest.approx(wanted, rel=1e-5)


def test_evaluation_is_trls_own(make):
    plain = make(DPOTrainer, DPOConfig, eval_dataset=Dataset.from_list(PAIRS))
    made = make(DPOTrainer, DPOConfig, CGGRConfig(), eval_dataset=Dataset.from_list(PAIRS))
    assert made.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


class TestExpertRouters:
    """The balancing loss, which TRL weights itself, of the tokens that have a backward."""

    @pytest.fixture
    def moe(self, make, tokenizer):
        def made(cggr=None):
            torch.manual_seed(0)
            config = MixtralConfig(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
                pad_token_id=0, bos_token_id=1, eos_token_id=2,
            )  # fmt: skip
            return make(DPOTrainer, DPOConfig, cggr, model=MixtralForCausalLM(config), router_aux_loss_coef=0.3)

        return made

    def test_in_exact_it_is_trls(self, moe):
        plain, made = moe(), moe(CGGRConfig(gradient="exact"))
        inputs = batch_of(plain)
        wanted, expected = step(plain, inputs)
        found, ours = step(made, inputs)
        assert found == pytest.approx(wanted, rel=1e-5)
        assert error(ours, expected) <= 1e-5

    def test_in_kv_it_is_in_the_loss(self, moe):
        made = moe(CGGRConfig())
        inputs = batch_of(made)
        with_it, gradient = step(made, inputs)
        made.router_aux_loss_coef = 0.0
        without = step(made, inputs)[0]
        logged = made._metrics["train"]["aux_loss"]
        assert with_it - without == pytest.approx(0.3 * logged[0], rel=1e-4) and logged[0] > 1.0
        assert made.model.config.output_router_logits is False
        assert any("gate" in name and value.any() for name, value in gradient.items())


@pytest.mark.parametrize("name", ["dpo", "sft"])
def test_bfloat16_is_close(make, name):
    kind, config, _ = CASES[name]
    moved = []
    for bf16 in (False, True):
        made = make(kind, config, CGGRConfig(selection="supervised"), bf16=bf16, learning_rate=0.05)
        before = {key: value.clone() for key, value in made.model.state_dict().items()}
        made.train()
        moved.append({key: value - before[key] for key, value in made.model.state_dict().items()})
    assert 0 < error(moved[1], moved[0]) <= 0.05
