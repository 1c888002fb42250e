"""Passages of English from the reference text that ships inside CPython, one part of it held back to measure on."""

from collections.abc import Iterable

PASSAGE_CHARACTERS = 1000
HELD_BACK_EVERY = 5


def pydoc_passages(topics: dict[str, str], split: str) -> list[str]:
    """Unique paragraphs of CPython's help topics, joined to passages of `PASSAGE_CHARACTERS` or more.

    "test" is every fifth topic in sorted order. "train" is the other topics without any paragraph of those,
    for topics quote each other (`compound` contains `if`, `for` and more).
    """
    held_back = sorted(topics)[::HELD_BACK_EVERY]
    kept, seen = held_back, set()
    if split == "train":
        kept = sorted(topics.keys() - held_back)
        seen = {words for name in held_back for words in _paragraphs(topics[name])}
    passages = []
    for name in kept:
        fresh = {words: text for words, text in _paragraphs(topics[name]).items() if words not in seen}
        seen |= fresh.keys()
        passages += _pack(fresh.values())
    return passages


def _paragraphs(text: str) -> dict[str, str]:
    """Paragraphs by their words, which tell that one is quoted however it is indented."""
    return {" ".join(part.split()): part.strip("\n") for part in text.split("\n\n") if part.strip()}


def _pack(paragraphs: Iterable[str]) -> list[str]:
    """Consecutive paragraphs joined until a passage is long enough; what is left over joins the last one."""
    passages, pending = [], []
    for paragraph in paragraphs:
        pending.append(paragraph)
        if len("\n\n".join(pending)) >= PASSAGE_CHARACTERS:
            passages.append("\n\n".join(pending))
            pending = []
    if pending:
        passages[-1:] = ["\n\n".join([*passages[-1:], *pending])]
    return passages
