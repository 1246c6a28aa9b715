"""llama.cpp and MNN as peers: what they are asked is the checkpoint's own chat template, in their own marks."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
from checkpoints import DEMO

from edgevl.benchmarks.peers import llama_cpp, mnn
from edgevl.benchmarks.peers.contract import Request, Unsupported
from edgevl.runtime.prompt import load_chat_template


@pytest.mark.parametrize("pictures", [0, 1, 3])
def test_prompts_are_those_of_the_chat_template(pictures):
    request = Request((b"jpeg",) * pictures, "what is it?", "be brief")
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": request.text}]
    messages = [{"role": "system", "content": request.system}, {"role": "user", "content": content}]
    expected = load_chat_template(DEMO).render(messages)
    span = "<|vision_start|><|image_pad|><|vision_end|>"  # both libraries put these around and in place of their marks
    assert llama_cpp.prompt(request, "<__media__>").replace("<__media__>", span) == expected
    theirs = mnn.prompt(request)
    for i in range(pictures):
        assert f"<img>image_{i}</img>" in theirs
        theirs = theirs.replace(f"<img>image_{i}</img>", span)
    assert theirs == expected


@pytest.mark.parametrize("prompts, new, expected", [([286], 64, 512), ([192], 64, 256), ([98, 300, 20], 32, 3 * 512)])
def test_every_sequence_has_room_for_the_longest(prompts, new, expected):
    room = llama_cpp.context_tokens(prompts, new)
    assert room == expected
    assert room // len(prompts) >= max(prompts) + new  # llama.cpp gives each sequence an equal part


def test_variants_name_types_of_both_files():
    assert llama_cpp.precisions("Q4_K_M") == ("Q4_K_M", "f16")
    assert llama_cpp.precisions("Q4_0-vision-Q8_0") == ("Q4_0", "q8_0")
    assert set(map(llama_cpp.precisions, llama_cpp.VARIANTS)) >= {("Q4_0", "f16"), ("Q8_0", "f16")}


def test_a_failed_conversion_leaves_no_model(tmp_path):
    with (
        pytest.raises(Unsupported, match="llmexport")
        if importlib.util.find_spec("llmexport") is None
        else (pytest.raises(subprocess.CalledProcessError))
    ):
        mnn.prepare(tmp_path / "absent", tmp_path / "model", "int4")
    assert not (tmp_path / "model").exists()


def test_modules_import_without_their_packages():
    code = (
        "import sys\n"
        "import edgevl.benchmarks.peers.llama_cpp, edgevl.benchmarks.peers.mnn\n"
        "print(*sorted({'llama_cpp', 'MNN', 'llmexport', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
