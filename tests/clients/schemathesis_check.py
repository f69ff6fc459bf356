"""The description of the API, tried by schemathesis: every route with data that fits it and data that does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "positive_data_acceptance",
    "missing_required_header",
    "unsupported_method",
)


SETTINGS = """\
[generation]
allow-extra-parameters = false
[checks]
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 501, 503, 504]
positive_data_acceptance.expected-statuses = ["2xx", 404, 501, 503, 504]
"""
"""A header that nobody knows breaks no description. 501: the fake engine has no such route. 503 and 504: a deadline of
a billionth of a second. Both are described."""


def test_the_description_is_kept(open_to_all: str, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(SETTINGS)
    command = [
        *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{open_to_all}/openapi.json"),
        *("--url", open_to_all, "--checks", ",".join(CHECKS), "--seed", "1", "--output-sanitize", "false"),
        *("--max-examples", os.environ.get("EXAMPLES", "25"), "--request-timeout", "20"),
        *("--phases", "examples,coverage,fuzzing", "--suppress-health-check", "all"),
    ]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-20000:] + found.stderr[-2000:]
