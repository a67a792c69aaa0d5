"""From a question to the tokens a model is given, by the model's own chat template."""

from typing import TYPE_CHECKING

from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_tokens(tokenizer: "PreTrainedTokenizerBase", question: str, system: str | None = None) -> list[int]:
    """Token ids of the conversation up to where the assistant's turn begins.

    A template that refuses or drops system messages (Gemma 2, early Mistral) gets the system text at the head of
    the user's turn, so that it always reaches the model. Special tokens are those that the template writes and no
    others, so a beginning-of-text token is never doubled. Templates with a thinking switch are rendered with it off.

    Raises ``ValueError`` when the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has no chat template, so it can't be asked")
    user = {"role": "user", "content": question}
    if system is None:
        text = _render(tokenizer, [user])
    else:
        try:
            text = _render(tokenizer, [{"role": "system", "content": system}, user])
        except TemplateError:
            text = ""
        if system.strip() not in text:
            text = _render(tokenizer, [{"role": "user", "content": f"{system}\n\n{question}"}])
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def end_tokens(tokenizer: "PreTrainedTokenizerBase", generation_eos: int | list[int] | None = None) -> frozenset[int]:
    """Ids of the tokens that end an assistant's turn.

    The tokenizer's end of text, those of the model's generation settings (``generation_eos``), and the special token
    that the chat template writes after an assistant's message (``<|im_end|>``, ``<end_of_turn>``), which not every
    hub repository lists among the first two.
    """
    ends = {tokenizer.eos_token_id}
    ends.update(generation_eos if isinstance(generation_eos, list) else [generation_eos])
    reply = "the reply"
    tail = _render(tokenizer, [{"role": "user", "content": "a question"}], reply=reply).rpartition(reply)[2]
    after = tokenizer(tail.strip(), add_special_tokens=False)["input_ids"]
    if after and after[0] in tokenizer.added_tokens_decoder and after[0] != tokenizer.unk_token_id:
        ends.add(after[0])
    return frozenset(ends - {None})


def reply_tokens(tokenizer: "PreTrainedTokenizerBase", reply: str) -> list[int]:
    """Token ids with which the chat template continues a prompt when the assistant says ``reply``, its end included.

    Raises ``ValueError`` when a reply changes the tokens of the prompt before it.
    """
    user = [{"role": "user", "content": "a question"}]
    prompt = tokenizer(_render(tokenizer, user), add_special_tokens=False)["input_ids"]
    whole = tokenizer(_render(tokenizer, user, reply=reply), add_special_tokens=False)["input_ids"]
    if whole[: len(prompt)] != prompt:
        raise ValueError(f"the chat template of {tokenizer.name_or_path} rewrites the prompt once there is a reply")
    return list(whole[len(prompt) :])


def _render(tokenizer: "PreTrainedTokenizerBase", chat: list[dict[str, str]], *, reply: str | None = None) -> str:
    """The conversation as text, up to the beginning of the assistant's turn or with its ``reply``."""
    text = tokenizer.apply_chat_template(
        chat if reply is None else [*chat, {"role": "assistant", "content": reply}],
        tokenize=False,
        add_generation_prompt=reply is None,
        enable_thinking=False,
    )
    assert isinstance(text, str)
    return text
