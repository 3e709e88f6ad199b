"""The code that docs/ shows, so that the tests run what a reader copies."""

import re

from tests.conftest import ROOT


def code_blocks(page: str, language: str = "python") -> list[str]:
    """The fenced blocks of that language in docs/<page>, in order."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
