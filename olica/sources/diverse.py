"""Which samples of a text to take: those that together have the most different tokens.

Text that is alike says the same again, so that samples that are not say more of what a model has to do. No model is
needed to choose them (after ZipCal, arXiv 2603.16105, which chooses by lexical diversity too).
"""

import heapq
from collections.abc import Sequence


def most_diverse(windows: Sequence[Sequence[int]], count: int) -> list[int]:
    """Indices of `count` windows of tokens: each adds most kinds of tokens to those before it, the first of equals.

    What a window adds only shrinks as others are taken, so that it need not be counted again before it comes first.
    """
    kinds = [set(window) for window in windows]
    seen: set[int] = set()
    adding = [(-len(own), index) for index, own in enumerate(kinds)]
    heapq.heapify(adding)
    taken: list[int] = []
    while len(taken) < count:
        added, index = heapq.heappop(adding)
        now = -len(kinds[index] - seen)
        if now == added:
            seen |= kinds[index]
            taken.append(index)
        else:
            heapq.heappush(adding, (now, index))
    return taken
