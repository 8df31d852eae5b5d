"""Filters choose candidates: each takes (ids, logits) and returns fewer of them, in the order in which they came.

Candidates are at first the whole vocabulary, by rising id; `top_k` sorts by falling logit. Of equal logits the lower id
goes first, so results do not depend on how a NumPy version sorts. Nothing here sorts a whole vocabulary: a threshold
decides about most, and only what is near it is sorted (128,000 logits: 7 us to compare, 6 ms to sort).

Sums are float64, but for products, float32 in blocks of 512 and good to 1e-8; weights of many candidates are float32,
whose error of 1e-7 is far below what logits mean.
"""

import math

import numpy as np

Candidates = tuple[np.ndarray, np.ndarray]
"""ids int [N] and logits float [N], N at least 1; logits may be -inf, but not all of them."""

_FEW = 4096  # sorting so many is cheaper than avoiding it
_BLOCK = 512
_SAMPLES = 1024
_HEAD = 256
_HEAD_MASS = 1024  # in weights of the most probable: more than a head holds
_NEVER = -1e4  # the logarithm of a probability that float64 still rounds to 0
_TINY = 1e-30  # as a temperature as good as 0; float32 still divides by it

_vocabularies: dict[int, np.ndarray] = {}


def whole(size: int) -> np.ndarray:
    """The ids of a whole vocabulary, int [size], read-only: always the same array, by which filters know it."""
    if size not in _vocabularies:
        ids = np.arange(size)
        ids.flags.writeable = False
        _vocabularies.setdefault(size, ids)
    return _vocabularies[size]


def top_k(logits: np.ndarray, k: int) -> Candidates:
    """The k candidates with the highest logits, sorted; k 0 keeps all.

    >>> top_k(np.array([0.5, 2.0, 1.0, 2.0], np.float32), 2)[0].tolist()
    [1, 3]
    """
    if 0 < k < logits.size:
        pool = np.arange(logits.size) if logits.size <= _FEW else np.flatnonzero(logits >= _floor_of_top(logits, k))
        values = logits[pool]
        threshold = np.partition(values, pool.size - k)[pool.size - k]
        above = values > threshold
        equal = np.flatnonzero(values == threshold)[: k - np.count_nonzero(above)]
        above[equal] = True
        ids = pool[above]
    else:
        ids = np.arange(logits.size)
    kept = logits[ids]
    order = np.argsort(-kept, kind="stable")
    return ids[order], kept[order]


def _floor_of_top(logits: np.ndarray, k: int) -> np.floating:
    """A value that at least k logits reach, and few more: cut into columns, k columns have a maximum that high."""
    columns = max(_BLOCK, 1 << (8 * k - 1).bit_length())
    rows = logits.size // columns
    if rows < 2:
        return logits.min()
    maxima = logits[: rows * columns].reshape(rows, columns).max(axis=0)
    return np.partition(maxima, columns - k)[columns - k]


def top_n_sigma(ids: np.ndarray, logits: np.ndarray, n: float) -> Candidates:
    """The candidates at most n standard deviations of all finite logits below the first (arXiv:2411.07641)."""
    if n <= 0 or ids.size == 1:
        return ids, logits
    best = logits.max()
    if math.isfinite(logits.min()):
        sigma = logits.std(dtype=np.float64) if logits.size <= _FEW else _fast_std(logits)
    else:
        sigma = logits[np.isfinite(logits)].std(dtype=np.float64)
    return _where(ids, logits, logits >= logits.dtype.type(best - n * sigma))


def _fast_std(logits: np.ndarray) -> float:
    """Of float32 differences."""
    away = logits - np.float32(_sum(logits) / logits.size)
    return math.sqrt(_dot(away, away) / logits.size)


def typical_p(ids: np.ndarray, logits: np.ndarray, mass: float) -> Candidates:
    """The fewest candidates, those whose surprise is nearest to the expected one first, that reach `mass`.

    Locally typical sampling (arXiv:2202.00666), with transformers' treatment of ties: all of the last are kept.
    """
    if mass >= 1 or ids.size == 1:
        return ids, logits
    shifted = _shifted(logits)
    weights = np.exp(shifted)
    total = _sum(weights)
    logprobs = shifted
    logprobs -= math.log(total)
    if logprobs.min() < _NEVER:  # probability 0: a number, for 0 * -inf would be none
        np.maximum(logprobs, _NEVER, out=logprobs)
    surprise = -_dot(weights, logprobs) / total
    typicality = logprobs
    typicality += surprise
    np.abs(typicality, out=typicality)
    np.negative(typicality, out=typicality)
    cut, _ = _cut(typicality, weights, total, mass * total)
    return _where(ids, logits, typicality >= cut)


def top_p(ids: np.ndarray, logits: np.ndarray, p: float) -> Candidates:
    """The fewest candidates, the most probable first, whose probabilities reach p; at least one (arXiv:1904.09751)."""
    if p >= 1 or ids.size == 1:
        return ids, logits
    weights = _weights(logits)
    total = _sum(weights)
    target = p * total
    cut, above = _cut(logits, weights, total, target)
    keep = logits > cut
    equal = np.flatnonzero(logits == cut)
    needed = np.searchsorted(above + np.cumsum(weights[equal], dtype=np.float64), target) + 1
    keep[equal[:needed]] = True
    return _where(ids, logits, keep)


def min_p(ids: np.ndarray, logits: np.ndarray, p: float) -> Candidates:
    """The candidates at least p times as probable as the first (arXiv:2407.01082)."""
    if p <= 0:
        return ids, logits
    return _where(ids, logits, logits >= logits.max() + math.log(p))


def xtc(ids: np.ndarray, logits: np.ndarray, threshold: float) -> Candidates:
    """Exclude top choices: of the candidates with a probability of at least `threshold` only the last stays.

    Whether to do it at all is the sampler's throw of the dice (`xtc_probability`).
    """
    if threshold > 0.5 or ids.size == 1:  # two cannot reach more than a half
        return ids, logits
    weights = _weights(logits)
    keep = weights < threshold * _sum(weights)
    likely = np.flatnonzero(~keep)
    if likely.size < 2:
        return ids, logits
    values = logits[likely]
    keep[likely[np.flatnonzero(values == values.min())[-1]]] = True
    return _where(ids, logits, keep)


def draw(ids: np.ndarray, logits: np.ndarray, temperature: float, u: float) -> int:
    """The candidate at quantile `u` (0 <= u < 1) of softmax(logits / temperature)."""
    weights = _weights(logits, temperature)
    first = 0
    if weights.size > _FEW:  # the block first, then the candidate in it
        blocks = np.cumsum(np.add.reduceat(weights, np.arange(0, weights.size, _BLOCK)), dtype=np.float64)
        block = _quantile(blocks, u * blocks[-1])
        low, high = (blocks[block - 1] if block else 0.0), blocks[block]
        u = min(max((u * blocks[-1] - low) / (high - low), 0.0), 1.0)
        first = block * _BLOCK
        weights = weights[first : first + _BLOCK]
    cumulative = np.cumsum(weights, dtype=np.float64)
    return int(ids[first + _quantile(cumulative, u * cumulative[-1])])


def _quantile(cumulative: np.ndarray, value: float) -> int:
    """The index whose step spans `value`: never one without weight, not even when `value` is rounded up to the end."""
    return int(min(np.searchsorted(cumulative, value, side="right"), np.searchsorted(cumulative, cumulative[-1])))


def _where(ids: np.ndarray, logits: np.ndarray, keep: np.ndarray) -> Candidates:
    kept = np.flatnonzero(keep)
    if kept.size == ids.size:
        return ids, logits
    return (kept if ids is _vocabularies.get(ids.size) else ids.take(kept)), logits.take(kept)


def _shifted(logits: np.ndarray) -> np.ndarray:
    """logits - their maximum; float64 where they are few."""
    return (logits.astype(np.float64) if logits.size <= _FEW else logits) - logits.max()


def _weights(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """softmax(logits / temperature) up to a factor; the most probable has weight 1."""
    # Subtract before dividing: a temperature near 0 must not turn large logits into inf - inf.
    shifted = _shifted(logits)
    if temperature != 1:
        with np.errstate(over="ignore"):
            shifted /= max(temperature, _TINY)
    return np.exp(shifted)


def _cut(keys: np.ndarray, weights: np.ndarray, total: float, target: float) -> tuple[float, float]:
    """(cut, above): going through falling keys, the sum of weights reaches `target` at key `cut`; `above` is the weight
    of all larger keys. No weight is above 1, `total` is their sum.

    Keys are narrowed to an interval around the cut until few are left to sort.
    """
    above = 0.0
    if keys.size > _FEW and target <= _HEAD_MASS:  # so few may reach it: a distribution with a head
        pool = np.flatnonzero(keys >= _floor_of_top(keys, _HEAD))
        head = weights.take(pool)
        if _sum(head) >= target:
            keys, weights, total = keys.take(pool), head, _sum(head)
    while keys.size > _FEW:
        low, high = _guess_interval(keys, weights, min((target - above) / max(total, _TINY), 1.0))
        is_above = keys > high
        beyond = _dot(weights, is_above.astype(np.float32))
        if above + beyond >= target:
            pool = np.flatnonzero(is_above)
            total = beyond
        else:
            above += beyond
            inside = keys >= low
            inside ^= is_above
            pool = np.flatnonzero(inside)
            held = _sum(weights.take(pool))
            if above + held < target and keys.min() < low:
                above += held
                pool = np.flatnonzero(keys < low)
                total -= beyond + held
            elif low == high:
                return low, above
            else:
                total = held
        if pool.size == keys.size:
            break
        keys, weights = keys.take(pool), weights.take(pool)
    order = np.argsort(-keys)
    cumulative = above + np.cumsum(weights[order], dtype=np.float64)
    cut = float(keys[order[min(int(np.searchsorted(cumulative, target)), keys.size - 1)]])
    larger = np.count_nonzero(keys > cut)
    return cut, (float(cumulative[larger - 1]) if larger else above)


def _guess_interval(keys: np.ndarray, weights: np.ndarray, share: float) -> tuple[float, float]:
    """(low, high), keys between which the sum of weights probably reaches `share` of itself, by a sample.

    A wrong guess costs time, nothing else.
    """
    step = keys.size // _SAMPLES
    sample = keys[::step]
    order = np.argsort(-sample)
    sample, taken = sample[order], weights[::step][order]
    cumulative = np.cumsum(taken, dtype=np.float64)
    held = max(float(cumulative[-1]), _TINY)
    # The standard deviation of a ratio of two sums over a sample. Two of them each way: three would leave half
    # as much again to go through each time, and seldom be needed.
    squares = np.cumsum(np.square(taken), dtype=np.float64)
    at = min(int(np.searchsorted(cumulative, share * held)), sample.size - 1)
    sigma = math.sqrt((1 - share) ** 2 * squares[at] + share**2 * (squares[-1] - squares[at]))
    below = int(np.searchsorted(cumulative, share * held + 2 * sigma))
    over = int(np.searchsorted(cumulative, share * held - 2 * sigma)) - 1
    return sample[below] if below < sample.size else -math.inf, sample[over] if over >= 0 else math.inf


def _sum(weights: np.ndarray) -> float:
    return float(weights.sum(dtype=np.float64))


def _dot(weights: np.ndarray, values: np.ndarray) -> float:
    """The sum of products: float32 in blocks, too short for BLAS to share them out to threads, float64 across them."""
    end = weights.size - weights.size % _BLOCK
    blocks = np.vecdot(weights[:end].reshape(-1, _BLOCK), values[:end].reshape(-1, _BLOCK))
    return _sum(blocks) + float(np.vecdot(weights[end:], values[end:]))
