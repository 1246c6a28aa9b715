"""Hadamard matrices: square matrices of +1 and -1 whose rows are orthogonal. Pure maths over orders.

Orders 2^k are Sylvester's; q + 1 for a prime q of 4k + 3, and 2 (q + 1) for one of 4k + 1, are Paley's (On orthogonal
matrices, Journal of Mathematics and Physics 12, 1933); products of orders are Kronecker products of the matrices. That
covers 1536 = 12 · 128, 3584 = 28 · 128 and 8192, the widths of Qwen2-VL, and 576 = 12 · 12 · 4. Orders that need a
field of q^k elements, or none of these constructions (92, 116), are not made.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

__all__ = ["hadamard_factors", "paley", "sylvester"]

_LARGEST_SYLVESTER = 64  # a larger one is the product of several, which cost less to multiply with


def sylvester(order: int) -> np.ndarray:
    """float64 [order, order] of +1 and -1, for a power of two: H[i, j] = (-1)^(number of ones in i & j).

    Raises:
        ValueError: another order.
    """
    if order < 1 or order & (order - 1):
        raise ValueError(f"order {order}, expected a power of two")
    out = np.ones((1, 1))
    while len(out) < order:
        out = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), out)
    return out


def paley(order: int) -> np.ndarray | None:
    """float64 [order, order] of +1 and -1 by Paley's first or second construction over a prime; None where neither
    applies."""
    first, second = order - 1, order // 2 - 1
    if order % 4 == 0 and _is_prime(first):  # first = 3 modulo 4
        # I + S, S skew: a border of ones around Q.
        skew = np.zeros((order, order))
        skew[0, 1:], skew[1:, 0] = 1, -1
        skew[1:, 1:] = _jacobsthal(first)
        return skew + np.eye(order)
    if order % 4 == 0 and second % 4 == 1 and _is_prime(second):
        # Every entry of a symmetric conference matrix becomes a block of 2 × 2, zeros on the diagonal another one.
        conference = np.ones((second + 1, second + 1))
        conference[0, 0] = 0
        conference[1:, 1:] = _jacobsthal(second)
        block, diagonal = np.array([[1.0, 1.0], [1.0, -1.0]]), np.array([[1.0, -1.0], [-1.0, -1.0]])
        return np.kron(conference, block) + np.kron(np.eye(second + 1), diagonal)
    return None


def hadamard_factors(order: int) -> tuple[np.ndarray, ...] | None:
    """Matrices whose Kronecker product, in order, is a Hadamard matrix of `order`; None where none is found."""
    orders = _split(order)
    if orders is None:
        return None
    out: list[np.ndarray] = []
    for part in orders:
        while part & (part - 1) == 0 and part > _LARGEST_SYLVESTER:
            out.append(sylvester(_LARGEST_SYLVESTER))
            part //= _LARGEST_SYLVESTER
        made = sylvester(part) if part & (part - 1) == 0 else paley(part)
        if made is None:
            raise AssertionError(f"order {part} was split off, but has no construction")
        out.append(made)
    return tuple(out)


@lru_cache
def _split(order: int) -> tuple[int, ...] | None:
    """Orders with a construction whose product is `order`, the smallest of Paley's first, a power of two last."""
    if order >= 1 and order & (order - 1) == 0:
        return (order,)
    for part in range(12, order + 1, 4):
        if order % part == 0 and part & (part - 1) and _has_paley(part):
            rest = (1,) if part == order else _split(order // part)
            if rest is not None:
                return (part, *(r for r in rest if r > 1))
    return None


def _has_paley(order: int) -> bool:
    """`order` a multiple of 4."""
    second = order // 2 - 1
    return _is_prime(order - 1) or (second % 4 == 1 and _is_prime(second))


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))


def _jacobsthal(q: int) -> np.ndarray:
    """[q, q]: 1 where column - row is a square modulo the prime q, -1 where not, 0 on the diagonal."""
    character = np.full(q, -1.0)
    character[[i * i % q for i in range(1, q)]] = 1
    character[0] = 0
    return character[(np.arange(q)[None, :] - np.arange(q)[:, None]) % q]
