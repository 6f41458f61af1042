"""Time to the first token, decoding speed, memory and number of compiled programs of the demo model.

    python benchmarks/generation.py

Each figure of the first table is from a process of its own: cold with an empty compilation cache, warm with the one
that the cold process left. The second table runs the same prompts plainly and with prompt lookup, in turns, in one
process. The limit beside a speed is the memory's: every step reads all weights once, whatever the batch.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

PROMPT = "The lighthouse stood at the end of a long stone pier, and every evening the keeper climbed its"
NEW_TOKENS = 128
ROUNDS = 5
TEXT = (
    "The little boat left the harbour at dawn. Its sails were red, and its captain was an old man who had sailed every "
    "sea. He carried salt, rope and oranges, and a letter that he had promised to deliver before the new moon."
)


def one_start(batch: int) -> None:
    """In a process of its own: loads, answers `batch` prompts, prints figures as JSON."""
    import jax

    import phi3_jax
    from phi3_jax.infer import Run
    from phi3_jax.infer.engine import decoding

    jax.config.update("jax_compilation_cache_dir", os.environ["COMPILED"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    checkpoint = phi3_jax.load("demo", "float32")
    begin = time.perf_counter()
    run = Run(checkpoint, [checkpoint.tokenizer.encode(PROMPT)] * batch, [NEW_TOKENS] * batch)
    run.advance()
    first = time.perf_counter() - begin
    run.advance(1)  # compiles the loop
    before, count = run.timings.decode, 0
    while not run.is_over:
        count += sum(len(new.token_ids) for new in run.advance(32))
    figures = {
        "first": first,
        "speed": count / (run.timings.decode - before),
        "compile": run.timings.compile,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "programs": sum(f._cache_size() for f in (decoding.read, decoding.answer, decoding.decode)),
        "weights": sum(leaf.nbytes for leaf in jax.tree.leaves(checkpoint.params)),
    }
    print(json.dumps(figures))


def bandwidth() -> float:
    """Bytes per second of summing a large array in two threads: reading weights cannot be faster."""
    import jax
    import jax.numpy as jnp

    array = jnp.ones(2**27, jnp.float32)
    total = jax.jit(jnp.sum)
    total(array).block_until_ready()
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        total(array).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return array.nbytes / min(seconds)


def starts() -> None:
    """Prints the first table."""
    limit = bandwidth()
    print(f"memory: {limit / 1e9:.0f} GB/s read")
    print(
        "| batch | start | first token, s | of it and the loop compiling, s | tokens/s | limit | peak, GB | programs |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for batch in (1, 8):
        with tempfile.TemporaryDirectory() as compiled:
            for start in ("cold", "warm"):
                rounds = []
                for _ in range(1 if start == "cold" else ROUNDS):
                    command = [sys.executable, __file__, str(batch)]
                    done = subprocess.run(command, env={**os.environ, "COMPILED": compiled}, capture_output=True)
                    rounds.append(json.loads(done.stdout.splitlines()[-1]))
                median = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
                print(
                    f"| {batch} | {start} | {median['first']:.2f} | {median['compile']:.2f} | {median['speed']:.0f} | "
                    f"{batch * limit / median['weights']:.0f} | {median['peak'] / 1e9:.2f} | {median['programs']:.0f} |"
                )


def guessing() -> None:
    """Prints the second table."""
    import phi3_jax
    from phi3_jax.infer import Options, PromptLookup, Run

    checkpoint = phi3_jax.load("demo", "float32")
    tasks = {
        "repeat a text": f"Repeat the following text exactly, word for word:\n\n{TEXT}",
        "summarise a text": f"Summarise the following text in one sentence:\n\n{TEXT}",
        "write freely": "Write a short story about a lighthouse.",
    }
    ways = {"plain": None, **{f"lookup {n}": PromptLookup(guesses=n) for n in (4, 8, 16)}}
    print("\n| task | way | tokens/s | ratio to plain | guesses right | same tokens |")
    print("|---|---|---|---|---|---|")
    for task, text in tasks.items():
        ids = phi3_jax.encode_chat(checkpoint.tokenizer, [{"role": "user", "content": text}])
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        tokens, right = {}, {}
        for round_ in range(ROUNDS + 1):
            for way, speculation in ways.items():
                run, answer = Run(checkpoint, [ids], [96], options=Options(speculation=speculation)), []
                while not run.is_over:
                    answer += run.advance(32)[0].token_ids
                if round_:  # the first one compiles
                    speeds[way].append((len(answer) - 1) / run.timings.decode)
                tokens[way], right[way] = answer, run.guesses
        plain = np.asarray(speeds["plain"])
        for way, each in speeds.items():
            ratio, (offered, taken) = statistics.median(np.asarray(each) / plain), right[way]
            share = f"{taken} of {offered}" if offered else ""
            same = tokens[way] == tokens["plain"]
            print(f"| {task} | {way} | {statistics.median(each):.0f} | {ratio:.2f} | {share} | {same} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        one_start(int(sys.argv[1]))
    else:
        starts()
        guessing()
