"""The conformance suite: ours pass it, and for each check there is a compressor that fails just that one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

import broken
from multifd.testing.checks import CHECKS

MULTIFD = [sys.executable, "-m", "multifd"]


def conformance(name: str, *arguments: str, env: Mapping[str, str] = os.environ) -> dict[str, dict[str, Any]]:
    """What `multifd conformance` finds: each check's outcome."""
    result = subprocess.run(
        [*MULTIFD, "conformance", name, "--json", *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert result.stdout, result.stderr
    found = json.loads(result.stdout)
    outcomes = {outcome["check"]: outcome for outcome in found["checks"]}
    bad = {"failed", "not run"} & {outcome["result"] for outcome in outcomes.values()}
    assert (found["passed"], result.returncode) == (not bad, bool(bad))
    return outcomes


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return broken.install(tmp_path_factory.mktemp("toys"))


def kept(outcomes: Mapping[str, Mapping[str, Any]], *not_asked: str) -> None:
    """Everything was asked but this, and nothing failed."""
    assert {name: outcome for name, outcome in outcomes.items() if outcome["result"] == "failed"} == {}
    assert {name for name, outcome in outcomes.items() if outcome["result"] == "not asked"} == set(not_asked)
    assert set(outcomes) == {check.name for check in CHECKS}


# --- the suite itself ---


def test_the_good_one_keeps_the_contract(toys: dict[str, str]) -> None:
    kept(conformance("toy-good", env=toys), "captures")


@pytest.mark.parametrize("name", broken.BROKEN)
def test_a_broken_one_fails_its_check_and_no_other(name: str, toys: dict[str, str]) -> None:
    outcomes = conformance(name, env=toys)
    failed = {name: outcome for name, outcome in outcomes.items() if outcome["result"] == "failed"}
    assert set(failed) == set(broken.BROKEN[name]), failed
    for outcome in failed.values():
        assert outcome["called"]
        assert outcome["came"]
