"""Programs of others, unchanged, beside `phi3-serve` as a process: `make test-clients` installs and runs them."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

openai = pytest.importorskip("openai", reason="the clients are not installed: make test-clients")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # what they warn of is not ours

KEY = "a-key-of-the-tests"
FRANCE = [{"role": "user", "content": "What is the capital of France? Answer with one short sentence."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    flags = ["--checkpoint", "demo", "--quantize", "stored", "--port", "0", "--slots", "2", "--room", "1024"]
    command = [sys.executable, "-m", "phi3_jax.infer.programs.serve_main", *flags]
    environment = os.environ | {"PHI3_API_KEYS": KEY}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        begun = server.stdout.readline()
        assert server.stdout.readline() == "phi3-serve: ready\n", begun
        yield begun.split(" at ")[1].split(",")[0]
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


@pytest.fixture(scope="module")
def client(url: str) -> Iterator["openai.OpenAI"]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


def test_models(client):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").object == "model"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.models.retrieve("gpt")


def test_chat(client):
    reply = client.chat.completions.create(model="demo", messages=FRANCE, temperature=0, max_tokens=12)
    assert "Paris" in reply.choices[0].message.content
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    options = {
        "n": 2,
        "seed": 7,
        "temperature": 0.7,
        "top_p": 0.9,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "logit_bias": {"1": -100},
        "stop": ["!"],
        "logprobs": True,
        "top_logprobs": 3,
        "max_completion_tokens": 8,
        "user": "someone",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "response_format": {"type": "text"},
        "parallel_tool_calls": False,
        "extra_body": {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1},
    }
    first, again = (client.chat.completions.create(model="demo", messages=FRANCE, **options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(texts) == 2
    assert texts == [choice.message.content for choice in again.choices]
    entries = first.choices[0].logprobs.content
    assert 0 < len(entries) <= 8
    assert all(len(entry.top_logprobs) == 3 and entry.logprob <= 0 for entry in entries)


def test_chat_is_streamed(client):
    options = {"model": "demo", "messages": FRANCE, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**options).choices[0]
    *chunks, last = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    assert (last.choices, last.usage.completion_tokens > 0) == ([], True)
    with client.chat.completions.stream(**options) as stream:
        told = "".join(event.delta for event in stream if event.type == "content.delta")
        assert told == whole.message.content == stream.get_final_completion().choices[0].message.content


def test_answers_of_a_form_and_calls_of_tools(client):
    pydantic = pytest.importorskip("pydantic")
    City = pydantic.create_model("City", name=(str, pydantic.Field(max_length=20)), is_capital=(bool, ...))
    options = {"model": "demo", "messages": FRANCE, "temperature": 0, "max_tokens": 60}
    assert isinstance(
        client.chat.completions.parse(**options, response_format=City).choices[0].message.parsed.is_capital, bool
    )
    reply = client.chat.completions.create(
        **options, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False
    )
    (call,) = reply.choices[0].message.tool_calls
    assert (call.function.name, reply.choices[0].finish_reason) == ("get_weather", "tool_calls")
    with client.chat.completions.stream(
        **options, tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "get_weather"}}
    ) as stream:
        (same,) = stream.get_final_completion().choices[0].message.tool_calls
    assert same.function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    messages = [*FRANCE, reply.choices[0].message.model_dump(exclude_none=True), result]
    assert client.chat.completions.create(model="demo", messages=messages, tools=[WEATHER], max_tokens=4).choices


def test_completions(client):
    options = {"model": "demo", "temperature": 0, "max_tokens": 4}
    reply = client.completions.create(prompt="The capital of France is", **options)
    assert reply.choices[0].text.startswith(" Paris")
    echoed = client.completions.create(prompt="The capital of", echo=True, logprobs=2, **options).choices[0]
    assert echoed.text.startswith("The capital of")
    assert echoed.logprobs.token_logprobs[0] is None
    assert len(echoed.logprobs.tokens) == len(echoed.logprobs.text_offset) == 7
    several = client.completions.create(prompt=["a", "b"], n=2, best_of=3, model="demo", max_tokens=3, seed=1)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    chunks = client.completions.create(prompt="The capital of France is", stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == reply.choices[0].text


def test_responses(client):
    options = {"model": "demo", "input": FRANCE, "temperature": 0, "max_output_tokens": 12}
    reply = client.responses.create(**options, instructions="Be brief.", metadata={"a": "b"}, store=False)
    assert "Paris" in reply.output_text
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
    whole = client.responses.create(**options)
    with client.responses.stream(**options) as stream:
        kinds = [event.type.removeprefix("response.") for event in stream]
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:-1] == ["output_text.done", "content_part.done", "output_item.done"]
    assert kinds[-1] == final.status == whole.status
    follow = [*FRANCE, *whole.output, {"role": "user", "content": "And of Italy?"}]
    assert client.responses.create(model="demo", input=follow, max_output_tokens=3).output_text
    listed = client.responses.create(**options, include=["message.output_text.logprobs"], top_logprobs=2)
    assert all(len(entry.top_logprobs) == 2 for entry in listed.output[0].content[0].logprobs)
    with pytest.raises(openai.BadRequestError, match="no state is kept"):
        client.responses.create(**options, previous_response_id=whole.id)


def test_responses_of_a_form(client):
    pydantic = pytest.importorskip("pydantic")
    City = pydantic.create_model("City", is_capital=(bool, ...))
    reply = client.responses.parse(model="demo", input="Is Paris a capital?", text_format=City, max_output_tokens=40)
    assert isinstance(reply.output_parsed.is_capital, bool)


def test_embeddings(client):
    texts = ["a cat", "a kitten", "the price of steel"]
    packed = client.embeddings.create(model="demo", input=texts)  # the client asks for base64
    plain = client.embeddings.create(model="demo", input=texts, encoding_format="float")
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-7)
        assert sum(x * x for x in one.embedding) == pytest.approx(1, abs=1e-5)
    assert packed.usage.prompt_tokens == plain.usage.total_tokens > 0


def test_errors(client, url):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=FRANCE, temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=FRANCE)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="another", max_retries=0).models.list()


def test_many_at_once(url):
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
            asked = [
                client.chat.completions.create(model="demo", messages=FRANCE, temperature=0, max_tokens=12)
                for _ in range(5)
            ]
            replies = await asyncio.gather(*asked)
        return [reply.choices[0].message.content for reply in replies]

    answers = asyncio.run(ask_all())
    assert "Paris" in answers[0]
    assert len(set(answers)) == 1


def test_litellm(url):
    litellm = pytest.importorskip("litellm")
    where = {"api_base": f"{url}/v1", "api_key": KEY}
    options = {"model": "openai/demo", "messages": FRANCE, "temperature": 0, "max_tokens": 12, **where}
    assert "Paris" in litellm.completion(**options).choices[0].message.content
    chunks = litellm.completion(**options, stream=True)
    assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert len(litellm.embedding(model="openai/demo", input=["a", "b"], encoding_format="float", **where).data) == 2
    assert litellm.responses(model="openai/demo", input="Hi", max_output_tokens=3, **where).output


def test_langchain(url):
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(model="demo", base_url=f"{url}/v1", api_key=KEY, temperature=0, max_tokens=60)
    assert "Paris" in chat.invoke(FRANCE).content
    assert "Paris" in "".join(chunk.content for chunk in chat.stream(FRANCE))
    called = chat.bind_tools([WEATHER], tool_choice="get_weather").invoke(FRANCE)
    assert called.tool_calls[0]["name"] == "get_weather"
    newer = langchain.ChatOpenAI(
        model="demo", base_url=f"{url}/v1", api_key=KEY, temperature=0, max_tokens=12, use_responses_api=True
    )
    assert "Paris" in newer.invoke(FRANCE).text
    vectors = langchain.OpenAIEmbeddings(
        model="demo", base_url=f"{url}/v1", api_key=KEY, check_embedding_ctx_length=False
    )
    assert len(vectors.embed_query("a cat")) == 576


def test_llm(url, tmp_path: Path):
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- {{model_id: here, model_name: demo, api_base: {url}/v1, api_key_name: here, supports_schema: true}}\n"
        f"- {{model_id: newer, model_name: demo, api_base: {url}/v1, api_key_name: here, responses: true}}\n"
    )

    def ask(*arguments: str) -> str:
        # The demo's weights come as a plugin of it, which would want llama.cpp.
        environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}
        command = [sys.executable, "-m", "llm", "--key", KEY, *arguments, FRANCE[0]["content"]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    brief = ["-o", "temperature", "0", "-o", "max_tokens", "12"]
    assert "Paris" in ask("-m", "here", *brief)
    assert "Paris" in ask("-m", "here", "--no-stream", *brief)
    assert "Paris" in ask("-m", "newer", *brief)
