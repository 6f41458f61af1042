"""Templates that would take all of the time or memory: refused in a moment, and our own process feels nothing of it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from templates import PHI4, PHI4_MINI, small_tokenizer

from phi3_jax.text import encode_chat, render_chat
from phi3_jax.text.added_tokens import template_text
from phi3_jax.text.templates import process

# A process with nothing but the stdlib and phi3_jax.text.templates.process, so that its memory can be measured.
PRELUDE = f"""
import json, os, resource, signal, subprocess, sys, threading, time, types
folder = {str(Path(process.__file__).parent)!r}
for name in ("phi3_jax.text.templates", "phi3_jax.text", "phi3_jax"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
    folder = os.path.dirname(folder)
from phi3_jax.text.added_tokens import template_text
from phi3_jax.text.templates import process
"""
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "add_generation_prompt": True}


def grow(step: str, first: str = "'a'") -> str:
    return f"{{% set n = namespace(x={first}) %}}{{% for i in range(99) %}}{{% set n.x = {step} %}}{{% endfor %}}"


def nest(count: int, statement: str = "for x{} in range(99999)", end: str = "endfor", inside: str = "") -> str:
    opened = "".join(f"{{% {statement.format(i)} %}}" for i in range(count))
    return opened + inside + f"{{% {end} %}}" * count


LOOPS = [  # no end in time
    nest(2),
    nest(3, inside="{{ x0 ~ x1 }}"),
    "{% macro f() %}{% for x in range(9999) %}{{ f() if x < 0 }}{% for y in range(9999) %}{% endfor %}{% endfor %}"
    "{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% for x in [[[]]] recursive %}" + nest(2) + "{% endfor %}",
    "{{ 10 ** (10**8) }}",
    "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{{ (7 ** 400000) | string | length + (7 ** 9999999) % 10 }}",
    "{% for x in range(99999) %}{% set y = range(99999) | sum %}{% endfor %}",
    "{% for x in range(99999) %}{% set y = range(99999) | sort(reverse=true) | list %}{% endfor %}",
    "{% for x in range(99999) %}{% if 'b' in 'a' * 900000 ~ x %}{% endif %}{% endfor %}",
    "{% set a = ('a' * 200000) %}{% for x in range(99999) %}{{ a.count('b') }}{% endfor %}",
    "{% for x in range(99999) %}{% for m in range(9999) | groupby('real') %}{% endfor %}{% endfor %}",
    "{% for x in range(99999) %}{% set y = ('x ' * 9999 ~ x) | title | wordcount %}{% endfor %}",
    "{% for x in range(99999) %}{% set y = ('<p ' * 30000 ~ x) | striptags %}{% endfor %}",
    "{{ ('<!--' * 60000) | striptags }}" + nest(2),
    "{% for x in range(99999) %}{% set y = ('http://a.b/( ' * 5000 ~ x) | urlize %}{% endfor %}",
    "{% for x in range(99999) %}{% set y = range(99999) | map('string') | list %}{% endfor %}",
    "{% set c = cycler(1, 2) %}" + nest(2, inside="{{ c.next() if false }}"),
    "{% filter upper %}" + nest(2) + "{% endfilter %}",
]
HOARDS = [  # more memory than there is
    grow("n.x ~ n.x"),
    grow("n.x + n.x"),
    grow("n.x + n.x", "[1]"),
    grow("(n.x, n.x) | string"),
    grow("n.x | replace('a', 'aaaa')"),
    grow("n.x.join(['b', 'b', 'b'])"),
    grow("[n.x, n.x] | join"),
    grow("'%s%s' % (n.x, n.x)"),
    grow("'%s%s' | format(n.x, n.x)"),
    grow("'{0}{0}{0}'.format(n.x)"),
    grow("{'a': n.x, 'b': n.x} | tojson"),
    grow("n.x | tojson | tojson"),
    grow("n.x | urlencode ~ n.x", "'%'"),
    grow("n.x | indent(99999, true)"),
    grow("n.x * 99"),
    "{{ 'a' * 10**9 }}",
    "{{ [0] * 10**9 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ '%.*f' % (10**9, 1.0) }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a'.ljust(10**9) }}{{ 'a'.rjust(10**9) }}{{ '7'.zfill(10**9) }}",
    "{{ 'a\t'.expandtabs(10**9) }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ [[1]] | tojson(indent='a' * 10**8) }}",
    "{{ range(99999) | batch(10**9, 0) | list }}",
    "{{ range(9) | slice(10**9) | list }}",
    "{{ ('a' * 10**6) | wordwrap(1, wrapstring='b' * 10**5) }}",
    "{{ messages[0].content.translate({72: 'a' * 10**9}) }}",
    "{% set x %}" + nest(2, inside="aaaaaaaaaaaaaaaa") + "{% endset %}",
    "{% set n = namespace(x={}) %}{% for i in range(99999) %}{% set n.x = dict(n.x, **{'k' ~ i: n.x}) %}{% endfor %}",
    "{% set n = namespace(x=[]) %}" + nest(2, inside="{% set n.x = [n.x, x0 ~ x1] %}"),
    "{% macro f(s) %}{{ f(s ~ s) }}{% endmacro %}{{ f('aaaaaaaa') }}",
    "{% macro g() %}{{ caller('a' * 10**9) }}{% endmacro %}{% call(x) g() %}{{ x ~ x }}{% endcall %}",
    "{{ joiner('a' * 10**9)() ~ 'a' * 10**9 }}",
    "{{ (1).__add__ }}{{ 'a' * 10**9 }}",
    "{{ 1 | round(10**9) }}{{ 'a' * 10**10 }}",
    "{{ raise_exception('a' * 10**9) }}",
    "{{ ('a' * 10**7) | list | tojson }}",
]
DEEP = [  # the parser's limits, jinja2's and Python's
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "[" * 5000 + "1" + "]" * 5000 + " }}",
    "{{ " + "-" * 50000 + "1 }}",
    "{{ " + "not " * 20000 + "1 }}",
    "{{ 1" + " + 1" * 20000 + " }}",
    "{{ a" + ".a" * 20000 + " }}",
    "{{ 1" + " | abs" * 12000 + " }}",
    nest(21, "for x{} in [1]"),
    nest(100, "for x{} in [1]"),
    nest(150, "if {}", "endif"),
    nest(3000, "if {}", "endif"),
    nest(3000, "set x{}", "endset"),
    nest(150, "macro m{}()", "endmacro"),
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    "{{ range(10**10) }}",
    "{% include 'a' %}",
    "{% for %}",
    "{{ 1 / 0 }}{{ messages.x.y }}",
    "{{ messages[0].content.encode('utf-99') }}",
    "a" * 100_001,
]
SAMPLE = [LOOPS[5], HOARDS[0], HOARDS[15], HOARDS[24]], DEEP[::8]


def program(code: str, stdin: str = "", executable: str = sys.executable) -> str:
    """What a program prints that has only templates; it must end well, and say nothing else."""
    code = f"{PRELUDE}sys.executable = {executable!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], input=stdin, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


MEASURE = """
def used(who):
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime

process.run("{{ 1 }}", {}, 0)
before, told = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
for bomb in json.load(sys.stdin):
    start = used(resource.RUSAGE_SELF) + used(resource.RUSAGE_CHILDREN)
    try:
        text = process.run(bomb, {"messages": [{"role": "user", "content": "Hello"}]}, 5)[0]
        told.append(f"not refused: {text[:50]}")
    except ValueError as error:
        told.append(str(error))
    process.end()  # its time is counted when it has ended
    told[-1] = [told[-1], used(resource.RUSAGE_SELF) + used(resource.RUSAGE_CHILDREN) - start]
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([told, after - before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""


def check(bombs: list[str], words: str) -> None:
    """Each is refused with these words, in time; seconds of the processor, for other programs may be at work, too."""
    told, grown, peak = json.loads(program(MEASURE, json.dumps(bombs)))
    for bomb, (why, seconds) in zip(bombs, told, strict=True):
        assert re.search(words, why), f"{bomb[:200]}: {why}"
        assert seconds < 1.5, bomb[:200]
        assert "\n" not in why
        assert len(why) < 700
    assert grown * 1024 < 5e6
    assert peak * 1024 < 200e6


LIMITS = r"takes more than (1\.0 s|150 MB of memory) on these messages.*; use another template|characters written"
FAULTS = "(fails on|refuses) these messages: .|syntax error in the chat template, line 1: ."


def test_bombs_are_refused_in_a_moment() -> None:
    check(SAMPLE[0], LIMITS)
    check(SAMPLE[1], FAULTS)


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
def test_loops_without_an_end(half: int) -> None:
    check(LOOPS[half::2], LIMITS)


@pytest.mark.slow
def test_more_memory_than_there_is() -> None:
    check(HOARDS, LIMITS)


@pytest.mark.slow
def test_deeper_than_the_parsers_go() -> None:
    check(DEEP, FAULTS)


def test_the_message_names_the_file() -> None:
    for template in (HOARDS[15], DEEP[9], DEEP[18]):
        for function in (render_chat, encode_chat):
            with pytest.raises(ValueError, match=r"^small\.gguf: .*the chat template"):
                function(small_tokenizer(template), HELLO["messages"])


def test_the_message_is_one_line_of_text() -> None:
    with pytest.raises(ValueError, match=r"refuses these messages: \ufffd\[2Ja \ufffd b \u2603$"):
        render_chat(small_tokenizer("{{ raise_exception('\\x1b[2Ja\\r\\n\\ud800\\tb \u2603') }}"), HELLO["messages"])


def test_a_tokenizer_loads_with_a_bomb() -> None:
    """What its template writes decides which tokens are special; of a bomb everything counts as written."""
    for template in (DEEP[0], DEEP[10], "x" * 200_000):
        assert template_text(template) == template
    assert template_text("a{{ 'b' ~ c }}{% generation %}d{% endgeneration %}") == "a\0d\0b"


@pytest.mark.slow
def test_long_chats_are_none() -> None:
    """2,000 messages; 5 MB in one; and after it the room that a short one has."""
    turns = [{"role": role, "content": f"{i} \u2603"} for i in range(1000) for role in ("user", "assistant")]
    for template in (PHI4, PHI4_MINI):
        text = render_chat(small_tokenizer(template), turns)
        assert text.count("999 \u2603") == 2
    for letters in ("ab c" * 1_250_000, "\U0001f600\u00e9" * 99_999):
        text = render_chat(small_tokenizer(template), [{"role": "user", "content": letters}])
        assert letters in text
    assert render_chat(small_tokenizer(template), HELLO["messages"]) == process.run(template, HELLO, 5)[0]


def test_what_goes_through_comes_back() -> None:
    odd = '\0\ud83d\ude00\udfff\U0001f600\ufdd0\r\n\u2028"\\'
    assert process.run("{{ a }}{{ b[0] }}{{ c.d is none }}", {"a": odd, "b": [odd], "c": {"d": None}}, 20) == [
        f"{odd}{odd}True"
    ]
    with pytest.raises(ValueError, match="cannot be given to the chat template: Exceeds the limit"):
        process.run("{{ a }}", {"a": 10**5000}, 0)


def test_an_error_if_there_is_no_process() -> None:
    """And no way around it, in silence."""
    printed = program(
        """
try: process.run("{{ 1 }}", {}, 0)
except OSError as error: print(error)
""",
        executable="/none",
    )
    assert printed.startswith("the process that runs chat templates cannot be started: [Errno 2] No such file")
    printed = program("""
sys.path[:] = []
try: process.run("{{ 1 }}", {}, 0)
except OSError as error: print(error)
""")
    assert printed.startswith("the process that runs chat templates cannot be started: ")


# ---------------------------------------------------------------- the process


def test_programs_that_change_their_surroundings(tmp_path: Path) -> None:
    """What an import or a socket bears; and that a status is lost where nobody waits for processes."""
    printed = program(f"""
import socket
sys.path[:0] = [None, os]
os.mkdir({str(tmp_path / "x")!r})
os.chdir({str(tmp_path / "x")!r})
os.rmdir({str(tmp_path / "x")!r})
socket.setdefaulttimeout(30)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print(process.run("{{{{ 1 }}}}", {{}}, 0)[0])
try: process.run("{{{{ 'a' * 10**10 }}}}", {{}}, 0)
except ValueError as error: print(error)
print(process.run("{{{{ 2 }}}}", {{}}, 0)[0])
""")
    assert re.fullmatch(r"1\nthe chat template takes more than 1\.0 s or 150 MB of memory on .*\n2\n", printed)


SLEEPING = "print(process.run('{{ 1 }}', {}, 0)[0], process.pid(), flush=True); time.sleep(60)"


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pid: int) -> None:
    for _ in range(200):
        if not is_alive(pid):
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still there")


def test_another_one_is_started_when_it_has_been_killed() -> None:
    printed = program("""
pids = set()
for _ in range(5):
    print(process.run("{{ 1 }}", {}, 0)[0], end="")
    pids.add(process.pid())
    os.kill(process.pid(), signal.SIGKILL)
zombies = [pid for pid in pids if os.path.exists(f"/proc/{pid}") and pid != process.pid()]
print(len(pids), zombies)
""")
    assert printed == "111115 []\n"


def test_threads_and_forks_of_ours() -> None:
    """A fork starts its own: with one socket for two, each would read what the other had asked for."""
    printed = program("""
import multiprocessing

def ask(i):
    return all(process.run("{{ x }}", {"x": f"{i} {j}"}, 5) == [f"{i} {j}"] for j in range(50)) and process.pid()

def ask_in_threads(queue, first):
    told = []
    threads = [threading.Thread(target=lambda i=i: told.append(ask(i))) for i in range(first, first + 4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    queue.put(told)

fork = multiprocessing.get_context("fork")
queue = fork.Queue()
process.run("{{ 1 }}", {}, 0)
forks = [fork.Process(target=ask_in_threads, args=(queue, 10 * i)) for i in range(2)]
[each.start() for each in forks]
ask_in_threads(queue, 50)
told = [queue.get() for _ in range(3)]
[each.join() for each in forks]
print(json.dumps(told))
""")
    told = json.loads(printed)
    assert all(len(pids) == 4 and len(set(pids)) == 1 and pids[0] for pids in told)
    assert len({pids[0] for pids in told}) == 3
    for pids in told:
        wait_until_gone(pids[0])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_it_ends_with_us(how: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PRELUDE + SLEEPING], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as ours:
        assert ours.stdout is not None
        one, pid = ours.stdout.readline().split()
        assert one == "1"
        assert is_alive(int(pid))
        assert os.getpgid(int(pid)) != os.getpgid(ours.pid)  # Ctrl-C goes to a group
        ours.send_signal(how)
        assert ours.stdout.read() == ""  # it does not hold our output open
        ours.wait()
        wait_until_gone(int(pid))


@pytest.mark.parametrize("closed", ["1", "0 1 2"])
def test_closed_streams(closed: str, tmp_path: Path) -> None:
    """What others write to standard output or errors must not get into the socket."""
    code = f"""
text = process.run("{{{{ x }}}}", {{"x": "Hello"}}, 5)[0]
for number in (1, 2):
    try: os.write(number, b"noise")
    except OSError: pass
open({str(tmp_path / "out")!r}, "w").write(text + process.run("{{{{ x }}}}", {{"x": "you"}}, 5)[0])
"""
    redirections = " ".join(f"{number}{'<' if number == '0' else '>'}&-" for number in closed.split())
    subprocess.run(["sh", "-c", f'"$0" -c "$1" {redirections}', sys.executable, PRELUDE + code], check=True, timeout=60)
    assert (tmp_path / "out").read_text() == "Helloyou"


def test_ctrl_c_leaves_no_reply_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reply to what was broken off must not be taken for the next one."""
    process.run("{{ 1 }}", {}, 0)
    pid = process.pid()

    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(process._Process, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            process.run("{{ 2 }}", {}, 0)
    assert not is_alive(pid)
    assert process.run("{{ 3 }}", {}, 0) == ["3"]


def test_a_process_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    process.run("{{ 1 }}", {}, 0)
    monkeypatch.setattr(process, "_PATIENCE", 0.2)
    os.kill(process.pid(), signal.SIGSTOP)
    with pytest.raises(ValueError, match="has not ended after 0 s; use another template"):
        process.run("{{ 2 }}", {}, 0)
    assert process.run("{{ 3 }}", {}, 0) == ["3"]
