"""The assignment problem: who does what at the least total cost, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def assign(costs: Sequence[Sequence[int]]) -> list[int]:
    """For each row its column, all different, so that the sum of ``costs[row][column]`` is least.

    ``costs``: n x n whole numbers (n times the largest must fit 63 bits). Shortest augmenting paths with
    potentials: Jonker & Volgenant, "A shortest augmenting path algorithm for dense and sparse linear assignment
    problems", Computing 38 (1987); O(n^3), one row after the other.
    """
    matrix = np.asarray(costs, dtype=np.int64)
    n = len(matrix)
    if n == 0:
        return []
    far = np.iinfo(np.int64).max // 4
    row_price = np.zeros(n, dtype=np.int64)
    column_price = np.zeros(n + 1, dtype=np.int64)  # the last column is where each search starts
    owner = np.full(n + 1, -1, dtype=np.int64)  # of each column: its row
    for row in range(n):
        owner[n] = row
        distance = np.full(n + 1, far, dtype=np.int64)
        came_from = np.full(n + 1, -1, dtype=np.int64)
        done = np.zeros(n + 1, dtype=bool)
        column = n
        while owner[column] != -1:
            done[column] = True
            here = owner[column]
            reduced = matrix[here] - row_price[here] - column_price[:n]
            nearer = ~done[:n] & (reduced < distance[:n])
            distance[:n][nearer] = reduced[nearer]
            came_from[:n][nearer] = column
            following = int(np.argmin(np.where(done[:n], far, distance[:n])))
            step = distance[following]
            row_price[owner[done]] += step
            column_price[done] -= step
            distance[:n][~done[:n]] -= step
            column = following
        while column != n:
            previous = int(came_from[column])
            owner[column] = owner[previous]
            column = previous
    columns = [0] * n
    for column in range(n):
        columns[int(owner[column])] = column
    return columns
