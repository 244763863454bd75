"""Every QEMU with every other, as each machine: what does not work does not without us either."""

from __future__ import annotations

import pytest

import prove
from boards import BOARDS
from matrix import Group, explained, groups, try_group
from standin import Missing

#: A sample has x86_64's alone: the other systems have to be downloaded.
SAMPLE = 3

pytestmark = [pytest.mark.timeout(600)]


BOARDS_HERE = [board for board in BOARDS if prove.SIZE == "full" or board.system == "x86_64"]


@pytest.mark.may_warn(".*")
@pytest.mark.parametrize("group", prove.sample(list(groups(BOARDS_HERE)), SAMPLE), ids=str)
def test_a_group(group: Group) -> None:
    try:
        found = try_group(group)
    except Missing as missing:
        pytest.skip(str(missing))
    assert {target: explained(pair) for target, pair in found.items() if pair.ours} == {}
