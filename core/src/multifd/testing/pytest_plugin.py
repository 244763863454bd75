"""The conformance suite in pytest: `pytest --multifd-compressor NAME`; without the option it does nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

OPTION = "--multifd-compressor"
#: Compressor -> check -> its outcome.
OUTCOMES = pytest.StashKey[dict[str, dict[str, dict[str, str]]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The one option."""
    parser.getgroup("multifd").addoption(
        OPTION,
        action="append",
        default=[],
        metavar="NAME[,key=value...]",
        help="run multifd's conformance suite on this compressor too; may be repeated",
    )


@pytest.hookimpl(tryfirst=True)  # before -k and -m choose
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """An item for each check of each compressor named."""
    if compressors := config.getoption(OPTION):
        from multifd.testing.checks import CHECKS

        for compressor in compressors:
            for check in CHECKS:
                name = f"conformance[{compressor}-{check.name}]"
                items.append(Conformance.from_parent(session, name=name, compressor=compressor, check=check.name))


class Failed(Exception):
    """What the check says."""


class Conformance(pytest.Item):
    """One check of one compressor."""

    def __init__(self, *, compressor: str, check: str, **more: Any) -> None:
        super().__init__(nodeid=str(more["name"]), **more)
        self.compressor = compressor
        self.check = check

    def runtest(self) -> None:
        """Raises Failed; skips what is not asked, or cannot be asked here."""
        outcome = self._outcomes()[self.check]
        if outcome["result"] == "failed":
            raise Failed(f'{outcome["called"]} {outcome["came"]}\nThe contract: "{outcome["sentence"]}"')
        if outcome["result"] != "passed":
            pytest.skip(f"{outcome['result']}: {outcome['reason']}")

    def _outcomes(self) -> dict[str, dict[str, str]]:
        """All checks of this compressor that were chosen: `multifd conformance` runs them, once."""
        known = self.session.stash.setdefault(OUTCOMES, {})
        if self.compressor not in known:
            items = (item for item in self.session.items if isinstance(item, Conformance))
            chosen = [f"--check={item.check}" for item in items if item.compressor == self.compressor]
            command = [sys.executable, "-m", "multifd", "conformance", self.compressor, "--json", *chosen]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if not result.stdout:
                raise Failed(result.stderr.strip())
            known[self.compressor] = {outcome["check"]: outcome for outcome in json.loads(result.stdout)["checks"]}
        return known[self.compressor]

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The text alone: the stack is this plugin's."""
        return str(excinfo.value) if isinstance(excinfo.value, Failed) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[str, None, str]:
        """Where it stands, for people."""
        return "multifd", None, self.name
