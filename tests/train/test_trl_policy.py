"""GRPO and RLOO: TRL's own loss and gradient, with a backward only for the tokens in the loss."""

import pytest
import torch
from torch.nn.functional import pad
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from cggr_train import CGGRConfig
from tests.support.trl_kit import (
    COMPLETION,
    PROMPT,
    QUIET,
    ROWS,
    build,
    error,
    policy_batch,
    step,
    stopped_by_hand,
)

pytestmark = QUIET

OPTIONS = {
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 2.0},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "two-sided": {"loss_type": "grpo", "delta": 1.5, "epsilon": 0.05},
    "sequence ratios": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "off-policy mask": {"loss_type": "grpo", "off_policy_mask_threshold": 0.02},
    "entropy bonus": {"loss_type": "dapo", "entropy_coef": 0.1},
    "temperature": {"loss_type": "dapo", "temperature": 0.7},
    "accumulated": {"loss_type": "grpo", "gradient_accumulation_steps": 2},
    "luspo by token": {"loss_type": "luspo"},
    "adaptive entropy": {"loss_type": "dapo", "use_adaptive_entropy": True, "entropy_coef": 0.05},
    "head in float32": {"loss_type": "dapo", "cast_lm_head_to_fp32": True},
}


@pytest.fixture
def grpo(tmp_path, tokenizer):
    def make(cggr=None, **values):
        return build(GRPOTrainer, GRPOConfig, tmp_path, tokenizer, cggr=cggr, **values)

    return make


def batch_for(made, tokenizer, *, old: bool, **values):
    """A batch, with the old policy's log-probabilities a little off the present one's where asked for."""
    inputs = policy_batch(len(tokenizer), **values)
    if old:
        noise = torch.randn(ROWS, COMPLETION, generator=torch.Generator().manual_seed(5)) * 0.1
        inputs["old_per_token_logps"] = log_probs_and_entropies(made, inputs)[0] + noise
    return inputs


@torch.no_grad()
def log_probs_and_entropies(made, inputs):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    found = made._get_per_token_logps_and_entropies(made.model, ids, mask, COMPLETION, compute_entropy=True)
    return found[0], found[1]


def kept_by_the_loss(made, inputs, quantile: float):
    """The tokens in TRL's loss, found without CGGR."""
    mask = inputs["completion_mask"] * inputs.get("tool_mask", torch.ones_like(inputs["completion_mask"]))
    keep = mask.bool()
    if quantile < 1:
        keep = made.get_high_entropy_mask(log_probs_and_entropies(made, inputs)[1], mask, 1 - quantile)
    return pad(keep, (PROMPT - 1, 1))


@pytest.mark.parametrize("old", [False, True], ids=["on policy", "several iterations"])
@pytest.mark.parametrize("name", OPTIONS)
def test_exact_is_trls_own_update(grpo, tokenizer, name, old):
    plain = grpo(top_entropy_quantile=0.4, **OPTIONS[name])
    made = grpo(CGGRConfig(gradient="exact"), top_entropy_quantile=0.4, **OPTIONS[name])
    inputs = batch_for(plain, tokenizer, old=old)
    wanted, gradient = step(plain, inputs)
    found, ours = step(made, inputs)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert error(ours, gradient) <= 1e-5
    assert made._metrics["train"]["entropy"] == pytest.approx(plain._metrics["train"]["entropy"], rel=1e-5)


@pytest.mark.parametrize("old", [False, True], ids=["on policy", "several iterations"])
@pytest.mark.parametrize("name", OPTIONS)
def test_kv_is_trls_loss_with_the_gradient_of_the_kept_tokens(grpo, tokenizer, name, old):
    plain = grpo(top_entropy_quantile=0.4, **OPTIONS[name])
    made = grpo(CGGRConfig(), top_entropy_quantile=0.4, **OPTIONS[name])
    inputs = batch_for(plain, tokenizer, old=old)
    keep = kept_by_the_loss(plain, inputs, 0.4)
    with stopped_by_hand(plain.model, keep):
        wanted, gradient = step(plain, inputs)
    found, ours = step(made, inputs)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert error(ours, gradient) <= 1e-5


def _ratios_of_vllm(inputs):
    inputs["importance_sampling_ratio"] = torch.rand(ROWS, COMPLETION, generator=torch.Generator().manual_seed(2)) + 0.5
    inputs["sampling_per_token_logps"] = inputs["old_per_token_logps"] + 0.05


def _observations_of_tools(inputs):
    inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["tool_mask"][:, 2:5] = 0
    inputs["tool_mask"][1] = 0


def _a_truncated_completion(inputs):
    inputs["completion_mask"][1] = 0


def _advantages_by_token(inputs):
    inputs["advantages"] = torch.randn(ROWS, COMPLETION, generator=torch.Generator().manual_seed(1))
    inputs["advantages"][2] = 0
    inputs["advantages"][0, ::2] = 0


@pytest.mark.parametrize("gradient", ["exact", "kv"])
@pytest.mark.parametrize("loss", ["grpo", "vespo", "sequence ratios"])
@pytest.mark.parametrize(
    "change", [_ratios_of_vllm, _observations_of_tools, _a_truncated_completion, _advantages_by_token]
)
def test_whatever_a_batch_holds_is_in_the_loss(grpo, tokenizer, change, loss, gradient):
    configurations = (None, CGGRConfig(gradient=gradient))
    plain, made = (grpo(cggr, top_entropy_quantile=0.4, **OPTIONS[loss]) for cggr in configurations)
    inputs = batch_for(plain, tokenizer, old=True)
    before = step(plain, inputs)[0]
    change(inputs)
    for trainer in (plain, made):
        trainer.use_vllm = "importance_sampling_ratio" in inputs
    keep = kept_by_the_loss(plain, inputs, 0.4)
    with stopped_by_hand(plain.model, keep if gradient == "kv" else torch.ones_like(keep)):
        wanted, expected = step(plain, inputs)
    found, ours = step(made, inputs)
    assert wanted != pytest.approx(before, rel=1e-3)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert error(ours, expected) <= 1e-5


@pytest.mark.parametrize("gradient", ["exact", "kv"])
def test_where_all_completions_were_cut_off_nothing_is_learned(grpo, tokenizer, gradient):
    plain, made = (grpo(cggr, top_entropy_quantile=0.4) for cggr in (None, CGGRConfig(gradient=gradient)))
    inputs = batch_for(plain, tokenizer, old=True)
    inputs["completion_mask"][:] = 0
    for trainer in (plain, made):
        loss, found = step(trainer, inputs)
        assert loss == 0.0 and found and not any(value.any() for value in found.values())


def test_the_kept_tokens_gradient_is_not_all_of_it(grpo, tokenizer):
    plain, made = grpo(top_entropy_quantile=0.4), grpo(CGGRConfig(), top_entropy_quantile=0.4)
    inputs = batch_for(plain, tokenizer, old=False)
    assert error(step(made, inputs)[1], step(plain, inputs)[1]) >= 0.05


@pytest.mark.parametrize("gradient", ["kv", "detached"])
@pytest.mark.parametrize("name", ["dapo", "sequence ratios"])
def test_prompts_and_observations_of_tools_are_forward_only(grpo, tokenizer, gradient, name):
    plain, made = grpo(**OPTIONS[name]), grpo(CGGRConfig(gradient=gradient), **OPTIONS[name])
    inputs = batch_for(plain, tokenizer, old=True)
    inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["tool_mask"][:, 2:5] = 0
    with stopped_by_hand(plain.model, kept_by_the_loss(plain, inputs, 1.0), detached=gradient == "detached"):
        wanted, expected = step(plain, inputs)
    found, ours = step(made, inputs)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert error(ours, expected) <= 1e-5


def passes_of(made, monkeypatch):
    """Rows and slots of every gradient pass, and rows and tokens of every context pass."""
    engine, seen = made._task_loss.forward()._engine, {"gradient": [], "context": []}
    for name in seen:
        own = getattr(engine, name)

        def noted(batch, *args, own=own, name=name, **kwargs):
            seen[name].append((batch.shape[0], args[0].index.shape[1] if name == "gradient" else batch.shape[1]))
            return own(batch, *args, **kwargs)

        monkeypatch.setattr(engine, name, noted)
    return seen


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("gradient", ["kv", "detached"])
@pytest.mark.parametrize(("name", "quantile"), [("dapo", 1.0), ("dapo", 0.4), ("sequence ratios", 0.4)])
def test_a_prompt_of_several_completions_is_run_once(grpo, tokenizer, monkeypatch, name, quantile, gradient, ragged):
    values = {**OPTIONS[name], "top_entropy_quantile": quantile}
    plain, made = grpo(**values), grpo(CGGRConfig(gradient=gradient), **values)
    inputs = batch_for(plain, tokenizer, old=True, ragged=ragged)
    for entry in ("prompt_ids", "prompt_mask"):  # rows 0, 2, 3 and row 1: of two prompts, not in turn
        inputs[entry] = inputs[entry][[0, 1, 0, 0]]
    inputs["advantages"] = torch.tensor([1.0, -0.5, 0.2, 0.7])
    if quantile == 1.0:
        inputs["prompt_ids"][1], inputs["prompt_mask"][1] = inputs["prompt_ids"][0], inputs["prompt_mask"][0]
    inputs["old_per_token_logps"] = log_probs_and_entropies(plain, inputs)[0] + 0.05
    with stopped_by_hand(plain.model, kept_by_the_loss(plain, inputs, quantile), detached=gradient == "detached"):
        wanted, expected = step(plain, inputs)
    seen = passes_of(made, monkeypatch)
    found, ours = step(made, inputs)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert error(ours, expected) <= 1e-5
    # The prompt but for its last token, once for each of the prompts.
    assert seen["context"][0] == (1 if quantile == 1.0 else 2, PROMPT - 1)
    ((rows, slots),) = seen["gradient"]
    assert rows == ROWS and slots <= COMPLETION + 1


def hold_to_trl_with_a_reference(plain, made, tokenizer):
    """An update whose loss has a KL term."""
    inputs = batch_for(plain, tokenizer, old=True)
    inputs["ref_per_token_logps"] = inputs["old_per_token_logps"] - 0.3
    with stopped_by_hand(plain.model, kept_by_the_loss(plain, inputs, 1.0)):
        wanted, expected = step(plain, inputs)
    found, ours = step(made, inputs)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert error(ours, expected) <= 1e-5


class TestRowsWithoutAdvantage:
    def test_they_leave_the_forward(self, grpo, tokenizer, monkeypatch):
        made = grpo(CGGRConfig())
        seen = passes_of(made, monkeypatch)
        step(made, batch_for(made, tokenizer, old=False, advantages=(0.0, 0.5, 0.0, -0.5)))
        ((rows, slots),) = seen["gradient"]
        assert rows == 2 and COMPLETION - 2 <= slots <= PROMPT + COMPLETION and seen["context"] == []
        assert {name: int(value) for name, value in made._task_loss.metrics.items()} == {
            "kept_tokens": 14, "countable_tokens": 32, "rows_skipped": 2,
        }  # fmt: skip

    def test_one_stays_where_none_has_any(self, grpo, tokenizer):
        made = grpo(CGGRConfig())
        loss, gradient = step(made, batch_for(made, tokenizer, old=True, advantages=(0.0,) * ROWS))
        assert loss == 0.0
        assert gradient and not any(value.any() for value in gradient.values())

    def test_a_very_unlikely_one_is_no_overflow(self, grpo, tokenizer):
        made = grpo(CGGRConfig())
        inputs = batch_for(made, tokenizer, old=True)
        inputs["old_per_token_logps"][2] = -1000.0
        loss, gradient = step(made, inputs)
        assert loss == loss and all(value.isfinite().all() for value in gradient.values())

    @pytest.mark.parametrize(
        ("values", "why"),
        [
            ({"beta": 0.1}, "beta=0.1 adds a KL term"),
            ({"entropy_coef": 0.1}, "entropy bonus"),
        ],
    )
    def test_they_stay_where_something_acts_on_them(self, grpo, tokenizer, reference, caplog, values, why):
        plain, made = grpo(model=reference(), **values), grpo(CGGRConfig(), model=reference(), **values)
        assert f"rows whose advantage is zero stay in the update: {why}" in caplog.text.replace(
            "the entropy", "entropy"
        )
        hold_to_trl_with_a_reference(plain, made, tokenizer)
        assert made._task_loss.metrics["rows_skipped"] == 0
        with pytest.raises(ValueError, match="skip_zero_advantage=True would change the gradient"):
            grpo(CGGRConfig(skip_zero_advantage=True), model=reference(), **values)

    def test_they_stay_where_they_are_to(self, grpo, tokenizer):
        made = grpo(CGGRConfig(skip_zero_advantage=False))
        step(made, batch_for(made, tokenizer, old=False))
        assert made._task_loss.metrics["rows_skipped"] == 0


@pytest.fixture
def reference(tmp_path, tokenizer):
    """Models that a reference model can be loaded for."""
    from tests.support.trl_kit import model_for

    def make():
        model = model_for(tokenizer)
        model.save_pretrained(tmp_path / "reference")
        model.config._name_or_path = str(tmp_path / "reference")
        return model

    return make


def test_with_a_kl_term_tokens_below_the_quantile_stay(grpo, tokenizer, reference, caplog):
    values = {"beta": 0.1, "top_entropy_quantile": 0.4}
    plain, made = grpo(model=reference(), **values), grpo(CGGRConfig(), model=reference(), **values)
    assert "beta=0.1 adds a KL term at every completion token" in caplog.text
    hold_to_trl_with_a_reference(plain, made, tokenizer)


class TestEntropies:
    def test_come_from_the_pass_of_the_old_log_probabilities(self, grpo, tokenizer, monkeypatch):
        made = grpo(CGGRConfig(), top_entropy_quantile=0.4)
        inputs = batch_for(made, tokenizer, old=True)
        inputs["cggr_entropies"] = torch.rand(ROWS, COMPLETION, generator=torch.Generator().manual_seed(9))
        seen = passes_of(made, monkeypatch)
        step(made, inputs)
        kept = made.get_high_entropy_mask(inputs["cggr_entropies"], inputs["completion_mask"], 0.6)
        assert seen["context"] == [] and len(seen["gradient"]) == 1
        assert made._task_loss.metrics["kept_tokens"] == kept[[0, 1, 3]].sum()

    def test_else_from_a_pass_that_the_update_goes_on_from(self, grpo, tokenizer, monkeypatch):
        made = grpo(CGGRConfig(), top_entropy_quantile=0.4)
        seen = passes_of(made, monkeypatch)
        step(made, batch_for(made, tokenizer, old=False))
        assert seen["context"] == [(3, PROMPT + COMPLETION)] and seen["gradient"][0][0] == 3

    @pytest.mark.parametrize("quantile", [1.0, 0.4])
    def test_in_the_log_are_those_of_all_tokens_where_they_are_known(self, grpo, tokenizer, quantile):
        made = grpo(CGGRConfig(), top_entropy_quantile=quantile)
        inputs = batch_for(made, tokenizer, old=True)  # its third row has no advantage
        inputs["cggr_entropies"] = log_probs_and_entropies(made, inputs)[1]
        step(made, inputs)
        mask = inputs["completion_mask"]
        wanted = (inputs["cggr_entropies"] * mask).sum() / mask.sum()
        assert made._metrics["train"]["entropy"] == [pytest.approx(wanted.item(), rel=1e-5)]

    def test_in_the_log_are_the_last_ones_where_an_update_computes_none(self, grpo, tokenizer):
        made = grpo(CGGRConfig())
        step(made, batch_for(made, tokenizer, old=False))
        step(made, batch_for(made, tokenizer, old=False, advantages=(0.0,) * ROWS))
        first, second = made._metrics["train"]["entropy"]
        assert first == pytest.approx(second) and first > 1.0

    @pytest.mark.parametrize(("kind", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
    def test_of_a_generation_are_noted(self, tmp_path, tokenizer, kind, config):
        made = build(kind, config, tmp_path, tokenizer, cggr=CGGRConfig(), num_iterations=2, max_steps=2, beta=0.0)
        made.train()
        (batch,) = made._buffered_inputs
        assert batch["cggr_entropies"].shape == batch["completion_ids"].shape and (batch["cggr_entropies"] > 0).all()

    @pytest.mark.parametrize("iterations", [1, 2])
    def test_in_a_run(self, grpo, monkeypatch, iterations):
        made = grpo(CGGRConfig(), top_entropy_quantile=0.4, num_iterations=iterations, max_steps=3)
        monkeypatch.setattr(
            made, "reward_funcs", [lambda completions, **_: [float(n) for n in range(len(completions))]]
        )
        seen = passes_of(made, monkeypatch)
        made.train()
        assert len(seen["gradient"]) == 3
        scored = [rows for rows, _ in seen["context"] if rows == ROWS]  # the others are of the prompts
        assert len(scored) == (3 if iterations == 1 else 0)
        record = made.state.log_history[0]
        assert 0 < record["keep_ratio"] <= 0.5
        assert record["rows_skipped"] == 0
        assert 0 < record["update_share"] <= 1 and record["update_seconds"] > 0
        assert {"entropy", "reward", "clip_ratio/region_mean"} <= record.keys()


@pytest.mark.parametrize("gradient", ["exact", "kv"])
def test_a_random_share_is_weighted(grpo, tokenizer, gradient):
    from cggr_core import select

    plain = grpo()
    made = grpo(CGGRConfig(gradient=gradient, selection="random", min_tokens_ratio=0.4, selection_seed=3))
    inputs = batch_for(plain, tokenizer, old=True, advantages=(1.0, -0.5, 0.2, 0.7))
    countable = kept_by_the_loss(plain, inputs, 1.0)
    kept = select(torch.zeros(countable.shape), countable, ratio=0.4, selection="random", seed=3, draw=0)
    weight = torch.zeros(ROWS, PROMPT + COMPLETION + 1)
    weight.scatter_(1, kept.index.masked_fill(~kept.valid, PROMPT + COMPLETION), kept.weight)
    # TRL takes an advantage for each token.
    by_token = {**inputs, "advantages": inputs["advantages"][:, None] * weight[:, PROMPT - 1 : -2]}
    keep = kept.mask if gradient == "kv" else torch.ones_like(kept.mask)
    with stopped_by_hand(plain.model, keep):
        expected = step(plain, by_token)[1]
    assert error(step(made, inputs)[1], expected) <= 1e-5


@pytest.mark.parametrize("gradient", ["exact", "kv"])
def test_rloo(tmp_path, tokenizer, gradient):
    plain = build(RLOOTrainer, RLOOConfig, tmp_path, tokenizer, cggr=None, beta=0.0)
    made = build(RLOOTrainer, RLOOConfig, tmp_path, tokenizer, cggr=CGGRConfig(gradient=gradient), beta=0.0)
    inputs = policy_batch(len(tokenizer))
    log_probs = log_probs_and_entropies(plain, inputs)[0]
    inputs["old_logps"] = (log_probs * inputs["completion_mask"]).sum(1) + torch.tensor([0.1, -0.05, 900.0, 0.0])
    inputs["old_logps"][2] = -60.0  # of a row without an advantage
    keep = kept_by_the_loss(plain, inputs, 1.0)
    with stopped_by_hand(plain.model, keep if gradient == "kv" else torch.ones_like(keep)):
        wanted, expected = step(plain, inputs)
    found, ours = step(made, inputs)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert error(ours, expected) <= 1e-5
    assert made._task_loss.metrics["rows_skipped"] == 1


def test_rloo_trains(tmp_path, tokenizer):
    made = build(RLOOTrainer, RLOOConfig, tmp_path, tokenizer, cggr=CGGRConfig(), beta=0.0)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    made.train()
    assert any(not value.equal(before[name]) for name, value in made.model.state_dict().items())
    assert "forward" not in vars(made) and made.state.log_history[0]["keep_ratio"] == 1.0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked for by peft
def test_adapters_with_the_base_as_reference(grpo, tokenizer):
    from peft import LoraConfig

    adapters = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False, exclude_modules=["lm_head"])
    made = grpo(CGGRConfig(), peft_config=adapters, beta=0.1, top_entropy_quantile=0.4)
    made.train()
    assert all(value.grad is None for name, value in made.model.named_parameters() if "lora" not in name)
    assert made.state.log_history[0]["keep_ratio"] == 1.0


class TestBadInput:
    @pytest.mark.parametrize(
        ("cggr", "message"),
        [
            (CGGRConfig(gradient="sequence"), "gradient='sequence' keeps whole sequences"),
            (CGGRConfig(selection="topk"), "selection='topk' selects tokens by a cross-entropy score"),
            (CGGRConfig(scoring="loss"), "scoring='loss' does not apply to the loss of GRPOTrainer"),
            (CGGRConfig(router="truncated"), "router='truncated' applies to tokens selected by a score"),
            (CGGRConfig(min_tokens_ratio=0.2), "min_tokens_ratio=0.2 with selection='supervised', which keeps every"),
            (CGGRConfig(min_tokens_ratio=0.0), r"min_tokens_ratio must be in \(0, 1\], got 0.0"),
        ],
    )
    def test_settings(self, grpo, cggr, message):
        with pytest.raises(ValueError, match=message):
            grpo(cggr)

    def test_two_selections(self, grpo):
        with pytest.raises(ValueError, match="both select tokens"):
            grpo(CGGRConfig(selection="random"), top_entropy_quantile=0.5)

    def test_another_trl(self, grpo, monkeypatch):
        monkeypatch.delattr(GRPOTrainer, "get_high_entropy_mask")
        with pytest.raises(
            RuntimeError, match=r"GRPOTrainer of TRL 1\.\d.*no method get_high_entropy_mask.*TRL 1.16 works"
        ):
            grpo(CGGRConfig(), top_entropy_quantile=0.5)
