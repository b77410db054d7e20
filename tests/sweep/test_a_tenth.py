"""A fixed tenth of the sweep over all language-model classes; all of them run by ``nox -s sweep``."""

import pytest

from tests.support.sweep.judge import judge
from tests.support.sweep.page import group
from tests.support.sweep.tiny import language_model_classes

# Every tenth by name of those that all supported versions of transformers have, and what becomes of it.
TENTH = {
    "ApertusForCausalLM": "every",
    "BigBirdForMaskedLM": "every",
    "CamembertForMaskedLM": "every",
    "Data2VecTextForMaskedLM": "every",
    "DogeForCausalLM": "exact",
    "EsmcForMaskedLM": "exact",
    "FunnelForMaskedLM": "exact",
    "Gemma3ForConditionalGeneration": "every",
    "GitForCausalLM": "untried",
    "GraniteMoeHybridForCausalLM": "exact",
    "HyperCLOVAXForCausalLM": "every",
    "Lfm2ForCausalLM": "exact",
    "Mamba2ForCausalLM": "exact",
    "MiniMaxM3VLForCausalLM": "every",
    "MoshiForCausalLM": "every",
    "NeoMMEForMaskedLM": "exact",
    "PLBartForCausalLM": "every",
    "Qwen2MoeForCausalLM": "every",
    "RemBertForCausalLM": "every",
    "RwkvForCausalLM": "exact",
    "WhisperForCausalLM": "every",
    "YosoForMaskedLM": "exact",
}


@pytest.mark.parametrize("name", TENTH)
def test_exact_or_refused(name):
    report = judge(name, language_model_classes()[name], lengths=(21,))
    wrong = [line for line in report["found"] if line["verdict"] == "wrong"]
    assert not wrong
    assert group(report) == TENTH[name], report
    modes = {(line["mode"], line["layout"]) for line in report["found"]}
    assert len(modes) == 5 * 3 or report["built"]
