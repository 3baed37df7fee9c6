"""GBNF as Lark: what a grammar of llama.cpp's takes, the converted one takes too, and nothing else."""

import pytest
from llguidance import LLMatcher, LLTokenizer

from server.messages.gbnf import as_lark

BYTES = LLTokenizer("byte")


def taken(grammar: str, text: str) -> bool:
    matcher = LLMatcher(BYTES, LLMatcher.grammar_from_lark(as_lark(grammar)), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


GRAMMARS: dict[str, tuple[str, list[str], list[str]]] = {
    "escapes in texts": (r'root ::= "\x41\u00e9bc\U0001F600f" # "\u0041', ["Aébc😀f"], ["A\ue9bc😀f", "A"]),
    "quotes and lines by number": (r'root ::= "\x22\x5c\x0a\u0009"', ['"\\\n\t'], []),
    "escapes in classes": (r"root ::= [\x41-\x43\u00e9-\u00ef]+", ["ABCéï"], ["D", "ÿ", "9"]),
    "beyond the basic plane": (r"root ::= [\U0001F600-\U0001F64F]", ["😀"], ["a", "🦜"]),
    "signs in classes by number": (r"root ::= [a\x5d\x2d\x5e\x5b]+", ["]-^[a"], ["b", "\\"]),
    "negated": (r'root ::= "[" [^\]\u00e9]* "]"', ["[a]", "[]"], ["[é]", "[a"]),
    "Lark with an inlined start": ('?start: x\n?x: "a" | "b"', ["a", "b"], ["c"]),
    "Lark as it is": ('start: "a" /[\\u00e9b]/', ["aé", "ab"], ["a"]),
}


@pytest.mark.parametrize("name", GRAMMARS)
def test_characters_by_their_numbers(name: str) -> None:
    grammar, good, bad = GRAMMARS[name]
    assert [text for text in good if not taken(grammar, text)] == []
    assert [text for text in bad if taken(grammar, text)] == []


FAULTY = [
    "hello world",
    'root ::= "a',
    r'root ::= "\q"',
    "root ::= [^]]*",
    "root ::= foo",
    'foo ::= "a"',
    "",
    "(" * 100_000,
]


@pytest.mark.parametrize("grammar", FAULTY, ids=[text[:20] for text in FAULTY])
def test_what_is_neither_is_a_value_error(grammar: str) -> None:
    with pytest.raises(ValueError, match=r"GBNF|too deep"):
        as_lark(grammar)
