"""The code blocks of docs/, so that the tests run what a reader copies."""

import re

from tests.conftest import ROOT


def code_blocks(page: str, language: str = "python") -> list[str]:
    """Return the fenced blocks of a language in docs/<page>, in order."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def registered_part(script: str) -> str:
    """Return the registered class or function of a script, which the page tells readers to copy into a checkout."""
    return script[script.index("@register_") : script.index("\n\nif __name__")]


def stated_lines(page: str, code: str) -> bool:
    """Return whether the page states the number of lines of `code`, without blank lines."""
    lines = [line for line in code.splitlines() if line.strip()]
    return f"takes {len(lines)} lines" in (ROOT / "docs" / page).read_text(encoding="utf-8")
