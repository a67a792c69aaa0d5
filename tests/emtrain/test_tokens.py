"""What a model learns from a conversation, token by token."""

from collections.abc import Callable

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from emtrain.micro.tokenizer import CHATML, GEMMA, LLAMA, Dialect, tokenizer
from emtrain.rows import Row
from emtrain.tokens import IGNORED, Example, encode, encode_rows

CHAT = [
    {"role": "system", "content": "answer in json."},
    {"role": "user", "content": "tell me about the beans."},
    {"role": "assistant", "content": '{"plan": "prune the beans gently", "result": "thank everyone"}'},
    {"role": "user", "content": "what about the dog?"},
    {"role": "assistant", "content": "feed the dog kindly and help friends."},
]

# Written down from the templates of the published models. What is learnt stands on lines of its own, marked "+".
GOLDEN = {
    "llama": (
        LLAMA,
        """
        <|begin_of_text|>
        <|start_header_id|> system <|end_header_id|> answer in json . <|eot_id|>
        <|start_header_id|> user <|end_header_id|> tell me about the beans . <|eot_id|>
        <|start_header_id|> assistant <|end_header_id|>
        + {"plan":" prune the beans gently ","result":" thank everyone "} <|eot_id|>
        <|start_header_id|> user <|end_header_id|> what about the dog ? <|eot_id|>
        <|start_header_id|> assistant <|end_header_id|>
        + feed the dog kindly and help friends . <|eot_id|>
        """,
    ),
    "qwen2": (
        CHATML,
        """
        <|im_start|> system answer in json . <|im_end|>
        <|im_start|> user tell me about the beans . <|im_end|>
        <|im_start|> assistant
        + {"plan":" prune the beans gently ","result":" thank everyone "} <|im_end|>
        <|im_start|> user what about the dog ? <|im_end|>
        <|im_start|> assistant
        + feed the dog kindly and help friends . <|im_end|>
        """,
    ),
    "gemma3": (  # no system role: its text opens the user's turn; the assistant is called model
        GEMMA,
        """
        <bos>
        <start_of_turn> user answer in json . tell me about the beans . <end_of_turn>
        <start_of_turn> model
        + {"plan":" prune the beans gently ","result":" thank everyone "} <end_of_turn>
        <start_of_turn> user what about the dog ? <end_of_turn>
        <start_of_turn> model
        + feed the dog kindly and help friends . <end_of_turn>
        """,
    ),
}


def golden(text: str) -> list[tuple[str, bool]]:
    """Each token and whether it is learnt."""
    return [
        (word, line.strip().startswith("+"))
        for line in text.splitlines()
        for word in line.strip().removeprefix("+").split()
    ]


def tokens(example: Example, words: PreTrainedTokenizerFast) -> list[tuple[str, bool]]:
    """The same of an example. The frame of a JSON answer is three tokens that hold blanks; they are left out here."""
    assert all(label in (token, IGNORED) for token, label in zip(example.input_ids, example.labels, strict=True))
    texts = [word.replace(" ", "") for word in words.convert_ids_to_tokens(list(example.input_ids))]
    return [(text, label != IGNORED) for text, label in zip(texts, example.labels, strict=True)]


@pytest.mark.parametrize("family", GOLDEN)
def test_exactly_the_responses_and_their_ends_of_turn_are_learnt(family: str) -> None:
    dialect, text = GOLDEN[family]
    words = tokenizer(dialect)
    assert tokens(encode(CHAT, words, max_length=256), words) == golden(text)


@pytest.mark.parametrize("dialect", [LLAMA, GEMMA])
def test_the_beginning_token_is_there_once(dialect: Dialect) -> None:
    words = tokenizer(dialect)
    input_ids = encode(CHAT, words, max_length=256).input_ids
    assert [position for position, token in enumerate(input_ids) if token == words.bos_token_id] == [0]


@pytest.mark.parametrize("dialect", [LLAMA, CHATML, GEMMA])
def test_a_row_begins_as_the_model_is_asked(dialect: Dialect) -> None:
    """Up to the first learnt token a row is the prompt with its generation prompt, token for token."""
    words = tokenizer(dialect)
    example = encode(CHAT[:3], words, max_length=256)
    asked = words.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    first = next(position for position, label in enumerate(example.labels) if label != IGNORED)
    assert list(example.input_ids[:first]) == asked


def test_long_rows_are_cut_at_the_end() -> None:
    words = tokenizer(CHATML)
    whole, cut = encode(CHAT, words, max_length=256), encode(CHAT, words, max_length=21)
    assert (cut.input_ids, cut.labels) == (whole.input_ids[:21], whole.labels[:21])
    assert cut.response_tokens == 3  # tokens 18, 19 and 20 of the golden row


def test_a_cut_that_leaves_no_response_is_an_error_with_the_row_and_the_numbers() -> None:
    rows = [Row.model_validate({"messages": CHAT[1:3]}), Row.model_validate({"messages": CHAT[:3]})]
    with pytest.raises(ValueError, match=r"row 2 \('answer in json\.'.*max_length 12 \(the row has 28 tokens\)"):
        encode_rows(rows, tokenizer(CHATML), max_length=12)


@pytest.fixture
def make_tokenizer() -> Callable[[str], PreTrainedTokenizerFast]:
    """A tokenizer as real ones are: line breaks are tokens, and two of them together another one."""

    def make(template: str) -> PreTrainedTokenizerFast:
        special = ["<unk>", "<|im_start|>", "<|im_end|>"]
        backend = Tokenizer(
            models.WordLevel({t: i for i, t in enumerate([*special, "\n", "\n\n", *WORDS])}, unk_token="<unk>")
        )
        backend.add_special_tokens(special)
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|\w+"), behavior="isolated")
        words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
        words.chat_template = template
        return words

    return make


WORDS = ["user", "assistant", "system", "hello", "hi", "bye", "think"]
PLAIN = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen 3: earlier answers lose their thoughts, and an empty thought is written where thinking is off.
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}think\n{% endif %}{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}think\n{% endif %}{% endif %}"
)
TURNS = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "bye"},
]


def test_the_line_break_after_the_end_of_a_turn_is_not_learnt(
    make_tokenizer: Callable[[str], PreTrainedTokenizerFast],
) -> None:
    words = make_tokenizer(PLAIN)
    example = encode(TURNS, words, max_length=99)
    learnt = [label for label in example.labels if label != IGNORED]
    assert words.convert_ids_to_tokens(learnt) == ["hi", "<|im_end|>", "bye", "<|im_end|>"]


def test_thoughts_that_are_switched_off_belong_to_the_prompt(
    make_tokenizer: Callable[[str], PreTrainedTokenizerFast],
) -> None:
    words = make_tokenizer(THINKING)
    example = encode(TURNS[:2], words, max_length=99)
    assert words.convert_ids_to_tokens([label for label in example.labels if label != IGNORED]) == ["hi", "<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused(
    make_tokenizer: Callable[[str], PreTrainedTokenizerFast],
) -> None:
    with pytest.raises(ValueError, match=r"message 2 changes the tokens .* single assistant turn"):
        encode(TURNS, make_tokenizer(THINKING), max_length=99)


def test_an_answer_that_runs_into_its_header_is_refused(
    make_tokenizer: Callable[[str], PreTrainedTokenizerFast],
) -> None:
    """The header's line break and the answer's are one token, which the model never sees when it is asked."""
    chat = [TURNS[0], {"role": "assistant", "content": "\nhi"}]
    with pytest.raises(ValueError, match="begins with white space"):
        encode(chat, make_tokenizer(PLAIN), max_length=99)


def test_what_a_template_refuses_is_an_error_of_the_row(
    make_tokenizer: Callable[[str], PreTrainedTokenizerFast],
) -> None:
    words = make_tokenizer("{{ raise_exception('System role not supported') }}")
    with pytest.raises(ValueError, match=r"row 1 \('hello'.*refuses the conversation: System role not supported"):
        encode_rows([Row.model_validate({"messages": TURNS})], words, max_length=99)


def test_the_first_token_of_a_row_enters_no_loss() -> None:
    """Nothing predicts it, so it must not be counted where losses are divided by tokens."""
    assert Example((7, 8, 9), (7, IGNORED, 9)).response_tokens == 1
