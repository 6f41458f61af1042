"""Requests of all lengths at once to phi3-serve as a process, some of whose clients leave; the demo's: benchmarks/."""

import random

import pytest
from chats import USER, small_chat
from load import Load
from processes import phi3_serve

import phi3_jax
from phi3_jax.infer import Options, generate

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]
ROOM, COUNT, AT_ONCE = 512, 60, 16


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    place = tmp_path_factory.mktemp("load")
    phi3_jax.save(small_chat(tiny, place / "tokenizer"), place / "small")
    return place / "small"


def ids(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(USER) for _ in range(length)]


def test_nothing_is_lost_and_nothing_is_left(folder):
    """Greedy answers in a crowd are those of single runs; slots and memory are free again, also of who left."""
    checkpoint = phi3_jax.load(folder)
    options = Options(room=ROOM, prefill_chunk=128)
    works = [Load.random(seed, COUNT, ids, range(8, 400), range(16, 65)) for seed in range(2)]
    arguments = [f"--checkpoint={folder}", "--slots=4", f"--room={ROOM}"]
    with phi3_serve(*arguments, JAX_DISABLE_MOST_OPTIMIZATIONS="1") as server:
        memory = []
        replies = []
        for work in works:
            replies.append(work.run(server, AT_ONCE))
            memory.append(server.memory())
        assert server.get("/health")[0] == 200
    assert sum(reply.left for each in replies for reply in each) >= 0.05 * 2 * COUNT
    work = works[0]
    stayed = [i for i, reply in enumerate(replies[0]) if not reply.left][::2]
    expected = {
        i: generate(checkpoint, work.requests[i]["prompt"], work.requests[i]["max_tokens"], options=options)[0].text
        for i in stayed
    }
    assert not works[0].faults(replies[0], expected)
    assert not works[1].faults(replies[1], {})
    assert memory[1] < 1.05 * memory[0] + 20e6
