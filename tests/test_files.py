"""Small files: whole or not at all, and rows that survive a stop in the middle of a write."""

import pytest

from erv_min.base.errors import DataError
from erv_min.base.files import append_jsonl, atomic_write, read_json, read_jsonl, write_json, write_jsonl


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        atomic_write(tmp_path / "a.json", 3)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert read_json(tmp_path / "a.json") == {"x": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("cut", ['{"n": 2, "te', '{"n": 2}'])
def test_a_partial_last_line_of_a_log_is_left_out_and_then_replaced(tmp_path, cut):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, {"n": 1})
    path.write_text(path.read_text() + cut)
    assert read_jsonl(path, log=True) == [{"n": 1}]
    append_jsonl(path, {"n": 3})
    assert read_jsonl(path) == [{"n": 1}, {"n": 3}]


def test_a_cut_last_line_of_given_data_is_an_error(tmp_path):
    """A prediction, a training pair: what was cut is not dropped without a word. A whole one needs no newline."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n\n{"n": 2}')
    assert read_jsonl(path) == [{"n": 1}, {"n": 2}]
    path.write_text('{"n": 1}\n{"n": 2, "te')
    with pytest.raises(DataError, match="rows.jsonl, line 2: not a JSON object, or cut off"):
        read_jsonl(path)


def test_rows_are_written_whole_or_not_at_all(tmp_path):
    rows = [{"n": 1, "text": "快乐\nand \ud800 half a surrogate"}, {"n": 2}]
    write_jsonl(tmp_path / "new" / "rows.jsonl", (row for row in rows))
    assert read_jsonl(tmp_path / "new" / "rows.jsonl") == rows
    assert "快乐" in (tmp_path / "new" / "rows.jsonl").read_text() and len(list((tmp_path / "new").iterdir())) == 1
    with pytest.raises(TypeError):
        write_jsonl(tmp_path / "new" / "rows.jsonl", [{"n": 3}, object()])
    assert read_jsonl(tmp_path / "new" / "rows.jsonl") == rows


def test_errors_name_file_and_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"n": 1}\nnot json\n{"n": 2}\n')
    with pytest.raises(DataError, match=r"bad.jsonl, line 2"):
        read_jsonl(tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"n": 1}\n[2]\n')
    with pytest.raises(DataError, match="bad.jsonl, line 2: not a JSON object.*found a list"):
        read_jsonl(tmp_path / "bad.jsonl")
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="bad.json"):
        read_json(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("9" * 5000)  # more digits than Python turns into an integer
    with pytest.raises(DataError, match="bad.json: not a JSON file"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(DataError, match="no such file"):
        read_json(tmp_path / "none.json")
