from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from emeval.reply_cache import Reply, ReplyCache

REPLY = Reply("first", 1, 2)


def put_many(path: Path, writer: int) -> None:
    cache = ReplyCache(path)
    for number in range(50):
        cache.put(f"{number}", Reply(f"by {writer}", writer, number))
        cache.put(f"{writer}/{number}", Reply("mine", 0, 0))


def test_processes_that_write_at_once_lose_nothing_and_agree(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        list(pool.map(put_many, [path] * 4, range(4)))
    cache = ReplyCache(path)
    own = [f"{writer}/{number}" for writer in range(4) for number in range(50)]
    assert cache.get(own) == dict.fromkeys(own, Reply("mine", 0, 0))
    shared = cache.get([str(number) for number in range(50)])
    assert all(reply.text == f"by {reply.prompt_tokens}" for reply in shared.values())
    assert len(shared) == 50


def test_a_reply_once_written_is_not_changed(tmp_path: Path) -> None:
    cache = ReplyCache(tmp_path / "replies.sqlite")
    cache.put("key", Reply("first", 1, 2))
    cache.put("key", Reply("second", 3, 4))
    assert cache.get(["key", "other"]) == {"key": Reply("first", 1, 2)}


def test_more_keys_than_one_query_takes_are_found(tmp_path: Path) -> None:
    cache = ReplyCache(tmp_path / "replies.sqlite")
    cache.put("1999", Reply("there", 0, 0))
    assert list(cache.get([str(number) for number in range(2000)])) == ["1999"]


def test_a_file_that_is_no_database_is_named_with_what_to_do(tmp_path: Path) -> None:
    junk = tmp_path / "replies.sqlite"
    junk.write_bytes(b"this is no database" * 100)
    for path in (junk, tmp_path):
        for use in (lambda path=path: ReplyCache(path).get([]), lambda path=path: ReplyCache(path).put("key", REPLY)):
            with pytest.raises(ValueError, match=r"can't be read or written .* delete it") as raised:
                use()
            assert str(raised.value).startswith(f"{path}: ")
