"""Steps of decoding, and small prompts by the history, as CUDA graphs: kernels recorded once and launched together.

A step of one token is often over sooner than its kernels are launched one by one. Inductor's own CUDA graphs copy
every input that it does not know to stay in place; a lowered step takes its weights, caches and selections as inputs.
Here two calls tell: what lies where it lay in the call before is read there, and the rest, such as the token, is copied
into memory of the recording. Prompts below `history_below` are recorded where two of the same shape follow each other;
those that choose for themselves are not: they are larger, and their kernels outlast the launches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Step = Callable[..., Sequence[Any]]
# Runs a step on these inputs, and gives what runs it again on them and the results that this writes anew.
Record = Callable[[Step, Sequence[Any]], tuple[Callable[[], None], Sequence[Any]]]


@dataclass(frozen=True)
class Recording:
    """One recorded step.

    `replay` reads what lies at `addresses` and in `copies` (the recording's own memory, by place of the input), and
    writes `results`; those that are an input are given as its place.
    """

    replay: Callable[[], None]
    addresses: Sequence[int | None]
    copies: Mapping[int, Tensor]
    results: Sequence[Any]

    def reads(self, addresses: Sequence[int | None]) -> bool:
        """Whether inputs lie where they lay when the step was recorded, but for those that are copied."""
        pairs = enumerate(zip(addresses, self.addresses, strict=True))
        return all(given == known or place in self.copies for place, (given, known) in pairs)

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Run the step on inputs that it reads; the results stay what they are when it is replayed again."""
        for place, own in self.copies.items():
            own.copy_(inputs[place])
        self.replay()
        return [inputs[result.place] if isinstance(result, _Given) else _kept(result) for result in self.results]


@dataclass(frozen=True)
class _Given:
    """A result that is the input at `place`."""

    place: int


class Replayed:
    """A lowered step that is recorded at the second of two calls alike, and replayed from then on.

    Calls are alike where all shapes and numbers are the same; growing caches never are, so steps on them run as they
    are. One recording is kept: a cache in other memory has it made again.

    Args:
        step: Takes the graph's inputs and gives its outputs, on one GPU.
        written: Places of the inputs that it writes to; while one of them moves, nothing is recorded.
        record: How a step is recorded.
    """

    def __init__(self, step: Step, written: frozenset[int], record: Record | None = None) -> None:
        self._step, self._written = step, written
        self._record = _CudaGraphs() if record is None else record
        self._last: tuple[list[Any], list[int | None]] = ([], [])
        self._recording: Recording | None = None

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        kinds, addresses = [_kind(value) for value in inputs], [_address(value) for value in inputs]
        (last_kinds, last), self._last = self._last, (kinds, addresses)
        if kinds != last_kinds:
            self._recording = None
            return self._step(*inputs)
        if self._recording is None or not self._recording.reads(addresses):
            self._recording = None
            moved = [place for place, address in enumerate(addresses) if address != last[place]]
            if self._written.intersection(moved) or not _recordable(inputs):
                return self._step(*inputs)
            self._recording = self._recorded(inputs, addresses, moved)
        results = self._recording(inputs)
        # A lowered graph does so itself; who keeps what such a tensor held looks at its version.
        written = [inputs[place] for place in self._written]
        torch.autograd.graph.increment_version([value for value in written if not value.is_inference()])
        return results

    def _recorded(self, inputs: Sequence[Any], addresses: Sequence[int | None], moved: Sequence[int]) -> Recording:
        copies = {place: inputs[place].clone() for place in moved}
        own = [copies.get(place, value) for place, value in enumerate(inputs)]
        places = {id(value): place for place, value in enumerate(own)}
        replay, results = self._record(self._step, own)
        named = [_Given(places[id(value)]) if id(value) in places else value for value in results]
        return Recording(replay, addresses, copies, named)


class _CudaGraphs:
    """Records steps one after the other into memory that they share, as no two of them run at once."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, step: Step, inputs: Sequence[Any]) -> tuple[Callable[[], None], Sequence[Any]]:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        device = next(value.device for value in inputs if isinstance(value, Tensor))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            # Its own stream, for the default one stays on the device that recorded first. Other threads may go on
            # allocating; what they do is none of the recording.
            stream = torch.cuda.Stream()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                results = step(*inputs)
        return graph.replay, list(results)


def _kind(value: Any) -> Any:
    return (value.dtype, value.device, value.shape, value.stride()) if isinstance(value, Tensor) else value


def _address(value: Any) -> int | None:
    return value.data_ptr() if isinstance(value, Tensor) else None


def _kept(result: Any) -> Any:
    return result.clone() if isinstance(result, Tensor) else result


def _recordable(inputs: Sequence[Any]) -> bool:
    """Whether all tensors are on one device; numbers that tensors on the CPU hold would be recorded as they are."""
    return len({value.device for value in inputs if isinstance(value, Tensor)}) == 1
