"""What a Stage 2 run says of itself: lines of JSON, which the report draws, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from backend import artifacts
from backend.config import Config
from backend.training.device_memory import peak_gib
from backend.training.stage2_files import PREFIX, log_path, log_rows

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TrainingLog:
    """One line per ``write`` in ``stage2_log.jsonl`` and its points in ``tensorboard/stage2/``. ``keep`` false: writes nothing.

    After ``resume`` the lines and points of steps that a kill threw away are gone; they come again.
    """

    def __init__(self, config: Config, device: torch.device, *, keep: bool) -> None:
        self._config, self._device, self._keep = config, device, keep
        self._first = 0
        self._board: SummaryWriter | None = None

    def write(self, row: dict[str, Any]) -> None:
        """Adds a line with the peak of memory so far. row: ``step`` and numbers."""
        if not self._keep:
            return
        path = log_path(self._config)
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {**row, "memory_gib": round(peak_gib(self._device), 3)}
        with path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row, sort_keys=True) + "\n")
        board = self._opened()
        for name, value in row.items():
            if name != "step":
                board.add_scalar(f"train/{name}", value, row["step"])

    def resume(self, step: int) -> None:
        """Goes on after ``step``."""
        if not self._keep:
            return
        self._first = step + 1
        kept = [row for row in log_rows(self._config) if row["step"] <= step]
        artifacts.write_text(log_path(self._config), "".join(json.dumps(row, sort_keys=True) + "\n" for row in kept))

    def close(self) -> None:
        """Flushes what TensorBoard's writer still holds."""
        if self._board is not None:
            self._board.close()
            self._board = None

    def _opened(self) -> SummaryWriter:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter  # late: it takes a second to import

            self._board = SummaryWriter(str(self._config.paths.checkpoints / "tensorboard" / PREFIX), purge_step=self._first)
        return self._board
