"""Generation with a pruned model: what it writes beside the dense one, and how well decoding predicts real text.

    python examples/generate.py                         # SmolLM2-135M, downloaded once (93 MB)
    python examples/generate.py MODEL --text FILE       # a folder, .gguf file or hub name; a text of your own

Each prompt chooses its own heads and channels. The table scores decoding: the first half of each window of text is the
prompt, the second half goes through the KV cache token by token, each given the true tokens before it. `decode` says
what those steps run on: the prompt's selection (reuse), a selection of their own (probe), or the whole model (dense).
With `dense_below` prompts that are too small for pruning to save time run dense, and all of their tokens choose; with
`history_below` they run on what the history alone says, and so do the steps behind them.
"""

from __future__ import annotations

import argparse
import inspect
import math
import pydoc_data.topics
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from tqdm import tqdm
from transformers import DynamicCache, LlamaForCausalLM

import ppgraph
from ppgraph.config import DECODE_MODES
from ppgraph.loading import load_model, smollm2_path

RATIO = 0.2
PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about a lighthouse.",
    "What is the difference between a list and a tuple in Python?",
)
NEW_TOKENS = 48
WINDOWS, PROMPT_TOKENS, STEPS = 8, 128, 64
CALIBRATION_BATCHES = 2
# The name of the argument that takes a KV cache has changed with transformers 5.24.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def main() -> None:
    """Load, calibrate, generate, score, print."""
    args = parse()
    print("loading the model", file=sys.stderr)
    model, tokenizer = load_model(args.model or smollm2_path(lambda line: print(line, file=sys.stderr)))
    if tokenizer is None:
        sys.exit(f"generate: {args.model} has no tokenizer; name a model that comes with one")
    calibration, windows = split(args.text, tokenizer)
    configs: dict[str, dict[str, Any]] = {f"decode={decode!r}": {"decode": decode} for decode in DECODE_MODES}
    for limit in ("dense_below", "history_below"):
        configs[f"decode='reuse', {limit}=2000"] = {limit: 2000}
    # Short texts on a small model don't pay for compiling: the rewritten graphs run as they are.
    pruned: dict[str, Any] = {
        name: ppgraph.transform(model, ratio=args.ratio, lowering="eager", **config) for name, config in configs.items()
    }
    calibrate(pruned, calibration)

    for prompt in PROMPTS:
        print(f"\n# {prompt}")
        print_text("dense", answer(model, tokenizer, prompt))
        print_text(f"pruned {args.ratio:.0%}", answer(pruned["decode='reuse'"], tokenizer, prompt))

    models = {"the dense model": model} | {f"pruned, {name}": each for name, each in pruned.items()}
    rows = [
        {"model": name, "perplexity of decoding": decode_perplexity(each, windows)} for name, each in models.items()
    ]
    print(f"\n{WINDOWS} windows: {PROMPT_TOKENS} tokens of prompt, then {STEPS} scored; ratio {args.ratio}\n")
    print(tabulate(rows, headers="keys", floatfmt=".2f"))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Generate with a pruned model beside the dense one.")
    parser.add_argument("model", nargs="?", help="folder, .gguf file or hub name; SmolLM2-135M if absent")
    parser.add_argument("--text", type=Path, help="text to score; Python's own help topics if absent")
    parser.add_argument("--ratio", type=float, default=RATIO, help="share of heads and channels removed")
    return parser.parse_args()


def split(path: Path | None, tokenizer: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Batches to calibrate on, from the text's first half, and windows `[WINDOWS, PROMPT_TOKENS + STEPS]` to score."""
    text = path.read_text(encoding="utf-8") if path else "\n".join(pydoc_data.topics.topics.values())
    ids = torch.tensor(tokenizer(text)["input_ids"])
    length = PROMPT_TOKENS + STEPS
    batch, middle = WINDOWS * length, len(ids) // 2
    needed = 2 * batch * CALIBRATION_BATCHES
    if len(ids) < needed:
        sys.exit(f"generate: the text has {len(ids)} tokens, {needed} are needed; name a longer one by --text")
    calibration = ids[: batch * CALIBRATION_BATCHES].view(-1, WINDOWS, length)
    return list(calibration), ids[middle : middle + batch].view(WINDOWS, length)


def calibrate(pruned: dict[str, Any], calibration: list[torch.Tensor]) -> None:
    """Give all pruned models the history of one run over the calibration batches."""
    first, *others = pruned.values()
    ppgraph.calibrate(first, calibration)
    with tempfile.TemporaryDirectory() as folder:
        first.ppgraph.history.save(folder)
        for each in others:
            each.ppgraph.history.load(folder)


def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """The model's greedy answer to a prompt, as a chat where it has a template for that."""
    text = prompt
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
    inputs = tokenizer(text, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    new: str = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return new


def print_text(title: str, text: str) -> None:
    """A generated text under its title."""
    print(f"{title}:\n{textwrap.indent(textwrap.fill(text.strip(), 100), '    ')}")


@torch.no_grad()
def decode_perplexity(model: Any, windows: torch.Tensor) -> float:
    """Perplexity of the tokens behind the prompt, each predicted by a single-token step through the cache."""
    cache = {CACHE: DynamicCache(config=model.config)}
    logits = model(windows[:, :PROMPT_TOKENS], **cache).logits[:, -1]
    losses = []
    for place in tqdm(range(PROMPT_TOKENS, windows.shape[1]), desc="decoding", leave=False):
        losses.append(F.cross_entropy(logits, windows[:, place]).item())
        logits = model(windows[:, place : place + 1], **cache).logits[:, -1]
    return math.exp(sum(losses[1:]) / len(losses[1:]))  # the first is predicted by the prompt itself


if __name__ == "__main__":
    try:
        main()
    except ppgraph.PPGraphError as error:
        sys.exit(f"generate: {error}")
