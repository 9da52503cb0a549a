"""Tables in a terminal."""

from rotssl.reports import tables, terminal


def test_names_and_remarks_are_broken_rather_than_numbers(capsys):
    numbers = ["2.57x\n(2.25 to 2.95)"] * 5
    remark = "no complete run with rotation.weight=0 agrees in optim.lr, so there is no gain to be stated"
    table = tables.Table("title", "", list("abcdefg"), [["rotation weight 0.3, mode in_place, " * 3, remark, *numbers]])
    terminal.show(terminal.rich_table(table))
    printed = capsys.readouterr().out
    assert printed.count("(2.25 to 2.95)") == 5 and "stated" in printed
    assert max(map(len, printed.splitlines())) <= 110


def test_names_stay_legible_where_words_take_the_room(capsys):
    words = ["both by their first\nmeasured epoch\n≤1.0 vs ≤1.0"] * 3
    table = tables.Table(
        "title", "", list("abcdefg"), [["rotation weight 1", "100.0%", "(95% interval)" * 2, "1", *words]]
    )
    terminal.show(terminal.rich_table(table))
    printed = capsys.readouterr().out
    assert "rotation" in printed and printed.count("≤1.0 vs ≤1.0") == 3
    assert max(map(len, printed.splitlines())) <= 110
