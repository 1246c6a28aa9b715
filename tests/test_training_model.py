"""The training model is transformers' model: logits, greedy answers, and the files it is exported to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from demo.training import chat, export, pictures, train
from demo.training.answer import Reading, answers, load, prepare, reading_of
from demo.training.evaluate import round_to_nearest, rounded, transformers_answers
from demo.training.losses import Heads, losses
from demo.training.model import Model
from demo.training.optimizer import adam_step, muon_step
from demo.training.train import rate_factor
from edgevl.tasks import TASKS

FOLDER = Path(__file__).parents[1] / "demo" / "model"
torch.set_num_threads(2)


@pytest.fixture(scope="module")
def model() -> Model:
    return load(FOLDER)


@pytest.fixture(scope="module")
def reference():
    from transformers import Qwen2VLForConditionalGeneration

    return Qwen2VLForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32)


def reference_logits(reference, model: Model, arrays: tuple[np.ndarray, ...], video: bool, ids: torch.Tensor):
    """transformers on the same pixels and token ids -> logits [L, vocab]"""
    stills = [a if video else a[None] for a in arrays]
    pixels = []
    for a in stills:
        p = model.patches(torch.from_numpy(np.array(a))[None]).flatten(0, 2)
        if not video:  # transformers repeats the still; ours keeps one frame
            p = p.view(len(p), 3, 1, 196).expand(-1, -1, 2, -1).reshape(len(p), -1)
        pixels.append(p)
    grid = torch.tensor([[max(1, len(a) // 2), a.shape[1] // 14, a.shape[2] // 14] for a in stills])
    kinds = (ids == chat.ID["<|image_pad|>"]).int() + 2 * (ids == chat.ID["<|video_pad|>"]).int()
    names = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
    seen = dict(zip(names, (torch.cat(pixels), grid)))
    with torch.no_grad():
        return reference(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **seen).logits[0]


@pytest.mark.parametrize("task", ["read_1_line", "read_any_size", "where", "receipt_items", "two_pictures", "motion"])
def test_logits_equal_transformers(model, reference, task):
    for index in range(3):
        case = TASKS[task].case("test", index)
        arrays = prepare(case, reading_of(FOLDER))
        truth = [chat.answer_ids(case.truth)]
        shapes = [(1, *a.shape) for a in arrays]
        # transformers 5 lets the text go on after rows and columns, whatever the frames
        ids, pos, cols, _ = chat.collate(shapes, [case.question], truth, time_counts=False)
        with torch.no_grad():
            vis = torch.cat([model.vision(torch.from_numpy(np.array(a))[None])[0] for a in arrays], 1)
            ours = model.decode(ids, pos, chat.P, vis, cols)[0]
        theirs = reference_logits(reference, model, arrays, case.video, ids)
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 2e-4, (task, index)


def test_a_batch_equals_its_rows(model):
    """The shared prefix and the padding change nothing."""
    cases = [TASKS["colour"].case("test", i) for i in range(3)]
    arrays = [np.resize(prepare(c, Reading())[0], (112, 112, 3)) for c in cases]
    truth = [chat.answer_ids(t) for t in ("red", "<|box_start|>(1,2),(3,4)<|box_end|>", "x")]
    questions = ["What colour is the star?", "Where is the red star?", "Read the text."]
    with torch.no_grad():
        vis = model.vision(torch.from_numpy(np.stack(arrays)))[0]
        ids, pos, cols, targets = chat.collate([(3, 112, 112, 3)], questions, truth)
        whole = model.decode(ids, pos, chat.P, vis, cols)
        for i in range(3):
            one, pos1, cols1, t1 = chat.collate([(1, 112, 112, 3)], questions[i : i + 1], truth[i : i + 1])
            alone = model.decode(one, pos1, chat.P, vis[i : i + 1], cols1)[0]
            assert (whole[i][targets[i] >= 0] - alone[t1[0] >= 0]).abs().max() < 1e-4


def test_answers_equal_generate(model):
    """62 cases of all tasks: our greedy answers are those of transformers' processor and generate()."""
    cases = [c for t in TASKS.values() for c in t.cases("test", 5, seed=9)] + TASKS["motion"].cases("test", 2, seed=8)
    reading = reading_of(FOLDER)
    ours = answers(model, cases, Reading(reading.min_pixels, reading.max_pixels, time_counts=False))[0]
    theirs = transformers_answers(FOLDER, cases)
    assert len(cases) == 62
    assert [(c.task, a) for c, a in zip(cases, ours)] == [(c.task, b) for c, b in zip(cases, theirs)]


def test_export_writes_the_shipped_files(model, tmp_path):
    export.export(dict(model.state_dict()), tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == sorted(p.name for p in FOLDER.iterdir() if p.suffix in (".json", ".txt", ".safetensors"))
    for name in names:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name


@pytest.mark.parametrize(
    "task",
    ["read:small", "read:medium", "read:large", "read:strip", "two", "receipt", "scene", "scene:where", "motion"],
)
def test_training_batches(task):
    """Deterministic; picture sizes come from the common generator only; labels fit the pictures; losses are finite."""
    a, b = (pictures.make(task, np.random.default_rng(3), np.random.default_rng(5), 4) for _ in range(2))
    assert a["q"] == b["q"] and a["a"] == b["a"] and all(np.array_equal(x, y) for x, y in zip(a["imgs"], b["imgs"]))
    other = pictures.make(task, np.random.default_rng(4), np.random.default_rng(5), 4)
    assert [i.shape for i in other["imgs"]] == [i.shape for i in a["imgs"]] and other["a"] != a["a"]
    m = Model()
    loss, out = losses(m, Heads(m.c), a, 0.5, torch.device("cpu"))
    assert torch.isfinite(loss) and 0 <= out["tok"] <= 1
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in m.parameters())


def test_training_leaves_the_test_split_alone():
    assert not any(pictures.words.is_test_word(w) for w in pictures.training_words())
    for family in pictures.training_faces():
        for path in family:
            name = Path(path).stem.lower()
            assert not name.startswith(("test-", *pictures.fonts.HELD_OUT_FAMILIES)), path


def test_dense_labels_lie_where_the_characters_are():
    """A page with one W: its label is in the patch that holds the ink's middle."""
    page = pictures.cards.Page((112, 84), pictures.fonts.faces("calibration")[0], 28, [])
    page.lines = [pictures.cards.TextLine("W", 60, 50)]
    labels = pictures.Labels(1, 84, 112)
    labels.put(0, page.glyphs(), 1, 1)
    ink = pictures.cards.coverage(page)
    y, x = (float(v) for v in np.argwhere(ink > 0.5).mean(0))
    cell = int(y) // 28 * 4 + int(x) // 28
    assert labels.cell[0, cell, 0] == pictures.CODE["W"] and (labels.cell > 0).sum() == 1
    patch = 4 * cell + int(y) % 28 // 14 * 2 + int(x) % 28 // 14
    assert labels.patch[0, patch, int(x) % 14 // 7] == pictures.CODE["W"] and (labels.patch > 0).sum() == 1


def test_optimizers_by_hand():
    """Adam's first step is the rate times the gradient's sign; Muon's update has singular values near one."""
    p, g = torch.zeros(3), torch.tensor([0.5, -2.0, 3.0])
    first, second = {"p": torch.zeros(3)}, {"p": torch.zeros(3)}
    adam_step([("p", p)], lambda _: g, first, second, lambda _: 0.1, 1)
    assert torch.allclose(p, torch.tensor([-0.1, 0.1, -0.1]), atol=1e-5)
    torch.manual_seed(0)
    w, g = torch.zeros(16, 24), torch.randn(16, 24)
    muon_step([("w", w)], lambda _: g, {"w": torch.zeros(16, 24)}, 1.0)
    s = torch.linalg.svdvals(w)
    assert s.min() > 0.5 and s.max() < 1.4
    assert torch.trace(w @ g.T) < 0, "it must go downhill"


def test_learning_rate_schedule():
    plan = dict(rate=0.5, warm=0.1, hold=0.5)
    assert rate_factor(plan, 0.05) == pytest.approx(0.25) and rate_factor(plan, 0.1) == 0.5
    assert rate_factor(plan, 0.5) == 0.5 and rate_factor(plan, 0.75) == pytest.approx(0.25)
    assert rate_factor(plan, 1.0) == 0
    shipped = json.loads((FOLDER.parent / "training" / "plan.json").read_text())
    assert rate_factor(shipped, 1.0) == 0 < rate_factor(shipped, 0.2)


def test_a_share_of_the_budget(tmp_path, monkeypatch, capsys):
    plan = json.loads((Path(train.__file__).parent / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"cpu_minutes": 50}))
    arguments = ["train", str(tmp_path / "run"), "--plan", str(tmp_path / "plan.json"), "--processes", "1"]
    monkeypatch.setattr(train.Worker, "train", lambda self: None)  # the budget is what is looked at
    monkeypatch.setattr("sys.argv", [*arguments, "--share", "0.02"])
    train.main()
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == plan | {"cpu_minutes": 1.0}
    monkeypatch.setattr("sys.argv", [*arguments, "--share", "0"])
    with pytest.raises(SystemExit):
        train.main()
    assert "--share is 0, expected more than 0" in capsys.readouterr().err


def test_rounding_by_hand(model):
    w = torch.tensor([[7.0, -3.4, 0.4, 14.0]])
    assert round_to_nearest(w, 4, 2).tolist() == [[7.0, -3.0, 0.0, 14.0]]
    assert round_to_nearest(w, 4, 0).tolist() == [[8.0, -4.0, 0.0, 14.0]]
    r = rounded(model, 3, 128)
    for (n, a), (_, b) in zip(model.named_parameters(), r.named_parameters()):
        assert torch.equal(a, b) != (n.startswith("model.layers.") and a.dim() == 2), n
