"""What runs a try-on for the server: encoded pictures and options in, encoded pictures out (DESIGN 5).

``LocalEngine`` runs it in this process. ``engine_process.ProcessEngine`` is a pipe to one in another process, which is how the server
holds the model: its Python and its memory are not those of the HTTP process, and its death is not the server's.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from backend.app.uploads import BRUSH_FILE, MASK_FILE, REFERENCE_FILE, RESULT_FILE, TARGET_FILE, Pixels
from backend.errors import DeepHairError
from backend.imaging.decode import ImageError, decode_png, encode_png, stored_profile

if TYPE_CHECKING:
    from backend.config import Config
    from backend.tryon.pipeline import TryOn
    from backend.tryon.values import Preview, TryOnRequest

logger = logging.getLogger(__name__)

OnStep = Callable[[int, int], None]  # steps done, steps in all
Cancelled = Callable[[], bool]


@dataclass(frozen=True)
class Finished:
    """A job's pictures ({file name: PNG}) and what is told of them: width, height, bundle_sha256, info."""

    pictures: dict[str, bytes]
    facts: dict[str, Any]


class EngineDied(DeepHairError):
    """The process that held the model is gone; another one can be started."""

    code = "engine_died"


class Engine(Protocol):
    """A loaded model. ``run`` is for one thread at a time; ``preview`` may run beside it."""

    bundle_sha256: str
    header: dict[str, Any]

    def run(self, options: Mapping[str, Any], pictures: Mapping[str, bytes], *, on_step: OnStep, cancelled: Cancelled) -> Finished:
        """Tries the hair on. options: fields of ``TryOnRequest``; pictures: uploads by file name, PNGs of our own.

        Raises DeepHairError with the job's error, ``values.Cancelled``, EngineDied.
        """

    def preview(self, image: Pixels) -> Preview:
        """The faces and hair of an (H, W, 3) uint8 RGB picture. Raises DeepHairError."""

    def close(self) -> None:
        """Gives its memory back; nothing runs in it any more."""


class LocalEngine:
    """A model in this process."""

    def __init__(self, tryon: TryOn) -> None:
        self._tryon = tryon
        self.bundle_sha256, self.header = tryon.bundle_sha256, tryon.header

    def run(self, options: Mapping[str, Any], pictures: Mapping[str, bytes], *, on_step: OnStep, cancelled: Cancelled) -> Finished:
        """See ``Engine``."""
        from backend.tryon.values import Cancelled as Stopped

        failure: DeepHairError | None = None
        try:
            request = _request(options, pictures)
            result = self._tryon.run(request, on_step=on_step, cancelled=cancelled)
            made = {
                RESULT_FILE: encode_png(result.image, quick=True, profile=request.profile),
                MASK_FILE: encode_png(mask_to_bytes(result.mask), quick=True),
            }
            height, width = result.image.shape[:2]
            return Finished(made, {"width": width, "height": height, "bundle_sha256": self.bundle_sha256, "info": result.info})
        except Stopped:
            raise
        except Exception as error:  # noqa: BLE001 - the job's boundary: one job's failure is its own
            failure = as_failure(error)
        if failure.code == "out_of_memory":
            _free_memory()  # only now have the frames that held the arrays gone
        raise failure

    def preview(self, image: Pixels) -> Preview:
        """See ``Engine``."""
        try:
            return self._tryon.preview(image)
        except Exception as error:  # noqa: BLE001 - as_failure logs what nobody expected
            raise as_failure(error) from None

    def close(self) -> None:
        """Nothing to do: the memory goes with the object."""


def _request(options: Mapping[str, Any], pictures: Mapping[str, bytes]) -> TryOnRequest:
    from backend.tryon.values import TryOnRequest

    try:
        decoded = {name: decode_png(content) for name, content in pictures.items()}
        profile = stored_profile(pictures[TARGET_FILE])
    except ImageError as error:
        raise DeepHairError("the stored photo cannot be read back", hint="send it again", code="storage") from error
    return TryOnRequest(
        target=decoded[TARGET_FILE], reference=decoded.get(REFERENCE_FILE), mask=decoded.get(BRUSH_FILE), profile=profile, **options
    )


def as_failure(error: Exception) -> DeepHairError:
    """What a person is told of an error; one that nobody expected is logged, and nothing of its inside is told."""
    if isinstance(error, DeepHairError):
        return error
    if is_out_of_memory(error):
        hint = "send a smaller photo or fewer steps, or try again later"
        return DeepHairError("the server ran out of memory on this photo", hint=hint, code="out_of_memory")
    logger.error("a try-on failed unexpectedly", exc_info=error)
    return DeepHairError("the try-on failed unexpectedly", hint="the reason is in the server's log", code="internal")


def mask_to_bytes(mask: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A feathered mask, float 0..1, as uint8, rounded UP: 0 says that the pixel is the upload's own."""
    rounded: NDArray[np.uint8] = np.ceil(np.clip(mask, 0.0, 1.0) * 255.0).astype(np.uint8)
    return rounded


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, in Python, on a card, or in a CPU allocator (which raises a bare RuntimeError)."""
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error).lower()
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "not enough memory" in text or "failed to allocate memory" in text


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")  # not imported here: an engine without torch loaded has nothing to give back
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_tryon(config: Config) -> TryOn:
    """``TryOn.load``, imported when it is wanted: it brings torch."""
    from backend.tryon.pipeline import TryOn

    return TryOn.load(config)
