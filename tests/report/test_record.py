from contrast.report.record import flat, moment, read_run


def test_the_latest_value_of_a_step_counts_and_steps_ascend(tmp_path):
    lines = ['{"step": 5, "loss": 3.0}', '{"step": 1, "loss": 9.0}', '{"step": 5, "loss": 2.0}', '{"step": 6, "lo']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    step, loss = read_run(tmp_path).series("loss")
    assert step.tolist() == [1, 5]
    assert loss.tolist() == [9.0, 2.0]


def test_a_heartbeat_is_a_date():
    assert moment(0) == "1970-01-01 00:00 UTC"
    assert moment("noon") == "noon"
    assert moment(None) == ""


def test_nested_settings_become_dotted_and_nothing_is_left_out_but_none():
    assert list(flat({"a": {"b": [1, 2], "c": None}, "d": False})) == [("a.b", "1, 2"), ("d", "False")]
