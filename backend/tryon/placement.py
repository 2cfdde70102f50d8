"""Which networks are on the card (DESIGN 5): all of them always, or each one only while it computes.

The second is for cards on which they do not fit beside each other. At SDXL's size in bf16 the UNet weighs 4.8 GiB, the text encoders 1.5 and
decoding at 1024 takes 1.5 beside the VAE (training_memory.md, section 5); with one part there at a time the largest of them is what counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Placement:
    """card: where networks compute. rest: where they wait; None leaves them where they are."""

    card: torch.device
    rest: torch.device | None = None

    @property
    def home(self) -> torch.device:
        """Where a network is put that nobody uses."""
        return self.card if self.rest is None else self.rest

    @contextlib.contextmanager
    def used(self, *networks: nn.Module) -> Iterator[None]:
        """Has ``networks`` on the card for the length of a ``with``. They are moved, never copied: no weight is there twice."""
        if self.rest is None:
            yield
            return
        try:
            for network in networks:
                network.to(self.card)
            yield
        finally:
            for network in networks:
                network.to(self.rest)


STAYS = Placement(torch.device("cpu"))  # nothing is moved, wherever it is
