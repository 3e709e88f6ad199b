"""A page in headless Chromium, driven over a pipe in the DevTools protocol: nothing to install beside the browser."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
_ROOTS = """
  const roots = [document];
  for (const root of roots) for (const e of root.querySelectorAll("*")) if (e.shadowRoot) roots.push(e.shadowRoot);
"""
# What can be read on a page, shadow trees included, which innerText leaves out.
_TEXT = f"""(() => {{ {_ROOTS}
  return roots.flatMap((root) => [...root.children])
    .filter((e) => e.tagName !== "STYLE" && e.checkVisibility()).map((e) => e.innerText || "").join("\\n");
}})()"""
_PICTURES = f"""(() => {{ {_ROOTS}
  return roots.flatMap((root) => [...root.querySelectorAll("img")])
    .filter((e) => e.checkVisibility() && e.complete).map((e) => e.naturalWidth);
}})()"""


_LIMIT = 600.0  # seconds for what a page must show; a test that passes never comes near it


class Page:
    """The one page of a browser."""

    def __init__(self, commands: int, answers: int) -> None:
        self._out, self._in = os.fdopen(commands, "wb", buffering=0), os.fdopen(answers, "rb")
        self._count, self._session = 0, ""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command of the protocol; RuntimeError where the browser refuses it."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._next())
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, url: str) -> None:
        """Go to `url`, afresh even where only its fragment differs."""
        self.ask("Page.navigate", url="about:blank")
        self.ask("Page.navigate", url=url)

    def wait_for(self, *words: str, seconds: float = _LIMIT) -> str:
        """The page's text as soon as it holds all `words`; AssertionError naming those that do not come."""
        end = time.monotonic() + seconds
        while True:
            text = str(self.run(_TEXT))
            missing = [word for word in words if word not in text]
            if not missing:
                return text
            assert time.monotonic() < end, f"{missing} do not appear; the page says: {text[:2000]}"
            time.sleep(0.25)

    def wait_for_pictures(self, count: int, seconds: float = _LIMIT) -> None:
        """Return as soon as the page shows `count` images, all of them loaded."""
        end = time.monotonic() + seconds
        while not (len(widths := self.run(_PICTURES)) == count and all(widths)):
            assert time.monotonic() < end, f"images of these widths are shown: {widths}"
            time.sleep(0.25)

    def screenshot(self, path: Path) -> None:
        """Write what the window shows as PNG."""
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))

    def _next(self) -> bytes:
        parts = bytearray()
        while (byte := self._in.read1(1)) != b"\0":
            assert byte, "the browser has ended"
            parts += byte
        return bytes(parts)


@contextmanager
def chromium(width: int = 1600, height: int = 1200) -> Iterator[Page]:
    """A page of `width` x `height` pixels in a browser of its own, which ends with the block."""
    assert CHROMIUM is not None
    commands, answers = os.pipe(), os.pipe()
    # The browser's helper processes may still write while the folder is removed.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
        ]
        words += ["--remote-debugging-pipe", f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (commands[0], answers[1])]

        def place_pipes() -> None:
            os.dup2(high[0], 3)  # where the browser looks for them
            os.dup2(high[1], 4)

        browser = subprocess.Popen(words, stderr=subprocess.DEVNULL, close_fds=False, preexec_fn=place_pipes)
        for end in (commands[0], answers[1], *high):
            os.close(end)
        try:
            page = Page(commands[1], answers[0])
            page.ask(
                "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
            )
            yield page
        finally:
            stop(browser)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process, by force where it does not end by itself."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":  # python -m tests.browser URL FILE.png WIDTH HEIGHT WORD...: a picture once all words appear
    address, file, *size = sys.argv[1:5]
    with chromium(*map(int, size)) as picture:
        picture.open(address)
        picture.wait_for(*sys.argv[5:])
        time.sleep(3)  # until what moves has come to rest
        picture.screenshot(Path(file))
    with Image.open(file) as image:
        image.convert("RGB").quantize(256).save(file, optimize=True)
