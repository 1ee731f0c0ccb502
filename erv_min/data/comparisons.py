"""Two sets of labels beside each other: two judges on the same explanations, answers before and after a change."""

from collections import Counter


def agreement(judged_a: list[str | None], judged_b: list[str | None]) -> dict:
    """Two judges on the same explanations -> {"n", "left_out", "accuracy", "kappa"}; a share, not percent.

    Rows for which either gave no emotion (None) are left out and counted; accuracy and kappa are None if none is left
    (a policy that does not explain). Cohen's kappa = (p_o - p_e) / (1 - p_e), None if p_e = 1 (both always say the same
    one word)."""
    pairs = [(a, b) for a, b in zip(judged_a, judged_b, strict=True) if a is not None and b is not None]
    n, said_a, said_b = len(pairs), Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    p_o = sum(a == b for a, b in pairs) / n if n else None
    p_e = sum(said_a[x] * said_b[x] for x in said_a) / n**2 if n else 1
    return {"n": n, "left_out": len(judged_a) - n, "accuracy": p_o,
            "kappa": None if p_e == 1 else (p_o - p_e) / (1 - p_e)}


def next_with_another(answers: list[str]) -> list[int | None]:
    """For each clip the next one in the order (after the last comes the first) with another answer; None if there is
    none."""
    n = len(answers)
    return [next((j % n for j in range(i + 1, i + n) if answers[j % n] != answers[i]), None) for i in range(n)]


def moved(own: list[str | None], changed: list[str | None], others: list[str] | None = None) -> dict:
    """Answers after the own explanation and after a changed one -> {"n", "moved"[, "followed"]}, shares; None of none.

    moved: they differ ("Measuring faithfulness in chain-of-thought reasoning", arXiv 2307.13702: the answer is asked
    for again after altered reasoning). followed: the new one is `others`', the answer whose explanation it was given.
    """
    n = len(own)
    shares = {"moved": sum(a != b for a, b in zip(own, changed, strict=True))}
    if others is not None:
        shares["followed"] = sum(b == c for b, c in zip(changed, others, strict=True))
    return {"n": n} | {name: count / n if n else None for name, count in shares.items()}
