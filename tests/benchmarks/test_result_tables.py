"""Tables of measurements: begun once, added to, and never mixed up."""

import pytest


def test_rows_are_added_below_one_header(benchmark_script, tmp_path):
    tables = benchmark_script("result_tables")
    path = tmp_path / "new" / "table.csv"
    tables.append_rows(path, [{"a": 1, "b": "x, y"}])
    tables.append_rows(path, [{"a": 2, "b": "", "c": "no column"}, {"a": 3}], ["a", "b"])
    assert path.read_bytes() == b'a,b\r\n1,"x, y"\r\n2,\r\n3,\r\n'
    with pytest.raises(ValueError, match=r"table.csv has the columns \['a', 'b'\], not \['b', 'a'\]"):
        tables.append_rows(path, [{"b": 1, "a": 1}])
    tables.write_rows(path, [{"b": 1}])
    assert path.read_bytes() == b"b\r\n1\r\n"
    with pytest.raises(ValueError, match="not in fieldnames"):
        tables.write_rows(path, [{"a": 1}, {"a": 1, "b": 2}])


def test_hardware_names_the_processor(benchmark_script):
    assert benchmark_script("result_tables").hardware().endswith("cores")
