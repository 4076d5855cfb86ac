"""Looking into it: what pruning would do to a model (`explain`), and what it did (`Report`)."""

from ppgraph.inspect.explain import Explanation, explain
from ppgraph.inspect.report import Report

__all__ = ["Explanation", "Report", "explain"]
