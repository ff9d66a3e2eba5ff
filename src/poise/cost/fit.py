"""The closed form that lies closest to measured points, in relative terms.

Least squares of ``log T`` over (log a, log b, log p) by Levenberg-Marquardt from a few starts; p is kept between 0.25 and 32,
beyond which curves can no longer be told apart. Where all points lie on one side of the knee the other side's parameter
is not determined by them: the fit is then good on the points and says nothing beyond.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from poise.cost.curves import Floats
from poise.spec.curve import ClosedForm

STARTS_P = (1.0, 2.0, 4.0, 10.0)
MIN_P, MAX_P = 0.25, 32.0
STEPS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class ClosedFormFit:
    """``relative_errors[i]``: fitted over measured time of point i, less 1."""

    form: ClosedForm
    relative_errors: tuple[float, ...]

    @property
    def worst_error(self) -> float:
        """Largest relative error, either way."""
        return max(map(abs, self.relative_errors))


def fit_closed_form(tokens_P: ArrayLike, seconds_P: ArrayLike) -> ClosedFormFit:
    """Fits ``T(n) = (a^p + (b n)^p)^(1/p)`` to points with tokens > 0 and seconds > 0; at least one point."""
    log_n = np.log(np.asarray(tokens_P, dtype=float))
    log_t = np.log(np.asarray(seconds_P, dtype=float))
    assert log_n.size, "a fit needs a point"
    fits = [_descend(_start(log_n, log_t, p), log_n, log_t) for p in STARTS_P]
    theta, _ = min(fits, key=lambda fit: fit[1])
    residual, _ = _residual(theta, log_n, log_t)
    a_s, b_s, p = np.exp(theta).tolist()
    return ClosedFormFit(form=ClosedForm(a_s=a_s, b_s=b_s, p=p), relative_errors=tuple(np.expm1(residual).tolist()))


def _start(log_n: Floats, log_t: Floats, p: float) -> Floats:
    return np.array([log_t.min(), (log_t - log_n).min(), np.log(p)])


def _residual(theta: Floats, log_n: Floats, log_t: Floats) -> tuple[Floats, Floats]:
    """``log T - log t`` at every point, and its derivatives by (log a, log b, log p), shape (P, 3)."""
    log_a, log_b, p = theta[0], theta[1] + log_n, np.exp(theta[2])
    log_sum = np.logaddexp(p * log_a, p * log_b) / p
    share = np.exp(p * (log_a - log_sum))
    by_p = share * log_a + (1.0 - share) * log_b - log_sum
    return log_sum - log_t, np.stack([share, 1.0 - share, by_p], axis=1)


def _descend(theta: Floats, log_n: Floats, log_t: Floats) -> tuple[Floats, float]:
    residual, slopes = _residual(theta, log_n, log_t)
    error, damping = float(residual @ residual), 1e-3
    for _ in range(STEPS):
        normal = slopes.T @ slopes
        step = np.linalg.solve(normal + damping * (np.diag(np.diag(normal)) + 1e-9 * np.eye(3)), slopes.T @ residual)
        tried = theta - np.clip(step, -2.0, 2.0)
        tried[2] = np.clip(tried[2], np.log(MIN_P), np.log(MAX_P))
        new_residual, new_slopes = _residual(tried, log_n, log_t)
        new_error = float(new_residual @ new_residual)
        if new_error < error:
            gained = error - new_error
            theta, residual, slopes, error, damping = (
                tried,
                new_residual,
                new_slopes,
                new_error,
                max(damping / 5, 1e-12),
            )
            if gained < 1e-14 * (1.0 + error):
                break
        else:
            damping *= 4
            if damping > 1e12:
                break
    return theta, error
