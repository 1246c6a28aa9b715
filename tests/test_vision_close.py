"""A vision stage that is closed lets go of its graph: closing the engine then frees the session."""

from __future__ import annotations

import gc
import weakref

import pytest
from conftest import Pair
from PIL import Image

from edgevl.runtime.bundle import Bundle
from edgevl.runtime.errors import EngineError
from edgevl.runtime.ort_engine import OrtEngine, OrtGraph
from edgevl.runtime.prompt import VisionInput
from edgevl.runtime.vision import VisionStage


def test_a_closed_stage_holds_no_graph(tiny: Pair) -> None:
    bundle = Bundle.open(tiny.bundle)
    engine = OrtEngine(bundle, threads=1)
    stage = VisionStage(engine.vision, bundle.model, bundle.image_processor)
    picture = VisionInput("image", Image.new("RGB", (56, 56)))
    assert len(stage.encode(picture).embeds) == 4
    graph = engine.vision
    assert isinstance(graph, OrtGraph)
    session = weakref.ref(graph._session)
    del graph
    stage.close()
    engine.close()
    gc.collect()
    assert session() is None
    with pytest.raises(EngineError, match="the vision stage is closed; open the model again"):
        stage.encode(picture)


def test_a_closed_model_holds_no_session(tiny: Pair) -> None:
    with tiny.open() as model:
        model.generate([{"role": "user", "content": "x"}], max_new_tokens=1)
        graphs = model.engine.vision, model.engine.decoder
        sessions = [weakref.ref(graph._session) for graph in graphs if isinstance(graph, OrtGraph)]
        del graphs
    gc.collect()
    assert [session() for session in sessions] == [None, None]
