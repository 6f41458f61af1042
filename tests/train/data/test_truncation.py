"""What is longer than a row: skipped, cut, or without its oldest turns, against slices and shorter chats."""

import dataclasses
import json

import pytest
from templates import DROPS_SYSTEM, PHI4, PHI4_MINI, small_tokenizer

from phi3_jax.train.data import prepare, read_record
from phi3_jax.train.data.truncation import TooLongError
from phi3_jax.train.settings import Settings

TOKENIZER = small_tokenizer(PHI4_MINI)
BOS = TOKENIZER.bos_id


def read(record, length, tokenizer=TOKENIZER, **changes):
    settings = Settings(sequence_length=length, pack=changes.get("method") != "dpo", **changes)
    example = read_record(record, tokenizer, settings)
    assert all(len(text.tokens) <= length for text in example.texts)
    return [(text.tokens.tolist(), text.learned.tolist()) for text in example.texts], example.tokens_cut


def said(role, text, **more):
    return {"role": role, "content": text, **more}


def turns(count, *system):
    """Turns of different lengths."""
    messages = [said("system", each) for each in system]
    for i in range(count):
        messages += [said("user", "q" * (3 + i % 3) + str(i)), said("assistant", "a" * (1 + i % 4) + str(i))]
    return messages


@pytest.mark.parametrize("record", [{"messages": turns(2)}, {"prompt": "abcdefgh", "completion": "ij"}])
def test_stop_and_skip(record):
    [(ids, _)], _ = read(record, 1000)
    assert read(record, len(ids), truncate="skip") == read(record, 1000)
    message = rf"{len(ids)} tokens, more than a row \(sequence_length={len(ids) - 1}\)"
    with pytest.raises(TooLongError, match=f"{message}$"):
        read(record, len(ids) - 1, truncate="skip")
    with pytest.raises(ValueError, match=f"{message}; raise sequence_length, or set truncate=left, turns") as error:
        read(record, len(ids) - 1)
    assert not isinstance(error.value, TooLongError)


# ---------------------------------------------------------------- left


@pytest.mark.parametrize("template", [PHI4_MINI, PHI4, DROPS_SYSTEM])
@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_left_keeps_the_end_and_bos(template, loss_on):
    tokenizer = small_tokenizer(template)
    if template == PHI4:
        tokenizer = small_tokenizer(template, "<s>", "</s>", "<|im_start|>", "<|im_sep|>", "<|im_end|>")
    record = {"messages": turns(3)}
    [(ids, learned)], _ = read(record, 1000, tokenizer, loss_on=loss_on)
    [(_, answers)], _ = read(record, 1000, tokenizer)
    last = max(i for i in range(1, len(ids)) if answers[i] and not answers[i - 1])
    kept = int(ids[0] == BOS)
    assert kept == (template == DROPS_SYSTEM)
    for length in range(2, len(ids)):
        cut = len(ids) - length
        if kept + cut >= last:  # nothing would stand before the answer
            with pytest.raises(TooLongError, match="its answer leaves no room"):
                read(record, length, tokenizer, truncate="left", loss_on=loss_on)
            continue
        expected = [*learned[:kept], False, *learned[kept + cut + 1 :]]
        found = read(record, length, tokenizer, truncate="left", loss_on=loss_on)
        assert found == ([(ids[:kept] + ids[kept + cut :], expected)], cut)


def test_left_of_a_completion():
    record = {"prompt": "abcdefgh", "completion": "ij"}
    eos = TOKENIZER.eos_id
    expected = [BOS, *TOKENIZER.encode("ghij", add_bos=False), eos]
    assert read(record, 6, truncate="left") == ([(expected, [False] * 3 + [True] * 3)], 6)
    plain = dataclasses.replace(TOKENIZER, add_bos=False)
    assert read(record, 5, plain, truncate="left") == ([(expected[1:], [False] * 2 + [True] * 3)], 6)
    for length in (4, 3, 2):
        with pytest.raises(TooLongError, match="leaves no room"):
            read(record, length, truncate="left")
    # A text is cut into pieces whatever is set.
    for truncate in ("skip", "left", "turns"):
        assert read({"text": "abcdefgh"}, 4, truncate=truncate) == read({"text": "abcdefgh"}, 4)


def test_an_answer_that_is_not_learned_may_be_cut_and_one_that_is_may_not():
    early = [said("user", "q"), said("assistant", "yes"), said("user", "more?"), said("assistant", "no", weight=0)]
    [(ids, _)], _ = read({"messages": early}, 1000)
    with pytest.raises(TooLongError, match="leaves no room"):
        read({"messages": early}, len(ids) - 4, truncate="left")
    [(_, learned)], lost = read({"messages": early}, len(ids) - 1, truncate="left")
    assert (sum(learned), lost) == (len("yes") + 1, 1)
    none = [said("user", "q" * 50), said("assistant", "a", weight=0)]
    with pytest.raises(ValueError, match="nothing in it is learned"):
        read({"messages": none}, 9, truncate="left")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [*turns(2), said("user", "?")], "chosen": "yes, it is", "rejected": "no"},
        {"prompt": "one two three four?", "chosen": " yes, it is", "rejected": " no"},
    ],
)
def test_left_cuts_both_answers_of_a_preference_alike(record):
    (chosen, rejected), _ = read(record, 1000, method="dpo")
    ids, other = chosen[0], rejected[0]
    kept, border = int(ids[0] == BOS), chosen[1].index(True)
    assert rejected[1].index(True) == border
    for length in range(len(ids) - border + kept + 1, len(ids)):
        cut = len(ids) - length
        found, lost = read(record, length, method="dpo", truncate="left")
        assert [tokens for tokens, _ in found] == [each[:kept] + each[kept + cut :] for each in (ids, other)]
        assert [sum(learned) for _, learned in found] == [sum(chosen[1]), sum(rejected[1])]
        assert lost == 2 * cut
        swapped = record | {"chosen": record["rejected"], "rejected": record["chosen"]}
        assert read(swapped, length, method="dpo", truncate="left") == (found[::-1], lost)
    with pytest.raises(TooLongError, match="leaves no room"):
        read(record, len(ids) - border + kept, method="dpo", truncate="left")


# ---------------------------------------------------------------- turns

CALL = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
CALLS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m.tool_calls %}"
    "{% for c in m.tool_calls %}{{ c.function.name + (c.function.arguments | tojson) }}{% endfor %}{% endif %}"
    "{{ (m['content'] or '') + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.mark.parametrize("kind", ["plain", "system", "greeting", "tools", "system between"])
def test_turns_leave_out_the_oldest_exchanges(kind):
    tokenizer = TOKENIZER
    messages, head = turns(7), []
    exchanges = [messages[i : i + 2] for i in range(0, len(messages), 2)]
    if kind == "system":
        head = [said("system", "Be brief.")]
    if kind == "greeting":  # of the assistant, before any message of the user
        exchanges[:0] = [[said("assistant", "Hello!")]]
    if kind == "system between":
        exchanges[3] = [said("system", "Now in verse."), *exchanges[3]]
    if kind == "tools":
        tokenizer = small_tokenizer(CALLS, "<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>")
        for i in (1, 2, 5):
            exchanges[i][1:1] = [said("assistant", "", tool_calls=CALL), said("tool", f"is {i}")]
        exchanges[4][1:1] = [said("user", "and")]  # two messages of the user in a row
    record = {"messages": head + [each for exchange in exchanges for each in exchange]}
    chats = [head + [each for exchange in exchanges[first:] for each in exchange] for first in range(len(exchanges))]
    whole, *shorter = (read({"messages": chat}, 1000, tokenizer)[0][0] for chat in chats)
    seen = set()
    for length in range(5, len(whole[0]), 2):
        expected = next((each for each in shorter if len(each[0]) <= length), None)
        if expected is None:
            with pytest.raises(TooLongError, match="its last turn alone is longer than a row"):
                read(record, length, tokenizer, truncate="turns")
            continue
        lost = len(whole[0]) - len(expected[0])
        assert read(record, length, tokenizer, truncate="turns") == ([expected], lost)
        seen.add(lost)
    assert len(seen) == len(exchanges) - 1


def test_turns_keep_something_that_is_learned():
    messages = turns(3)
    for answer in (messages[3], messages[5]):
        answer["weight"] = 0
    [(ids, _)], _ = read({"messages": messages}, 1000)
    with pytest.raises(TooLongError, match="last turn"):
        read({"messages": messages}, len(ids) - 1, truncate="turns")
    with pytest.raises(TooLongError, match="it is plain text, which has no turns"):
        read({"prompt": "abcdefgh", "completion": "ij"}, 7, truncate="turns")


def test_turns_of_a_preference_are_those_of_both():
    context = [*turns(4, "S"), said("user", "?")]
    record = {"messages": context, "chosen": "yes, it is", "rejected": "no"}
    whole = read(record, 1000, method="dpo")[0]
    shorter = [context[:1] + context[2 * first + 1 :] for first in range(5)]
    lengths = set()
    expected = [read(record | {"messages": each}, 1000, method="dpo")[0] for each in shorter]
    for length in range(30, len(whole[0][0]), 2):
        found, lost = read(record, length, method="dpo", truncate="turns")
        assert found == next(each for each in expected if len(each[0][0]) <= length)
        assert lost == sum(len(before[0]) - len(after[0]) for before, after in zip(whole, found, strict=True))
        lengths.add(len(found[0][0]))
    assert len(lengths) >= 3
    # Of two whole conversations the common beginning is cut, and no turn that only one of them has.
    more = [said("user", "w" * 30), said("assistant", "z")]
    record = {"chosen": [*context, said("assistant", "yes"), *more], "rejected": [*context, said("assistant", "no")]}
    (chosen, rejected), _ = read(record, 1000, method="dpo")
    found, _ = read(record, len(chosen[0]) - 1, method="dpo", truncate="turns")
    cut = len(chosen[0]) - len(found[0][0])
    assert cut == len(rejected[0]) - len(found[1][0]) > 0
    with pytest.raises(TooLongError, match="last turn"):
        read(record, 30, method="dpo", truncate="turns")
    # Also where both have such turns, which alone would fit; and nothing of a reply of several messages is cut.
    record = {key: [*context, said("assistant", f"{key}!" * 5), *more] for key in ("chosen", "rejected")}
    (chosen, rejected), _ = read(record, 1000, method="dpo")
    with pytest.raises(TooLongError, match="last turn"):
        read(record, 50, method="dpo", truncate="turns")
    border = chosen[1].index(True)
    shortest = len(rejected[0]) - border + 10
    assert read(record, shortest, method="dpo", truncate="left")[0][0][1].index(True) == 10
    with pytest.raises(TooLongError, match="leaves no room"):
        read(record, shortest - 10, method="dpo", truncate="left")


# ---------------------------------------------------------------- what is told


def test_the_report_counts_what_was_cut(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [{"messages": turns(n)} for n in (1, 3, 4)] + [
        {"messages": [said("user", "q"), said("assistant", "a" * 99)]}
    ]
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    whole = prepare(path, TOKENIZER, Settings(sequence_length=200), tmp_path).report
    assert (whole.lines, whole.cut, whole.tokens_cut, whole.too_long) == (4, 0, 0, 0)
    for truncate, cut, skipped in (("skip", 0, 3), ("left", 2, 1), ("turns", 2, 1)):
        settings = Settings(sequence_length=25, truncate=truncate)
        report = prepare(path, TOKENIZER, settings, tmp_path).report
        assert (report.lines, report.cut, report.too_long, report.bad_lines) == (4 - skipped, cut, skipped, 0)
        assert [number for number, _ in report.too_long_reasons] == [2, 3, 4][-skipped:]
        if truncate == "left":
            kept = whole.tokens - len(read(lines[3], 200)[0][0][0])
            assert report.tokens == kept - report.tokens_cut
        assert prepare(path, TOKENIZER, settings, tmp_path).report == report
    with pytest.raises(
        ValueError, match=r"data\.jsonl: no line of it can be used; line 1: it has \d+ tokens, more than"
    ):
        prepare(path, TOKENIZER, Settings(sequence_length=5, truncate="skip"), tmp_path)
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2: it has .* \(on_bad_line=skip leaves"):
        prepare(path, TOKENIZER, Settings(sequence_length=25), tmp_path)
