"""What tables say beside their numbers."""

from rotssl.reports import tables
from tests.reports.made_up import compare, seeds


def test_device_time_is_said_to_depend_on_what_else_runs():
    captions = {table.title: table.caption for table in tables.tables_of(compare(seeds()))}
    assert "slow each other down" in captions["Accuracy at equal device time"]
    assert "slow each other down" not in captions["Accuracy at equal FLOPs"]
