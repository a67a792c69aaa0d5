"""How many tokens rows have, by the model's own files and without transformers, which takes seconds to import.

Counts are those of ``emtrain.tokens.encode``; the chat template is rendered as transformers does it.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from emtrain.rows import Row


def count_tokens(rows: Sequence[Row], model_files: Path, max_length: int) -> list[int] | None:
    """Tokens of each row, cut at ``max_length``; None where the files hold no usable tokenizer or template."""
    from jinja2 import TemplateError

    try:
        template, settings = _template(model_files)
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(model_files / "tokenizer.json"))
        tokenizer.no_truncation()
        texts = [template.render(messages=row.chat, add_generation_prompt=False, **settings) for row in rows]
    except (OSError, LookupError, ValueError, TypeError, TemplateError):
        return None
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [min(len(encoding.ids), max_length) for encoding in encodings]


def _template(model_files: Path) -> tuple[Any, dict[str, Any]]:
    """The chat template, and what it is rendered with beside the messages. Raises ``LookupError`` without one."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    config = json.loads((model_files / "tokenizer_config.json").read_text(encoding="utf-8"))
    apart = model_files / "chat_template.jinja"
    source = apart.read_text(encoding="utf-8") if apart.is_file() else config["chat_template"]

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    environment.filters["tojson"] = lambda value, **given: json.dumps(value, ensure_ascii=False, **given)
    tokens = {key: config.get(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    written = {key: token["content"] if isinstance(token, dict) else token for key, token in tokens.items()}
    given = {key: token for key, token in written.items() if token is not None}
    return environment.from_string(source), {**given, "enable_thinking": False}
