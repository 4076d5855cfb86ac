"""The commands of the command line, one module each, and the arguments that they share."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppgraph.config import BLOCKS, PruneConfig
from ppgraph.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "float16")


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL, and where and as what to load it."""
    parser.add_argument("model", metavar="MODEL", help="folder, .gguf file, hub name or config:FAMILY")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (float32)")
    parser.add_argument("--device", help="where to run (cuda if there is one, else cpu)")


def add_batch(parser: argparse.ArgumentParser, samples: int, tokens: int) -> None:
    """The size of a batch."""
    parser.add_argument("--batch", type=positive, default=samples, metavar="B", help=f"samples a batch ({samples})")
    parser.add_argument("--length", type=positive, default=tokens, metavar="S", help=f"tokens a sample ({tokens})")


def add_config(parser: argparse.ArgumentParser) -> None:
    """One option a field of `PruneConfig`, described as there; what is left out keeps the field's default."""
    group = parser.add_argument_group("pruning")
    described = dict(_field_descriptions())
    for field in dataclasses.fields(PruneConfig):
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": described[field.name], "dest": field.name}
        flag = f"--{field.name.replace('_', '-')}"
        if field.name == "blocks":
            group.add_argument(flag, nargs="+", choices=BLOCKS, **options)
        elif isinstance(field.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif field.name == "skip_layers" or field.name == "width_multiple":
            group.add_argument(flag, type=int, metavar="N", **options)
        elif field.type == "float":
            group.add_argument(flag, type=float, metavar="X", **options)
        else:
            group.add_argument(flag, metavar="NAME", **options)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Machine-readable output."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def add_examples(parser: argparse.ArgumentParser, *lines: str) -> None:
    """Examples below a command's options."""
    parser.epilog = "examples:\n" + "\n".join(f"  ppgraph {line}" for line in lines)


def config_of(args: argparse.Namespace) -> PruneConfig:
    """The config that the options give.

    Raises:
        ConfigError: a bad value.
    """
    fields = {field.name for field in dataclasses.fields(PruneConfig)}
    return PruneConfig.from_dict({name: value for name, value in vars(args).items() if name in fields})


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model and, where it has one, its tokenizer.

    Raises:
        InputError: it can't be loaded.
    """
    import torch

    from ppgraph.loading import load_model

    say(f"loading {args.model}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load_model(args.model, dtype=getattr(torch, args.dtype), device=device)


def random_batch(model: PreTrainedModel, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Token ids [B, S] drawn at random, always the same ones.

    Raises:
        InputError: samples longer than the model's context.
    """
    import torch

    vocabulary = model.get_input_embeddings().weight.shape[0]
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or args.length
    if args.length > longest:
        raise InputError(f"--length {args.length} is longer than the model's context of {longest} tokens")
    ids = torch.randint(vocabulary, (args.batch, args.length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(model.device)}


def text_batches(
    tokenizer: PreTrainedTokenizerBase | None, path: Path, args: argparse.Namespace
) -> Iterator[torch.Tensor]:
    """The text's tokens in order as whole batches [B, S], none of them padded.

    Raises:
        InputError: no tokenizer, a file that can't be read, or less text than one batch.
    """
    import torch

    if tokenizer is None:
        raise InputError(f"{args.model} has no tokenizer to read {path} with; name a model that comes with one")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    whole = len(ids) // (args.batch * args.length)
    if not whole:
        raise InputError(
            f"{path} has {len(ids)} tokens, one batch needs {args.batch} x {args.length}; "
            "name a longer text or a smaller batch"
        )
    return iter(ids[: whole * args.batch * args.length].view(whole, args.batch, args.length))


def as_json(values: Mapping[str, Any]) -> str:
    """Indented JSON."""
    return json.dumps(values, indent=2)


def say(message: str) -> None:
    """Show progress on stderr."""
    print(message, file=sys.stderr, flush=True)


def positive(text: str) -> int:
    """A whole number of at least 1, as argparse wants it checked."""
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return value


def _field_descriptions() -> Iterator[tuple[str, str]]:
    """Each field of `PruneConfig` with the text that its docstring has for it."""
    attributes = (inspect.getdoc(PruneConfig) or "").partition("Attributes:")[2].partition("Raises:")[0]
    for match in re.finditer(r"^ {4}(\w+): (.+?)(?=^ {4}\w+: |\Z)", attributes, re.MULTILINE | re.DOTALL):
        yield match[1], " ".join(match[2].split()).rstrip(".").replace("%", "%%").replace("`", "")
