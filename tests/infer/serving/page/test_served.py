"""The chat page as the real server serves it, beside the same answers asked for without it."""

import json

import httpx
import pytest
from chat_page import IDLE, ask, last
from chats import small_chat
from recorded_server import POLICY
from servers import is_idle, serving, wait_until, working

from phi3_jax.infer.serving.engine import Engine, EngineOptions
from phi3_jax.infer.serving.http.gate import Access, Keys
from phi3_jax.infer.serving.http.service import Service

ROOM = 128
KEY = "sk-of-sixteen-and-more"
SHOWN = """(async (text) => {
  const { Answer } = await import("/page/markdown.js");
  const answer = new Answer();
  answer.show(text, true);
  return answer.element.textContent;
})"""


@pytest.mark.slow
def test_the_page_shows_what_the_model_writes(browser, tiny, tmp_path, quick_compilation):
    checkpoint = small_chat(tiny, tmp_path)
    engine = Engine(checkpoint, EngineOptions(slots=1, room=ROOM, queue=4, chunk=16))
    access = Access(Keys([KEY]))
    page = browser
    page.requests.clear()
    with working(Service(engine, checkpoint, "small")) as service, serving(service, access) as url:
        assert httpx.get(url).headers["Content-Security-Policy"] == POLICY  # under which the other tests are run
        page.open(url)
        page.wait("document.querySelector('#key-dialog').open")
        page.type(KEY)
        page.press("Enter")
        page.wait("document.querySelector('#model').textContent === 'small'")
        page.console.clear()  # that the first request was refused
        for name, value in (("temperature", "0"), ("max_tokens", "12")):
            page.run(f"document.getElementById('{name}').value = '{value}'")

        headers = {"Authorization": f"Bearer {KEY}"}
        messages = []
        for question in ("Hi", "More"):
            ask(page, question)
            page.wait(IDLE)
            messages.append({"role": "user", "content": question})
            body = {"model": "small", "messages": messages, "temperature": 0, "max_tokens": 12}
            reply = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers).json()
            text, usage = reply["choices"][0]["message"]["content"], reply["usage"]
            messages.append({"role": "assistant", "content": text})
            assert last(page, ".words") == page.run(f"{SHOWN}({json.dumps(text)})")
            under = last(page, ".under .note")
            assert under.startswith(f"{usage['completion_tokens']} tokens in ")
            assert f"; {usage['prompt_tokens']} read" in under

        page.run("document.querySelector('#max_tokens').value = ''")
        ask(page, "Go on")
        page.wait("document.querySelectorAll('.words').length === 3")
        page.press("Escape")
        page.wait(IDLE)
        wait_until(lambda: is_idle(service))
        page.run("document.querySelector('#max_tokens').value = '99999999999'")
        ask(page, "x")
        page.wait(f"{IDLE} && document.querySelectorAll('.words').length === 4")
        assert "max_tokens" in last(page, ".problem")
        assert all(each.startswith((url, "data:")) for each in page.requests)
        assert [line for line in page.console if "400" not in line] == []
        page.console.clear()
        page.run("sessionStorage.clear()")
