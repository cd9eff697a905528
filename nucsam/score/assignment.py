"""One-to-one assignment of truths to predictions with the largest summed weight."""

import numpy as np


def assign(t: np.ndarray, p: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Choose the one-to-one pairs with the largest summed weight.

    A pair belongs to every optimum if it outweighs its truth's best rival and its prediction's best
    rival together: swapping it in never loses. Such pairs are taken first, which settles almost all
    nuclei. The rest is one sparse assignment problem.

    Args:
        t: (k,) truth of each pair; the pairs are unique and in ascending order of (t, p).
        p: (k,) prediction of each pair.
        weight: (k,) above 0.

    Returns:
        Indices of the chosen pairs, ascending.
    """
    chosen = []
    rest = np.arange(len(t))
    while len(rest):
        t_rest, p_rest, w_rest = t[rest], p[rest], weight[rest]
        rivals = _best_rival(t_rest, w_rest) + _best_rival(p_rest, w_rest)
        sure = w_rest > rivals + 1e-9  # a tie is never sure
        if not sure.any():
            chosen.append(rest[_solve(t_rest, p_rest, w_rest)])
            break
        chosen.append(rest[sure])
        taken = np.bincount(t_rest, sure)[t_rest] + np.bincount(p_rest, sure)[p_rest]
        rest = rest[taken == 0]
    return np.sort(np.concatenate(chosen)) if chosen else rest


def _best_rival(group: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """For each pair the highest weight of another pair of its group; 0 where it has none."""
    best, second = np.zeros((2, int(group.max()) + 1))
    np.maximum.at(best, group, weight)
    is_best = weight == best[group]
    np.maximum.at(second, group, np.where(is_best, 0, weight))
    alone = is_best & (np.bincount(group, is_best) == 1)[group]
    return np.where(alone, second[group], best[group])


def _solve(t: np.ndarray, p: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """`assign` by SciPy's sparse LAPJV, which must match every truth.

    Each truth has a column of its own that stands for "no prediction".
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    truths, t = np.unique(t, return_inverse=True)
    preds, p = np.unique(p, return_inverse=True)
    n, m = len(truths), len(preds)
    nobody = np.arange(n)
    rows = np.append(t, nobody).astype(np.intc)  # SciPy 1.11 takes 32-bit indices only
    columns = np.append(p, m + nobody).astype(np.intc)
    # an edge of weight 0 cannot be stored; 1 more on every edge changes no optimum
    weights = np.append(1 + weight, np.ones(n))
    graph = csr_array((weights, (rows, columns)), shape=(n, m + n))
    row, column = min_weight_full_bipartite_matching(graph, maximize=True)
    real = column < m
    return np.searchsorted(t * m + p, row[real] * m + column[real])
