"""What a tokenizer's chat template renders around a message and its answer."""

from __future__ import annotations

import re
from typing import Any

from remora.errors import ModelError

MESSAGE_MARK = "REMORAMESSAGEMARK"
ANSWER_MARK = "REMORAANSWERMARK"


def control_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Return a pattern of the texts that the tokenizer reads as control tokens."""
    special = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    longest_first = sorted((t for t in special if len(t) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def ask(tokenizer: Any, content: str) -> tuple[str, str]:
    """Return the text before and after the message in a prompt without its answer."""
    if not tokenizer.chat_template:
        text = f"{tokenizer.bos_token or ''}{content}\n"
    else:
        text = _render(tokenizer, [{"role": "user", "content": content}], generate=True)
    if text.count(MESSAGE_MARK) != 1:
        raise ModelError(
            f"the chat template shows the message {text.count(MESSAGE_MARK)} times, not once; "
            "use another model or template"
        )
    head, _, tail = text.partition(MESSAGE_MARK)
    return head, tail


def answer(tokenizer: Any, content: str) -> tuple[str, str]:
    """Return the text between message and label in a whole conversation, and its end token."""
    if tokenizer.eos_token is None:
        raise ModelError("the tokenizer has no end-of-text token; set its eos_token")
    if not tokenizer.chat_template:
        return "\n", tokenizer.eos_token
    conversation = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": ANSWER_MARK},
    ]
    text = _render(tokenizer, conversation, generate=False)
    _, _, rest = text.partition(MESSAGE_MARK)
    opening, mark, rest = rest.partition(ANSWER_MARK)
    if not mark:
        raise ModelError(
            "the chat template leaves out the assistant's answer; use another model or template"
        )
    added = [token for token in tokenizer.added_tokens_decoder.values() if str(token) in rest]
    added = [token for token in added if token.special] or added
    ends = [rest.index(str(token)) + len(str(token)) for token in added]
    return opening, rest[: min(ends)] if ends else tokenizer.eos_token


def _render(tokenizer: Any, conversation: list[dict[str, str]], *, generate: bool) -> str:
    """Render a conversation, with thinking switched off."""
    try:
        text: str = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=generate, enable_thinking=False
        )
    except Exception as error:  # a template is a program and may raise anything
        raise ModelError(
            f"the tokenizer's chat template fails ({error}); use another model or template"
        ) from error
    return text
