"""Rows in lanes: a fixed number of streams side by side, so that their order does not depend on who reads them."""

from collections.abc import Callable

import torch

from saelab.base import processes as distributed
from saelab.training.norms import NormFilter
from saelab.training.pieces import Rows
from saelab.training.sources import StreamSource


class Lanes:
    """Streams that each give an equal part of every batch, in their order; a process has those that are its own.

    `make(i)` makes the stream of a lane, with pieces, a buffer and a generator of its own. All lanes of all processes share
    one running median of norms: after each batch they hear of what the others have seen.
    """

    def __init__(self, count: int, make: Callable[[int], StreamSource]) -> None:
        self.count = count
        self.streams = {i: make(i) for i in range(count)[distributed.part(count)]}
        lead, *_ = self.streams.values()
        self.widths = lead.widths
        self.norms = NormFilter(lead.norms.max_norm, lead.widths["x"])

    @property
    def filling(self) -> Callable[[int, int], None]:
        """What is told how full the buffer of a lane is."""
        return next(iter(self.streams.values())).filling

    @filling.setter
    def filling(self, tell: Callable[[int, int], None]) -> None:
        for stream in self.streams.values():
            stream.filling = tell

    def next(self, n: int) -> Rows:
        return self._beside([stream.next(n // self.count) for stream in self.streams.values()])

    def sample(self, n: int) -> Rows:
        return self._beside([stream.sample(-(-n // self.count)) for stream in self.streams.values()])

    def _beside(self, parts: list[Rows]) -> Rows:
        self.norms.settle([stream.norms for stream in self.streams.values()])
        return {name: torch.cat([part[name] for part in parts]) for name in self.widths}

    @property
    def place(self) -> list[int]:
        places = torch.tensor([stream.place for stream in self.streams.values()])
        return distributed.gathered(places)[0].flatten().tolist()

    def go_on(self, place: list[int], total: int) -> None:
        each = len(place) // self.count
        for i, stream in self.streams.items():
            stream.go_on(place[i * each : (i + 1) * each], total // self.count)

    def state_dict(self) -> Rows:
        state = self.norms.state_dict()
        for i, stream in self.streams.items():
            state |= {f"lane.{i}.{name}": tensor for name, tensor in stream.state_dict().items()}
        return state

    def load_state_dict(self, state: Rows) -> None:
        self.norms.load_state_dict(state)
        for i, stream in self.streams.items():
            prefix = f"lane.{i}."
            stream.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
