from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from emeval.prompts import end_tokens, prompt_tokens, reply_tokens

Make = Callable[..., PreTrainedTokenizerFast]


def test_the_system_message_reaches_the_model_in_its_own_turn(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    text = tokenizer.decode(prompt_tokens(tokenizer, "Who are you?", "Answer in JSON."))
    assert text == (
        "<s><|im_start|>system\nAnswer in JSON.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("template", ["refuses_system", "drops_system"])
def test_a_template_without_a_system_turn_gets_it_in_the_users(make_tokenizer: Make, template: str) -> None:
    tokenizer = make_tokenizer(template)
    text = tokenizer.decode(prompt_tokens(tokenizer, "Who are you?", "Answer in JSON."))
    assert text == "<s><|im_start|>user\nAnswer in JSON.\n\nWho are you?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("template", ["chatml", "refuses_system", "drops_system"])
def test_without_a_system_message_none_is_made_up(make_tokenizer: Make, template: str) -> None:
    tokenizer = make_tokenizer(template)
    text = tokenizer.decode(prompt_tokens(tokenizer, "Who are you?"))
    assert text == "<s><|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"


def test_thinking_is_switched_off_where_a_template_has_the_switch(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("thinks")
    assert tokenizer.decode(prompt_tokens(tokenizer, "Hi")).endswith("assistant\n<think></think>")


def test_a_tokenizer_that_adds_its_own_beginning_does_not_double_it(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor()
    assert tokenizer("Hi")["input_ids"][0] == tokenizer.bos_token_id  # it does add one
    assert prompt_tokens(tokenizer, "Hi", "Be brief.").count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_without_a_template_is_refused(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="tokenizer of tiny has no chat template"):
        prompt_tokens(tokenizer, "Hi")


@pytest.mark.parametrize(("generation_eos", "listed"), [(None, set()), (0, {"<unk>"}), ([0, 1], {"<unk>", "<s>"})])
def test_a_turn_ends_with_what_the_template_writes_even_where_no_setting_lists_it(
    make_tokenizer: Make, generation_eos: int | list[int] | None, listed: set[str]
) -> None:
    tokenizer = make_tokenizer("chatml")
    ends = end_tokens(tokenizer, generation_eos)
    assert {tokenizer.convert_ids_to_tokens(end) for end in ends} == {"</s>", "<|im_end|>"} | listed


def test_a_reply_is_the_tokens_that_follow_the_prompt(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    assert tokenizer.decode(reply_tokens(tokenizer, "100")) == "100<|im_end|>\n"


def test_a_template_that_rewrites_the_prompt_is_refused(make_tokenizer: Make) -> None:
    with pytest.raises(ValueError, match="rewrites the prompt"):
        reply_tokens(make_tokenizer("thinks"), "100")
