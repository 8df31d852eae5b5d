"""How fast the GPU's memory is: the yardstick of `edgellama bench --device cuda`."""

from __future__ import annotations

import torch

COPY_BYTES = 512 << 20


class DeviceBandwidth:
    """Bytes a second that a copy on the GPU reads and writes; `measure` appends to `samples`."""

    def __init__(self) -> None:
        size = min(COPY_BYTES, torch.cuda.mem_get_info()[0] // 4)
        self._source = torch.zeros(size, dtype=torch.uint8, device="cuda")
        self._target = torch.empty_like(self._source)
        self.samples: list[float] = []
        self._target.copy_(self._source)

    def measure(self, copies: int = 5) -> None:
        """The best of a few copies."""
        times = []
        for _ in range(copies):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self._target.copy_(self._source)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000)
        self.samples.append(2 * self._source.numel() / min(times))

    def close(self) -> None:
        del self._source, self._target
