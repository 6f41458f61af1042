"""The files that a model is evaluated on: texts, data as for training, and questions with several answers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from phi3_jax.regular_file import read_text
from phi3_jax.text import Tokenizer

from ..data import Tally, Text, find_files, is_data, read_entries, read_record, tell
from ..settings import Settings


@dataclasses.dataclass(frozen=True)
class Question:
    """What stands before the answer, the possible answers, and which of them is right."""

    context: str
    choices: tuple[str, ...]
    answer: int


def read_texts(path: str | os.PathLike[str]) -> list[str]:
    """The texts of a file: the field "text" of every entry of a data file (data/files.py); any other is one text.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is not UTF-8, or a line is not a JSON object with a text.
    """
    if not is_data(str(path)):
        return [read_text(path)]
    texts = []
    for place, record in _records(path):
        if not isinstance(record.get("text"), str):
            raise ValueError(f'{place}: has no string "text"; --data measures chats')
        texts.append(record["text"])
    return texts


def read_data(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    longest: int,
    parse_special: bool = False,
    on_note: Callable[[str], None] | None = None,
) -> list[Text]:
    """The texts of a data set as for training (data/sources.py and data/forms.py), and which tokens are learned.

    Args:
      longest: the most tokens of a text.
      parse_special: as in the settings of training.
      on_note: is told what was converted and what is not used, if anything.

    Raises:
      OSError: a file cannot be read.
      ImportError: a package is missing that reads it.
      ValueError: it has no lines, or one that cannot be used.
    """
    settings, tally = Settings(sequence_length=longest, parse_special=parse_special), Tally()
    texts: list[Text] = []
    for file in find_files(path):
        for entry in read_entries(file):
            where = f"{file}, {entry.unit} {entry.number}"
            try:
                example = read_record(entry.fields(), tokenizer, settings)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            tally.add(where, example)
            texts += example.texts
    if not texts:
        raise ValueError(f"{path}: there are no lines in it")
    if on_note is not None and (told := tell(tally)):
        on_note(f"{path}{told}")
    return texts


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """The questions of a file of JSON lines {"question" or "context": ..., "choices": [...], "answer": ...}.

    The answer is the number of a choice, from 0, or the choice itself.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is not UTF-8, has no lines, or a line is not such a question.
    """
    questions = [_question(place, record) for place, record in _records(path)]
    if not questions:
        raise ValueError(f"{path}: there are no questions in it")
    return questions


def _question(place: str, record: Mapping[str, Any]) -> Question:
    contexts = [record[name] for name in ("question", "context") if name in record]
    choices, answer = record.get("choices"), record.get("answer")
    if len(contexts) != 1 or not isinstance(contexts[0], str):
        raise ValueError(f'{place}: needs one string "question" or "context"')
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ValueError(f'{place}: "choices" must be a list of at least two texts')
    if isinstance(answer, str) and choices.count(answer) == 1:
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f'{place}: "answer" must be one of the choices, or its number from 0 on')
    return Question(contexts[0], tuple(choices), answer)


def _records(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for entry in read_entries(Path(path)):
        where = f"{path}, {entry.unit} {entry.number}"
        try:
            yield where, entry.fields()
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
