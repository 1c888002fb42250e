"""Rows that are chats: the columns that hold them, their messages, and the text that a chat template makes of them."""

import datasets
from transformers import PreTrainedTokenizerBase

from ..errors import UsageError, is_no_fault_of_input, reason

# The columns that hold chats, in the order in which they are looked for.
CHAT_COLUMNS = ("messages", "conversations")
# What the parts of a message are called: where they follow the chat templates, and in files made as ShareGPT's were.
PARTS = (("role", "content"), ("from", "value"))
# What ShareGPT calls the roles that chat templates know by other names.
ROLES = {"human": "user", "gpt": "assistant"}
# Put in front of templates, some of which say the date (LLaMA 3's, SmolLM3's): the same chat would be another text
# every day. This one is what LLaMA 3 itself takes where it is told none. The plus keeps a line break that may follow.
ON_ONE_DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro +%}"


class RefusedChat(ValueError):
    """The chat template has no place for a chat: two messages of one role in a row, say, or a role it does not know."""


def chat_column(table: datasets.Dataset) -> str | None:
    """The column of `table` that holds chats, if there is one: lists of messages, of which each has its role."""
    for name in CHAT_COLUMNS:
        kind = table.features.get(name)
        of_message = getattr(kind, "feature", None)
        # Where messages differ in what they have beside the two parts, datasets keeps them as JSON.
        is_json = isinstance(of_message, datasets.Json)
        if is_json or (isinstance(of_message, dict) and any({*parts} <= of_message.keys() for parts in PARTS)):
            return name
    return None


def messages_of(value: list[dict] | None, place: str) -> list[dict[str, str]]:
    """The messages of a chat as templates want them, each with its `role` and `content` and nothing else.

    Raises:
        UsageError: one of them has no role, or a content that is no text; `place` says in which row.
    """
    found = []
    for message in value or ():
        if not isinstance(message, dict):
            raise UsageError(f"{place} has a {type(message).__name__} for a message: make it a role and a content")
        keys = next((parts for parts in PARTS if isinstance(message.get(parts[0]), str)), None)
        if keys is None:
            raise UsageError(f"{place} has a message without a role: give it role and content, or from and value")
        role, content = message[keys[0]], message.get(keys[1])
        if not isinstance(content, str | None):
            raise UsageError(
                f"{place} has a message whose {keys[1]} is a {type(content).__name__}: make it one string or leave out "
                "the row"
            )
        found.append({"role": ROLES.get(role, role), "content": content or ""})
    return found


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template by which a tokenizer writes chats, or None where it has none."""
    try:
        return tokenizer.get_chat_template()
    except ValueError:  # there is none, or there are several and none of them is the default
        return None


def dated_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template of a tokenizer that has one, for which it is always the same day."""
    return ON_ONE_DAY + tokenizer.get_chat_template()


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """A chat as the tokenizer's template writes it, special tokens included.

    Raises:
        RefusedChat: the template refuses it.
    """
    try:
        return tokenizer.apply_chat_template(messages, chat_template=dated_template(tokenizer), tokenize=False)
    except Exception as error:  # what a template raises, or what befalls it where it counts on more than is there
        if is_no_fault_of_input(error):
            raise
        raise RefusedChat(reason(error)) from error
