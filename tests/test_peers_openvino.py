"""What the peers' modules for OpenVINO GenAI and onnxruntime-genai work out themselves; neither package is needed."""

from __future__ import annotations

import io

import numpy as np
import pytest
import transformers
from PIL import Image
from tokenizers import Tokenizer

from edgevl.benchmarks.peers import onnxruntime_genai, openvino_genai
from edgevl.benchmarks.peers.contract import Request
from edgevl.benchmarks.random_checkpoint import DEMO, released_config

SETTINGS = {"min_pixels": 56 * 56, "max_pixels": 1288 * 966, "patch_size": 14, "merge_size": 2}


def jpeg(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, 30)).save(out, "JPEG")
    return out.getvalue()


@pytest.mark.parametrize("width, height", [(448, 448), (1288, 966), (2000, 1500), (30, 40), (333, 1201)])
def test_picture_is_as_many_tokens_as_the_reference_makes_of_it(width: int, height: int) -> None:
    reference = transformers.Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=1288 * 966)
    grid = reference(Image.new("RGB", (width, height)), return_tensors="np")["image_grid_thw"]
    assert onnxruntime_genai.picture_tokens(jpeg(width, height), SETTINGS) == int(np.prod(grid)) // 4


def test_prompts_are_the_chat_template_filled_in() -> None:
    request = Request((b"", b""), "a question", system="a rule")
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": request.text}]
    said = [{"role": "system", "content": request.system}, {"role": "user", "content": content}]
    expected = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    tagged = openvino_genai.prompt(request)
    assert expected == tagged.replace("<ov_genai_image_0>", picture).replace("<ov_genai_image_1>", picture)
    assert expected == onnxruntime_genai.prompt(request, [1, 1])


def test_placeholders_of_a_picture_are_single_tokens() -> None:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids = tokenizer.encode(onnxruntime_genai.prompt(Request((b"", b""), "a"), [5, 7])).ids
    assert [tokenizer.id_to_token(i) for i in ids].count("<|image_pad|>") == 12


def test_text_config_is_the_decoder_of_the_checkpoint() -> None:
    config = released_config("2b")
    given = transformers.Qwen2Config(**onnxruntime_genai.text_config(config))
    decoder = transformers.Qwen2VLConfig(**config).text_config
    assert onnxruntime_genai.text_config(config)["architectures"] == ["Qwen2ForCausalLM"]
    for name in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "rms_norm_eps", "hidden_act", "max_position_embeddings",
    ):  # fmt: skip
        assert getattr(given, name) == getattr(decoder, name), name
    assert given.tie_word_embeddings
    assert given.to_dict()["rope_parameters"] == {"rope_theta": 1_000_000.0, "rope_type": "default"}
