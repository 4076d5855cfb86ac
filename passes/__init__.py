"""The graph transformation: from a captured dense model to one that probes, scores and selects.

Read in the order of `PRUNE`. Each pass is one file; `operators.py` holds all that is known about operators.
"""

from ppgraph.passes.base import Builder, Pass, PassResult, Program, Refusal, Site
from ppgraph.passes.compensate_exit import CompensateExit
from ppgraph.passes.dense_tokens import DenseTokens
from ppgraph.passes.find_sites import FindSites
from ppgraph.passes.insert_probe import InsertProbe
from ppgraph.passes.insert_score import InsertScore
from ppgraph.passes.manager import run_passes
from ppgraph.passes.observe_channels import ObserveChannels
from ppgraph.passes.pack_weights import PackWeights
from ppgraph.passes.probe_whole_batch import ProbeWholeBatch
from ppgraph.passes.reuse_probe import ReuseProbe
from ppgraph.passes.reuse_selection import ReuseSelection
from ppgraph.passes.select_weights import SelectWeights
from ppgraph.passes.update_history import UpdateHistory

ANALYSE: tuple[Pass, ...] = (FindSites(),)
PRUNE: tuple[Pass, ...] = (
    FindSites(),
    InsertProbe(),
    InsertScore(),
    SelectWeights(),
    CompensateExit(),
    DenseTokens(),
    ReuseProbe(),
    UpdateHistory(),
)
CHOOSE: tuple[Pass, ...] = (
    FindSites(),
    ProbeWholeBatch(),
    InsertScore(ProbeWholeBatch.name),
    UpdateHistory(ProbeWholeBatch.name),
)
REUSE: tuple[Pass, ...] = (FindSites(), ReuseSelection(), SelectWeights(), CompensateExit(), PackWeights())
CALIBRATE: tuple[Pass, ...] = (FindSites(), ObserveChannels())

__all__ = [
    "ANALYSE",
    "CALIBRATE",
    "CHOOSE",
    "PRUNE",
    "REUSE",
    "Builder",
    "Pass",
    "PassResult",
    "Program",
    "Refusal",
    "Site",
    "run_passes",
]
