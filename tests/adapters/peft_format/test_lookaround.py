"""Patterns with look-around compared with Python's `re`, and patterns of exponential cost."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.peft_format.fields import AdapterError, compile_regex
from adapters.peft_format.lookaround import LookaroundRegex

atoms = st.sampled_from(["a", "b", ".", r"\.", r"\d", "[ab]", "[^a]", r"\w", r"\W", r"[^\s0]", r"\b", "^", "$", "0"])
patterns = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{1,2}", "{2}", "{0,3}?"])).map(
            lambda pair: f"({pair[0]}){pair[1]}"
        ),
        st.tuples(st.sampled_from(["=", "!"]), inner).map(lambda pair: f"(?{pair[0]}{pair[1]})"),
        st.tuples(st.sampled_from(["<=", "<!"]), atoms, atoms).map(lambda parts: f"(?{parts[0]}{parts[1]}{parts[2]})"),
    ),
    max_leaves=8,
)


@given(pattern=patterns, text=st.text("ab0._\n", min_size=1, max_size=7))
def test_it_matches_what_re_matches(pattern: str, text: str) -> None:
    regex = LookaroundRegex(pattern, ValueError)
    assert regex.match(text) is (re.match(pattern, text) is not None)
    assert regex.fullmatch(text) is (re.fullmatch(pattern, text) is not None)


# Syntax that differs between RE2 and Python, and input that must crash neither.
signs = st.sampled_from(
    [
        *("q", "_", ".", r"\.", r"\d", "[a-z_]", "[[:alpha:]]", "[^[:digit:]]", "(?:q|l)", "*", "+?", "?", "{,2}"),
        *("{,}", "{1,}", "{0}", "{", "^", "$", r"\b", r"\Z", r"\z", r"\pL", r"\Q", r"\C", "(?i)", "(?i:Q)"),
        *(
            "(?U)",
            "(?u)",
            "(?a)",
            "(?x) q",
            "(?=",
            "(?!",
            ")",
            "|",
            "(",
            r"\1",
            "[]q]",
            r"[\w-]",
            "*+",
            "(?>q)",
            r"\x71",
            r"\161",
        ),
    ]
)


@pytest.mark.filterwarnings("ignore:Possible nested set")  # Python's warning about the same syntax
@settings(max_examples=1500)
@given(pattern=st.lists(signs, min_size=1, max_size=5).map("".join))
def test_a_pattern_means_what_it_means_to_python_or_is_refused(pattern: str) -> None:
    for suffix, whole in ((False, pattern), (True, rf"(.*\.)?({pattern})$")):
        try:
            regex = compile_regex("rank_pattern", pattern, suffix=suffix)
        except AdapterError:
            continue
        for name in ("a.0.q_proj", "a.10.q", "lm_head", "q"):
            ours, theirs = (regex.match, re.match) if suffix else (regex.fullmatch, re.fullmatch)
            assert bool(ours(name)) is bool(theirs(whole, name)), name


@pytest.mark.filterwarnings("ignore:Possible nested set")
@pytest.mark.parametrize("pattern", [r".*layers\.\d{,2}\..*q_proj", r".*q_proj\Z", "(.*[[:alpha:]])?.*"])
def test_syntax_that_re2_lacks_or_reads_otherwise(pattern: str) -> None:
    regex = compile_regex("target_modules", pattern)
    for name in ("model.layers.10.self_attn.q_proj", "q_proj", "lm_head", "[:]", ":]"):
        assert bool(regex.fullmatch(name)) is bool(re.fullmatch(pattern, name))


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"(?=a)(a)\1", "groupref"),
        (r"(?=a)(?>a)", "atomic"),
        (r"(?=a)a*+", "possessive"),
        (r"(?i)(?=a)a", "flags"),
        (r"(?=a)(?i:a)", "subpattern"),
        (r"(?<=a*)b", "look-behind requires fixed-width"),
        (r"(?=a", "missing )"),
        ("(?=" * 1000 + ")" * 1000, "bounded time"),
        (r"(?=a)b)(c", "unbalanced"),
        (r".*\pL", "bad escape"),
        ("q_proj(?i)", "global flags"),
        ("(?u)(?a)q", "incompatible"),
    ],
)
def test_unsupported_syntax_is_refused(pattern: str, reason: str) -> None:
    with pytest.raises(AdapterError, match=re.escape(reason)) as caught:
        compile_regex("target_modules", pattern)
    assert caught.value.param == "target_modules"


@pytest.mark.parametrize(
    "pattern", [r"(?=.*b)(((((a*)*)*)*)*)*c", r"((?=(?=(?=.*).*).*).*)*c", r"(?=a)(a{0,900}){900}c", r"(?!b)(a|a|.?)*c"]
)
def test_no_pattern_takes_long(pattern: str) -> None:
    regex = compile_regex("target_modules", pattern)
    began = time.process_time()
    try:
        assert not regex.fullmatch("a" * 200 + "b")
    except AdapterError as fault:
        assert "steps" in str(fault)  # noqa: PT017
    assert time.process_time() - began < 1
