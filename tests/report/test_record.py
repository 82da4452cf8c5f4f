from contrast.report.record import RunRecord, dotted_texts, format_time, without_items


def test_the_last_value_of_a_step_counts_and_steps_ascend():
    metrics = [{"step": 5, "loss": 3.0}, {"step": 1, "loss": 9.0}, {"step": 5, "loss": 2.0}, {"step": 7, "loss": True}]
    step, loss = RunRecord("a", metrics=metrics).series("loss")
    assert step.tolist() == [1, 5]
    assert loss.tolist() == [9.0, 2.0]


def test_a_heartbeat_is_a_date():
    assert format_time(0) == "1970-01-01 00:00 UTC"
    assert format_time("noon") == "noon"
    assert format_time(None) == ""


def test_nested_settings_become_dotted_and_only_none_is_left_out():
    assert list(dotted_texts({"a": {"b": [1, 2], "c": None}, "d": False})) == [("a.b", "1, 2"), ("d", "False")]


def test_without_items_no_row_of_an_item_and_no_name_is_left():
    findings = {
        "flagged": [{"sample": 3, "name": "c.png"}],
        "both": [{"sample": 4, "epoch": 1}, {"epoch": 1, "share": 0.5}],
        "clusters": [{"cluster": 1, "name": "d.png"}],
    }
    assert without_items(findings) == {"both": [{"epoch": 1, "share": 0.5}], "clusters": [{"cluster": 1}]}
