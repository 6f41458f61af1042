"""Lines in the forms of published data sets, against the obvious messages or plain text: ids and what is learned."""

import json
import random

import pytest
from templates import DROPS_SYSTEM, PHI4_MINI, small_tokenizer

from phi3_jax.train.data import read_record
from phi3_jax.train.settings import Settings

TOKENIZER = small_tokenizer(PHI4_MINI)
SFT = Settings(sequence_length=4000)
DPO = Settings(sequence_length=4000, method="dpo", pack=False)


def said(*texts, system=None):
    """Messages of a user and an assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def sharegpt(*texts, system=None):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in said(*texts, system=system)]


def parts(*texts, system=None):
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in said(*texts, system=system)]


def encoded(record, settings=SFT):
    return [(t.tokens.tolist(), t.learned.tolist()) for t in read_record(record, TOKENIZER, settings).texts]


def converted(record, settings=SFT):
    return read_record(record, TOKENIZER, settings).converted


CHAT = said("2+2?", "4", "And one more?", "5")
# What a data set has, the messages that it means, the fields that are not used, and a word of what is told.
CHATS = [
    ({"prompt": "2+2?", "prompt_id": "ab3", "messages": CHAT}, CHAT, {"prompt", "prompt_id"}, None),
    ({"messages": CHAT, "system": None, "tools": None, "prompt": None, "text": None}, CHAT, set(), None),
    ({"messages": [m | {"name": None, "weight": None, "tool_calls": None} for m in CHAT]}, CHAT, set(), None),
    ({"messages": [m | {"id": 3} for m in CHAT], "tools": [], "images": []}, CHAT, {"messages[].id"}, None),
    ({"messages": json.dumps(CHAT)}, CHAT, set(), "messages from JSON in a text"),
    ({"messages": said("a", "b"), "system": "Be brief."}, said("a", "b", system="Be brief."), set(), "system -> "),
    ({"messages": said("a", "b", system="S"), "system": "S"}, said("a", "b", system="S"), set(), None),
    ({"messages": said("a", "b"), "system": ""}, said("a", "b"), set(), None),
    ({"conversations": sharegpt("a", "b", "c", "d"), "id": 7}, said("a", "b", "c", "d"), {"id"}, "from and value"),
    ({"conversations": sharegpt("a", "b", system="S")}, said("a", "b", system="S"), set(), "role human -> user"),
    ({"conversation": said("a", "b"), "system": "S"}, said("a", "b", system="S"), set(), "conversation -> messages"),
    ({"conversations": [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]},
     said("a", "b"), set(), "role gpt -> assistant"),
    ({"prompt": said("a", "b", "c"), "completion": said("a", "b", "c", "d")[3:]}, None, set(), "prompt and completion"),
    ({"messages": [{"role": "User", "content": "a"}, {"role": "ASSISTANT", "content": "b"}]},
     said("a", "b"), set(), "role User -> user"),
    ({"messages": {"role": ["user", "assistant"], "content": ["a", "b"], "id": None}}, said("a", "b"), set(), "key"),
    ({"conversations": {"from": ["human", "gpt"], "value": ["a", "b"]}}, said("a", "b"), set(), "a list for each key"),
    ({"prompt": said("a", "b", "c"), "completion": "d"}, None, set(), "prompt and completion"),
    ({"instruction": "Add.", "input": "2, 3", "output": "5"}, said("Add.\n\n2, 3", "5"), set(), "and input"),
    ({"instruction": "Sing.", "input": "", "output": "La", "text": "Below..."}, said("Sing.", "La"), {"text"}, "->"),
    ({"instruction": "Who?", "context": "K. did.", "response": "K.", "category": "qa"},
     said("Who?\n\nK. did.", "K."), {"category"}, "instruction and context"),
    ({"system_prompt": "S", "question": "q", "response": "r"}, said("q", "r", system="S"), set(), "system_prompt -> "),
    ({"question": "q", "answer": "r"}, said("q", "r"), set(), "question and answer"),
    ({"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "S"},
     said("a", "b", "c", "d", system="S"), set(), "history"),
    ({"messages": parts("a", "b", "c", "d", system="S")}, said("a", "b", "c", "d", system="S"), set(), "in parts"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                   {"role": "assistant", "content": "c"}]}, said("a\nb", "c"), set(), "with line breaks"),
    ({"messages": CHAT, "chosen": CHAT, "rejected": CHAT, "score": 3}, CHAT, {"chosen", "rejected", "score"}, None),
]  # fmt: skip


@pytest.mark.parametrize("case", CHATS, ids=lambda case: ",".join(case[0]))
def test_chats(case):
    record, messages, unused, told = case
    found = read_record(record, TOKENIZER, SFT)
    assert found.unused == unused
    assert bool(found.converted) == (told is not None)
    assert any(told in each for each in found.converted) or told is None
    if messages is None:  # of prompt and completion only the completion is learned
        completion = record["completion"]
        reply = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        messages = [*record["prompt"], *reply]
        messages = [m | {"weight": int(i == 3)} if m["role"] == "assistant" else m for i, m in enumerate(messages)]
    assert encoded(record) == encoded({"messages": messages})
    everything = Settings(sequence_length=4000, loss_on="all")
    plain = [{key: m[key] for key in ("role", "content")} for m in messages]
    if all("weight" not in m for m in messages):
        assert encoded(record, everything) == encoded({"messages": plain}, everything)


def test_answers_of_weight_zero_are_not_learned():
    weighted = [m | {"weight": w} for m, w in zip(CHAT, (0, 0, 0, 1), strict=True)]
    [(ids, learned)] = encoded({"messages": CHAT})
    [(same, later)] = encoded({"messages": weighted})
    assert same == ids
    first = learned.index(True)
    assert later == [flag and i > first + 1 for i, flag in enumerate(learned)]  # "4" and its end token
    assert sum(learned) == sum(later) + 2 == 4
    everything = Settings(sequence_length=400, loss_on="all")
    assert encoded({"messages": weighted}, everything) == [
        (ids, [i > 0 and i not in (first, first + 1) for i in range(len(ids))])
    ]
    for weight in (2, 0.5, "1"):
        with pytest.raises(ValueError, match=r"messages\[1\]: weight is .*; answers may have 0"):
            encoded({"messages": [CHAT[0], CHAT[1] | {"weight": weight}]})
    with pytest.raises(ValueError, match=r"messages\[0\]: weight is 1"):
        encoded({"messages": [CHAT[0] | {"weight": 1}, CHAT[1]]})
    with pytest.raises(ValueError, match="nothing in it is learned"):
        encoded({"messages": [CHAT[0], CHAT[1] | {"weight": 0}]})


FIRST = said("a", "b", "c")
YES, NO = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
PREFERENCES = [
    ({"prompt": FIRST, "chosen": [YES], "rejected": [NO]}, set()),
    ({"chosen": [*FIRST, YES], "rejected": [*FIRST, NO]}, set()),
    ({"prompt": "a", "chosen": [*FIRST, YES], "rejected": [*FIRST, NO], "messages": [*FIRST, YES], "score_chosen": 8.5},
     {"prompt", "messages", "score_chosen"}),
    ({"messages": FIRST, "chosen": [YES], "rejected": [NO]}, set()),
    ({"conversations": sharegpt("a", "b", "c"), "chosen": {"from": "gpt", "value": "yes"},
      "rejected": {"from": "gpt", "value": "no"}}, set()),
    ({"prompt": FIRST, "chosen": "yes", "rejected": "no"}, set()),
    ({"input": {"messages": FIRST, "tools": [], "parallel_tool_calls": True}, "preferred_output": [YES],
      "non_preferred_output": [NO]}, {"parallel_tool_calls"}),
    ({"question": "c", "history": [["a", "b"]], "chosen": "yes", "rejected": "no"}, set()),
]  # fmt: skip


@pytest.mark.parametrize("case", PREFERENCES, ids=lambda case: ",".join(case[0]))
def test_preferences(case):
    record, unused = case
    expected = encoded({"messages": FIRST, "chosen": "yes", "rejected": "no"}, DPO)
    assert encoded(record, DPO) == expected
    assert read_record(record, TOKENIZER, DPO).unused == unused
    if "messages" not in record and "input" not in record:
        with_system = encoded({"messages": said(*"abc", system="S"), "chosen": "yes", "rejected": "no"}, DPO)
        assert encoded(record | {"system": "S"}, DPO) == with_system


def test_preferences_of_one_turn():
    expected = encoded({"messages": said("q", system="S"), "chosen": "yes", "rejected": "no"}, DPO)
    for record in (
        {"system": "S", "question": "q", "chosen": "yes", "rejected": "no"},
        {"system": "S", "prompt": "q", "chosen": [YES], "rejected": [NO]},
    ):
        assert encoded(record, DPO) == expected
    # Two plain texts: a prompt is what both begin with, up to the white space.
    record = {"chosen": "\n\nHuman: a?\n\nAssistant: yes", "rejected": "\n\nHuman: a?\n\nAssistant: yet another"}
    prompt = "\n\nHuman: a?\n\nAssistant:"
    expected = encoded({"prompt": prompt, "chosen": " yes", "rejected": " yet another"}, DPO)
    assert encoded(record, DPO) == expected
    assert converted(record, DPO) == {"chosen and rejected -> a prompt and its two completions"}
    for record, reason in (
        ({"input": "2+2?", "chosen": "It is 4.", "rejected": "It is 5."}, "it has input beside chosen and rejected"),
        (
            {"prompt": said("q", system="S"), "chosen": [*said("q"), YES], "rejected": [*said("q"), NO]},
            "prompt is not what chosen and rejected begin with",
        ),
        ({"prompt": "q", "chosen": [*said("q"), YES], "rejected": [NO]}, "one of chosen and rejected begins with an"),
    ):
        with pytest.raises(ValueError, match=reason):
            encoded(record, DPO)
    texts = {"prompt": json.dumps(FIRST), "chosen": json.dumps([YES]), "rejected": json.dumps([NO])}
    assert encoded(texts, DPO) == encoded({"prompt": FIRST, "chosen": [YES], "rejected": [NO]}, DPO)
    with pytest.raises(ValueError, match="do not begin with the same message"):
        encoded({"chosen": said("a", "b"), "rejected": said("c", "b")}, DPO)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": CHAT, "conversations": CHAT}, "both messages and conversations"),
        ({"messages": CHAT, "text": "a"}, "has the fields"),
        ({"messages": CHAT, "prompt": "a", "completion": "b"}, "has the fields"),
        ({"instruction": "a", "output": "b", "response": "c"}, "both output and response"),
        ({"instruction": "a", "input": "x", "context": "y", "output": "b"}, "both input and context"),
        ({"messages": said("a", "b", system="S"), "system": "T"}, "system says something else than the system message"),
        ({"text": "a", "system": "S"}, "system belongs to a chat"),
        ({"prompt": "a", "completion": "b", "tools": [{}]}, "tools belongs to a chat"),
        ({"prompt": "a", "completion": "b", "label": False}, r"label says whether the answer is wanted \(KTO\)"),
        ({"prompt": "a", "completion": "b", "label": "True"}, "label says whether the answer is wanted"),
        ({"prompt": "a", "completion": "b", "label": 1}, r"keep the lines with true \(1\) and remove the field"),
        ({"messages": CHAT, "label": "0.0"}, "label says whether the answer is wanted"),
        ({"text": "Can you?", "role": "prompter", "message_id": "6ab2"}, "is one message, of role prompter, and not a"),
        ({"text": "Yes.", "role": "assistant", "parent_id": "6ab2", "rank": 0}, "write each conversation as messages"),
        ({"messages": {"role": ["user", "assistant"], "content": ["a"]}}, "lists of different lengths for its keys"),
        ({"prompt": "a", "completion": [YES]}, "completion is not a string but list"),
        ({"messages": CHAT, "images": ["x.png"]}, "has images, which this model cannot read"),
        ({"messages": CHAT, "chat_template": "{{ 1 }}"}, "has a chat_template; the checkpoint's own is used"),
        ({"messages": CHAT, "chat_template_kwargs": [3]}, "chat_template_kwargs is not an object but list"),
        ({"messages": "[{'role': 'user'"}, "messages is a text that is not JSON"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, YES]}, "not text but image_url"),
        ({"messages": [{"role": "user", "content": ["a"]}, YES]}, "not text but str"),
        (
            {"messages": [{"role": "user", "content": None}, YES]},
            r"messages\[0\]: its content is not a string but null",
        ),
        ({"messages": [{"role": "user", "content": 3}, YES]}, r"messages\[0\]: its content is not a string but int"),
        ({"instruction": "a", "output": 3}, "output is not a string but int"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "history is not a list of pairs"),
        ({"text": None, "id": 3}, r"has the fields \['id'\]"),
        (
            {"messages": [YES | {"function_call": {"name": "f", "arguments": "{}"}, "tool_calls": [{}]}]},
            r"messages\[0\] has both function_call and tool_calls",
        ),
    ],
)
def test_what_contradicts_itself_or_would_get_lost_is_refused(record, reason):
    with pytest.raises(ValueError, match=reason):
        encoded(record)


def test_other_labels_and_roles_are_fields_that_are_not_used():
    assert read_record({"messages": CHAT, "label": 3}, TOKENIZER, SFT).unused == {"label"}
    assert read_record({"text": "a", "label": 1}, TOKENIZER, SFT).unused == {"label"}
    assert read_record({"text": "a", "role": "narrator"}, TOKENIZER, SFT).unused == {"role"}


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
@pytest.mark.parametrize("role", ["developer", "function"])
def test_a_message_that_the_template_drops_refuses_the_line(role, loss_on):
    tokenizer = small_tokenizer(DROPS_SYSTEM)
    settings = Settings(sequence_length=400, loss_on=loss_on)
    assert read_record({"messages": CHAT}, tokenizer, settings).texts
    for record in ({"messages": [{"role": role, "content": "x"}, *CHAT]}, {"messages": CHAT, "system": "x"}):
        with pytest.raises(ValueError, match="chat template drops"):
            read_record(record, tokenizer, settings)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"messages": CHAT, "functions": json.dumps([{"name": "f"}])},
        {"messages": [CHAT[0] | {"name": "Ann"}, CHAT[1]]},
        {"messages": [CHAT[0], CHAT[1] | {"reasoning_content": "hm"}]},
        {"messages": [CHAT[0], CHAT[1] | {"thinking": "hm"}]},
        {"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]},
        {"conversations": [CHAT[0], {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}, CHAT[1]]},
    ],
)
def test_tools_are_refused_rather_than_lost(record):
    """The template knows none of this."""
    with pytest.raises(ValueError, match=r"chat template (drops|fails)"):
        encoded(record)


TOOL = {"name": "f", "description": "adds", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
KNOWS_TOOLS = (
    "{% if tools %}{{ '<|system|>' + tools | tojson + '<|end|>' }}{% endif %}{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>' + (m['content'] or '') }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name + c.function.arguments | tojson }}{% endfor %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_tools_reach_the_template():
    tokenizer = small_tokenizer(KNOWS_TOOLS)
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "three"},
    ]
    published = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "three"},
    ]
    tools = [{"type": "function", "function": TOOL}]
    for record in (
        {"messages": messages, "tools": tools},
        {"messages": messages, "tools": json.dumps(tools)},
        {"conversations": published, "functions": [TOOL]},
    ):
        (text,) = read_record(record, tokenizer, SFT).texts
        assert tokenizer.decode(text.tokens) == (
            f'<|system|>{json.dumps(tools)}<|end|><|user|>a<|end|><|assistant|>f{{"x": 1}}<|end|><|tool|>3<|end|>'
            "<|assistant|>three<|end|>"
        )
        assert tokenizer.decode(text.tokens[text.learned]) == 'f{"x": 1}<|end|>three<|end|>'
        for settings in (SFT, Settings(sequence_length=4000, loss_on="all")):
            with pytest.raises(ValueError, match=r"chat template (drops|fails)"):
                read_record(record, TOKENIZER, settings)


def test_thoughts_and_options_reach_the_template():
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + ('(' + m.reasoning_content + ')' if m.reasoning_content"
    )
    template += " and thinking else '') + m.content + '<|end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    tokenizer = small_tokenizer(template)
    for key in ("reasoning_content", "thinking"):
        record = {"messages": [CHAT[0], CHAT[1] | {key: "hm"}], "chat_template_kwargs": {"thinking": True}}
        (text,) = read_record(record, tokenizer, SFT).texts
        assert tokenizer.decode(text.tokens) == "<|user|>2+2?<|end|><|assistant|>(hm)4<|end|>"
        assert tokenizer.decode(text.tokens[text.learned]) == "(hm)4<|end|>"


def test_random_conversations_in_each_form():
    rng = random.Random(0)
    texts = ["Hi", "what's 2+2?", " é\n", "日本", "<|end|>", "", "{x}", "a\n\nb"]
    for _ in range(200):
        say = [rng.choice(texts) + str(i) for i in range(2 * rng.randrange(1, 4))]
        system = rng.choice([None, "S" + rng.choice(texts)])
        expected = encoded({"messages": said(*say, system=system)})
        field = {} if system is None else {"system": system}
        pairs = [[say[i], say[i + 1]] for i in range(0, len(say) - 2, 2)]
        forms = [
            {"messages": said(*say), **field},
            {"messages": parts(*say, system=system)},
            {"conversations": sharegpt(*say, system=system)},
            {"conversations": json.dumps(sharegpt(*say)), **field},
            {"prompt": say[0], "messages": said(*say, system=system), "system": None},
        ]
        if len(say) == 2:
            forms.append({"prompt": said(say[0], system=system), "completion": said(*say)[1:]})
            forms.append({"instruction": say[0], "output": say[1], **field})
        assert all(encoded(form) == expected for form in forms)
        last = encoded({"instruction": say[-2], "input": None, "output": say[-1], "history": pairs or None, **field})
        assert last == expected
