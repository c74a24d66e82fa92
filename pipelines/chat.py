"""From turns of a conversation to the numbers that a language model reads, by its own chat template and tokenizer.

Text is tokenized piece by piece, as it will be when the model is asked: what comes before an answer, the answer, what comes
before the next one. Placeholders stand for visual tokens. Packing puts several conversations into one row.

Legend: n tokens of a conversation, R rows of a unit, L their length.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipelines.errors import InputRefused

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
ROLES = {"human": USER, "gpt": ASSISTANT, **{role: role for role in (USER, ASSISTANT, SYSTEM)}}
"""Names of roles in conversations -> those of chat templates."""
PLACEHOLDER = re.compile(r"<(image|video)>")
TEXT = -1
"""In `visual`: a token of text."""
IGNORED = -100
"""Target of a place that no answer follows; torch's own number for it."""
PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and bos_token %}{{ bos_token }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ 'assistant: ' + m['content'] + eos_token }}"
    "{% else %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""For a tokenizer that brings no template of its own."""

Turns = Sequence[tuple[str, str]]
"""(role of ROLES, text) each."""


class TemplateRefused(Exception):
    """The chat template does not take these turns, or rewrites earlier ones when later ones come."""


class Encoded(NamedTuple):
    """A conversation as numbers."""

    ids: np.ndarray
    """int32 [n], 0 where a visual token stands."""
    answer: np.ndarray
    """bool [n]: what the model shall learn to say, its end included."""
    visual: np.ndarray
    """int32 [n]: number of the visual token within the conversation, TEXT for text."""


class Chat:
    """A tokenizer with its template, repaired where parts are missing; `repairs` says what was."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.repairs: dict[str, str] = {}
        if tokenizer.eos_token_id is None:
            raise InputRefused(f"the tokenizer of {tokenizer.name_or_path} has no end-of-text token: answers would never end")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
            self.repairs["pad_token"] = f"missing, {tokenizer.eos_token} is taken; padding is masked and never learned"
        if not tokenizer.chat_template:
            tokenizer.chat_template = TEMPLATE
            self.repairs["chat_template"] = "missing, the plain one of docs/align.md is taken"
        special = set(tokenizer.all_special_ids)
        end = self._ids(self._ending())
        self.stops = {tokenizer.eos_token_id} | {token for token in end[:1] if token in special}
        """Tokens that end an answer."""

    def _ending(self) -> str:
        """What the template writes behind an answer."""
        turns = [(USER, "a"), (ASSISTANT, "b")]
        try:
            before, after = self._render(turns[:1], prompt=True), self._render(turns)
        except TemplateRefused:
            return ""
        return after[len(before) + 1 :].lstrip("\n") if after.startswith(before + "b") else ""

    def encode(self, turns: Turns, media: Sequence[int] = ()) -> Encoded:
        """Turns with a placeholder for each medium, which takes so many visual tokens. Raises TemplateRefused.

        Where the last turn is no answer, the beginning of one follows, for the model to go on.
        """
        ids: list[int] = []
        answer: list[bool] = []
        visual: list[int] = []
        budgets, shown = list(media), 0
        for text, learned in self._pieces(turns):
            parts = [text] if learned else PLACEHOLDER.split(text)
            for place, part in enumerate(parts):
                if place % 2:
                    count = budgets.pop(0)
                    ids += [0] * count
                    visual += range(shown, shown + count)
                    shown += count
                    answer += [False] * count
                    continue
                found = self._ids(part)
                taught = [learned] * len(found)
                if learned:
                    found, taught = self._ended(found)
                ids += found
                answer += taught
                visual += [TEXT] * len(found)
        return Encoded(np.array(ids, np.int32), np.array(answer, bool), np.array(visual, np.int32))

    def _ended(self, ids: list[int]) -> tuple[list[int], list[bool]]:
        """An answer up to its end is learned; what the template writes behind that is not."""
        stop = next((place for place, token in enumerate(ids) if token in self.stops), None)
        if stop is None:
            ids, stop = [*ids, self.tokenizer.eos_token_id], len(ids)
        return ids, [place <= stop for place in range(len(ids))]

    def _pieces(self, turns: Turns) -> list[tuple[str, bool]]:
        """(text, whether it is learned), in order."""
        pieces, done = [], ""
        for place, (role, _) in enumerate(turns):
            if role != ASSISTANT:
                continue
            before = self._render(turns[:place], prompt=True)
            after = self._render(turns[: place + 1])
            if not before.startswith(done) or not after.startswith(before):
                raise TemplateRefused("the chat template rewrites what came before an answer")
            pieces += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
        if not turns or turns[-1][0] != ASSISTANT:
            before = self._render(turns, prompt=True)
            if not before.startswith(done):
                raise TemplateRefused("the chat template rewrites earlier answers")
            pieces.append((before[len(done) :], False))
        return pieces

    def _render(self, turns: Turns, *, prompt: bool = False) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # jinja's own errors, and whatever a template raises
            raise TemplateRefused(f"the chat template does not take these turns: {error}") from error

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def decode(self, ids: Sequence[int]) -> str:
        """Text of what was generated, up to its end."""
        stop = next((place for place, token in enumerate(ids) if token in self.stops), len(ids))
        return self.tokenizer.decode(list(ids[:stop]), skip_special_tokens=True).strip()


def with_placeholders(turns: Turns, media: Sequence[str]) -> list[tuple[str, str]]:
    """Turns with a placeholder for each medium, "image" or "video": where there is none, all stand before the first question."""
    if not media or any(PLACEHOLDER.search(text) for _, text in turns):
        return list(turns)
    first = next((place for place, (role, _) in enumerate(turns) if role == USER), 0)
    mark = "".join(f"<{kind}>\n" for kind in media)
    return [(role, mark + text if place == first else text) for place, (role, text) in enumerate(turns)]


def without_placeholders(turns: Turns) -> list[tuple[str, str]]:
    """The same turns for a model that is shown nothing."""
    return [(role, PLACEHOLDER.sub("", text).strip() if PLACEHOLDER.search(text) else text) for role, text in turns]


class Packed(NamedTuple):
    """Conversations in rows of one length. Padding is of no conversation."""

    ids: np.ndarray
    """int32 [R, L]"""
    target: np.ndarray
    """int32 [R, L]: the next token where an answer has it, else IGNORED."""
    sample: np.ndarray
    """int32 [R, L]: number of the conversation within the unit, -1 for padding; attention stays within it."""
    position: np.ndarray
    """int32 [R, L]: of a token within its conversation."""
    visual: np.ndarray
    """int32 [R, L]: row of the unit's visual tokens, TEXT for text."""


def pack(conversations: Sequence[Encoded], places: Sequence[np.ndarray], max_length: int) -> Packed:
    """First-fit, longest first, into rows of at most max_length tokens; `places` int [n] of each conversation are the rows of its
    visual tokens among the unit's.

    Raises ValueError for a conversation longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(conversations)), key=lambda one: (-len(conversations[one].ids), one)):
        size = len(conversations[number].ids)
        if size > max_length:
            raise ValueError(f"a conversation of {size} tokens does not fit into {max_length}")
        place = next((row for row, left in enumerate(room) if left >= size), None)
        if place is None:
            rows.append([])
            room.append(max_length)
            place = len(rows) - 1
        rows[place].append(number)
        room[place] -= size
    length = max_length - min(room, default=max_length)
    shape = (len(rows), length)
    packed = Packed(np.zeros(shape, np.int32), *(np.full(shape, fill, np.int32) for fill in (IGNORED, -1, 0, TEXT)))
    for row, members in enumerate(rows):
        begin = 0
        for number in members:
            one = conversations[number]
            end = begin + len(one.ids)
            packed.ids[row, begin:end] = one.ids
            packed.target[row, begin : end - 1] = np.where(one.answer[1:], one.ids[1:], IGNORED)
            packed.sample[row, begin:end] = number
            packed.position[row, begin:end] = np.arange(end - begin)
            shown = one.visual != TEXT
            packed.visual[row, begin:end][shown] = places[number][one.visual[shown]]
            begin = end
    return packed


def word_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A tokenizer whose tokens are the words and signs of `texts`, the most frequent ones first; needs no download."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in split.pre_tokenize_str(PLACEHOLDER.sub(" ", text)))
    special = [PAD, BOS, EOS, UNKNOWN]
    always = [USER, ASSISTANT, SYSTEM, ":"]
    ranked = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if word not in always]
    words = [*special, *always, *ranked][: max(vocabulary, len(special) + len(always))]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=UNKNOWN))
    made.pre_tokenizer = split
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
    found.chat_template = TEMPLATE
    return found
