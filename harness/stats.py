"""Whether two groups of numbers differ, by how much, and how sure that is. SciPy has the distributions."""

import math
import warnings

import numpy as np


def difference(a, b, paired=False):
    """(mean of `a` - mean of `b`, half the width of its 95% interval) by Welch's t test, or by that for pairs.

    `a` and `b` are arrays of at least two numbers each, for pairs in the same order.
    """
    from scipy import stats  # late: one to two seconds, for this one command

    with warnings.catch_warnings(action="ignore"):  # it warns of numbers that are all alike, where the width is 0
        test = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
        interval = test.confidence_interval(0.95)
    return float(np.mean(a) - np.mean(b)), float(interval.high - interval.low) / 2


def seeds_needed(a, b):
    """About how many numbers a group it takes to show a difference as large as that of `a` and `b` in 4 of 5 tries.

    The usual two-sided formula at 5% and 80% power, with one more for the t distribution; inf for no difference.
    """
    gap = np.mean(a) - np.mean(b)
    if gap == 0:
        return math.inf
    return math.ceil((1.960 + 0.842) ** 2 * (np.var(a, ddof=1) + np.var(b, ddof=1)) / gap**2) + 1


def first_below(x, y, level):
    """The x at which a curve first is at or below `level`, between points on a straight line; None if it never is."""
    below = np.flatnonzero(y <= level)
    if not len(below):
        return None
    i = below[0]
    if i == 0 or not math.isfinite(y[i - 1]):
        return float(x[i])
    return float(x[i] - (x[i] - x[i - 1]) * (level - y[i]) / (y[i - 1] - y[i]))
