"""An explanation's sentences, in one pass over the text."""

import re
from collections.abc import Iterable, Iterator

from erv_min.base.errors import SettingsError

ABBREVIATIONS = frozenset("mr mrs ms dr prof st sr jr vs etc fig approx inc ltd e.g i.e cf".split())
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
EXTENDED_END = re.compile(  # a run of stops and what closes after it, before white space; other scripts' need no space
    r"(?<![.!?…])[.!?…]+[\"'”’)\]]*\s+|(?<![。！？｡।॥۔؟])[。！？｡।॥۔؟]+[\"'”’」』）)]*\s*")
QUOTES = str.maketrans("“”", '""')


def split_sentences(text: str, rule: str = "released") -> list[str]:
    """S_i: the sentences of an explanation, stripped, none empty.

    "released": split at white space after `.`, `!` or `?` if an even number of double quotes follows.
    "extended": also keeps abbreviations, initials and a trailing ellipsis together, splits at newlines and at other
    scripts' full stops, and an unpaired quote counts in its own line only.
    """
    if rule == "released":
        return _cut(text, _outside_quotes(text, SENTENCE_END.finditer(text)))
    if rule != "extended":
        raise SettingsError(f"sentence rule {rule!r} is unknown; there are 'released' and 'extended'")
    return [sentence for line in re.split(r"[\r\n]+", text) for sentence in _cut(line, _extended_ends(line))]


def _cut(text: str, ends: Iterable[re.Match]) -> list[str]:
    places = [m.end() for m in ends]
    pieces = (text[a:b].strip() for a, b in zip([0, *places], [*places, len(text)]))
    return [piece for piece in pieces if piece]


def _outside_quotes(text: str, ends: Iterable[re.Match]) -> Iterator[re.Match]:
    """The matches after which an even number of double quotes follows."""
    after, position = text.count('"'), 0
    for m in ends:
        after -= text.count('"', position, m.end())
        position = m.end()
        if after % 2 == 0:
            yield m


def _extended_ends(line: str) -> Iterator[re.Match]:
    straight = line.translate(QUOTES)
    ends = EXTENDED_END.finditer(line)
    for m in ends if straight.count('"') % 2 else _outside_quotes(straight, ends):
        mark = m[0].rstrip()
        continues = line[m.end() : m.end() + 1].islower()
        if continues and (mark[-1] not in ".!?" or mark.startswith("..")):  # `"Stop!" she cries`, `dim... and quiet`
            continue
        word = re.search(r"[\w.]*$", line[max(0, m.start() - 12) : m.start()])[0]
        initial = len(word) == 1 and word.isupper() and word != "I"
        if mark == "." and (initial or word.lower() in ABBREVIATIONS or re.fullmatch(r"(\w\.)+\w", word)):
            continue  # J., Dr., U.S.
        yield m
