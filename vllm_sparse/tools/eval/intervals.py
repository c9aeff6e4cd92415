"""Intervals of 95 %.

- A score of n samples: Wilson's interval (J. Am. Stat. Assoc. 22, 1927) of a proportion, with the mean score in
  its place. Scores lie in 0 to 1, so none varies more than right-or-wrong ones of that mean do: for scores in
  between it is too wide, never too narrow, and unlike a bootstrap it does not shrink to a point where all
  samples agree.
- A difference of scores on the same samples: its mean gain less its mean loss, each with Wilson's interval, joined
  by Newcombe's rule for paired proportions (Statistics in Medicine 17, 1998, 2635-2650, method 10). A sample
  gains or loses, never both, which is their correlation.
- What has no bounds, such as a loss in nats: the percentile bootstrap over samples (Efron, Annals of Statistics 7,
  1979); of fewer than :data:`LEAST_RESAMPLED` samples it would say little, and none is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959964
RESAMPLES, LEAST_RESAMPLED = 10_000, 5

Interval = tuple[float, float]


def wilson(mean: float, count: int) -> Interval:
    """The interval of a mean of ``count`` scores between 0 and 1."""
    spread = Z * math.sqrt(mean * (1 - mean) / count + Z * Z / (4 * count * count))
    centre, scale = mean + Z * Z / (2 * count), 1 + Z * Z / count
    # At the ends rounding could pass the mean itself.
    return min(max((centre - spread) / scale, 0.0), mean), max(min((centre + spread) / scale, 1.0), mean)


def paired(differences: Sequence[float]) -> Interval:
    """The interval of the mean of differences between -1 and 1, one per sample."""
    count = len(differences)
    gain = sum(max(d, 0.0) for d in differences) / count
    loss = sum(max(-d, 0.0) for d in differences) / count
    (gain_low, gain_high), (loss_low, loss_high) = wilson(gain, count), wilson(loss, count)
    both = (1 - gain) * (1 - loss)
    correlation = -math.sqrt(gain * loss / both) if both else 0.0

    def reach(gained: float, lost: float) -> float:
        return math.sqrt(max(0.0, gained**2 - 2 * correlation * gained * lost + lost**2))

    mean = gain - loss
    return (
        max(-1.0, mean - reach(gain - gain_low, loss_high - loss)),
        min(1.0, mean + reach(gain_high - gain, loss - loss_low)),
    )


def bootstrap(values: Sequence[float]) -> Interval | None:
    """The interval of the mean of ``values``; None where they are too few."""
    import numpy as np

    if len(values) < LEAST_RESAMPLED:
        return None
    random = np.random.default_rng(0)
    means = random.choice(np.asarray(values, dtype=float), (RESAMPLES, len(values))).mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
