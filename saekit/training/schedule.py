"""How the rule changes in the course of a run: annealing of k, and a second phase under Feature Choice."""

from dataclasses import dataclass

from saekit.density import RunningDensity, zipf_fit
from saekit.errors import SaekitError
from saekit.selection import FeatureChoice


@dataclass(frozen=True, slots=True)
class AnnealK:
    """k falls in a straight line from `start` to that of the rule, over the first part of the run.

    Attributes:
        start: k at the first step, larger than the rule's.
        over: share of the run after which the rule's own k is reached.
    """

    start: int
    over: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.over <= 1:
            raise SaekitError(
                f"AnnealK(over={self.over}): give the share of the run that it takes, above 0 and up to 1"
            )

    def k(self, final: int, progress: float) -> int:
        """k at a moment of the run; `progress` is the share of it that is done."""
        left = max(0.0, 1 - progress / self.over)
        return round(final + (self.start - final) * left)


@dataclass(frozen=True, slots=True)
class ThenFeatureChoice:
    """A second phase under Feature Choice, with ranks frozen from the densities that the first one led to.

    Starting with Mutual Choice and going on with Feature Choice is our reconstruction; whether the paper
    does so is not known. Each phase has a learning rate that rises, stays and falls as in a run of its own: under the
    end of the first one's the second could not learn what its budgets ask for.

    Attributes:
        at: share of the run that is done when the second phase begins. A half suits short runs; where the first
            phase needs its tokens, give more.
        exponent, offset: of the budgets; None fits them to the densities of the first phase.
        cap: largest share of the tokens that one feature may have.
        pool: batches over which budgets are shared.
        rewarm: share of the second phase over which the learning rate rises again.
    """

    at: float = 0.5
    exponent: float | None = None
    offset: float | None = None
    cap: float = 1.0
    pool: int = 8
    rewarm: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.at < 1:
            raise SaekitError(f"ThenFeatureChoice(at={self.at}): give the share of the run before it, between 0 and 1")
        if not 0 <= self.rewarm <= 1:
            raise SaekitError(f"ThenFeatureChoice(rewarm={self.rewarm}): give a share of the second phase, 0 to 1")
        if self.pool < 1:
            raise SaekitError(f"ThenFeatureChoice(pool={self.pool}): give at least 1 batch")
        # refuses now what it could not be then
        FeatureChoice(1, exponent=self.exponent or 0.0, offset=self.offset or 0.0, cap=self.cap)

    def first_step(self, steps: int) -> int:
        """The step that the second phase begins with."""
        return round(self.at * steps)

    def rule(self, k: int, density: RunningDensity, *, relu: bool) -> FeatureChoice:
        """The rule of the second phase.

        Args:
            relu: of the rule of the first one.
        """
        fit = zipf_fit(density.density)
        return FeatureChoice(
            k,
            exponent=max(0.0, fit.exponent) if self.exponent is None else self.exponent,
            offset=fit.offset if self.offset is None else self.offset,
            # the fitted tail may ask for pools of millions of tokens; one token each must do
            floor=1,
            cap=self.cap,
            relu=relu,
            ranks=density.ranks(),
        )
