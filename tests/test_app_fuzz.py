"""The server against its own OpenAPI document, by schemathesis: whatever the document allows or forbids is answered as it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.app_standin import Live, app_config, serving

load_all_checks()
document = schemathesis.openapi.from_dict(json.loads((Path(__file__).parent / "openapi.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(app_config(tmp_path_factory.mktemp("fuzz"), queue_size=10_000)) as server:
        yield server


@pytest.mark.long
@document.parametrize()
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_answer_is_one_that_the_document_names(case: Any, live: Live) -> None:
    """Worth its time: it sends what nobody thought of. That a form is accepted is not asked: which bytes are a photo, no document says."""
    case.call_and_validate(base_url=f"http://127.0.0.1:{live.port}", excluded_checks=[positive_data_acceptance], timeout=20)
