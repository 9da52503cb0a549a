"""The journal: its points and lines that were torn."""

import json

import pytest

from rotssl.runs import journal
from rotssl.runs.journal import Journal


def test_a_journal_keeps_the_first_point_of_an_epoch(tmp_path):
    book = Journal(tmp_path / "run")
    book.append(1, {"loss/total": 1.5})
    book.append(2, {"loss/total": 1.25})
    book.append(2, {"loss/total": 9.0})
    again = Journal(tmp_path / "run")
    again.append(1, {"loss/total": 9.0})
    expected = {1: {"loss/total": 1.5}, 2: {"loss/total": 1.25}}
    assert journal.read(tmp_path / "run") == expected
    assert [book.point(epoch) for epoch in (1, 2, 3)] == [again.point(epoch) for epoch in (1, 2, 3)]
    assert [again.point(epoch) for epoch in (1, 2, 3)] == [expected[1], expected[2], None]
    assert len(book.path.read_text().splitlines()) == 2


def test_a_point_does_not_change_with_the_dict_it_came_in(tmp_path):
    book, metrics = Journal(tmp_path), {"loss/total": 1.5}
    book.append(1, metrics)
    metrics["loss/total"] = 9.0
    assert book.point(1) == {"loss/total": 1.5}


@pytest.mark.parametrize("keep", [1, 10, -2, -1], ids=["a byte", "some", "no brace", "no newline"])
def test_a_journal_survives_a_torn_last_line(tmp_path, keep):
    book = Journal(tmp_path)
    for epoch in (1, 2):
        book.append(epoch, {"loss/total": 1.0 / epoch})
    first, second = book.path.read_bytes().splitlines(keepends=True)
    book.path.write_bytes(first + second[:keep])
    survivors = {1, 2} if keep == -1 else {1}  # only the end of the line was lost, not the point
    assert set(journal.read(tmp_path)) == survivors
    again = Journal(tmp_path)
    again.append(2, {"loss/total": 0.5})
    again.append(3, {"loss/total": 0.25})
    assert journal.read(tmp_path) == {epoch: {"loss/total": value} for epoch, value in ((1, 1.0), (2, 0.5), (3, 0.25))}


def test_a_journal_that_is_not_there_is_empty_and_odd_lines_are_passed_over(tmp_path):
    assert journal.read(tmp_path / "none") == {}
    lines = ["", "5", "null", "[1]", '{"loss": 1}', "\0\0"]
    lines += [f'{{"epoch": {epoch}, "loss": 1}}' for epoch in ("null", '"3"', 3.5, 0, "true")]
    lines += [f'{{"epoch": 3, "loss": {loss}}}' for loss in ("null", "[]", '"1"', "true", 10**400)]
    lines += [json.dumps({"epoch": 3, "loss": loss}) for loss in (2.0, 9.0)]  # the first one counts
    (tmp_path / Journal.NAME).write_text("\n".join(lines))
    assert journal.read(tmp_path) == {3: {"loss": 2.0}}
