"""Whose face a photo shows, and how many threads the networks take that find it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from backend.training.prepare_photo import _main_face
from backend.training.training_face import DetectedFace, FaceAnalyzer
from tests.conftest import World


@pytest.mark.parametrize(
    ("x", "y", "blurred", "belongs"),
    [
        (200, 220, True, True),
        (215, 240, True, True),
        (40, 40, True, False),
        (200, 220, False, True),
        (200, 290, False, True),
        (40, 40, False, False),
    ],
)
def test_a_face_on_the_wall_is_not_the_clients(x: float, y: float, blurred: bool, belongs: bool) -> None:
    """The client's is blurred away, so the largest face that a detector finds may be a poster's."""
    box = (x - 30.0, y - 30.0, x + 30.0, y + 30.0)
    ring = [np.array([[160.0, 180.0], [240.0, 180.0], [240.0, 260.0], [160.0, 260.0]])] if blurred else []
    hair = [np.array([[150.0, 120.0], [250.0, 120.0], [250.0, 230.0], [150.0, 230.0]])]
    label = SimpleNamespace(horizontal=10.0, face_rings=ring, hair_rings=hair)
    face, other = (
        DetectedFace(box, 0.9, np.zeros((5, 2), np.float32)),
        DetectedFace((190, 200, 200, 210), 0.9, np.zeros((5, 2), np.float32)),
    )
    found = _main_face([face, other], label)  # type: ignore[arg-type]
    assert found is (face if belongs else other)
    label.horizontal = 180.0
    assert _main_face([face], label) is None  # type: ignore[arg-type]


def test_a_workers_networks_have_one_thread_each(raw_world: World) -> None:
    one, many = FaceAnalyzer(raw_world.root / "weights", threads=1), FaceAnalyzer(raw_world.root / "weights")
    for network in (one._detector, one._recognizer):
        options = network.session.get_session_options()
        assert options.intra_op_num_threads == options.inter_op_num_threads == 1
    assert many._detector.session.get_session_options().intra_op_num_threads == 0  # ONNX Runtime's own choice
