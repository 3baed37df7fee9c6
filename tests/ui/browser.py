"""Debian's chromium on a real server, driven by Playwright. A console error or a request to another host is a fault."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE = Path(__file__).parent / "vendor/axe.min.js"
SERIOUS = ("serious", "critical")

try:
    from playwright.sync_api import Browser, Page, expect, sync_playwright
except ImportError:
    pytest.skip("needs playwright (the test extra)", allow_module_level=True)

PATIENCE_MS = 30_000  # for content to appear, on a busy machine
expect.set_options(timeout=PATIENCE_MS)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the browser; skip the test if it is not installed."""
    if CHROMIUM is None:
        pytest.skip("needs chromium (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Console:
    """One page of the console, and the faults that occurred on it.

    Attributes:
        expected: parts of console messages that a test provokes.
    """

    def __init__(self, browser: Browser, url: str, prefix: str = "", **options: Any) -> None:
        self._url = url
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(PATIENCE_MS)
        self.page: Page = self.context.new_page()
        self.root = f"{url}{prefix}/ui/"
        self.faults: list[str] = []
        self.expected: list[str] = []
        self.page.on("console", lambda message: self._note(message.type, message.text))
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.context.on("request", lambda request: self._requested(request.url))

    def _note(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and not any(part in text for part in self.expected):
            self.faults.append(f"{kind}: {text}")

    def _requested(self, url: str) -> None:
        if not url.startswith((f"{self._url}/", "blob:", "data:")):
            self.faults.append(f"a request to {url}")

    def open(self, view: str) -> Page:
        """Go to a view as by a link."""
        self.page.goto(f"{self.root}#/{view}")
        self.page.get_by_role("heading", level=1).wait_for()
        return self.page

    def violations(self) -> list[str]:
        """Serious accessibility violations that axe-core finds on the page as shown."""
        # Evaluated, not added as a script, since the page's policy allows only its own scripts.
        self.page.evaluate(AXE.read_text(encoding="utf-8"))
        found: list[dict[str, Any]] = self.page.evaluate("async () => (await axe.run()).violations")
        return [
            f"{one['id']}: {node['target']} {node['failureSummary']}"
            for one in found
            if one["impact"] in SERIOUS
            for node in one["nodes"]
        ]

    def close(self) -> None:
        """Close the page, and fail on any fault that occurred."""
        self.context.close()
        assert not self.faults, self.faults
