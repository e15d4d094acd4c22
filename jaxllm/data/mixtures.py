"""How often each task comes: rates from token counts (prepare), and the order that holds them (loader)."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from jaxllm.data.config import Languages, Proportional, Rates, Task


def rates(
    mixture: Rates | Proportional | Languages, tasks: Sequence[Task], tokens: Mapping[str, int]
) -> dict[str, float]:
    """Task -> its share of the rows, summing to 1, from the tokens of its training split.

    `proportional`: min(tokens, maximum)^(1/temperature) (T5: Raffel et al. 2019, arXiv:1910.10683, section 3.5.2).
    `languages`: (share of the language)^alpha, by size within it (XLM: Lample & Conneau 2019, arXiv:1901.07291,
    section 3.1).
    """
    if mixture.kind == "rates":
        rate = {t.name: 1.0 if t.weight is None else t.weight for t in tasks}
    elif mixture.kind == "proportional":
        capped = {t.name: min(tokens[t.name], mixture.maximum or tokens[t.name]) for t in tasks}
        # of the largest, so that a small temperature does not overflow
        rate = {name: (n / max(capped.values())) ** (1 / mixture.temperature) for name, n in capped.items()}
    else:
        of_language = defaultdict(int)
        for t in tasks:
            of_language[t.language] += tokens[t.name]
        total = sum(of_language.values())
        rate = {
            t.name: (of_language[t.language] / total) ** mixture.alpha * tokens[t.name] / of_language[t.language]
            for t in tasks
        }
    return {name: r / sum(rate.values()) for name, r in rate.items()}


def schedule(weights: Sequence[int]) -> Callable[[int], tuple[int, int]]:
    """Row -> (part, how many rows of that part came before): parts by integer `weights`, as evenly as can be.

    A balanced binary tree over the parts; a node sends round(n * share) of its first n rows to its left. Each level
    adds at most half a row of error, so among m parts every window of rows holds each part's share to within
    ceil(log2 m) rows: 1 % of 1,000 rows for up to 1,024 parts. After sum(weights) rows each part had its weight.
    """

    def grow(lo: int, hi: int):
        if hi - lo == 1:
            return lo
        middle = (lo + hi) // 2
        return grow(lo, middle), grow(middle, hi), sum(weights[lo:middle]), sum(weights[lo:hi])

    root = grow(0, len(weights))

    def locate(n: int) -> tuple[int, int]:
        node = root
        while isinstance(node, tuple):
            left, right, share, total = node
            before = (n * share + total // 2) // total
            if ((n + 1) * share + total // 2) // total > before:
                node, n = left, before
            else:
                node, n = right, n - before
        return node, n

    return locate
