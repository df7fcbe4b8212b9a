"""Functions of tensors recorded as CUDA graphs and played again: a window's thousand launches as one.

A GPU's queue takes a launch every few microseconds, which is what small kernels take themselves. A graph has them all at
once. The first call with new shapes runs as it is, the second records, all others copy their inputs to where the recording
reads them, play it, and copy the results out. Weights are not copied: the recording reads them where they are, so it is
keyed by their addresses, and an optimiser's step in place needs nothing.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., list[Tensor]]
Recorder = Callable[[Callable[[], list[Tensor]]], tuple[list[Tensor], Callable[[], None]]]

MOST = 8
"""How many recordings are kept; each holds the memory of all that its function allocates."""


def record(call: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
    """Record a call on the current device; return the tensors that it makes, and what plays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # libraries make their workspaces, which a recording must not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return outputs, graph.replay


class _Recording:
    def __init__(self, function: Function, inputs: Sequence[Tensor | None], recorder: Recorder) -> None:
        self.inputs = [None if x is None else x.clone() for x in inputs]
        self.outputs, self.play = recorder(lambda: function(*self.inputs))

    def __call__(self, inputs: Sequence[Tensor | None]) -> list[Tensor]:
        for mine, given in zip(self.inputs, inputs, strict=True):
            if mine is not None:
                mine.copy_(given)  # type: ignore[arg-type]
        self.play()
        return [x.clone() for x in self.outputs]


class Graphs:
    """Recordings by key, the least recently used of which make room.

    Attributes:
        why_not: why nothing is recorded any more, in one line; empty as long as all is well.
    """

    def __init__(self, recorder: Recorder = record, most: int = MOST) -> None:
        self.why_not = "PYWM_CUDA_GRAPHS=0" if os.environ.get("PYWM_CUDA_GRAPHS") == "0" else ""
        self._recorder, self._most = recorder, most
        self._found: OrderedDict[Any, _Recording | None] = OrderedDict()
        self._lock = threading.Lock()

    def run(
        self,
        name: str,
        form: Any,
        function: Function,
        weights: Sequence[Tensor],
        inputs: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """Return ``function(*inputs)``.

        Args:
            name: of the function.
            form: everything beside tensors that it depends on, hashable.
            function: takes the inputs; reads the weights, always where they are now.
            weights: what it reads beside the inputs.
            inputs: copied each time.
        """
        if self.why_not or not self._is_worth_it(inputs):
            return function(*inputs)
        stream = torch.cuda.current_stream().cuda_stream if torch.cuda.is_available() else 0
        key = (name, form, stream, *(_look(x) for x in inputs), *((x.data_ptr(), _look(x)) for x in weights))
        with self._lock:
            if key not in self._found:  # once may be never again
                self._found[key] = None
                while len(self._found) > self._most:
                    self._found.popitem(last=False)
                return function(*inputs)
            self._found.move_to_end(key)
            recording = self._found[key]
            if recording is None:
                try:
                    recording = self._found[key] = _Recording(function, inputs, self._recorder)
                except Exception as error:
                    self.why_not = f"recording {name} failed: {(str(error).splitlines() or [''])[0]}"
                    logging.getLogger("pywm").warning("CUDA graphs are not used: %s", self.why_not)
                    self._found.clear()
                    return function(*inputs)
            return recording(inputs)

    def clear(self) -> None:
        """Forget all recordings and free their memory."""
        with self._lock:
            self._found.clear()

    def _is_worth_it(self, inputs: Sequence[Tensor | None]) -> bool:
        if self._recorder is not record:
            return True
        on_gpu = any(x is not None and x.device.type == "cuda" for x in inputs)
        return on_gpu and not torch.cuda.is_current_stream_capturing()  # somebody records us already


def _look(x: Tensor | None) -> Any:
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device)


graphs = Graphs()
