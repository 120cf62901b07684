"""The formulas of `baft.nn` once more, term by term on Python's floats: slow, and plain to read."""

import math

Vector = list[float]
Matrix = list[Vector]


def dot(one: Vector, other: Vector) -> float:
    return math.fsum(x * y for x, y in zip(one, other, strict=True))


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def logistic(h: Vector, U: Matrix, c: Vector, threshold: float = 0.0) -> Vector:
    """`max(0, (w_k - threshold) / (1 - threshold))` with `w_k = sigmoid(u_k^T h + c_k)`."""
    weights = [sigmoid(dot(u_k, h) + c_k) for u_k, c_k in zip(U, c, strict=True)]
    return [max(0.0, (w_k - threshold) / (1.0 - threshold)) for w_k in weights]


def conditioned(h: Vector, V: Matrix, v: Vector, mean: Vector, scale: Vector) -> Vector:
    """`sigmoid(v_k^T z + v_k)` with `z = (h - mean) / (scale sqrt(d))`."""
    z = [(x - m) / (s * math.sqrt(len(h))) for x, m, s in zip(h, mean, scale, strict=True)]
    return logistic(z, V, v)


def residual(h: Vector, R: Matrix, A: Matrix, b: Vector) -> Vector:
    """`A h + b - R h`."""
    return [dot(a_k, h) + b_k - dot(r_k, h) for r_k, a_k, b_k in zip(R, A, b, strict=True)]


def delta(h: Vector, R: list[Matrix], A: list[Matrix], b: Matrix, w: Matrix) -> Vector:
    """`sum over blocks and k of w_k r_k (a_k^T h + b_k - r_k^T h)`; the first axis of all is the block."""
    change = [0.0] * len(h)
    for R_i, A_i, b_i, w_i in zip(R, A, b, w, strict=True):
        for r_k, moved, w_k in zip(R_i, residual(h, R_i, A_i, b_i), w_i, strict=True):
            change = [x + w_k * moved * r for x, r in zip(change, r_k, strict=True)]
    return change


def gram_schmidt(rows: Matrix) -> Matrix:
    """Orthonormal rows, each taken in turn, freed of those before it and brought to length one."""
    basis: Matrix = []
    for row in rows:
        for _ in range(2):  # the second pass takes away what rounding left
            for q in basis:
                share = dot(q, row)
                row = [x - share * y for x, y in zip(row, q, strict=True)]
        basis.append([x / math.sqrt(dot(row, row)) for x in row])
    return basis


def cross_entropy(logits: Matrix, targets: list[int], rows: list[int]) -> float:
    """Mean over sequences of the mean of `-log softmax(logits)[target]` over a sequence's tokens."""
    of_sequence: dict[int, Vector] = {}
    for scores, target, row in zip(logits, targets, rows, strict=True):
        highest = max(scores)
        log_sum = highest + math.log(math.fsum(math.exp(x - highest) for x in scores))
        of_sequence.setdefault(row, []).append(log_sum - scores[target])
    means = [math.fsum(losses) / len(losses) for losses in of_sequence.values()]
    return math.fsum(means) / len(means)


def load_balance(current: Matrix, past: Matrix) -> float:
    """Mean over blocks of `Var_k(M + m) / Mean_k(M + m)^2`."""
    terms = []
    for m, M in zip(current, past, strict=True):
        load = [x + y for x, y in zip(m, M, strict=True)]
        mean = math.fsum(load) / len(load)
        terms.append(math.fsum((x - mean) ** 2 for x in load) / len(load) / mean**2)
    return math.fsum(terms) / len(terms)


def locality(w: Matrix) -> float:
    """Mean of `w_k(h)^2` over states and bases."""
    squares = [w_k**2 for row in w for w_k in row]
    return math.fsum(squares) / len(squares)


def weighted_moments(states: Matrix, weights: Vector) -> tuple[Vector, Matrix]:
    """Mean and population covariance of weighted states."""
    total, d_model = math.fsum(weights), range(len(states[0]))
    mean = [math.fsum(w * h[i] for w, h in zip(weights, states, strict=True)) / total for i in d_model]
    covariance = [
        [
            math.fsum(w * (h[i] - mean[i]) * (h[j] - mean[j]) for w, h in zip(weights, states, strict=True))
            / total
            for j in d_model
        ]
        for i in d_model
    ]
    return mean, covariance
