"""Zero-shot tasks from local JSON lines, scored by lm-eval on a model in memory. Needs `pip install 'ppgraph[eval]'`.

A file is one task, a line one question. What its keys are decides what is asked:

| keys | what is compared |
| --- | --- |
| `query`, `choices`, `gold` | the log-likelihood of each choice after the query (PIQA, ARC, BoolQ, OpenBookQA) |
| `context_options`, `continuation`, `gold` | that of one continuation after each context (WinoGrande) |
| `context`, `continuation` | whether the continuation is what greedy decoding gives (LAMBADA) |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppgraph.errors import InputError

Question = Mapping[str, Any]


def read_task(path: Path) -> list[dict[str, Any]]:
    """The questions of a file.

    Raises:
        InputError: the file can't be read, a line is no JSON object, or its keys are none of the known sets.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read task {path}: {error}; expected a file of JSON lines") from None
    questions = []
    for number, line in enumerate(lines, start=1):
        try:
            question = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number} is no JSON ({error}); expected one question a line") from None
        if not isinstance(question, dict) or _keys_of(question) is None:
            found = sorted(question) if isinstance(question, dict) else type(question).__name__
            known = " or ".join(str(sorted(keys)) for keys in _TASKS)
            raise InputError(f"{path}:{number} has {found}, expected a question with {known}")
        questions.append(question)
    if not questions:
        raise InputError(f"{path} holds no questions")
    return questions


def task_config(name: str, questions: Sequence[Question]) -> dict[str, Any]:
    """What lm-eval's ConfigurableTask takes for a file of questions."""
    keys = _keys_of(questions[0])
    assert keys is not None
    from datasets import Dataset

    return {
        "task": name,
        "custom_dataset": lambda **ignored: {"test": Dataset.from_list([dict(question) for question in questions])},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 1},
        **_TASKS[keys],
    }


def zero_shot(
    model: nn.Module, tokenizer: Any, tasks: Sequence[Path], *, batch: int = 20, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Score a model, dense or pruned, on local tasks.

    Each of lm-eval's batches is padded on the right and masked, so a pruned model selects for the batch it gets; which
    questions share a batch is lm-eval's choice (by length).

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        tasks: Files of JSON lines; a task is called by its file's name.
        batch: Requests a batch.
        limit: Only the first so many questions of each task.

    Returns:
        {task: {"acc": ..., maybe "acc_norm" and "acc_stderr": ..., "questions": ...}}.

    Raises:
        InputError: lm-eval is not installed, or a task can't be read.
    """
    questions = {path.stem: read_task(path)[:limit] for path in tasks}
    lm_eval = _import_lm_eval()
    from lm_eval.api.task import ConfigurableTask

    made = [ConfigurableTask(config=task_config(name, asked)) for name, asked in questions.items()]
    language_model = _masking_model(model, tokenizer, batch)
    found = lm_eval.simple_evaluate(language_model, tasks=made, bootstrap_iters=0, log_samples=False)
    return {
        name: {
            key.partition(",")[0]: float(value)
            for key, value in found["results"][name].items()
            if _is_accuracy(key) and value != "N/A"  # an error that lm-eval has not estimated
        }
        | {"questions": float(len(questions[name]))}
        for name in questions
    }


def real_tokens(ids: Tensor) -> Tensor:
    """1 for tokens and 0 for lm-eval's padding, [B, S]: it pads with zeros on the right and says no more about it."""
    later = (ids != 0).long().flip(1).cummax(1).values.flip(1)
    later[:, 0] = 1
    return later


def _import_lm_eval() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise InputError(f"zero-shot tasks need lm-eval ({error}); run: pip install 'ppgraph[eval]'") from None
    return lm_eval


def _masking_model(model: nn.Module, tokenizer: Any, batch: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    class MaskingModel(HFLM):  # type: ignore[misc]
        """lm-eval's wrapper, which hands over padding as if it were text, with a mask."""

        def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
            with torch.no_grad():
                logits: Tensor = self.model(input_ids=inps, attention_mask=real_tokens(inps), use_cache=False).logits
            return logits

    return MaskingModel(pretrained=model, tokenizer=tokenizer, batch_size=batch)


def _is_accuracy(key: str) -> bool:
    return key.partition(",")[0] in ("acc", "acc_norm", "acc_stderr")


def _prompt(question: Question) -> str:
    """The query; those that begin as lm-eval's own tasks do go on as these do."""
    query = str(question["query"]).strip()
    return f"{query}\nAnswer:" if query.startswith(("Question:", "Passage:")) else query


def _answer(key: str) -> Callable[[Question], Any]:
    return lambda question: question[key]


_MEAN_ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}

_TASKS: dict[frozenset[str], dict[str, Any]] = {
    frozenset(("query", "choices", "gold")): {
        "output_type": "multiple_choice",
        "doc_to_text": _prompt,
        "doc_to_choice": _answer("choices"),
        "doc_to_target": _answer("gold"),
        "metric_list": [_MEAN_ACCURACY, {**_MEAN_ACCURACY, "metric": "acc_norm"}],
    },
    frozenset(("context_options", "continuation", "gold")): {
        "output_type": "multiple_choice",
        "doc_to_text": _answer("gold"),
        "doc_to_choice": _answer("context_options"),
        "doc_to_target": _answer("continuation"),
        "metric_list": [_MEAN_ACCURACY],
    },
    frozenset(("context", "continuation")): {
        "output_type": "loglikelihood",
        "doc_to_text": _answer("context"),
        "doc_to_target": lambda question: f" {question['continuation']}",
        "metric_list": [_MEAN_ACCURACY],
    },
}


def _keys_of(question: Question) -> frozenset[str] | None:
    """The set of keys that says how a question is asked."""
    return next((keys for keys in _TASKS if keys <= set(question)), None)
