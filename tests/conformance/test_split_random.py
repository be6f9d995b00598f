"""Random graphs, cut at every legal place: the halves give what the whole gives, bit for bit."""

from __future__ import annotations

import every_cut
import numpy as np
import random_graphs
from hypothesis import HealthCheck, event, given, settings
from onnx import ModelProto

from warpcache.export.graph.run import open_session, run_session
from warpcache.export.graph.surgery import normalise


# The same graphs every time: the executor's fusions are without number, and which of them a run meets should not be a
# matter of luck. More of them: `max_examples` and `derandomize=False`.
@settings(max_examples=40, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(random_graphs.models())
def test_every_legal_cut_of_a_random_graph_is_exact(model: ModelProto) -> None:
    model = normalise(model)
    feeds = {"x": np.random.default_rng(1).standard_normal(random_graphs.INPUT_SHAPE).astype(np.float32)}
    want = run_session(open_session(model, threads=1), feeds)
    cuts, _ = every_cut.legal_cuts(model)
    event(f"{min(len(cuts) // 10 * 10, 50)} legal cuts or more")
    wrong = {cut.names: outputs for cut in cuts if (outputs := every_cut.inexact(model, cut, feeds, want))}
    assert not wrong
