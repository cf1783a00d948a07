from pathlib import Path

import numpy as np
import pytest

from pdlaunch.vllm.statements import KEPT_S, Statement, StatementBoard, token_hash

STATEMENT = Statement(
    token_hash=token_hash([1, 2, 3]),
    block_ids=(7, 9),
    first_head=2,
    algorithm="blake3",
    checksums=np.array([[1, 2**64 - 1], [3, 4]], dtype=np.uint64),
)


class Clock:
    now_at = 100.0

    def __call__(self) -> float:
        return self.now_at


def same(found: Statement | None, other: Statement) -> bool:
    return found is not None and found.encode() == other.encode()


def test_what_is_stated_is_found_by_engine_rank_and_request(tmp_path: Path) -> None:
    board, reader = StatementBoard(tmp_path), StatementBoard(tmp_path)
    board.state("engine", 1, "../request", STATEMENT)
    assert same(reader.find("engine", 1, "../request"), STATEMENT)
    for other in (("engine", 0, "../request"), ("other", 1, "../request"), ("engine", 1, "x")):
        assert reader.find(*other) is None
    assert [path.parent for path in tmp_path.iterdir()] == [tmp_path]


def test_statements_outlive_their_lease_for_a_while(tmp_path: Path) -> None:
    clock = Clock()
    board = StatementBoard(tmp_path, clock)
    board.state("engine", 0, "request", STATEMENT)
    for leased, seconds, is_there in (
        ({"request"}, 10 * KEPT_S, True),
        (set(), KEPT_S - 2, True),
        (set(), KEPT_S - 2, True),
        (set(), 4, False),
    ):
        board.sweep(leased)
        clock.now_at += seconds
        board.sweep(leased)
        assert (board.find("engine", 0, "request") is not None) == is_there


def test_what_is_withdrawn_and_what_a_writer_leaves_is_gone_for_readers(tmp_path: Path) -> None:
    board, other = StatementBoard(tmp_path), StatementBoard(tmp_path)
    for name in ("request", "withdrawn"):
        board.state("engine", 0, name, STATEMENT)
    other.state("other", 0, "request", STATEMENT)
    for _ in range(2):
        board.withdraw("withdrawn")
    assert other.find("engine", 0, "withdrawn") is None
    assert other.find("engine", 0, "request") is not None
    board.close()
    assert other.find("engine", 0, "request") is None
    assert other.find("other", 0, "request") is not None


@pytest.mark.parametrize("cut", [0, 10, -1, -8])
def test_half_a_statement_is_none(tmp_path: Path, cut: int) -> None:
    board = StatementBoard(tmp_path)
    board.state("engine", 0, "request", STATEMENT)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:cut])
    assert board.find("engine", 0, "request") is None


def test_token_hashes_depend_on_every_token_their_number_and_the_context() -> None:
    prompts = [[1, 2], [2, 1], [1, 2, 0], [1], [], [2**31, 5]]
    hashes = [token_hash(prompt, context) for prompt in prompts for context in ((), ("lora",))]
    assert len(set(hashes)) == 2 * len(prompts)
