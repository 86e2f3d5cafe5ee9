"""The web page in a real browser: send, stream, stop, regenerate, edit, error, reload; no script of an answer runs.

Needs Chromium (`apt-get install chromium`); `make browser` runs it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn

from tests.engine.fakes import FakeRunner
from tests.serve.serving import Served, served

pytestmark = pytest.mark.browser

HOSTILE_ANSWER = (
    '# Title\n\nA **bold** word, `code` and <img src=x onerror="window.hacked=1">.\n\n'
    "- one\n- two\n\n```python\nprint('<script>window.hacked=1</script>')\n```\n\n"
    "[bad](javascript:window.hacked=1) [good](https://example.org/) <script>window.hacked=1</script>\n"
)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class TellingRunner(FakeRunner):
    """Says a text after any prompt, slowly enough to be stopped; can be told to fail a request's prompt."""

    def __init__(self, text: str, pause_s: float) -> None:
        super().__init__(num_pages=1024)
        self.text = text.encode()
        self.pause_s = pause_s

    def forward(self, batch: Any) -> Any:
        time.sleep(self.pause_s)
        return super().forward(batch)

    def logits_after(self, history: Any) -> Any:
        import numpy as np

        marker = b"<assistant>"
        said = len(history) - (bytes(history.astype("uint8")).rfind(marker) + len(marker))
        logits = np.zeros(258, dtype=np.float32)
        logits[self.text[said] if 0 <= said < len(self.text) else 256] = 99
        return logits


@dataclass
class Site:
    """A page that is served, and its server."""

    url: str
    served: Served
    runner: TellingRunner


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    runner = TellingRunner(HOSTILE_ANSWER, 0.002)
    with served(runner) as found, socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(found.app, log_config=None, ws="none"))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
        thread.start()
        yield Site(f"http://127.0.0.1:{bound.getsockname()[1]}", found, runner)
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, site: Site) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    found = context.new_page()
    problems: list[str] = []
    asked: list[str] = []
    found.on("pageerror", lambda error: problems.append(str(error)))
    found.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    found.on("request", lambda request: asked.append(request.url))
    site.runner.pause_s = 0.002
    found.goto(site.url)
    found.wait_for_selector("#plan-facts dd")
    yield found
    context.close()
    assert all(url.startswith(site.url) for url in asked), asked
    assert [text for text in problems if "503" not in text and "429" not in text] == []


def send(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def wait_for_end(page: Any) -> None:
    page.wait_for_selector("#stop", state="hidden")
    page.wait_for_selector(".message.assistant .actions button")


def test_an_answer_is_shown_as_text_and_markup_of_ours_only(page: Any) -> None:
    send(page, "hello <b>you</b>")
    wait_for_end(page)
    body = page.locator(".message.assistant .body")
    assert page.locator(".message.user .body").inner_text() == "hello <b>you</b>"
    assert body.locator("h3").inner_text() == "Title"
    assert body.locator("strong").inner_text() == "bold"
    assert body.locator("li").all_inner_texts() == ["one", "two"]
    assert body.locator("pre code").inner_text().strip() == "print('<script>window.hacked=1</script>')"
    assert body.locator("a").evaluate_all("links => links.map((link) => link.href)") == ["https://example.org/"]
    assert body.locator("img, script").count() == 0
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.activeElement.id") == "input"


def test_stop_keeps_what_was_said_and_frees_the_engine(page: Any, site: Site) -> None:
    site.runner.pause_s = 0.03
    send(page, "stop me")
    page.locator(".message.assistant .body h3", has_text="Tit").wait_for()
    page.keyboard.press("Escape")
    wait_for_end(page)
    assert "stopped" in page.locator(".message.assistant .note").inner_text()
    assert page.locator(".message.assistant .body").inner_text().startswith("Tit")
    for _ in range(200):
        if site.served.service.engine.stats().running == 0:
            break
        time.sleep(0.02)
    assert site.served.service.engine.stats().running == 0


def test_reload_regenerate_and_edit(page: Any) -> None:
    send(page, "first")
    wait_for_end(page)
    page.reload()
    page.wait_for_selector(".message.assistant h3")
    assert page.locator(".message").count() == 2
    page.get_by_role("button", name="Regenerate").click()
    wait_for_end(page)
    assert page.locator(".message").count() == 2
    page.get_by_role("button", name="Edit").click()
    page.fill("#edit-area", "second")
    page.get_by_role("button", name="Send", exact=True).first.click()
    wait_for_end(page)
    assert page.locator(".message.user .body").all_inner_texts() == ["second"]
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".message").count() == 0
    assert page.locator("#welcome").is_visible()


def test_an_error_is_told_and_can_be_tried_again(page: Any, site: Site) -> None:
    site.served.service.is_draining = True
    try:
        send(page, "too late")
        page.wait_for_selector(".failed")
        assert "shutting down" in page.locator(".failed").inner_text()
    finally:
        site.served.service.is_draining = False
    page.get_by_role("button", name="Try again").click()
    wait_for_end(page)
    assert page.locator(".failed").count() == 0
    assert page.locator(".message.assistant h3").count() == 1


def test_a_phone_has_room_for_everything(browser: Any, site: Site) -> None:
    context = browser.new_context(
        viewport={"width": 360, "height": 740},
        is_mobile=True,
        has_touch=True,
        color_scheme="dark",
        reduced_motion="reduce",
    )
    page = context.new_page()
    page.goto(site.url)
    page.wait_for_selector("#plan-facts dd", state="attached")
    assert page.locator("#panel").is_hidden()
    send(page, "narrow")
    wait_for_end(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.tap("#panel-toggle")
    assert page.locator("#panel").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.tap("#panel-close")
    assert page.locator("#panel").is_hidden()
    context.close()


def test_the_keyboard_reaches_everything_in_order(page: Any) -> None:
    page.locator(".skip").focus()
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        if reached[-1] == "layer":
            break
    order = [name for name in reached if name in ("new-chat", "theme", "panel-toggle", "input", "temperature", "layer")]
    assert order == ["new-chat", "theme", "panel-toggle", "input", "temperature", "layer"]
