"""A generation service in small: prompts come in one a line, answers go out one a line, waiting prompts are batched.

    python examples/serve.py MODEL < prompts.txt > answers.jsonl        # a folder, .gguf file or hub name
    python examples/serve.py MODEL --lowering eager                     # type prompts; nothing is compiled

Each batch chooses its own heads and channels from its prompts and decodes on them. Its KV cache carries that choice, so
batches of several threads may be interleaved on one model. What has been seen moves the history on: save it at the end
(`--history FOLDER`), and the next start goes on from there.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ppgraph
from ppgraph.loading import load_model


def main(arguments: list[str]) -> None:
    """Load, then answer until the input ends."""
    args = parse(arguments)
    model, tokenizer = load_model(args.model)
    if tokenizer is None:
        raise ppgraph.PPGraphError(f"{args.model} has no tokenizer; name a model that comes with one")
    tokenizer.padding_side = "left"  # new tokens follow the prompt
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    pruned = ppgraph.transform(model, ratio=args.ratio, lowering=args.lowering)
    if args.history and args.history.exists():
        pruned.ppgraph.history.load(args.history)
    for prompts in waiting(args.batch):
        for prompt, answer in zip(prompts, answers(pruned, tokenizer, prompts, args.tokens), strict=True):
            print(json.dumps({"prompt": prompt, "answer": answer}), flush=True)
        print(f"{len(prompts)} answered", file=sys.stderr)
    if args.history:
        pruned.ppgraph.history.save(args.history)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Answer prompts from stdin with a pruned model.")
    parser.add_argument("model", help="folder, .gguf file or hub name")
    parser.add_argument("--ratio", type=float, default=0.2, help="share of heads and channels removed")
    parser.add_argument("--batch", type=int, default=8, help="most prompts to answer at once")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens a prompt")
    parser.add_argument("--history", type=Path, help="folder to go on from, and to save to at the end")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor", help="eager compiles nothing")
    return parser.parse_args(arguments)


def waiting(most: int) -> Iterator[list[str]]:
    """Batches of what is waiting: the next prompt, and all that have come by then."""
    arrived: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=read, args=(arrived,), daemon=True).start()
    batch: list[str | None] = []
    while not batch or batch[-1] is not None:
        batch = [arrived.get()]
        while len(batch) < most and not arrived.empty():
            batch.append(arrived.get())
        prompts = [prompt for prompt in batch if prompt is not None]
        if prompts:
            yield prompts


def read(arrived: queue.Queue[str | None]) -> None:
    """Put the prompts of stdin into a queue, and None behind them."""
    for line in sys.stdin:
        if line.strip():
            arrived.put(line.strip())
    arrived.put(None)


def answers(model: Any, tokenizer: Any, prompts: list[str], tokens: int) -> list[str]:
    """Greedy answers to a batch of prompts."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    new: list[str] = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in new]


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ppgraph.PPGraphError as error:
        sys.exit(f"serve: {error}")
