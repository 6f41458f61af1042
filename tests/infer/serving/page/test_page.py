"""The chat page in Chromium, in front of a server that replays answers: real HTTP, real keys, no model."""

import json
import re
import threading

import pytest
from chat_page import IDLE, LOG, ask, last
from chromium import SHIFT
from recorded_server import PAGE, answer, chunk, event, refusal, torn

FILES = {path.name: path.read_text(encoding="utf-8") for path in PAGE.iterdir()}


def test_the_page_is_whole_and_nothing_in_it_reads_text_as_html_or_script():
    html = FILES["index.html"]
    assert set(re.findall(r'(?:src|href)="page/([^"]+)"', html)) == {"chat.js", "page.css"}
    for name, text in FILES.items():
        if name.endswith(".js"):
            assert set(re.findall(r'from "\./([^"]+)"', text)) <= FILES.keys(), name
            banned = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|srcdoc"
            assert not re.search(banned, text), name
        assert set(re.findall(r"https?://[\w.]+", text)) <= {"http://www.w3.org"}, name  # a name, not an address
        assert len(text.splitlines()) <= 400, name
    assert not re.search(r"<style|<script(?! type=\"module\" src=)|\son\w+=|\sstyle=", html)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_apart(scheme):
    """As WCAG 2.2 has it: 4.5 for text, 3 for the borders of what one can press."""
    block = re.findall(r":root \{(.*?)\}", FILES["page.css"], re.S)[scheme]
    colours = {name: luminance(value) for name, value in re.findall(r"--([\w-]+): (#\w{6})", block)}
    pairs = [("ink", "paper", 4.5), ("ink", "mine", 4.5), ("soft", "paper", 4.5), ("soft", "panel", 4.5)]
    pairs += [("accent", "paper", 4.5), ("on-accent", "accent", 4.5), ("wrong", "paper", 4.5), ("border", "paper", 3)]
    for over, under, least in pairs:
        bright, dark = sorted([colours[over], colours[under]], reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= least, (over, under)


@pytest.mark.slow
def test_answers_are_streamed_and_the_next_question_has_them_before_it(page, server):
    more = threading.Event()
    first = answer("Grüße, *Welt*: 你好 🧭", cached=16)
    server.answers = [
        [*torn(first[:5], "ü".encode(), b"\n\ndata", b"*"), more, *torn(first[5:], "🧭".encode(), b"DONE")],
        answer("Two", reason="length"),
    ]
    page.run("document.querySelector('#message').focus()")
    page.type("Hello")
    page.press("Enter", SHIFT)
    page.type("you")
    composing = "new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, bubbles: true, cancelable: true })"
    assert page.run(f"document.querySelector('#message').dispatchEvent({composing})")  # an input method's Enter
    page.press("Enter")
    page.wait("document.querySelector('.words').textContent.includes('Grüße')")
    assert page.run("document.querySelector('#message').value") == ""
    assert "Writing" in last(page, ".under")
    more.set()
    page.wait(IDLE)
    assert last(page, ".words") == "Grüße, Welt: 你好 🧭"
    found = re.search(
        r"12 tokens in ([\d.]+) s, ([\d.]+) tokens/s; first word after [\d.]+ s; 31 read, 16 of them",
        last(page, ".under .note"),
    )
    assert found is not None
    assert float(found[2]) == pytest.approx(12 / float(found[1]), rel=0.1)

    page.click("#settings-button")
    for name, value in (("system", "Be brief."), ("temperature", "0.5"), ("max_tokens", "40"), ("seed", "7")):
        page.click(f"#{name}")
        page.type(value)
    ask(page, "More")
    page.wait(IDLE)
    assert "limit of tokens" in last(page, ".problem")
    common = {"model": "demo", "stream": True, "stream_options": {"include_usage": True}}
    question = {"role": "user", "content": "Hello\nyou"}
    assert server.asked[0] == common | {"messages": [question]}
    turns = [{"role": "system", "content": "Be brief."}, question]
    turns += [{"role": "assistant", "content": "Grüße, *Welt*: 你好 🧭"}, {"role": "user", "content": "More"}]
    assert server.asked[1] == common | {"messages": turns, "temperature": 0.5, "max_tokens": 40, "seed": 7}

    page.run("document.querySelector('#max_tokens').value = '0'")
    ask(page, "Again")
    assert page.run("document.querySelector('#message').value") == "Again"  # it was not sent
    assert len(server.asked) == 2


@pytest.mark.slow
def test_an_answer_is_stopped_and_its_beginning_kept(page, server):
    never = threading.Event()
    server.answers = [[*answer("One two three four", 2)[:2], never], answer("five"), [chunk({"content": "x"}), never]]
    ask(page, "Count")
    page.wait("document.querySelector('.words').textContent.includes('One')")
    page.type("A draft")
    page.press("Enter")  # not while an answer is written
    page.press("Escape")
    page.wait(IDLE)
    assert server.gone.wait(5)
    assert last(page, ".problem") == "Stopped."
    assert last(page, ".words") == "One two t"
    assert page.run("document.querySelector('#message').value") == "A draft"
    page.press("Enter")
    page.wait(IDLE)
    assert server.asked[1]["messages"][1:] == [
        {"role": "assistant", "content": "One two t"},
        {"role": "user", "content": "A draft"},
    ]
    server.gone.clear()
    ask(page, "Third")
    page.wait(f"{LOG}.includes('Writing')")
    page.click("#new")
    assert server.gone.wait(5)
    page.wait(IDLE)
    assert page.run("document.querySelector('#log').children.length") == 0
    server.answers = [answer("fresh")]
    ask(page, "Anew")
    page.wait(IDLE)
    assert server.asked[-1]["messages"] == [{"role": "user", "content": "Anew"}]
    assert page.run(LOG).count("fresh") == 1


@pytest.mark.slow
def test_the_end_of_an_answer_is_followed_unless_one_scrolls_away(page, server):
    more, rest = threading.Event(), threading.Event()
    pieces = answer("line\n\n" * 300, 3)
    server.answers = [[*pieces[:2], more, pieces[2], rest, *pieces[3:]]]
    ask(page, "Long")
    log = "document.querySelector('#log')"
    away = f"{log}.scrollHeight - {log}.clientHeight - {log}.scrollTop"
    lines = "document.querySelectorAll('.words p').length"
    page.wait(f"{lines} >= 99 && {away} < 2")
    page.run(f"{log}.scrollTop = 50")
    frame = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    page.run(frame)  # the page hears of it with the next picture
    more.set()
    page.wait(f"{lines} >= 199")
    assert page.run(f"{log}.scrollTop") == 50
    page.run(f"{log}.scrollTop = 1e6")
    page.run(frame)
    rest.set()
    page.wait(f"{IDLE} && {lines} === 300")
    assert page.run(away) < 2


@pytest.mark.slow
def test_the_last_turn_is_done_again_and_edited(page, server):
    server.answers = [answer("One"), answer("Two"), answer("third")]
    ask(page, "Question")
    page.wait(IDLE)
    page.run("[...document.querySelectorAll('button')].find((b) => b.textContent === 'Try again').click()")
    page.wait(f"{LOG}.includes('Two') && {IDLE}")
    assert "One" not in page.run(LOG)
    assert server.asked[1] == server.asked[0]
    page.run("[...document.querySelectorAll('button')].find((b) => b.textContent === 'Edit').click()")
    page.type("?")
    page.press("Enter")
    page.wait(f"{LOG}.includes('third') && {IDLE}")
    assert server.asked[2]["messages"] == [{"role": "user", "content": "Question?"}]


@pytest.mark.slow
def test_errors_of_the_server_are_said_in_words_and_what_was_written_is_kept(page, server):
    begun = answer("Some words", 1)[:2]
    wrong = {"error": {"message": "The engine is <b>gone</b>.", "type": "server_error"}}
    server.answers = [
        refusal(400, "max_tokens: at most 4096, not 5000"),
        refusal(503, "The queue is full.", **{"Retry-After": "2"}),
        (502, {"Content-Type": "text/html"}, b"<h1>Bad gateway</h1>"),
        begun,
        [*begun, event(wrong)],
        [*begun, event(b"{nonsense")],
        (200, {"Content-Type": "text/html"}, b"<p>a proxy's page</p>"),
        answer("Well"),
    ]
    expected = [
        ("", "max_tokens: at most 4096, not 5000"),
        ("", "The queue is full. Try again in 2 s."),
        ("", "The server refused: 502 Bad Gateway."),
        ("Some words", "The connection broke before the answer was complete."),
        ("Some words", "The engine is <b>gone</b>."),
        ("Some words", "The server sent what is no part of an answer."),
        ("", "The server sent something else than an answer that is written piece by piece."),
    ]
    for i, (text, problem) in enumerate(expected):
        ask(page, f"q{i}")
        page.wait(f"document.querySelectorAll('.problem').length === {i + 1} && {IDLE}")
        assert (last(page, ".words"), last(page, ".problem")) == (text, problem)
    ask(page, "end")
    page.wait(f"{LOG}.includes('Well')")
    contents = [turn["content"] for turn in server.asked[-1]["messages"]]
    assert contents == ["q0\n\nq1\n\nq2\n\nq3", "Some words", "q4", "Some words", "q5", "Some words", "q6\n\nend"]
    server.shutdown()
    server.server_close()
    ask(page, "anybody?")
    page.wait(f"document.querySelectorAll('.problem').length === 8 && {IDLE}")
    assert last(page, ".problem") == "The server cannot be reached. Is it still running?"
    assert all("Failed to load resource" in line for line in page.console)  # what Chromium says of such answers
    page.console.clear()


@pytest.mark.slow
def test_a_key_is_asked_for_and_stays_in_the_tab(browser, server):
    server.key = "sk-right"
    server.models = ["demo", "pirate<b>"]
    server.answers = [answer("Ahoy"), answer("Aye")]
    browser.open(server.url)
    browser.wait("document.querySelector('#key-dialog').open")
    for key, said in (("two words", "letters, digits"), ("sk-wrong", "not known here: <b>another</b>")):
        browser.type(key)
        browser.press("Enter")
        browser.wait(f"document.querySelector('#key-problem').textContent.includes({json.dumps(said)})")
        browser.run("document.querySelector('#key').value = ''")
    browser.type("sk-right")
    browser.press("Enter")
    browser.wait("!document.querySelector('#key-dialog').open && !document.querySelector('#models').hidden")
    browser.run("document.querySelector('select').value = 'pirate<b>'")
    ask(browser, "Hello")
    browser.wait(IDLE)
    assert server.asked[0]["model"] == "pirate<b>"
    assert browser.run("[sessionStorage.length, sessionStorage.getItem('key')]") == [1, "sk-right"]
    assert browser.run("[localStorage.length, document.cookie]") == [0, ""]
    server.key = "sk-newer"  # the old one is refused in the middle of a chat: what was asked is not lost
    ask(browser, "Again")
    browser.wait("document.querySelector('#key-dialog').open")
    browser.type("sk-newer")
    browser.press("Enter")
    browser.wait(f"{LOG}.includes('Aye')")
    server.key = "sk-newest"
    ask(browser, "Third")
    browser.wait("document.querySelector('#key-dialog').open")
    browser.press("Escape")
    browser.wait(IDLE)
    assert "not known here" in last(browser, ".problem")
    browser.run("sessionStorage.clear()")


@pytest.mark.slow
def test_it_works_by_keys_for_screen_readers_and_on_a_phone(page, server):
    table = "|" + "a|" * 40 + "\n|" + "-|" * 40
    wide = "\n\n".join(["# h", "```\n" + "x" * 500 + "\n```", table, "w" * 500, "`" + "c" * 500 + "`"])
    server.answers = [answer("```c\n\tint x; // <b>\n```"), answer(wide)]
    ask(page, "Code?")
    page.wait(IDLE)
    tree = page.tree()
    expected = {("log", "Conversation"), ("main", ""), ("banner", ""), ("textbox", "Message"), ("form", "Your message")}
    expected |= {("button", name) for name in ("Settings", "New chat", "Send", "Copy", "Try again", "Edit")}
    expected |= {("heading", "You"), ("heading", "Answer"), ("region", "Code, c")}
    assert expected <= set(tree)
    assert not [each for each in tree if each[0] in ("button", "textbox", "spinbutton", "combobox") and not each[1]]
    # Nothing is left in the part that is not read out.
    assert page.run("document.querySelector('.words [aria-live=off]').childElementCount") == 0

    stops = []
    page.run("document.querySelector('#settings-button').focus()")
    for _ in range(9):
        page.press("Tab")
        focus = "(document.activeElement.ariaLabel ?? document.activeElement.textContent) || document.activeElement.id"
        stops.append(page.run(focus))
        assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid", stops
    assert stops == ["New chat", "Conversation", "Edit", "Copy", "Code, c", "Copy", "Try again", "message", "Send"]

    page.send("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.click(".bar button")
    page.wait("document.querySelector('.bar button').textContent === 'Copied'")
    assert page.run("navigator.clipboard.readText()") == "\tint x; // <b>"
    page.run("Object.defineProperty(navigator, 'clipboard', { value: undefined, configurable: true })")  # without https
    page.click(".under:has(.note) button")
    page.wait("document.querySelector('.under:has(.note) button').textContent === 'Copied'")
    page.run("delete navigator.clipboard")
    assert page.run("navigator.clipboard.readText()") == "```c\n\tint x; // <b>\n```"

    page.send("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=2, mobile=True)
    ask(page, "w" * 300)
    page.wait(IDLE)
    page.click("#settings-button")
    assert {("spinbutton", "Temperature"), ("spinbutton", "Seed"), ("textbox", "System message")} <= set(page.tree())
    each = "[document.documentElement, document.querySelector('#log'), ...document.querySelectorAll('form, .words')]"
    assert page.run(f"{each}.filter((e) => e.scrollWidth > 360 || e.scrollWidth > e.clientWidth).length") == 0
    ends = "[...document.querySelectorAll('form *, header *')].map((e) => e.getBoundingClientRect().right)"
    assert page.run(f"Math.max(...{ends})") <= 360
    assert page.run("document.documentElement.scrollHeight <= innerHeight")  # the message stays in sight
    page.send("Emulation.clearDeviceMetricsOverride")
