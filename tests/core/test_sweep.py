"""A fixed tenth of the sweep over all language-model classes; all of them run by ``nox -s sweep``."""

import pytest

from tests.support.sweep.judge import judge
from tests.support.sweep.page import group
from tests.support.sweep.tiny import language_model_classes

# Every tenth by name of those that can be built tiny, and what becomes of it.
TENTH = {
    "AXK1ForCausalLM": "every",
    "BartForConditionalGeneration": "none",
    "BlenderbotForCausalLM": "every",
    "DeepseekV2ForCausalLM": "every",
    "ElectraForMaskedLM": "every",
    "ExaoneMoeForCausalLM": "every",
    "GPT2LMHeadModel": "every",
    "Glm4MoeForCausalLM": "every",
    "GraniteMoeSharedForCausalLM": "every",
    "IBertForMaskedLM": "exact",
    "LayoutLMForMaskedLM": "exact",
    "MBartForConditionalGeneration": "none",
    "MiniMaxForCausalLM": "exact",
    "ModernBertForMaskedLM": "exact",
    "NanoChatForCausalLM": "every",
    "OlmoHybridForCausalLM": "exact",
    "PhimoeForCausalLM": "every",
    "RecurrentGemmaForCausalLM": "exact",
    "RobertaForMaskedLM": "every",
    "TapasForMaskedLM": "exact",
    "XLMRobertaXLForMaskedLM": "every",
    "xLSTMForCausalLM": "exact",
}


@pytest.mark.parametrize("name", TENTH)
def test_exact_or_refused(name):
    report = judge(name, language_model_classes()[name], lengths=(21,))
    wrong = [line for line in report["found"] if line["verdict"] == "wrong"]
    assert not wrong
    assert group(report) == TENTH[name], report
    modes = {(line["mode"], line["layout"]) for line in report["found"]}
    assert len(modes) == 5 * 3 or report["built"]
