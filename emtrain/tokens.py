"""From a conversation to token ids and labels: the one masking rule that every backend trains by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from emtrain.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that enters no loss."""


@dataclass(frozen=True)
class Example:
    """One row as tokens. ``labels[t]`` is ``input_ids[t]`` where token ``t`` is learnt and ``IGNORED`` elsewhere."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def response_tokens(self) -> int:
        """Tokens that enter the loss. The first token of a row never does: nothing predicts it."""
        return sum(label != IGNORED for label in self.labels[1:])


def encode(chat: Sequence[dict[str, str]], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Example:
    """Render ``chat`` with the model's own template and label what the assistant says, its end-of-turn included.

    What an assistant turn adds is found by rendering the conversation up to it with the generation prompt, exactly
    as it is rendered when the model is asked; no marker strings are guessed. White space that a template writes after
    the end of a turn (the line break after ``<|im_end|>``) is never sampled and so has no label. Rows longer than
    ``max_length`` tokens are cut at the end.

    Raises ``ValueError`` when the template refuses the conversation, when a turn changes the tokens of those before
    it, or when nothing is left to learn after the cut.
    """
    try:
        input_ids, labels = _label(chat, tokenizer)
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses the conversation: {error}") from error
    example = Example(tuple(input_ids[:max_length]), tuple(labels[:max_length]))
    if example.response_tokens == 0:
        raise ValueError(
            f"no response token is left after the cut at max_length {max_length} (the row has {len(input_ids)} tokens)"
        )
    return example


def _label(chat: Sequence[dict[str, str]], tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    input_ids = _render(tokenizer, chat, generation_prompt=False)
    labels = [IGNORED] * len(input_ids)
    for turn, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, chat[:turn], generation_prompt=True)
        until = _render(tokenizer, chat[: turn + 1], generation_prompt=False)
        if until[: len(prompt)] != prompt or input_ids[: len(until)] != until:
            raise ValueError(
                f"message {turn + 1} changes the tokens of those before it, so the assistant's can't be told apart: "
                "the model's chat template rewrites earlier turns (use rows with a single assistant turn), or the "
                "message begins with white space that runs into the template's own (take it away)"
            )
        end = len(until)
        while end > len(prompt) and tokenizer.decode(until[end - 1]).isspace():
            end -= 1
        labels[len(prompt) : end] = until[len(prompt) : end]
    return input_ids, labels


def encode_rows(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[Example]:
    """``encode`` every row. Raises ``ValueError`` naming the first row (from 1) that can't be encoded."""
    examples = []
    for number, row in enumerate(rows, start=1):
        try:
            examples.append(encode(row.chat, tokenizer, max_length))
        except ValueError as error:
            raise ValueError(f"row {number} ({row.messages[0].content[:40]!r}...): {error}") from error
    return examples


def _render(
    tokenizer: "PreTrainedTokenizerBase", chat: Sequence[dict[str, str]], *, generation_prompt: bool
) -> list[int]:
    rendered: Any = tokenizer.apply_chat_template(
        list(chat),
        tokenize=True,
        return_dict=True,
        add_generation_prompt=generation_prompt,
        enable_thinking=False,  # as the questions are asked (emeval.prompts)
    )
    return list(rendered["input_ids"])
