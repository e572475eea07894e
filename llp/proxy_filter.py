"""The first filter without training: the best of several random draws by a training-free proxy.

Every `AUDIT_EVERY`-th trial takes its first draw whatever the proxy says. So the search never hangs
on the proxy alone, and its rank correlation with the results can be measured on draws that it has
not selected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llp.driver import ConfigurationSource
from llp.records import HyperparameterValue, ProxyScore
from llp.spec.schema import ProxySpec

AUDIT_EVERY = 3
STRIDE = 1_000_003
"""Distance between the draws of one trial in the numbering of the searcher below."""


class ProxyFilter:
    """A searcher that draws several configurations and keeps the best by a proxy.

    Args:
        searcher: Draws by number, as `RandomSearch` does.
        score: The proxy of a configuration, larger is better.
        asked: Its name, and how many are drawn.
    """

    num_points: int | None = None

    def __init__(
        self,
        searcher: ConfigurationSource,
        score: Callable[[Mapping[str, HyperparameterValue]], float],
        asked: ProxySpec,
    ) -> None:
        self._searcher, self._score, self._asked = searcher, score, asked
        self.noted: dict[int, ProxyScore] = {}

    def suggest(self, index: int) -> dict[str, HyperparameterValue]:
        """The configuration of trial `index`: a function of the index alone; ties go to the first.

        What the proxy says of it is then in `noted`.
        """
        audited = index % AUDIT_EVERY == 0
        num = 1 if audited else self._asked.candidates
        drawn = [self._searcher.suggest(index + STRIDE * k) for k in range(num)]
        scores = [self._score(values) for values in drawn]
        best = max(range(num), key=lambda k: scores[k])
        self.noted[index] = ProxyScore(self._asked.name, scores[best], filtered=not audited)
        return drawn[best]
