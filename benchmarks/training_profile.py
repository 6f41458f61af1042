"""What a training step of the demo model spends its time on, by kind of operation, from XLA's own trace.

    python benchmarks/training_profile.py --train lora

If operations run at the same time, each gets an equal share of it. The rate of the products with weights is printed
beside what the machine can do (phi3_jax/kernels/machine.py).
"""

from __future__ import annotations

import argparse
import collections
import re
import tempfile
from pathlib import Path

import jax
import training

import phi3_jax
from phi3_jax.infer.benchmark.roofline import parameters
from phi3_jax.kernels import why_unavailable
from phi3_jax.kernels.machine import Machine
from phi3_jax.kernels.native.build import library
from phi3_jax.train.settings import Settings
from phi3_jax.train.step import make_train_step, start

# The kind of an operation is the first one whose pattern is in the operation's name, as JAX gives it.
_KINDS = {
    "products with weights": r"\.\.\.i,oi->\.\.\.o",
    "products of the adapter": r"\.\.\.r,\.\.\.o->ro|\.\.\.o,or->\.\.\.r",
    "products of attention": r"BKG.*dot_general|BKG\w+,BK\w+->",
    "the rest of attention": r"self_attn",
    "the rest of the layers": r"layers|Phi3\.hidden|Phi3\.embed",
    "the rest of the loss": r"jvp\(",
}
_REST = "the optimizer, and what has no name"
_NESTED = re.compile(r"\$|Thunk|while|call|conditional|Slinky|wait|Await|Execute")  # other operations run inside


def kinds(compiled_text: str) -> dict[str, str]:
    """The kind of each instruction of a compiled program."""
    found = {}
    for name, label in re.findall(r'%([\w.\-]+) = .*op_name="([^"]*)"', compiled_text):
        found[name] = next((kind for kind, pattern in _KINDS.items() if re.search(pattern, label)), _REST)
    return found


def shares(folder: Path, kind_of: dict[str, str]) -> collections.Counter[str]:
    """Seconds by kind."""
    (path,) = folder.rglob("*.xplane.pb")
    borders = []
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.duration_ns > 0 and not _NESTED.match(event.name) and (name := event.name) in kind_of:
                    borders += [
                        (event.start_ns, 1, kind_of[name]),
                        (event.start_ns + event.duration_ns, -1, kind_of[name]),
                    ]
    seconds: collections.Counter[str] = collections.Counter()
    active: collections.Counter[str] = collections.Counter()
    before = 0.0
    for at, change, kind in sorted(borders):
        if total := active.total():
            for each, count in active.items():
                seconds[each] += (at - before) * count / total / 1e9
        active[kind] += change
        before = at
    return seconds


def main() -> None:
    """Prints the table; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="all", choices=("all", "lora"))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    arguments = parser.parse_args()
    checkpoint = phi3_jax.load("demo")
    settings = Settings(
        train=arguments.train, batch_size=arguments.rows, sequence_length=arguments.tokens, remat="dots"
    )
    batch = training.batch(jax.numpy.asarray([training.random_rows(arguments.rows, arguments.tokens)]))
    state, frozen = start(settings, checkpoint.config, checkpoint.params)
    step = make_train_step(settings, checkpoint.config).lower(state, frozen, batch).compile()
    for _ in range(2):
        state, _ = step(state, frozen, batch)
    jax.block_until_ready(state)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(step(state, frozen, batch))
        seconds = shares(Path(folder), kinds(step.as_text()))
    print("| kind | seconds | share |\n|---|---|---|")
    for kind, each in seconds.most_common():
        print(f"| {kind} | {each:.2f} | {each / seconds.total():.0%} |")
    if why_unavailable() is None:
        passes = 6 if arguments.train == "all" else 4
        operations = passes * arguments.rows * arguments.tokens * sum(parameters(checkpoint.config))
        rate, most = operations / seconds["products with weights"], Machine(library()).rates["float32"]
        print(f"products with weights: {rate / 1e9:.0f} of {most / 1e9:.0f} GOP/s, {rate / most:.0%}")


if __name__ == "__main__":
    main()
