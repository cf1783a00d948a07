"""Fits a linear model to measurements as they come: recursive least squares that forget."""

from __future__ import annotations

from collections.abc import Sequence

DRIFT = 0.001
"""Coefficients may change by this share from one measurement to the next, so that what was
measured a few hundred measurements ago counts for little.
"""
NOISE = 0.1
"""Relative error of a usual measurement."""
MAX_SURPRISE = 3.0
"""A measurement counts at most as if it were off by so many times the usual error."""
SMALLEST_SHARE = 0.05


class OnlineFit:
    """Keeps coefficients, none negative, with ``sum(coefficient * feature)`` close to what was
    measured.

    Errors count relative to the measured value, so that short steps count as much as long ones.
    ``start``: the coefficients before any measurement. ``doubt``: by how much each may be wrong;
    one that no measurement speaks of stays as it is. ``drifts``: which may change for good by
    themselves, the others only with all of them and by the same share; all.
    """

    def __init__(
        self, start: Sequence[float], doubt: Sequence[float], drifts: Sequence[bool] | None = None
    ) -> None:
        self.coefficients = list(start)
        self.doubt(doubt)
        self._doubt = tuple(doubt)
        self._drifts = (True,) * len(doubt) if drifts is None else tuple(drifts)
        self._usual_error = 1.0
        """It begins large, so that nothing surprises at the start."""

    def predict(self, features: Sequence[float]) -> float:
        """Return what a measurement of these features should find."""
        return sum(
            coefficient * feature
            for coefficient, feature in zip(self.coefficients, features, strict=True)
        )

    def observe(self, features: Sequence[float], value: float) -> None:
        """Take a measurement; ``value`` must be positive."""
        inputs = [feature / value for feature in features]
        error = 1.0 - self.predict(inputs)
        limit = MAX_SURPRISE * self._usual_error
        # Slow, and never small: a lasting change must not be taken for a row of outliers.
        self._usual_error += 0.05 * (max(NOISE, min(abs(error), 10.0)) - self._usual_error)
        error = max(-limit, min(limit, error))
        self._drift(inputs)
        spread = [
            sum(entry * feature for entry, feature in zip(row, inputs, strict=True))
            for row in self._covariance
        ]
        total = NOISE * NOISE + sum(
            entry * feature for entry, feature in zip(spread, inputs, strict=True)
        )
        gains = [entry / total for entry in spread]
        self.coefficients = [
            coefficient + gain * error
            for coefficient, gain in zip(self.coefficients, gains, strict=True)
        ]
        for row, gain in enumerate(gains):
            for column, entry in enumerate(spread):
                self._covariance[row][column] -= gain * entry
        self._raise_negative()

    def _raise_negative(self) -> None:
        """Make negative coefficients zero, and move the others as if that had been measured.

        Those move most that are known least: features that grow together have coefficients that
        move against each other.
        """
        covariance = self._covariance
        for _ in self.coefficients:
            lowest = min(self.coefficients)
            if lowest >= 0:
                return
            index = self.coefficients.index(lowest)
            if covariance[index][index] <= 0:
                self.coefficients[index] = 0.0
                continue
            # Zero for what was raised before, which then stays where it is.
            shares = [row[index] / covariance[index][index] for row in covariance]
            self.coefficients = [
                coefficient - share * lowest
                for coefficient, share in zip(self.coefficients, shares, strict=True)
            ]
            self.coefficients[index] = 0.0
            covariance = [
                [entry - share * other for entry, other in zip(row, covariance[index], strict=True)]
                for row, share in zip(covariance, shares, strict=True)
            ]
        self.coefficients = [max(0.0, coefficient) for coefficient in self.coefficients]

    def doubt(self, values: Sequence[float]) -> None:
        """Take the coefficients for no more than a guess, each of which may be wrong by this."""
        self._covariance = [
            [value * value if row == column else 0.0 for column in range(len(values))]
            for row, value in enumerate(values)
        ]

    def _drift(self, inputs: Sequence[float]) -> None:
        """Doubt the coefficients that this measurement speaks of a little more."""
        for index, feature in enumerate(inputs):
            if feature > 0 and self._drifts[index]:
                share = max(self.coefficients[index], SMALLEST_SHARE / feature)
                share = min(share, self._doubt[index])
                self._covariance[index][index] += (DRIFT * share) ** 2
        if all(self._drifts):
            return
        # A machine that gets slower does all of its work more slowly.
        changes = [
            DRIFT * coefficient if feature > 0 else 0.0
            for coefficient, feature in zip(self.coefficients, inputs, strict=True)
        ]
        for row, change in enumerate(changes):
            for column, other in enumerate(changes):
                self._covariance[row][column] += change * other
