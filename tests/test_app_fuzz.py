"""The server against its own OpenAPI document, by schemathesis: whatever the document allows or forbids is answered as it says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.app_standin import Live, app_config, serving

load_all_checks()
document = schemathesis.pytest.from_fixture("api_document")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(app_config(tmp_path_factory.mktemp("fuzz"), queue_size=10_000)) as server:
        yield server


@pytest.fixture(scope="module")
def api_document(live: Live) -> Any:
    return schemathesis.openapi.from_url(f"http://127.0.0.1:{live.port}/api/v1/openapi.json")


@pytest.mark.long
@document.parametrize()
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_answer_is_one_that_the_document_names(case: Any) -> None:
    """Worth its time: it sends what nobody thought of. That a form is accepted is not asked: which bytes are a photo, no document says."""
    case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=20)
