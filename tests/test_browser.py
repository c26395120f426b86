"""The page /docs in a real browser, which sends its requests itself."""

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from tests.service import Service, http_client, serve

pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs chromium and chromedriver",
)

# The name of an element in a response of the driver: https://www.w3.org/TR/webdriver2/#elements
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """Chromium without a window, controlled by the WebDriver protocol."""

    def __init__(self, driver: httpx2.Client, profile: Path) -> None:
        arguments = [
            *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"),
            *("--window-size=1200,3200", f"--user-data-dir={profile}"),
            # No name has an address, so that a request to another host fails everywhere.
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ]
        options = {
            "goog:chromeOptions": {"args": arguments},
            "goog:loggingPrefs": {"performance": "ALL"},
            "timeouts": {"implicit": 20_000},
        }
        self._driver = driver
        self._session = ""
        session = self("POST", "/session", capabilities={"alwaysMatch": options})["sessionId"]
        self._session = f"/session/{session}"

    def __call__(self, method: str, path: str, **body: Any) -> Any:
        content = json.dumps(body) if method == "POST" else None
        response = self._driver.request(method, self._session + path, content=content)
        value = response.json()["value"]
        assert response.status_code == 200, value
        return value

    def open(self, url: str) -> None:
        self("POST", "/url", url=url)

    def find(self, selector: str) -> str:
        """Return the path of the first element; wait until there is one."""
        found = self("POST", "/element", using="css selector", value=selector)
        return f"/element/{found[ELEMENT]}"

    def click(self, selector: str) -> None:
        self("POST", f"{self.find(selector)}/click")

    def text(self, selector: str) -> str:
        return str(self("GET", f"{self.find(selector)}/text"))

    def requested(self) -> list[str]:
        """Return the URLs that the browser has requested since the last call."""
        logged = self("POST", "/se/log", type="performance")
        events = [json.loads(entry["message"])["message"] for entry in logged]
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def save_screenshot(self, selector: str, file: Path) -> None:
        file.write_bytes(base64.b64decode(self("GET", f"{self.find(selector)}/screenshot")))


@pytest.fixture
def backend() -> str:
    return "sqlite"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout
            line = next(line for line in process.stdout if "successfully on port" in line)
            port = int(line.rpartition(" ")[2].strip().rstrip("."))
            with http_client(port, timeout=60) as driver:
                browser = Browser(driver, tmp_path / "profile")
                yield browser
                browser("DELETE", "")
        finally:
            process.terminate()


def foreign(urls: list[str], origin: str) -> list[str]:
    return [url for url in urls if not url.startswith((f"{origin}/", "data:", "blob:", "chrome"))]


def test_the_docs_page_sends_requests_to_this_host_only(
    service: Service, browser: Browser, tmp_path: Path
) -> None:
    origin = f"http://127.0.0.1:{service.port}"
    browser.open(f"{origin}/docs")

    def try_out(operation: str) -> Any:
        """Send the request of the form with its examples; return the body of the response."""
        block = f"#operations-heroes-{operation}"
        browser.click(f"{block} .opblock-summary-control")
        browser.click(f"{block} .try-out__btn")
        browser.click(f"{block} .execute")
        response = f"{block} .live-responses-table tr.response"
        assert browser.text(f"{response} .response-col_status").startswith("200")
        body = json.loads(browser.text(f"{response} .response-col_description code"))
        browser.save_screenshot(block, tmp_path / f"{operation}.png")
        browser.click(f"{block} .opblock-summary-control")
        return body

    created = try_out("create_hero")
    assert created["id"] == 1
    assert try_out("read_heroes") == [created]

    urls = browser.requested()
    assert foreign(urls, origin) == []
    assert {f"{origin}/openapi.json", f"{origin}/heroes/"} <= {
        url.partition("?")[0] for url in urls
    }


def test_a_request_to_another_host_is_seen(browser: Browser) -> None:
    """The control of the previous test: FastAPI's own page loads Swagger UI from a CDN."""
    with serve(FastAPI()) as service:
        browser.open(f"http://127.0.0.1:{service.port}/docs")
        deadline = time.monotonic() + 10
        urls: list[str] = []
        while not foreign(urls, f"http://127.0.0.1:{service.port}"):
            assert time.monotonic() < deadline
            urls += browser.requested()
