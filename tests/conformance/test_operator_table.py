"""ONNX's node cases through both backends, and the page that says so."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from typing import Any

import numpy as np
import onnx_cases
import operator_table
import ort_runs
import pytest
import rtx_builds


@pytest.fixture(scope="session")
def table(outcomes: Any) -> dict[str, operator_table.Row]:
    return operator_table.rows(outcomes.collection.tried, outcomes.ort, outcomes.rtx)


def test_the_page_says_what_was_found(outcomes: Any, table: Any, request: pytest.FixtureRequest) -> None:
    page = operator_table.render(outcomes.collection, table)
    if request.config.getoption("--write-operators", default=False):
        operator_table.PATH.write_text(page)
    pinned = operator_table.pinned_versions()
    other = [name for name in operator_table.VERSIONS if _installed(name) != pinned[name]]
    if other:
        pytest.skip(f"the page is of the versions in constraints.txt, but another {', '.join(other)} is installed")
    assert operator_table.PATH.read_text() == page, f"docs/operators.md is out of date; run {operator_table.COMMAND}"


def _installed(name: str) -> str:
    if name == "onnxruntime":
        # Under either of its two distributions.
        import onnxruntime

        return str(onnxruntime.__version__)
    return version(name)


def test_every_operator_of_the_collection_is_decided_on(outcomes: Any) -> None:
    assert not outcomes.collection.unknown
    assert {case.operator for case in outcomes.collection.tried} == set(onnx_cases.group_of())
    left_out = {name for names in onnx_cases.LEFT_OUT_OPERATORS.values() for name in names.split()}
    assert not left_out & set(onnx_cases.group_of())
    assert len({case.name for case in outcomes.collection.tried}) == len(outcomes.collection.tried)
    # ONNX 1.23 has 1884 cases; far fewer would mean that they were not found.
    assert len(outcomes.collection.tried) > 1200
    assert sum(case.dtype == "float16" for case in outcomes.collection.tried) > 500


def test_nothing_fails_unexplained(table: Any) -> None:
    """Every message of a library is one that somebody has read and put in words."""
    known = {words for _, words in operator_table._CLAUSES}
    odd = {
        (row.operator, clause)
        for row in table.values()
        for (_, clause) in row.failures
        if clause not in known and not clause.startswith("the attribute `")
    }
    assert not odd


def test_what_onnx_runtime_gets_wrong_is_known(outcomes: Any) -> None:
    """Other values than expected are worse than a refusal: each of these is looked at by name."""
    wrong = {name for name, problem in outcomes.ort.items() if problem == "gives other values"}
    assert wrong == {
        # Where the scaled size is no whole number: ONNX aligns to the fraction, ONNX Runtime and PyTorch do not.
        "test_resize_downsample_scales_cubic_align_corners",
        "test_resize_downsample_scales_linear_align_corners",
        # ONNX counts indices in the shape without padding, ONNX Runtime in the one given.
        "test_maxunpool_export_with_output_shape",
        # Masked inner products, given out, are the lowest number instead of minus infinity.
        "test_attention_4d_with_past_and_present_qk_matmul_bias_3d_mask_causal",
        "test_attention_4d_with_past_and_present_qk_matmul_bias_4d_mask_causal",
    }


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_one_wrong_element_is_a_difference(dtype: str) -> None:
    """Seeded defect, so that the comparison can be trusted: 1 % of the largest element, in one place."""
    want = np.linspace(-1, 1, 24).reshape(2, 12).astype(dtype)
    got = want.copy()
    assert ort_runs.difference(got, want, rtol=1e-3, atol=1e-7) is None
    got[1, 3] += 0.01
    assert ort_runs.difference(got, want, rtol=1e-3, atol=1e-7) == "gives other values"
    got[1, 3] = np.nan
    assert ort_runs.difference(got, want, rtol=1e-3, atol=1e-7) == "gives other values"
    assert ort_runs.difference(want[:1], want, rtol=1e-3, atol=1e-7) == "gives another shape"
    assert ort_runs.difference(want.astype(np.float64), want, rtol=1e-3, atol=1e-7) == "gives another type"


def test_a_graph_that_ends_the_builder_is_a_result(outcomes: Any) -> None:
    """And the cases after it are built all the same."""
    crashed = {name for name, problem in outcomes.rtx.items() if rtx_builds.crashed(problem)}
    assert crashed == {"own_attention_of_one_tensor", "own_attention_of_one_tensor@float16"}
    assert Counter(outcomes.rtx.values())[None] > 1000


def test_messages_become_stable_words() -> None:
    assert operator_table.clause('Assertion failed: (x) && "Plugin not found, are ..."') == "not known to the parser"
    assert operator_table.clause("no runner at /src/a.cpp:12 for 0x7ffd [tag]\nsecond line") == "no runner at for"
