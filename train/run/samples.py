"""Sample answers while a run goes on: the same prompts again and again, to the model as it is at that moment."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from phi3_jax import infer
from phi3_jax.checkpoint import Checkpoint, require_tokenizer
from phi3_jax.json_files import parse
from phi3_jax.model import Params
from phi3_jax.regular_file import read_text
from phi3_jax.text import Tokenizer, encode_chat

from ..data import Chat, Mixture, Pair, find_files, is_data, read_entries, read_form
from ..forward import Reference, parameters
from ..settings import Settings
from ..step import TrainState
from .observer import Observer

_NEW_TOKENS = 48  # of an answer at most
_ROWS = 1000  # of the data, in which prompts are looked for
_MOST = 64  # prompts of a file, which are answered as one batch
_PROBE = "\ufdd0"  # a message whose place in the template is looked for

# A text, or the messages of a chat with tools and options for the template.
Prompt = str | Chat


def read_prompts(settings: Settings) -> list[Prompt]:
    """The prompts of `sample_prompts`; none if there is no such file. No model is needed.

    The file is one of data (data/files.py) in the forms of data/forms.py, of whose answers the last one is left out, or
    with a `prompt` alone. If its name is not that of such a file, and its first line no JSON object, each line is a
    text: what a user says, if the training data begin with a chat, and else a beginning to be continued.

    Raises:
      ValueError: there is no prompt, or a line is not as said; names the file and the line.
      ImportError: a package is missing that reads it.
    """
    if not settings.sample_prompts:
        return []
    path = Path(settings.sample_prompts)
    lines = [] if is_data(path.name) else _lines(path)
    prompts: list[Prompt]
    if is_data(path.name) or (lines and _is_object(lines[0])):
        prompts = _prompts_of_entries(path, settings)
    elif _begins_with_chat(settings):
        prompts = [_said(line) for line in lines]
    else:
        prompts = [*lines]
    if not 1 <= len(prompts) <= _MOST:
        raise ValueError(f"{path}: it has {len(prompts)} prompts; give 1 to {_MOST}, one in each line")
    return prompts


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def _prompts_of_entries(path: Path, settings: Settings) -> list[Prompt]:
    prompts = []
    for entry in read_entries(path):
        try:
            prompts.append(_prompt(entry.fields(), settings))
        except ValueError as error:
            raise ValueError(f"{path}, {entry.unit} {entry.number}: {error}") from None
    return prompts


def encode_prompts(prompts: list[Prompt], checkpoint: Checkpoint, settings: Settings) -> list[list[int]]:
    """The token ids of each, as training has them. Raises ValueError for one that leaves no room for an answer."""
    tokenizer, context = require_tokenizer(checkpoint), checkpoint.config.max_position_embeddings
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, Chat):
            messages = [message.fields for message in prompt.messages]
            ids = encode_chat(tokenizer, messages, tools=prompt.tools, template_options=prompt.options)
        else:
            ids = tokenizer.encode(prompt, parse_special=settings.parse_special, add_eos=False)
        if len(ids) >= context:
            raise ValueError(
                f"{settings.sample_prompts}: a prompt has {len(ids)} tokens, which leaves no room for an answer in the "
                f"model's context of {context}; shorten it"
            )
        encoded.append(ids)
    return encoded


class Sampler:
    """Answers the run's prompts greedily: those of `sample_prompts`, or the first of the data."""

    def __init__(
        self,
        settings: Settings,
        checkpoint: Checkpoint,
        prompts: list[list[int]],
        data: Mixture,
        observer: Observer,
    ):
        """Finds the prompts.

        Args:
          checkpoint: the model; its parameters are not kept.
          prompts: of `encode_prompts`.
          data: what is held out, or else what is trained on; asked if there are none.
        """
        if not prompts:
            prompts = _prompts_of(data, settings.samples)
        self._settings, self._checkpoint = settings, dataclasses.replace(checkpoint, params={})
        self._prompts, self._observer = prompts, observer
        self._asked = [asked(require_tokenizer(checkpoint), ids) for ids in prompts]

    def answer(self, frozen: Params | Reference, state: TrainState) -> list[tuple[str, str]]:
        """(prompt, answer) of each, in the model after the steps of `state`; see `step.start` for both arguments.

        The functions that do this are compiled the first time. If they cannot be, or the memory does not suffice, the
        observer is told, once, and there are no samples any more.
        """
        if not self._prompts:
            return []
        self._observer.progress("answering sample prompts", 0, 1)
        try:
            params = self._parameters(frozen, state.trainable)
            answers = infer.generate(dataclasses.replace(self._checkpoint, params=params), self._prompts, _NEW_TOKENS)
        except (ValueError, RuntimeError) as error:  # jax has the second for what the devices cannot do
            self._prompts = []
            reason = str(error).strip().splitlines()[0][:300]
            self._observer.note(f"no sample answers, and the run goes on without them: {reason}")
            return []
        finally:
            self._observer.progress("answering sample prompts", 1, 1)
        texts = [f"(none: {answer.error})" if answer.error else answer.text for answer in answers]
        return list(zip(self._asked, texts, strict=True))

    def _parameters(self, frozen: Params | Reference, trainable: Params) -> Params:
        """The model in the dtype of its weights, whatever training computes in: so none of them are copied."""
        weights: Any = trainable if self._settings.train == "all" else frozen
        named = jax.tree.leaves_with_path(weights)
        norm = next(leaf for path, leaf in named if "norm" in jax.tree_util.keystr(path))  # is never quantised
        return parameters(dataclasses.replace(self._settings, compute_dtype=norm.dtype.name), trainable, frozen, None)


def asked(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of a prompt; of a chat only what the user said last, without the template around it."""
    text = tokenizer.decode(ids)
    try:
        around = tokenizer.decode(encode_chat(tokenizer, [{"role": "user", "content": _PROBE}]))
    except ValueError:  # there is no template
        return tokenizer.decode(ids, skip_special_tokens=True)
    before, _, after = around.partition(_PROBE)
    if not text.endswith(after):
        return tokenizer.decode(ids, skip_special_tokens=True)
    specials = [token.content for token in tokenizer.added_tokens if token.special]
    opening = before[max([0, *map(before.rfind, specials)]) :]  # of the turn, such as "<|user|>\n"
    return text.removesuffix(after).rpartition(opening)[2]


def _prompts_of(data: Mixture, count: int) -> list[list[int]]:
    """The first different prompts of texts, in token ids: what stands before the first token that is learned.

    A text that is learned from its start, which is its second token, has none. Of a preference the chosen one counts.
    """
    found: dict[tuple[int, ...], None] = {}
    for row in range(min(len(data), _ROWS)):
        batch = data.rows([row])
        batch = batch.chosen if isinstance(batch, Pair) else batch
        tokens, learned, places = (leaf[0] for leaf in (batch.tokens, batch.weights, batch.positions))
        begins = np.flatnonzero(places == 0).tolist()
        for begin, end in itertools.pairwise([*begins, int((places >= 0).sum())]):
            length = int((learned[begin:end] > 0).argmax())
            if length > 1 and len(found) < count:
                found.setdefault(tuple(tokens[begin : begin + length].tolist()))
        if len(found) == count:
            break
    return [list(prompt) for prompt in found]


def _begins_with_chat(settings: Settings) -> bool:
    """Whether the first entry of the training data that can be read is one."""
    for entry in read_entries(find_files(settings.train_files[0])[0]):
        try:
            return isinstance(read_form(entry.fields(), settings.method)[0][0], Chat)
        except ValueError:
            continue
    return False


def _prompt(record: dict[str, Any], settings: Settings) -> Prompt:
    if record.keys() == {"prompt"}:
        if isinstance(record["prompt"], str):
            return record["prompt"]
        record = {"messages": record["prompt"]}
    forms, _ = read_form(record, settings.method if "chosen" in record else "sft")
    form = forms[0]
    if not isinstance(form, Chat):
        if not form.prompt:
            raise ValueError("it has no prompt, only a text")
        return form.prompt
    count = len(form.messages)
    if count and form.messages[-1].is_answer:
        count -= 1
    if not count:
        raise ValueError("it has no message that could be answered")
    return dataclasses.replace(form, messages=form.messages[:count])


def _said(text: str) -> Chat:
    form = read_form({"messages": [{"role": "user", "content": text}]}, "sft")[0][0]
    assert isinstance(form, Chat)
    return form


def _is_object(line: str) -> bool:
    try:
        return isinstance(parse(line), dict)
    except ValueError:
        return False
