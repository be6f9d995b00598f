"""Policies: their text form, what excludes what, and what they promise about ages."""

from __future__ import annotations

import pytest

from warpcache.engine.errors import InputError
from warpcache.engine.schedule.policy import Policy


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("full", Policy("full")),
        ("async", Policy("async")),
        ("every:1", Policy("every", period=1)),
        ("every:12", Policy("every", period=12)),
        (" async ", Policy("async")),
    ],
)
def test_parse_reads_the_text_form_and_str_writes_it(text: str, policy: Policy) -> None:
    assert Policy.parse(text) == policy
    assert str(policy) == text.strip()


@pytest.mark.parametrize(
    ("text", "opening"),
    [
        ("sliced", "policy 'sliced' is not available in this version; choose 'full', 'every:N' or 'async'"),
        ("every", "policy 'every' needs a whole number of frames"),
        ("every:", "policy 'every:' needs a whole number of frames"),
        ("every:two", "policy 'every:two' needs a whole number of frames"),
        ("every:-1", "policy 'every:-1' needs a whole number of frames"),
        ("every:²", "policy 'every:²' needs a whole number of frames"),
        ("every:0", "policy 'every:0' has a period below 1"),
        ("async:2", "unknown policy 'async:2'; choose 'full', 'every:N' or 'async'"),
        ("", "unknown policy ''; choose"),
        ("lockstep:2", "lockstep is asked for by its age alone"),
    ],
)
def test_parse_says_what_is_wrong(text: str, opening: str) -> None:
    with pytest.raises(InputError) as caught:
        Policy.parse(text)
    assert str(caught.value).startswith(opening)


def test_an_age_means_lockstep() -> None:
    assert Policy.choose(None, 3) == Policy.choose("async", 3) == Policy.lockstep(3)
    assert Policy.choose("every:2") == Policy("every", period=2)
    assert Policy.choose() == Policy("async")
    assert Policy.choose(Policy("full")) == Policy("full")


@pytest.mark.parametrize("policy", ["full", "every:4", Policy.lockstep(1)])
def test_an_age_excludes_every_other_policy(policy: str | Policy) -> None:
    with pytest.raises(InputError, match=rf"^policy '{policy}' and age 2 exclude each other"):
        Policy.choose(policy, 2)


def test_a_negative_age_and_stray_fields_are_refused() -> None:
    with pytest.raises(InputError, match=r"^age -1 is negative"):
        Policy.lockstep(-1)
    with pytest.raises(InputError, match=r"^policy 'full' takes neither period nor age"):
        Policy("full", period=3)
    with pytest.raises(InputError, match=r"^unknown policy 'often'"):
        Policy("often")  # type: ignore[arg-type]


def test_what_policies_promise() -> None:
    assert [Policy.parse(text).oldest_planned_age for text in ("full", "every:4", "async")] == [0, 3, None]
    assert Policy.lockstep(5).oldest_planned_age == 5
    assert [Policy.parse(text).foreground for text in ("full", "every:4", "async")] == [True, True, False]
    assert Policy.parse("async").live
    assert not Policy.lockstep(1).live
