import dataclasses
import json
import resource
from pathlib import Path

import pytest
from batches import PROGRAM, read

from phi3_jax.infer.sampling import Sampling
from phi3_jax.infer.serving.batch.requests import read_requests


def test_lines_are_read(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi é"}]
    requests = read(
        tmp_path,
        b"\xef\xbb\xbf" + '{"prompt": "ä\\n😀"}'.encode(),
        "",
        '{"id": 3.5, "messages": ' + json.dumps(messages) + ', "max_new_tokens": 1}\r',
        " \t",
        '{"prompt": "c", "seed": 5, "top_k": null, "temperature": 1, "id": ""}',
        '{"prompt": "d"}',
    )
    assert [r.line for r in requests] == [1, 3, 5, 6]
    assert [r.prompt for r in requests] == ["ä\n😀", None, "c", "d"]
    assert [r.messages for r in requests] == [None, messages, None, None]
    assert [r.max_new_tokens for r in requests] == [None, 1, None, None]
    assert requests[1].fields == {"id": 3.5, "messages": messages, "max_new_tokens": 1}
    # The seeds run on by the index of the request, not the line, and wrap.
    assert [r.sampling for r in requests] == [
        PROGRAM,
        dataclasses.replace(PROGRAM, seed=2**32 - 1),
        dataclasses.replace(PROGRAM, seed=5, top_k=None, temperature=1.0),
        dataclasses.replace(PROGRAM, seed=1),
    ]


def test_every_field_of_sampling_can_be_given(tmp_path: Path) -> None:
    own = {
        "temperature": 0.25,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.125,
        "typical_p": 1,
        "repetition_penalty": 1.5,
        "presence_penalty": -1,
        "frequency_penalty": 0.75,
        "logit_bias": {"123": 1.5, "0": -2},
        "banned_tokens": [5, 7],
        "forced_tokens": [],
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 4,
        "seed": 9,
    }
    assert own.keys() == {field.name for field in dataclasses.fields(Sampling)}
    (request,) = read(tmp_path, json.dumps({"prompt": "a", **own}))
    assert request.sampling == Sampling(**{**own, "logit_bias": {123: 1.5, 0: -2}})
    assert request.fields["logit_bias"] == own["logit_bias"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{}", 'exactly one of "prompt" and "messages"'),
        ('{"id": 1}', 'exactly one of "prompt" and "messages"'),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}', 'exactly one of "prompt" and "messages"'),
        ('{"prompt": "a", "temprature": 1}', r"unknown keys \['temprature'\]"),
        ('{"prompt": "a", "text": "b", "line": 2}', r"unknown keys \['line', 'text'\]"),
        ('{"prompt": "a", "' + 9999 * "b" + '": 2}', r"unknown keys \['b{40}'\]"),
        ('{"prompt": ""}', 'prompt="" must be a text that is not empty'),
        ('{"prompt": ["a"]}', "must be a text that is not empty"),
        ('{"prompt": null}', "prompt=null must be a text"),
        ('{"messages": []}', "messages is empty"),
        ('{"messages": {"role": "user", "content": "a"}}', "messages is a dict; pass a list"),
        ('{"messages": ["a"]}', r"messages\[0\] is 'a'; pass a list"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\] is {'role': 'user'}; pass a list"),
        ('{"messages": [{"role": "user", "content": 1}]}', r"messages\[0\]\['content'\] is a int"),
        ('{"messages": [{"role": "user", "content": "a", "nome": "b"}]}', r"has the unknown fields \['nome'\]"),
        ('{"prompt": "a", "id": null}', "id=null must be a text or a number"),
        ('{"prompt": "a", "id": true}', "id=true must be a text or a number"),
        ('{"prompt": "a", "id": [1]}', r"id=\[1\] must be a text or a number"),
        ('{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens=0 must be a whole number of at least 1"),
        ('{"prompt": "a", "max_new_tokens": 2.0}', r"max_new_tokens=2\.0 must be a whole number"),
        ('{"prompt": "a", "top_k": true}', "top_k=true must be a whole number or null"),
        ('{"prompt": "a", "top_k": 0}', "top_k=0 must be a whole number of at least 1"),
        ('{"prompt": "a", "temperature": "1"}', 'temperature="1" must be a number'),
        ('{"prompt": "a", "temperature": null}', "temperature=null must be a number"),
        ('{"prompt": "a", "temperature": -1}', "temperature=-1 must be 0"),
        ('{"prompt": "a", "temperature": 1' + 400 * "0" + "}", "of 401 characters does not fit into 64 bits"),
        ('{"prompt": "a", "temperature": 1000000000000000000}', r"temperature=10* must be a number"),
        ('{"prompt": "a", "top_p": false}', "top_p=false must be a number or null"),
        ('{"prompt": "a", "seed": 4294967296}', r"seed=4294967296 must be .*\[0, 2\*\*32\)"),
        ('{"prompt": "a", "seed": null}', "seed=null must be a whole number"),
        ('{"prompt": "a", "banned_tokens": 5}', "banned_tokens=5 must be a list of token ids"),
        ('{"prompt": "a", "banned_tokens": ["5"]}', "must be a list of token ids"),
        ('{"prompt": "a", "forced_tokens": [-5]}', "forced_tokens.* token ids of at least 0"),
        ('{"prompt": "a", "logit_bias": [1]}', r"logit_bias=\[1\] must be an object"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "must be an object"),
        ('{"prompt": "a", "logit_bias": {"1_0": 1}}', "must be an object"),
        ('{"prompt": "a", "logit_bias": {"05": 1}}', "must be an object"),
        ('{"prompt": "a", "logit_bias": {"１": 1}}', "must be an object"),
        ('{"prompt": "a", "logit_bias": {"-1": 1}}', "must be an object"),
        ('{"prompt": "a", "logit_bias": {"1": "2"}}', "must be an object"),
        ('{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}', "the key '1' is there twice"),
        ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' is there twice"),
        ('{"messages": [{"role": "user", "role": "x", "content": "a"}]}', "the key 'role' is there twice"),
        ('{"prompt": "a", "temperature": NaN}', "NaN is not a finite number"),
        ('{"prompt": "a", "id": -Infinity}', "-Infinity is not a finite number"),
        ('{"prompt": "a", "id": 1e999}', "1e999 is not a finite number"),
        ('{"prompt": "a\\ud83d"}', "half of a surrogate pair"),
        ('{"prompt": "a"} {"prompt": "b"}', "not JSON: Extra data at column 17"),
        ('{"prompt": "a",}', "not JSON: .* at column 1[56]"),
        ("{'prompt': 'a'}", "not JSON"),
        ('["a"]', r'not a JSON object but \["a"\]'),
        (b'{"prompt": "\xff"}', "not UTF-8 at byte 13"),
        (100_000 * "[", "nested too deeply"),
    ],
)
def test_lines_are_refused(tmp_path: Path, line: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"\A[^\n]*requests\.jsonl:3: [^\n]*{reason}.*\n.*banned_tokens, .*top_k"):
        read(tmp_path, '{"prompt": "good"}', "", line)


def test_equal_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'requests\.jsonl:4: id="a" is the id of line 1, too'):
        read(tmp_path, '{"prompt": "x", "id": "a"}', '{"prompt": "x"}', '{"prompt": "x"}', '{"prompt": "y", "id": "a"}')
    assert len(read(tmp_path, '{"prompt": "x", "id": "1"}', '{"prompt": "x", "id": 1}')) == 2


def test_bad_lines_are_reported_together(tmp_path: Path) -> None:
    lines = ['{"prompt": "a"}', *['{"prompt": 1}'] * 10]
    with pytest.raises(ValueError, match="prompt=1") as caught:
        read(tmp_path, *lines)
    *reasons, advice = str(caught.value).split("\n")
    assert reasons == [
        f"{tmp_path}/requests.jsonl:{i}: prompt=1 must be a text that is not empty" for i in range(2, 12)
    ]
    assert '"messages"' in advice
    with pytest.raises(ValueError, match="prompt=1") as caught:
        read(tmp_path, *lines, "[]", "[]", "[]")
    assert str(caught.value).split("\n")[:-1] == [*reasons, "and 3 more"]


def test_a_line_that_is_too_long_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path, most = tmp_path / "long.jsonl", 1 << 25
    with open(path, "wb") as file:
        file.write(b'{"prompt": "a"}\n{"prompt": "b"}' + b" " * (most - 16) + b"\n{")
        file.truncate(1 << 32)  # 4 GB of zeros, of which the system stores nothing
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=rf"long\.jsonl:3: the line is longer than {most} bytes; write one"):
        read_requests(path, Sampling())
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 6 * most


def test_no_requests(tmp_path: Path) -> None:
    for lines in ([], ["", " \r"]):
        with pytest.raises(ValueError, match=r"requests\.jsonl: holds no requests"):
            read(tmp_path, *lines)
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl: no such file"):
        read_requests(tmp_path / "absent.jsonl", PROGRAM)
