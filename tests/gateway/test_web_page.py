"""The web page, in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Page, browser
from fake_engine import Engine
from harness import gateway, run

from lowbit.gateway.auth import hash_key

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

MARKDOWN = r"""## Title

**bold** *it* `a<b` [link](https://example.org) [bad](javascript:alert(1)) <img src=x onerror="window.hurt=1">

- one
- two

```
let x = "<script>window.hurt=1</script>";
```

| a | b |
|---|---|
| 1 | 2 |
"""


async def say(page: Page, text: str) -> None:
    await page.run(
        f"document.querySelector('#prompt').value = {text!r}; document.querySelector('#composer').requestSubmit()"
    )


def texts(side: int) -> str:
    return f"[...document.querySelectorAll('.log[data-side=\"{side}\"] .text')].map((e) => e.textContent)"


@pytest.mark.slow
def test_chat_compare_stop_and_status(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with gateway([Engine(), Engine(tokens=4)]) as bench, browser() as page:
            await page.open(f"{bench.url}/")
            await page.until("document.querySelectorAll('#composer select.model option').length === 3")
            await page.run("document.querySelector('[name=temperature]').value = 0.5")
            await page.run("document.querySelector('[name=max_tokens]').value = ''")
            await say(page, "hello <b>you</b>")
            await page.until("document.querySelector('.about')?.textContent.includes('16 tokens')")
            words = " ".join(f"w{index}" for index in range(16))
            assert await page.run(texts(0)) == ["hello <b>you</b>", words]
            assert "assistant@int8 · KL 0.01" in await page.run("document.querySelector('.about').textContent")
            await say(page, "again")
            await page.until(f"{texts(0)}.length === 4 && running.length === 0")
            sent = bench.engines[0].bodies[-1]
            assert [message["role"] for message in sent["messages"]] == ["user", "assistant", "user"]
            assert sent["temperature"] == 0.5
            await page.run("document.querySelector('[data-view=compare]').click()")
            await say(page, "both")
            await page.until(f"{texts(1)}.length === 2 && {texts(2)}.length === 2 && running.length === 0")
            assert await page.run(texts(2)) == ["both", "w0 w1 w2 w3"]
            await page.run("document.querySelector('[data-view=chat]').click()")
            bench.engines[0].tokens, bench.engines[0].token_time = 1000, 0.02
            bench.engines[0].ready_chunks.clear()
            await say(page, "long")
            await page.until("document.querySelectorAll('#chat .text')[5]?.textContent.includes('w3')")
            await page.run("document.querySelector('#stop').click()")
            await page.until("running.length === 0 && document.querySelector('#chat').textContent.includes('stopped')")
            await page.until("!document.querySelector('#send').hidden")
            await bench.until_idle()
            assert bench.engines[0].counts["cancelled"] == 1
            await page.run("document.querySelector('[data-view=status]').click()")
            await page.until("document.querySelectorAll('.tier').length === 2")
            await page.run("document.querySelector('#theme').click()")
            await page.look(tmp_path / "status.png")
            assert (tmp_path / "status.png").stat().st_size > 5000
            assert page.errors == []
            assert all(url.startswith((bench.url, "data:")) for url in page.requests)

    run(scenario, timeout=90)


@pytest.mark.slow
def test_markdown_never_becomes_html_and_errors_are_shown() -> None:
    async def scenario() -> None:
        async with gateway([Engine(fault="close_mid")]) as bench, browser() as page:
            await page.open(f"{bench.url}/")
            made: Any = await page.run(
                f"document.body.append(element('div', markdown({MARKDOWN!r}), {{id: 'made'}}));"
                "['h4', 'strong', 'em', 'code', 'a', 'li', 'pre', 'td', 'img', 'script']"
                ".map((name) => document.querySelectorAll('#made ' + name).length)"
            )
            assert made == [1, 1, 1, 2, 1, 2, 1, 2, 0, 0]
            assert await page.run("window.hurt") is None
            await page.until("document.querySelectorAll('#composer select.model option').length === 2")
            await say(page, "hello")
            await page.until("document.querySelector('.error')?.textContent.includes('broke off')")

    run(scenario, timeout=90)


def test_the_page_asks_for_the_key_and_keeps_to_itself() -> None:
    async def scenario() -> None:
        async with gateway([Engine()], api_keys=[hash_key("secret-key")]) as bench:
            async with bench.http.get(f"{bench.url}/") as response:
                assert response.status == 401
                assert response.headers["WWW-Authenticate"].startswith("Basic")
            for name in ("", "app.js", "markdown.js", "status.js", "style.css"):
                headers = {"Authorization": "Bearer secret-key"}
                async with bench.http.get(f"{bench.url}/{name}", headers=headers) as response:
                    assert response.status == 200
                    assert "default-src 'self'" in response.headers["Content-Security-Policy"]
                    assert "://" not in (await response.text()).replace("https?:\\/\\/", "")

    run(scenario)
