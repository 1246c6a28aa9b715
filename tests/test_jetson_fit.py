"""The memory table of docs/jetson.md: printed by the script, and right where an arithmetic by hand can tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgevl.benchmarks import jetson_fit
from edgevl.benchmarks.jetson_fit import BOARDS, RECIPES, Fit, fit, model_config

DOC = Path(__file__).parent.parent / "docs" / "jetson.md"


def test_the_table_of_the_guide_is_what_the_script_prints(capsys: pytest.CaptureFixture[str]) -> None:
    jetson_fit.main()
    printed = capsys.readouterr().out
    text = DOC.read_text(encoding="utf-8")
    start = "<!-- table: python -m edgevl.benchmarks.jetson_fit -->\n"
    assert text.partition(start)[2].partition("<!-- end of table -->")[0] == printed


def test_weights_by_hand() -> None:
    """2B: 1,543,714,304 numbers in the decoder with its tied table (151,936 x 1,536), 665,252,608 in the encoder: what
    the release counts."""
    config = model_config("2b")
    recipes = {r.name: r for r in RECIPES}
    table, decoder, vision = 151936 * 1536, 1_543_714_304, 665_252_608
    vectors = 28 * (2 * 1536 + 1536 + 256 + 256) + 1536  # norms and biases stay float16, once
    fp16 = fit(config, recipes["TensorRT fp16"])
    layers = decoder - table - vectors
    assert abs(fp16.weights - (layers * 4 + table * 2 + vectors * 2 + vision * 2)) < 0.001 * fp16.weights
    int4 = fit(config, recipes["ONNX Runtime CUDA int4"])
    expected = layers * (0.5 + 2 / 128) + table * (1 + 2 / 128) + vectors * 2 + vision * 2
    assert abs(int4.weights - expected) < 0.001 * expected
    assert fp16.cache == 2 * 28 * 2 * 128 * 4096 * 2  # keys and values, layers, heads, numbers, tokens, bytes


def test_larger_models_and_precisions_need_more() -> None:
    for recipe in RECIPES:
        totals = [fit(model_config(m), recipe).total for m in jetson_fit.MODELS]
        assert totals == sorted(totals)
    config = model_config("7b")
    by_name = {r.name: fit(config, r).total for r in RECIPES}
    assert by_name["TensorRT fp16"] > by_name["TensorRT W8A8"] > by_name["TensorRT int4"]
    assert by_name["TensorRT int4"] > by_name["TensorRT int4, vision int8"]


def test_fits_compares_with_what_a_board_can_use() -> None:
    exact = Fit(int(8 * 2**30 * 0.93 - 2.0e9), 0, 0)
    assert exact.fits(8) and not Fit(exact.weights + 10, 0, 0).fits(8)
    assert [Fit(0, 0, 0).fits(b) for b in BOARDS] == [True] * len(BOARDS)
