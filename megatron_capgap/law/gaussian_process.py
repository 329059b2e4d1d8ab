"""Gaussian-process model of all cells: a student's loss as a function of its teacher, with uncertainty.

The loss of a run, in nats per token, is modelled as

    level[student, seed] + a d + shared(d) + drift(d, log S) + own[student](d) + b q + training[teacher] + noise

with d = log(T / S). `shared` is one smooth curve for all students; `drift` is its smooth change with the student's
size; `own` is one student's deviation. `training` is the random effect of a teacher's training (scale `luck`), shared
by all students of that teacher; q is the deviation of the teacher's own held-out loss from the smooth curve of losses
against sizes, if recorded. Levels and the coefficients a and b have fixed priors. The six standard deviations and
lengths of `Scales` are estimated by marginal likelihood; importance sampling accounts for their uncertainty.

Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, equations 2.25, 2.26 and 5.9.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import linalg, optimize

from megatron_capgap.law.cells import Array, Cells, Numbers

LEVEL_SD = 5.0
SLOPE_SD = 0.1
BETA_SD = 1.0
"""Prior standard deviations of a level, of a and of b."""
OWN_BEND = 0.05
"""Variance of the smooth curve, relative to a slope of variance 1, in a student's own deviation."""
SIZE_LENGTH = 1.2
"""Correlation length of the drift in log S."""
# Medians, and standard deviations of the logarithm.
PRIOR = {
    "shared": (0.05, 1.2),
    "length": (1.6, 0.35),
    "drift": (0.005, 1.5),
    "own": (0.01, 1.5),
    "luck": (0.004, 1.5),
    "noise": (0.002, 1.5),
}
NAMES = tuple(PRIOR)
HYPER_DRAWS = 200
"""Number of draws of the scales."""
ROUNDS, ROUND, FREEDOM, FIRST_WIDTH, NEXT_WIDTH = 3, 300, 5, 1.7, 1.14
"""Importance sampling: rounds, draws per round, degrees of freedom of the t distribution, and its width relative to the
curvature at the mode and relative to the spread of the draws so far."""
REACH = 4.0
"""Maximum distance of a scale from its prior median, in prior standard deviations."""
JITTER = 1e-10
"""Added to the noise variance, so that covariances are invertible."""
ROOT_JITTER = 1e-8
"""The same for a covariance used for draws, relative to its mean variance."""
SAME = 1e-6
"""Students whose log S differ by less count as one."""


class Process:
    """The posterior given a set of cells."""

    def __init__(self, cells: Cells, random: np.random.Generator) -> None:
        self.cells, self.random = cells, random
        self.d, self.z = np.log(cells.teacher / cells.student), np.log(cells.student)
        self._y = cells.loss - cells.loss.mean()
        self._fixed = LEVEL_SD**2 * _same(cells.curve, cells.curve) + BETA_SD**2 * np.outer(
            cells.quality, cells.quality
        )
        self._luck = _same(cells.training, cells.training)
        self._parts = _parts(self.d, self.z, self.d, self.z)
        self._median = np.log([PRIOR[name][0] for name in NAMES])
        self._sd = np.array([PRIOR[name][1] for name in NAMES])
        reach = REACH * self._sd
        bounds = np.stack([self._median - reach, self._median + reach], axis=1)
        best = optimize.minimize(self.objective, self._median, jac=True, method="L-BFGS-B", bounds=bounds)
        self.mode = best.x
        self.draws = self._sample(best.x)
        self._factors = [self._factor(h) for h in self.draws]

    def scales(self) -> dict[str, float]:
        """Posterior medians of the standard deviations and the length, by name."""
        return dict(zip(NAMES, np.exp(np.median(self.draws, axis=0)).tolist(), strict=True))

    def curves(self, student: float, ratios: Array, draws: int) -> Array:
        """Draws of one student's curve, up to a level: `[draws, m]`.

        Args:
            student: parameters; a size of the cells, or another.
            ratios: log(T / S) `[m]`.
            draws: number of them.
        """
        z = np.full(len(ratios), np.log(student))
        across, within = _parts(ratios, z, self.d, self.z), _parts(ratios, z, ratios, z)
        found = []
        numbers = np.diff(np.linspace(0, draws, len(self.draws) + 1).round().astype(int))
        for h, factor, number in zip(self.draws, self._factors, numbers, strict=True):
            cross, own = _shape(h, across), _shape(h, within)
            solved = linalg.solve_triangular(factor, cross.T, lower=True)
            mean = solved.T @ linalg.solve_triangular(factor, self._y, lower=True)
            covariance = own - solved.T @ solved
            root = root_of(covariance)
            found.append(mean + self.random.standard_normal((number, len(ratios))) @ root.T)
        return np.concatenate(found)

    def mean(self, student: float, ratios: Array) -> Array:
        """The mean of the curves that `curves` draws `[m]`."""
        across = _parts(ratios, np.full(len(ratios), np.log(student)), self.d, self.z)
        solved = [linalg.cho_solve((factor, True), self._y) for factor in self._factors]
        means = [_shape(h, across) @ each for h, each in zip(self.draws, solved, strict=True)]
        return np.mean(means, axis=0)

    def moments(self, number: int, curves: Sequence[tuple[float, Array]], runs: Cells) -> tuple[Array, Array]:
        """Mean `[m + c]` and covariance of points of curves, each up to a level, and of the losses of runs not yet made
        (noise included), relative to the mean of the known losses.

        Args:
            number: index of the draw of the scales.
            curves: student and log(T / S) of the points, m in total.
            runs: c runs, whose losses are not used; curves or trainings that are not in the cells count as new.
        """
        h, factor = self.draws[number], self._factors[number]
        d = np.concatenate([*(ratios for _, ratios in curves), np.log(runs.teacher / runs.student)])
        of_curves = [np.full(len(ratios), np.log(student)) for student, ratios in curves]
        z, none = np.concatenate([*of_curves, np.log(runs.student)]), np.full(len(d) - len(runs), -1)
        curve, training = (np.append(none, each) for each in (runs.curve, runs.training))
        quality = np.append(np.zeros(len(none)), runs.quality)

        def covariance(parts: Parts, curves: Numbers, trainings: Numbers, qualities: Array) -> Array:
            levels = LEVEL_SD**2 * _same(curve, curves) * (curve >= 0)[:, None]
            luck = np.exp(h[4]) ** 2 * _same(training, trainings) * (training >= 0)[:, None]
            return _shape(h, parts) + levels + luck + BETA_SD**2 * np.outer(quality, qualities)

        known = self.cells
        cross = covariance(_parts(d, z, self.d, self.z), known.curve, known.training, known.quality)
        own = covariance(_parts(d, z, d, z), curve, training, quality)
        own += np.diag(np.where(curve >= 0, np.exp(h[5]) ** 2 + JITTER, 0.0))
        solved = linalg.solve_triangular(factor, cross.T, lower=True)
        mean = solved.T @ linalg.solve_triangular(factor, self._y, lower=True)
        return mean, own - solved.T @ solved

    def teachers(self) -> Array:
        """Effect of each training of a teacher on its students' losses, beyond its size: effect of its own loss plus
        its random effect, nats per token, at the mode of the scales; in the order of `cells.training` `[trainings]`."""
        which = np.arange(self.cells.training.max() + 1)
        quality = np.zeros(len(which))
        quality[self.cells.training] = self.cells.quality
        return self.effects(which, quality)

    def effects(self, which: Numbers, quality: Array) -> Array:
        """The same for trainings given by index, which need not be in the cells, and their qualities `[n]`."""
        cross = BETA_SD**2 * np.outer(quality, self.cells.quality)
        cross += np.exp(2 * self.mode[NAMES.index("luck")]) * _same(which, self.cells.training)
        return cross @ linalg.cho_solve((self._factor(self.mode), True), self._y)

    def left_out(self) -> tuple[Array, Array]:
        """Each loss minus its prediction from all other runs, and the standard deviation of this difference, nats per
        token, at the mode of the scales `[n]`. Rasmussen and Williams, equation 5.12."""
        inverse = linalg.cho_solve((self._factor(self.mode), True), np.eye(len(self.cells)))
        sd = np.diag(inverse) ** -0.5
        return inverse @ self._y * sd**2, sd

    def _matrix(self, h: Array) -> Array:
        e = np.exp(h)
        return (
            self._fixed
            + _shape(h, self._parts)
            + e[4] ** 2 * self._luck
            + (e[5] ** 2 + JITTER) * np.eye(len(self.cells))
        )

    def _factor(self, h: Array) -> Array:
        return linalg.cholesky(self._matrix(h), lower=True)

    def objective(self, h: Array) -> tuple[float, Array]:
        """Minus the logarithm of the posterior of the scales, and its gradient."""
        e = np.exp(h)
        try:
            factor = self._factor(h)
        except linalg.LinAlgError:
            return 1e10, np.zeros(len(h))
        inverse = linalg.cho_solve((factor, True), np.eye(len(self.cells)))
        alpha = inverse @ self._y
        prior = (h - self._median) / self._sd
        value = 0.5 * self._y @ alpha + np.log(np.diag(factor)).sum() + 0.5 * prior @ prior
        parts = self._parts
        shared, drift, own = _terms(h, parts)
        smooth = np.exp(-0.5 * parts.d2 / e[1] ** 2)
        amplitudes = e[0] ** 2 + e[2] ** 2 * parts.near + OWN_BEND * e[3] ** 2 * parts.same
        by = [
            2 * shared,
            amplitudes * smooth * parts.d2 / e[1] ** 2,
            2 * drift,
            2 * own,
            2 * e[4] ** 2 * self._luck,
            2 * e[5] ** 2 * np.eye(len(self.cells)),
        ]
        left = inverse - np.outer(alpha, alpha)
        gradient = np.array([0.5 * np.sum(left * each) for each in by]) + prior / self._sd
        return float(value), gradient

    def _sample(self, mode: Array) -> Array:
        """Draws of the scales from their posterior `[HYPER_DRAWS, 6]`, by adaptive multiple importance sampling: each
        round proposes from a t distribution with the mean and covariance of all rounds before it, and all draws are
        weighted by the mixture of the proposals (Cornuet et al., arXiv 0907.1254)."""
        step = 1e-4
        rows = [
            (self.objective(mode + step * unit)[1] - self.objective(mode - step * unit)[1]) / (2 * step)
            for unit in np.eye(len(mode))
        ]
        values, vectors = np.linalg.eigh(0.5 * (np.array(rows) + np.array(rows).T))
        proposals = [(mode, FIRST_WIDTH * linalg.cholesky((vectors / np.maximum(values, 0.3)) @ vectors.T, lower=True))]
        drawn: Array = np.zeros((0, len(mode)))
        logs: Array = np.zeros(0)
        for _ in range(ROUNDS):
            mean, root = proposals[-1]
            scaled = self.random.standard_normal((ROUND, len(mode)))
            scaled /= np.sqrt(self.random.chisquare(FREEDOM, ROUND) / FREEDOM)[:, None]
            new = mean + scaled @ root.T
            new = new[(np.abs(new - self._median) <= REACH * self._sd).all(axis=1)]
            drawn = np.concatenate([drawn, new])
            logs = np.append(logs, [-self.objective(h)[0] for h in new])
            proposed = np.logaddexp.reduce([_log_t(drawn, *each) for each in proposals], axis=0)
            weights = np.exp(logs - proposed - (logs - proposed).max())
            weights /= weights.sum()
            mean = weights @ drawn
            covariance = ((drawn - mean) * weights[:, None]).T @ (drawn - mean) + 1e-3 * np.eye(len(mode))
            proposals.append((mean, NEXT_WIDTH * linalg.cholesky(covariance, lower=True)))
        points = (np.arange(HYPER_DRAWS) + self.random.uniform()) / HYPER_DRAWS
        return drawn[np.minimum(np.searchsorted(np.cumsum(weights), points), len(drawn) - 1)]


def _log_t(h: Array, mean: Array, root: Array) -> Array:
    """Logarithm of the density of a t distribution, up to a constant `[n]`."""
    scaled = linalg.solve_triangular(root, (h - mean).T, lower=True)
    tail = -0.5 * (FREEDOM + len(mean)) * np.log1p((scaled**2).sum(axis=0) / FREEDOM)
    return tail - np.log(np.diag(root)).sum()


def _same(one: Numbers, other: Numbers) -> Array:
    return (one[:, None] == other[None]).astype(float)


@dataclass(frozen=True)
class Parts:
    """Components of the covariance between two sets of cells, `[n, m]` each."""

    d2: Array
    """Squared distances of d."""
    product: Array
    """Products of d."""
    near: Array
    """Correlation of the drift by the students' sizes."""
    same: Array
    """1 for the same student, otherwise 0."""


def _parts(d1: Array, z1: Array, d2: Array, z2: Array) -> Parts:
    z = np.abs(z1[:, None] - z2[None])
    near = np.exp(-0.5 * (z / SIZE_LENGTH) ** 2)
    return Parts((d1[:, None] - d2[None]) ** 2, d1[:, None] * d2[None], near, (z < SAME).astype(float))


def _shape(h: Array, parts: Parts) -> Array:
    """Covariance of the curves, without levels and random effects of trainings."""
    return SLOPE_SD**2 * parts.product + sum(_terms(h, parts))


def _terms(h: Array, parts: Parts) -> tuple[Array, Array, Array]:
    """Covariances of the shared curve, the drift and a student's own deviation. Each is smooth; the last two include a
    slope, which moves an optimum without changing the curvature. A student's own deviation is mostly slope."""
    shared, length, drift, own = np.exp(h[:4])
    smooth = np.exp(-0.5 * parts.d2 / length**2)
    drifting = drift**2 * parts.near * (smooth + parts.product)
    return shared**2 * smooth, drifting, own**2 * parts.same * (OWN_BEND * smooth + parts.product)


def root_of(covariance: Array) -> Array:
    """The Cholesky factor of a covariance that is singular up to rounding. Unlike eigenvectors it is unique, so equal
    random numbers give equal curves on every machine."""
    return linalg.cholesky(
        covariance + ROOT_JITTER * np.trace(covariance) / len(covariance) * np.eye(len(covariance)), lower=True
    )
