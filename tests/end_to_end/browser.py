"""Headless Chromium over the WebDriver protocol: a page opened, asked and printed; what it logs and requests."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from typing import Any

DRIVER = shutil.which("chromedriver")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """A session; use as a context."""

    def __init__(self, profile, width: int = 1400):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._root = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
        arguments += ["--disable-component-update", f"--user-data-dir={profile}", f"--window-size={width},1200"]
        options = {"binary": CHROMIUM, "args": arguments}
        capabilities = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        try:
            for _ in range(100):
                try:
                    created = self._send("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
                    break
                except (ConnectionError, urllib.error.URLError):
                    time.sleep(0.1)
            else:
                raise TimeoutError("chromedriver does not answer")
        except BaseException:
            self._process.kill()
            raise
        self._session = f"/session/{created['sessionId']}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self._send("DELETE", self._session)
        finally:
            self._process.terminate()
            self._process.wait(10)

    def open(self, url: str) -> None:
        self._send("POST", f"{self._session}/url", {"url": url})

    def run(self, script: str, *arguments) -> Any:
        return self._send("POST", f"{self._session}/execute/sync", {"script": script, "args": list(arguments)})

    def run_async(self, script: str) -> Any:
        return self._send("POST", f"{self._session}/execute/async", {"script": script, "args": []})

    def pdf(self) -> str:
        """Base64."""
        return self._send("POST", f"{self._session}/print", {})

    def console(self) -> list[dict[str, Any]]:
        return self._send("POST", f"{self._session}/se/log", {"type": "browser"})

    def requests(self) -> list[str]:
        """Addresses asked for since the last call."""
        entries = self._send("POST", f"{self._session}/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def _send(self, verb: str, path: str, content: Any = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self._root + path, data, {"Content-Type": "application/json"}, method=verb)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["value"]
