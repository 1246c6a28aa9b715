"""Golden vectors: what transformers says in fp32, kept in the bundle, and their replay on any engine. No torch here.

A bundle holds one file per case, `golden/<case>.safetensors`. Every stage is fed with the golden input of that stage,
so that a drift is attributed to the stage that causes it:

    preprocessing  pictures -> grids (equal), pixel values
    prompt         messages and golden grids -> token ids (equal)
    positions      golden ids and grids -> [3, S] and the next position (equal)
    vision         golden pixel values -> image embeddings
    prefill        golden ids, positions, embeddings -> logits of the first answer token
    decode         golden answer tokens, one by one (teacher forced) -> logits of those after it
    tokens         pictures and messages, end to end -> the greedy answer

`edgevl.export.verify` writes the files; this module knows how to read them and how an engine is driven.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from edgevl.runtime.bundle import Bundle
from edgevl.runtime.engine import Engine, open_engine
from edgevl.runtime.errors import BundleError, EdgeVLError
from edgevl.runtime.generation import VisionLanguageModel
from edgevl.runtime.golden_case import GoldenCase, GoldenVision
from edgevl.runtime.golden_seen import SeenErrors
from edgevl.runtime.image_processing import ProcessedImage
from edgevl.runtime.mrope import position_ids
from edgevl.runtime.prompt import ChatTemplate, PromptBuilder, collect_vision
from edgevl.runtime.vision import VisionStage

__all__ = [
    "COSINE_FLOORS",
    "GOLDEN_FOLDER",
    "STAGES",
    "GoldenCase",
    "GoldenVision",
    "StageResult",
    "VerifyReport",
    "golden_files",
    "replay",
]

GOLDEN_FOLDER = "golden"
STAGES = ("preprocessing", "prompt", "positions", "vision", "prefill", "decode", "tokens")

# Least cosine against the fp32 reference, by part and by the precision that the manifest gives for the stage's graph
# (a hybrid bundle: prefill as int8, decode as int4). Seen where all is well (demo model; 2B shapes with random weights,
# hybrid): fp32 1 - 1e-12; fp16 0.999999; int8 vision 0.9988 and 0.9997, decoder 0.9985 and 0.996; int4 0.98 and 0.93,
# down to 0.84 in a random model 64 wide. A kernel that reads 4-bit weights wrongly (nibbles, zero points, scales)
# gives under 0.7 in some case. bf16 was not run yet. What these floors may not see is one dead feed-forward layer among
# good ones (the demo keeps 0.87 to 0.995 without it): for that a bundle keeps what its exporting host saw
# (golden_seen.py).
COSINE_FLOORS = {
    "vision": {"fp32": 0.99999, "fp16": 0.999, "bf16": 0.99, "int8": 0.98},
    "decoder": {"fp32": 0.99999, "fp16": 0.999, "bf16": 0.99, "int8": 0.98, "int8-weights": 0.98, "int4": 0.8},
}
# The same where keys and values are int8 codes: seen over fp32 weights 0.9999 (demo model) and 0.9995 (random).
INT8_CACHE_FLOOR = 0.995
# Normalised units. Pixels are integers before normalising, so the smallest real difference is 1 / 255 / 0.28 = 0.014.
PIXEL_TOLERANCE = 1e-5
# Greedy tokens that differ are a tie, not a drift, when their golden logits are closer than this part of the range.
TIE = 1e-5


@dataclass(frozen=True)
class StageResult:
    """One stage of one case. `value` against `threshold` is a cosine (at least), a largest error or a count of
    differences (at most), as `detail` says; `value` is NaN where the stage could not run."""

    case: str
    stage: str
    value: float
    threshold: float
    passed: bool
    detail: str

    def __str__(self) -> str:
        return f"stage {self.stage!r} of case {self.case!r} drifts: {self.detail}"


@dataclass(frozen=True)
class VerifyReport:
    """All results, in the order in which they were measured."""

    engine: str
    results: tuple[StageResult, ...]

    @property
    def first_drift(self) -> StageResult | None:
        """The failed stage that comes first on the way from pictures to words: the others may follow from it."""
        failed = [r for r in self.results if not r.passed]
        return min(failed, key=lambda r: STAGES.index(r.stage), default=None)

    @property
    def passed(self) -> bool:
        return self.first_drift is None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: null where a number is not finite."""

        def plain(result: StageResult) -> dict[str, Any]:
            return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(result).items()}

        first = None if self.first_drift is None else str(self.first_drift)
        results = [plain(r) for r in self.results]
        return {"engine": self.engine, "passed": self.passed, "first_drift": first, "results": results}


def golden_files(bundle: Bundle) -> list[str]:
    """Names of the bundle's golden files."""
    return sorted(n for n in bundle.files if n.startswith(f"{GOLDEN_FOLDER}/") and n.endswith(".safetensors"))


def replay(
    bundle: Bundle,
    engine: str | Engine = "auto",
    *,
    threads: int | None = None,
    notice: Callable[[str], None] | None = None,
    progress: Callable[[StageResult], None] | None = None,
) -> VerifyReport:
    """Check the hashes of the bundle and of its TensorRT plans, then run its golden vectors through an engine, stage by
    stage.

    Args:
        engine: a name, as for `VisionLanguageModel.open`, or an open engine, which stays open.
        progress: told of every result.

    Raises:
        BundleError: a file with another hash, no golden vectors, or malformed ones.
        EngineError: the engine cannot be opened here.
    """
    bundle.check_hashes()
    names = golden_files(bundle)
    if not names:
        raise BundleError(
            f"{bundle.folder}: no golden vectors inside, so there is nothing to compare with; on a host with torch and "
            "transformers, add them with `edgevl verify BUNDLE --against CHECKPOINT`"
        )
    opened = open_engine(bundle, engine, threads, notice) if isinstance(engine, str) else engine
    try:
        runner = _Replay(bundle, opened)
        results = []
        for name in names:
            case = GoldenCase.load(bundle.path(name))
            _check_fits(bundle, name, case)
            for result in runner.run(case):
                results.append(result)
                if progress is not None:
                    progress(result)
        return VerifyReport(opened.name, tuple(results))
    finally:
        if isinstance(engine, str):
            opened.close()


@dataclass
class _Replay:
    """The stages of one bundle on one engine."""

    bundle: Bundle
    engine: Engine
    model: VisionLanguageModel = field(init=False)

    def __post_init__(self) -> None:
        bundle = self.bundle
        self.model = VisionLanguageModel(bundle, self.engine)
        self._seen = SeenErrors.of(bundle)
        self._vision = VisionStage(self.engine.vision, bundle.model, bundle.image_processor)
        template = ChatTemplate(bundle.path("chat_template.jinja").read_text(encoding="utf-8"))
        self._builder = PromptBuilder(self.model.tokenizer, template, bundle.model)

    def run(self, case: GoldenCase) -> Iterator[StageResult]:
        stages: dict[str, Callable[[GoldenCase], tuple[float, float, bool, str]]] = {
            "preprocessing": self._preprocessing,
            "prompt": self._prompt,
            "positions": self._positions,
            "vision": self._embeddings,
            "prefill": self._prefill,
            "decode": self._decode,
            "tokens": self._tokens,
        }
        for stage in STAGES:
            if not case.vision and stage in ("preprocessing", "vision"):
                continue
            try:
                yield StageResult(case.name, stage, *stages[stage](case))
            except EdgeVLError as e:
                yield StageResult(case.name, stage, math.nan, math.nan, False, str(e))

    def _preprocessing(self, case: GoldenCase) -> tuple[float, float, bool, str]:
        worst = 0.0
        for item, given in zip(case.vision, collect_vision(case.filled_messages())):
            got = self._vision.preprocess(given)
            if got.grid != item.grid:
                return math.inf, PIXEL_TOLERANCE, False, f"{got.grid}, expected {item.grid}"
            if got.pixel_values.shape != item.pixel_values.shape:
                shapes = f"pixel values {got.pixel_values.shape}, expected {item.pixel_values.shape}"
                return math.inf, PIXEL_TOLERANCE, False, shapes
            worst = max(worst, float(np.abs(got.pixel_values - item.pixel_values).max()))
        detail = f"largest pixel error {worst:.1e} (at most {PIXEL_TOLERANCE:.0e})"
        return worst, PIXEL_TOLERANCE, worst <= PIXEL_TOLERANCE, detail

    def _prompt(self, case: GoldenCase) -> tuple[float, float, bool, str]:
        prompt = self._builder.build(case.filled_messages(), [item.grid for item in case.vision])
        return _exact("token ids", prompt.input_ids, case.input_ids)

    def _positions(self, case: GoldenCase) -> tuple[float, float, bool, str]:
        model, grids = self.bundle.model, [item.grid for item in case.vision]
        merge = model.vision.spatial_merge_size
        got = position_ids(case.input_ids, grids, model.tokens, merge, self.bundle.mrope_rule)
        flat = [np.append(p, n) for p, n in ((got.ids, got.next_position), (case.positions, case.next_position))]
        return _exact("positions", *flat)

    def _embeddings(self, case: GoldenCase) -> tuple[float, float, bool, str]:
        got = np.concatenate([self._vision.run(_processed(item)) for item in case.vision])
        expected = np.concatenate([item.image_embeds for item in case.vision])
        floor = self._floor(case, "vision", "vision", "vision")
        return _close(got, expected, floor)

    def _prefill(self, case: GoldenCase) -> tuple[float, float, bool, str]:
        logits = next(self._logits(case))
        return _close(_centred(logits), _centred(case.logits[:1]), self._floor(case, "prefill", "prefill", "decoder"))

    def _decode(self, case: GoldenCase) -> tuple[float, float, bool, str]:
        floor = self._floor(case, "decode", "decoder", "decoder")
        if case.steps == 1:
            return 1.0, floor, True, "no further steps in this case"
        rows = np.concatenate(list(self._logits(case))[1:])
        return _close(_centred(rows), _centred(case.logits[1:]), floor)

    def _tokens(self, case: GoldenCase) -> tuple[float, float, bool, str]:
        got = self.model.generate(
            case.filled_messages(),
            max_new_tokens=case.steps,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_ids=(),
        ).token_ids
        graphs = self.bundle.graphs.values()
        gates = all(graph.precision == "fp32" and not graph.spec.quantized_cache for graph in graphs)
        equal = _equal_prefix(got, case)
        detail = f"{equal} of {case.steps} greedy tokens equal" + ("" if gates else " (reported, no gate)")
        return float(equal), float(case.steps if gates else 0), not gates or equal == case.steps, detail

    def _logits(self, case: GoldenCase) -> Iterator[np.ndarray]:
        """Logits [1, vocab] after prefill and after every golden token but the last."""
        decoder = self.model.decoder()
        embeds = np.concatenate([item.image_embeds for item in case.vision]) if case.vision else None
        yield decoder.prefill(0, case.input_ids, case.positions, embeds)[None]
        for i, token in enumerate(case.tokens[:-1]):
            yield decoder.step(np.array([token]), np.array([case.next_position + i]))

    def _floor(self, case: GoldenCase, stage: str, role: str, part: str) -> float:
        graph = self.bundle.graphs.get(role) or self.bundle.graphs["decoder"]
        floors = COSINE_FLOORS[part]
        if graph.precision not in floors:
            raise BundleError(f"{part} precision {graph.precision!r} is unknown, expected one of {', '.join(floors)}")
        general = floors[graph.precision]
        if graph.spec.quantized_cache:
            general = min(general, INT8_CACHE_FLOOR)
        return general if self._seen is None else self._seen.floor(case.name, stage, general, self.engine.name)


def _check_fits(bundle: Bundle, name: str, case: GoldenCase) -> None:
    """Raises BundleError where the widths of a case are not those of the bundle's model."""
    model = bundle.model
    pairs = [("logits", case.logits.shape, (case.steps, model.text.vocab_size))]
    for item in case.vision:
        tokens = item.grid.tokens(model.vision.spatial_merge_size)
        pairs.append(("image_embeds", item.image_embeds.shape, (tokens, model.text.hidden_size)))
        pairs.append(("pixel_values", item.pixel_values.shape, (item.grid.patches, model.vision.patch_dim)))
    for what, got, expected in pairs:
        if got != expected:
            raise BundleError(
                f"{bundle.path(name)}: {what} of {list(got)}, expected {list(expected)}: golden vectors of another "
                "model; write them again with `edgevl verify BUNDLE --against CHECKPOINT`"
            )


def _processed(item: GoldenVision) -> ProcessedImage:
    size = (item.frames.shape[2], item.frames.shape[1])
    return ProcessedImage(pixel_values=item.pixel_values, grid=item.grid, original_size=size, resized_size=size)


def _exact(what: str, got: np.ndarray, expected: np.ndarray) -> tuple[float, float, bool, str]:
    if got.shape != expected.shape:
        return math.inf, 0.0, False, f"{got.size} {what}, expected {expected.size}"
    wrong = np.flatnonzero(got != expected)
    if not wrong.size:
        return 0.0, 0.0, True, f"{got.size} {what} equal"
    at = int(wrong[0])
    detail = (
        f"{wrong.size} of {got.size} {what} differ, first number {at}: {int(got[at])}, expected {int(expected[at])}"
    )
    return float(wrong.size), 0.0, False, detail


def _centred(logits: np.ndarray) -> np.ndarray:
    """Logits less their mean: softmax does not see it, and it would hide differences from a cosine."""
    return logits - logits.mean(axis=-1, keepdims=True)


def _close(got: np.ndarray, expected: np.ndarray, floor: float) -> tuple[float, float, bool, str]:
    """The cosine of all numbers together against `floor`, and the worst row's for the reader. A wrong size counts too:
    an error orthogonal to the truth that just meets the floor is about sqrt(2 (1 - floor)) of its norm, and half as
    much again is the limit."""
    if got.shape != expected.shape:
        return math.nan, floor, False, f"shape {list(got.shape)}, expected {list(expected.shape)}"
    a, b = got.astype(np.float64), expected.astype(np.float64)
    cosine, worst = _cosine(a.ravel(), b.ravel()), min(_cosine(x, y) for x, y in zip(a, b))
    error = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))
    most = 1.5 * math.sqrt(2 * (1 - floor))
    row = f", worst of {len(a)} rows {worst:.7f}" if len(a) > 1 else ""
    detail = f"cosine {cosine:.7f} (at least {floor:.5g}){row}, relative error {error:.1e} (at most {most:.1e})"
    return cosine, floor, cosine >= floor and error <= most, detail


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two vectors; 1 where both are zero, 0 where one is."""
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm else float(np.array_equal(a, b))


def _equal_prefix(got: Sequence[int], case: GoldenCase) -> int:
    """How many tokens are those of the case before the first that is not; all of them, where that one is a tie."""
    for i, (token, expected) in enumerate(zip(got, case.tokens.tolist())):
        if token != expected:
            row = case.logits[i]
            return case.steps if abs(row[expected] - row[token]) <= TIE * (row.max() - row.min()) else i
    return min(len(got), case.steps)
