"""The record of a trace equals the cache's tables; its page in a real browser, where there is one (chromium)."""

import base64
import json
import os
import shutil
import subprocess
import time
import zlib

import pytest
import torch

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """Headless Chromium with one page, by the DevTools protocol over a pipe: messages are JSON that end with a zero."""

    def __init__(self, folder):
        ours, theirs = os.pipe(), os.pipe()
        flags = f"--user-data-dir={folder}", "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1440,1000"

        def inherit():  # what Chromium reads is its file 3, what it writes its file 4
            os.dup2(ours[0], 3), os.dup2(theirs[1], 4)

        self.process = subprocess.Popen(
            [BROWSER, *flags, "--remote-debugging-pipe"], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(3, 4), preexec_fn=inherit,
        )  # fmt: skip
        os.close(ours[0]), os.close(theirs[1])
        self.out, self.into, self.number, self.session, self.events = ours[1], os.fdopen(theirs[0], "rb"), 0, {}, []
        self.rest = b""
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **given) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": given, **self.session}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                piece = self.into.read1(1 << 16)
                assert piece, "the browser has ended"
                self.rest += piece
            answer, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(answer)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def js(self, code: str):
        """The value of an expression in the page."""
        found = self("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, path) -> None:
        self("Page.navigate", url=path.as_uri())
        for _ in range(500):
            if self.js("document.body?.dataset.ready"):
                return
            time.sleep(0.02)
        raise AssertionError(f"{path} does not show anything")

    def press(self, key: str) -> None:
        codes = {" ": 32, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for kind in ("rawKeyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=codes[key])

    def scheme(self, name: str) -> None:
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def picture(self) -> bytes:
        return base64.b64decode(self("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.out), self.into.close()
