"""Write the second half of docs/plugins.md, the contract, from the docstrings of `multifd.hookspecs`.

    python tools/contract.py [--check]

What stands above the line MARK is written by hand, and stays.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from multifd import hookspecs
from multifd.testing.checks import CHECKS

PAGE = Path(__file__).parents[1] / "docs" / "plugins.md"
MARK = "<!-- From here on written by tools/contract.py, from core/src/multifd/hookspecs.py -->\n"
#: When each hook is called, in one phrase.
CALLED = {
    "multifd_compressor": "when the compressor is loaded",
    "multifd_probe": "to list compressors and to choose one",
    "multifd_send_setup": "once for each sending channel",
    "multifd_send_prepare": "once for each packet with normal pages",
    "multifd_send_cleanup": "once for each sending channel",
    "multifd_recv_setup": "once for each receiving channel",
    "multifd_recv": "once for each packet with normal pages",
    "multifd_recv_cleanup": "once for each receiving channel",
}
RECORDS = (hookspecs.Facts, hookspecs.Option, hookspecs.Probe, hookspecs.Channel)


def text(of: object) -> str:
    """A docstring, one line for each paragraph."""
    paragraphs = (inspect.getdoc(of) or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def signature(of: object) -> str:
    """Arguments and result, as the source has them."""
    assert callable(of)
    return str(inspect.signature(of)).replace("'", "")


def contract() -> str:
    """The contract in Markdown."""
    parts = ["## The contract", text(hookspecs).partition("\n\n")[2]]
    parts.append(
        "| hook | called |\n| --- | --- |\n" + "\n".join(f"| `{hook}` | {when} |" for hook, when in CALLED.items())
    )
    for hook in CALLED:
        spec = getattr(hookspecs, hook)
        parts += [f"### {hook}", f"```python\n{hook}{signature(spec)}\n```", text(spec)]
    for record in RECORDS:
        fields = re.sub(r"^\(|\) -> None$", "", signature(record).replace("<factory>", "{}"))
        parts += [f"### {record.__name__}", f"```python\n{record.__name__}({fields})\n```", text(record)]
    parts += [f"`Channel.read_into{signature(hookspecs.Channel.read_into)}`: ", text(hookspecs.Channel.read_into)]
    rows = "\n".join(f"| `{check.name}` | {check.sentence} |" for check in CHECKS)
    parts += [
        "## What the suite asks",
        f"| check | the sentence that it holds a compressor to |\n| --- | --- |\n{rows}",
    ]
    return "\n\n".join(parts) + "\n"


def page(now: str) -> str:
    """The whole page, its first half as it is now."""
    return now.partition(MARK)[0] + MARK + "\n" + contract()


def main() -> None:
    now = PAGE.read_text()
    new = page(now)
    if sys.argv[1:] == ["--check"]:
        sys.exit("docs/plugins.md is not what the docstrings say: run tools/contract.py" if new != now else 0)
    PAGE.write_text(new)


if __name__ == "__main__":
    main()
