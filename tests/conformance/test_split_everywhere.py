"""Every ONNX model of several nodes, cut at every legal place: the halves give what the whole gives, bit for bit."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import every_cut
import numpy as np
import onnx
import operator_table
import pytest

from warpcache.export.graph.run import open_session, run_session
from warpcache.export.graph.surgery import normalise


@pytest.fixture(scope="module")
def ledger() -> every_cut.Ledger:
    # Two processes: the models are many and small, and Python is most of it.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return every_cut.merged(pool.map(every_cut.cut_share, range(2), [2, 2]))


def test_every_legal_cut_is_exact(ledger: every_cut.Ledger) -> None:
    assert ledger.wrong == []


def test_enough_is_cut(ledger: every_cut.Ledger) -> None:
    """So that the test above cannot pass by skipping: fusions depend on the processor, so these are lower bounds."""
    assert len(ledger.cuts) >= 370
    assert sum(ledger.cuts.values()) >= 5000
    assert max(ledger.cuts.values()) >= 50
    families = {name.split("/")[0] for name in ledger.cuts if "/" in name}
    # The simple models of several nodes have sequences between them.
    assert families == {"pytorch-operator", "pytorch-converted"}
    assert set(ledger.refused) == {
        "the consumer needs none of it",
        "nothing is left for the consumer",
        "inside a kernel",
        "a half would have other kernels",
    }


def test_what_cannot_be_cut_is_counted(ledger: every_cut.Ledger) -> None:
    counts = {reason: len(names) for reason, names in ledger.uncut.items()}
    legal = counts.pop("no place is legal: the executor makes one kernel of it, or has nothing left for a consumer")
    if onnx.__version__ != operator_table.pinned_versions()["onnx"]:
        pytest.skip("the numbers are those of the ONNX in constraints.txt")
    assert sum(counts.values()) + legal + len(ledger.cuts) == 451
    assert counts == {
        "takes or gives sequences": 6,
        "trains": 2,
        "ONNX Runtime has no kernel": 12,
        "ONNX Runtime's Python API takes no bfloat16": 1,
        "ONNX Runtime refuses a vector as a limit of Range, which ONNX's own function body has": 2,
    }
    assert legal <= 60


def test_normal_form_keeps_what_a_model_computes(ledger: every_cut.Ledger) -> None:
    assert ledger.unexpected == []


def test_a_wrong_cut_would_be_seen() -> None:
    """Seeded defect: the consumer reads the cached tensor where the whole reads another."""
    model = normalise(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 20]>'
            "g (float[2] x) => (float[2] y) { v = Sin(x)\n w = Cos(x)\n u = Sub(v, w)\n y = Exp(u) }"
        )
    )
    feeds = {"x": np.array([0.25, np.nan], np.float32)}
    want = run_session(open_session(model, threads=1), feeds)
    cuts, _ = every_cut.legal_cuts(model)
    assert {frozenset(cut.names) for cut in cuts} >= {frozenset("v"), frozenset("w"), frozenset("u"), frozenset("vw")}
    assert all(every_cut.inexact(model, cut, feeds, want) == [] for cut in cuts)
    other = {name: np.nextafter(array, np.float32(9)) for name, array in want.items()}
    assert all(every_cut.inexact(model, cut, feeds, other) == ["y"] for cut in cuts)
