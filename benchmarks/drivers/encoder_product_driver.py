"""The encoder's fp32 product alone, x [batch, d_in] times W_enc, into an output that is there already."""

import os
from collections.abc import Iterator

import protocol
import torch
from torch import Tensor


class EncoderProduct:
    def __init__(self, task: protocol.Task) -> None:
        generator = torch.Generator().manual_seed(task.seed)
        W_enc = torch.randn(task.d_in, task.d_sae, generator=generator) / task.d_in**0.5
        transposed = os.environ.get("LAYOUT") == "transposed"  # stored as [d_sae, d_in], as torch.nn.Linear does
        self.W_enc = W_enc.T.contiguous().T if transposed else W_enc
        self.scores = torch.empty(task.batch_size, task.d_sae)

    def run(self, batches: list[Tensor]) -> list[float]:
        return protocol.timed(lambda x: torch.mm(x, self.W_enc, out=self.scores), batches)

    def train(self, batches: Iterator[Tensor]) -> None:
        raise NotImplementedError("there is nothing to train")

    def reconstruct(self, x: Tensor) -> Tensor:
        raise NotImplementedError("there is nothing to score")


if __name__ == "__main__":
    protocol.serve(EncoderProduct, [])
