"""Calibration sets of chats, which go through the tokenizer's template."""

import logging

import datasets
import pytest
from conftest import make_tokenizer, write_json
from tiny_texts import cached, draw_by_hand, prose

from olica.errors import UsageError

pytestmark = pytest.mark.usefixtures("own_cache")
TEMPLATE = (
    "{% for message in messages %}{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no such role: ' + message.role) }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}\n{% endfor %}"
)
NAMES = {"user": "human", "assistant": "gpt", "system": "system"}


def chats(count=12):
    """Chats of two or three messages, in text of 20 bytes or more."""
    talks = [[("user", f"What is {number}?"), ("assistant", "x" * number)] for number in range(count)]
    return [[("system", "Be brief.")] * (number % 2) + talk for number, talk in enumerate(talks)]


def in_messages(talk):
    return {"messages": [{"role": role, "content": content} for role, content in talk]}


def in_conversations(talk):
    return {"conversations": [{"from": NAMES[role], "value": content} for role, content in talk], "id": "1"}


def by_template(talk):
    return "".join(f"[{role}] {content}\n" for role, content in talk)


@pytest.fixture
def chatting(tokenizer):
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("form", [in_messages, in_conversations])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_chats_go_through_the_template_and_keep_their_beginning(tmp_path, build, chatting, form, kind):
    rows, path = [form(talk) for talk in chats()], tmp_path / f"chats.{kind}"
    if kind == "jsonl":
        write_json(path, rows)
    else:
        table = datasets.Dataset.from_list(rows)
        table.to_parquet(path) if kind == "parquet" else table.save_to_disk(path)
    drawn = build(path)
    expected, tried = draw_by_hand([by_template(talk) for talk in chats()], True, 8, 20, 3)
    assert [chatting.decode(window) for window in drawn.ids.tolist()] == expected
    assert drawn.sources[0]["tried"] == tried


def test_a_row_without_messages_is_what_else_it_is(tmp_path, build, chatting):
    rows = [in_messages(chats()[5]) | {"text": "unread"}, {"messages": [], "text": "t" * 50}, {"text": "u" * 50}]
    rows += [{"instruction": "Add.", "output": "2"}]
    drawn = build(write_json(tmp_path / "a.jsonl", rows), num_samples=4)
    texts = {chatting.decode(window)[:10] for window in drawn.ids.tolist()}
    assert texts == {by_template(chats()[5])[:10], "t" * 10, "u" * 10, "Below is a"}


def test_messages_that_differ_in_their_parts(tmp_path, build, chatting):
    talk = in_messages(chats()[4])
    named = {"messages": [message | {"name": "x", "weight": 1} for message in talk["messages"]]}
    silent = {"messages": [*talk["messages"], {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]}
    drawn = build(write_json(tmp_path / "a.jsonl", [talk, named, silent]), num_samples=3)
    assert {chatting.decode(window) for window in drawn.ids.tolist()} == {by_template(chats()[4])[:20]}


def test_chats_beside_a_column_that_changes_its_kind(tmp_path, build, chatting):
    lines = [in_messages(talk) | {"score": 1} for talk in chats()] * 2000
    path = write_json(tmp_path / "a.jsonl", [*lines, in_messages(chats()[4]) | {"score": "high"}])
    drawn = build(path)
    expected, _ = draw_by_hand([by_template(talk) for talk in chats()] * 2000, True, 8, 20, 3)
    assert [chatting.decode(window) for window in drawn.ids.tolist()] == expected


@pytest.mark.parametrize("add_bos_token", [False, True])
def test_the_start_token_is_there_once(tmp_path, build, bos_tokenizer, add_bos_token):
    path = write_json(tmp_path / "a.jsonl", [in_messages(chats()[9])])
    expected = [bos_tokenizer.bos_token_id, *make_tokenizer()(by_template(chats()[9]))["input_ids"]]
    bos_tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    drawn = build(path, tokenizer=bos_tokenizer, num_samples=1, add_bos_token=add_bos_token)
    assert drawn.ids.tolist() == [expected[:20]]
    bos_tokenizer.chat_template = TEMPLATE  # what the template leaves out, the flag alone puts there
    drawn = build(path, tokenizer=bos_tokenizer, num_samples=1, add_bos_token=add_bos_token)
    assert drawn.ids.tolist() == [expected[:20] if add_bos_token else expected[1:21]]


def test_chats_of_a_template_that_says_the_date_are_the_same_every_day(tmp_path, build, chatting):
    chatting.chat_template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    drawn = build(write_json(tmp_path / "a.jsonl", [in_messages(chats()[9])]), num_samples=1)
    assert chatting.decode(drawn.ids[0]) == "26 Jul 2024Be brief."


def test_the_template_decides_the_draw_of_chats_alone(tmp_path, build, chatting, tokenise_no_more):
    prose_path, chats_path = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_json(prose_path, prose())
    write_json(chats_path, [in_messages(talk) for talk in chats()])
    build(prose_path), build(chats_path)
    chatting.chat_template = TEMPLATE.replace("[", "<")
    assert chatting.decode(build(chats_path).ids[0]).startswith("<")
    assert len(cached(tmp_path)) == 3
    tokenise_no_more()
    build(prose_path)


def test_chats_without_a_template(tmp_path, build, tokenizer):
    path = write_json(tmp_path / "a.jsonl", [in_messages(chats()[9])])
    with pytest.raises(UsageError, match="has no chat template: put its chat_template.jinja beside it") as caught:
        build(path)
    assert str(caught.value).startswith(f"{path} holds chats (column messages)") and "\n" not in str(caught.value)
    tokenizer.chat_template = {"rag": TEMPLATE, "tool_use": TEMPLATE}  # and none that is the default
    with pytest.raises(UsageError, match="has no chat template"):
        build(path)


def test_chats_that_the_template_refuses_are_left_out(tmp_path, build, chatting, caplog):
    odd = in_messages([("user", "What?" * 9), ("critic", "No." * 9)])
    path = write_json(tmp_path / "a.jsonl", [odd, odd, *(in_messages(talk) for talk in chats())])
    with caplog.at_level(logging.WARNING, logger="olica.sources.calibration_set"):
        drawn = build(path, num_samples=12)
    assert drawn.sources[0]["tried"] == 14
    assert f"{path}: left out 2 chats that the tokenizer's chat template refuses" in caplog.text
    assert "(the first: no such role: critic)" in caplog.text
    with pytest.raises(
        UsageError, match="12 of 14 tried .*among the others are 2 chats .*no such role: critic"
    ) as caught:
        build(path, num_samples=13)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "content": [{"type": "text"}]}, "a message whose content is a list: make it one string"),
        ({"role": None, "content": "x" * 30}, "a message without a role: give it role and content, or from and value"),
        ("x" * 30, "a str for a message"),
    ],
)
def test_messages_that_are_none(tmp_path, build, chatting, message, words):
    path = write_json(tmp_path / "a.jsonl", [{"messages": [message, {"role": "user", "content": "x", "name": "y"}]}])
    with pytest.raises(UsageError, match=words) as caught:
        build(path, num_samples=1)
    assert str(caught.value).startswith(f"{path}: row 1 has") and "\n" not in str(caught.value)
