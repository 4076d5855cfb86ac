"""Families: every causal language model of transformers, tiny and with random weights, against its masked dense model.

    python -m tests.reliability.families
    python -m tests.reliability.families --only granite_swa xlnet

`tests/test_families.py` has those that matter most, in detail; this looks at all others, each with one padded batch.
Sizes are set under the names that configs commonly have for them: where others keep a model large, it runs out of the
memory or time that its process may take, and is listed as one that was not made. POSIX only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import ppgraph
from ppgraph.errors import NothingToPruneError
from tests.reliability import record
from tests.test_families import FAMILIES, PRUNING, Family, batch, check_logits

# Beside those of tests/test_families.py: other names for sizes, and what the latent attention of some is made of.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"), 1),
    **dict.fromkeys(("n_head", "num_heads", "decoder_attention_heads", "n_routed_experts"), 4),
    **dict.fromkeys(("n_embd", "d_model", "hidden_dim"), 64),
    **dict.fromkeys(("d_inner", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group"), 1),
    "v_head_dim": 16,
}


def shortened(error: BaseException) -> str:
    """Its type and first line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def look(model_type: str) -> dict[str, Any]:
    """What came of a family: `result` is "equal", "nothing to prune", "not judged", "not made", "wrong" or "failed"."""
    torch._dynamo.reset()
    family = Family(model_type)
    try:
        dense = family.model(family.implementations()[0], sizes=SIZES)
        with torch.no_grad():
            dense(**batch("left"), use_cache=False)
    except Exception as error:
        return {"result": "not made", "why": shortened(error)}
    pruned: Any = ppgraph.transform(dense, **PRUNING)
    try:
        pruned(**batch("left"), use_cache=False)
        sites = pruned.ppgraph.sites
        if any("#" in site.name for site in sites if site.status == "pruned"):
            return {"result": "not judged", "why": "it runs a layer several times, with a choice for each"}
        check_logits(dense, pruned, batch("left"), use_cache=False)
    except NothingToPruneError as error:
        return {"result": "nothing to prune", "why": str(error)}
    except AssertionError as error:
        return {"result": "wrong", "why": shortened(error)}
    except Exception as error:
        return {"result": "failed", "why": shortened(error)}
    counts = Counter(site.status for site in sites)
    refused = {site.name: site.reason for site in sites if site.refused}
    return {"result": "equal", "pruned": counts["pruned"], "refused": refused}


def _look_in_child(model_type: str, gigabytes: int, results: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, gigabytes << 30))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results.send(look(model_type))


def looked_at(model_type: str, seconds: float, gigabytes: int) -> dict[str, Any]:
    """`look` in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_look_in_child, args=(model_type, gigabytes, sender))
    child.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(seconds) else {"result": "not made", "why": f"over {seconds:.0f} s"}
    except EOFError:
        return {"result": "not made", "why": f"its process ended, maybe for more than {gigabytes} GiB of memory"}
    finally:
        child.kill()
        child.join()


def main() -> None:
    """Look at all, write what was found, and end with 1 where a family was wrong or failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", metavar="MODEL_TYPE", help="these alone; nothing is written")
    parser.add_argument("--seconds", type=float, default=200, help="the most that one may take")
    parser.add_argument("--gigabytes", type=int, default=10, help="the most memory that one may take")
    options = parser.parse_args()
    listed = {family.model_type for family in FAMILIES.values()}
    wanted = options.only or [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in listed]
    start, found = time.monotonic(), {}
    for name in wanted:
        found[name] = looked_at(name, options.seconds, options.gigabytes)
        print(name, found[name]["result"], found[name].get("why", ""), flush=True)
    counts = Counter(result["result"] for result in found.values())
    if not options.only:
        summary = {"program": "tests/reliability/families.py", "counts": dict(counts), "families": found}
        record.write("families", {**summary, "seconds": round(time.monotonic() - start)})
    print(dict(counts))
    raise SystemExit(bool(counts["wrong"] or counts["failed"]))


if __name__ == "__main__":
    main()
