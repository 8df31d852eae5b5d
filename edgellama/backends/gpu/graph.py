"""A decode step captured in CUDA graphs: one launch from Python instead of two hundred.

A graph holds one kind of step: so many tokens, so many splits of attention, logits only or a choice after them. Each is
captured when it is first wanted, after it has run once without (which compiles its kernels).
"""

from __future__ import annotations

import torch

from .decode import Decoder, launch

Kind = tuple[int, int, str]
"""Tokens, attention splits, and what comes out: "logits", "greedy" or "sampled"."""


class Steps:
    """Runs a decoder's steps; through graphs where the device is a GPU."""

    def __init__(self, decoder: Decoder, device: torch.device):
        self._decoder, self._device = decoder, device
        self._graphs: dict[Kind, torch.cuda.CUDAGraph] = {}

    def run(self, kind: Kind) -> None:
        """One step over the decoder's buffers, on the current stream; it may still be running on return."""
        if self._device.type != "cuda":
            self._launch(kind)
            return
        if kind not in self._graphs:
            self._graphs[kind] = self._capture(kind)
        self._graphs[kind].replay()

    def _launch(self, kind: Kind) -> None:
        n_tokens, splits, output = kind
        launch(self._decoder.step(n_tokens, splits))
        if output != "logits":
            self._decoder.select(n_tokens, greedy=output == "greedy")

    def _capture(self, kind: Kind) -> torch.cuda.CUDAGraph:
        """The run before the capture compiles, and warms up what allocates; its inputs are put back."""
        decoder = self._decoder
        inputs = decoder.tokens.clone(), decoder.positions.clone()
        self._launch(kind)
        torch.cuda.synchronize(self._device)
        decoder.tokens.copy_(inputs[0])
        decoder.positions.copy_(inputs[1])
        graph = torch.cuda.CUDAGraph()
        # Other threads may use CUDA meanwhile: only what this one does is captured.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._launch(kind)
        return graph
