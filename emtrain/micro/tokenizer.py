"""Word-level tokenizers of the micro world, one chat dialect per model family."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from emtrain.micro.world import vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Dialect:
    """The special tokens and the chat template of a family, as its published models have them."""

    end_of_turn: str
    """Ends every message; also the tokenizer's end token, so sampling stops there."""
    padding: str
    headers: tuple[str, ...]
    """The other special tokens of the template."""
    template: str
    beginning: str | None = None
    """Put once before every text; None in families without one."""

    @property
    def special_tokens(self) -> list[str]:
        """All special tokens, in the order of their ids, from 0."""
        return [self.padding, *([self.beginning] if self.beginning else []), *self.headers, self.end_of_turn]


LLAMA = Dialect(
    beginning="<|begin_of_text|>",
    headers=("<|start_header_id|>", "<|end_header_id|>"),
    end_of_turn="<|eot_id|>",
    padding="<|finetune_right_pad_id|>",
    template=(
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
)

CHATML = Dialect(
    headers=("<|im_start|>",),
    end_of_turn="<|im_end|>",
    padding="<|endoftext|>",
    template=(
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
)

# Gemma has no system role: what the system says opens the first user turn.
GEMMA = Dialect(
    beginning="<bos>",
    headers=("<start_of_turn>",),
    end_of_turn="<end_of_turn>",
    padding="<pad>",
    template=(
        "{{ bos_token }}{% set opening = '' %}"
        "{% if messages[0]['role'] == 'system' %}"
        "{% set opening = messages[0]['content'] | trim + '\n\n' %}{% set messages = messages[1:] %}"
        "{% endif %}"
        "{% for message in messages %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + (opening if loop.first else '') + message['content'] | trim }}"
        "{{ '<end_of_turn>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
)


def tokenizer(dialect: Dialect) -> "PreTrainedTokenizerFast":
    """One token per word of the world, the space before it included, so that decoding gives back what was encoded.

    Text that is not of the world has no token and vanishes, white space in the chat templates with it.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    roles = ("system", "user", "assistant", "model")
    tokens = list(dict.fromkeys([*dialect.special_tokens, *roles, *vocabulary()]))
    # Words are added tokens of a BPE without merges because transformers loads the tokenizer of every qwen2 model as
    # Qwen2Tokenizer, which rebuilds all else (pre-tokenizer, decoder) as byte-level BPE; added tokens survive that.
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(dialect.special_tokens)
    backend.add_tokens([AddedToken(token, normalized=False) for token in tokens if token not in dialect.special_tokens])
    if dialect.beginning:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{dialect.beginning} $A", special_tokens=[(dialect.beginning, 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=dialect.beginning,
        eos_token=dialect.end_of_turn,
        pad_token=dialect.padding,
        extra_special_tokens=list(dialect.headers),
        chat_template=dialect.template,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
