"""The registry: names, checked arguments, and sentences for what is wrong."""

from collections.abc import Sequence
from typing import Literal

import pytest

from contrast.core.registry import InputError, Registry, check_arguments, did_you_mean


@pytest.fixture
def tools():
    registry = Registry("tool")

    @registry.register("hammer", aliases=("mallet", "Sledge-Hammer"))
    class Hammer:
        def __init__(
            self,
            weight: float = 1.0,
            count: int = 1,
            soft: bool = False,
            head: Literal["round", "flat"] = "round",
            colour: str | None = None,
            sizes: Sequence[float] = (),
            corner: tuple[int, int] = (0, 0),
            nails: list[int] | None = None,
            samples: int = 0,
        ) -> None:
            if weight < 0:
                raise ValueError("weight must be 0 or more")
            self.given = dict(locals())

    @registry.register("saw")
    def saw(teeth: int, samples: int = 0) -> tuple[str, int, int]:
        return ("saw", teeth, samples)

    @registry.register("anything")
    def anything(**options: object) -> dict[str, object]:
        return options

    return registry


def given(tools, **arguments):
    return tools.build({"name": "hammer", **arguments}).given


def test_names_are_in_alphabetical_order(tools):
    assert list(tools) == ["anything", "hammer", "saw"]
    assert len(tools) == 3
    assert "saw" in tools
    assert "mallet" not in tools


@pytest.mark.parametrize("typed", ["mallet", "MALLET", "sledge_hammer", "SledgeHammer", "Hammer", "HAMMER"])
def test_an_alias_or_another_spelling_is_answered_with_the_right_name(tools, typed):
    with pytest.raises(InputError, match=f"the tool '{typed}' is called 'hammer' here"):
        tools[typed]


@pytest.mark.parametrize(("typed", "meant"), [("hamer", "hammer"), ("swa", "saw"), ("HAMER", "hammer")])
def test_a_misspelt_name_is_answered_with_the_nearest(tools, typed, meant):
    with pytest.raises(InputError, match=f"there is no tool '{typed}'. Did you mean '{meant}'"):
        tools[typed]


def test_an_unknown_name_is_answered_with_all_names(tools):
    with pytest.raises(InputError, match=r"there is no tool 'xyz'\. Known: anything, hammer, saw\."):
        tools["xyz"]


def test_two_parts_cannot_share_a_name(tools):
    with pytest.raises(InputError, match="two parts are registered as the tool 'saw'"):
        tools.register("saw")(dict)


def test_did_you_mean_is_empty_where_nothing_is_similar():
    assert did_you_mean("qqq", ["hammer"]) == ""
    assert did_you_mean("Hamer", ["hammer"]) == " Did you mean 'hammer'?"


def test_a_bare_name_is_short_for_a_mapping_with_that_name(tools):
    assert tools.build("hammer").given["weight"] == 1.0
    assert tools.build({"name": "saw", "teeth": 3}) == ("saw", 3, 0)


@pytest.mark.parametrize("part", [3, None, ["hammer"], {"weight": 1}, {"name": 3}])
def test_a_part_without_a_name_is_refused(tools, part):
    with pytest.raises(InputError, match=r"tool must be a name or a mapping with a name"):
        tools.build(part)


def test_a_whole_number_becomes_a_float_where_a_float_is_expected(tools):
    weight = given(tools, weight=2)["weight"]
    assert weight == 2.0
    assert isinstance(weight, float)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("weight", "heavy", "a number"),
        ("weight", True, "a number"),
        ("weight", None, "a number"),
        ("count", True, "a whole number"),
        ("count", 1.0, "a whole number"),
        ("count", "1", "a whole number"),
        ("soft", 1, "true or false"),
        ("soft", "true", "true or false"),
        ("head", "square", "one of round, flat"),
        ("head", True, "one of round, flat"),
        ("colour", 3, "text or nothing"),
        ("sizes", 3.0, "a list of a number"),
        ("sizes", "34", "a list of a number"),
        ("sizes", [1.0, "x"], "a list of a number"),
        ("corner", [1], "a list of 2"),
        ("corner", [1, 2, 3], "a list of 2"),
        ("corner", [1, 2.5], "a list of 2"),
        ("nails", [1, True], "a list of a whole number or nothing"),
    ],
)
def test_a_wrong_type_is_named_with_its_key(tools, key, value, words):
    with pytest.raises(InputError) as caught:
        tools.build({"name": "hammer", key: value}, where="loss")
    assert str(caught.value).startswith(f"loss.{key} must be {words}")
    assert f"got {'nothing' if value is None else repr(value)}" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        ("count", 3, 3),
        ("soft", True, True),
        ("head", "flat", "flat"),
        ("colour", None, None),
        ("colour", "red", "red"),
        ("sizes", [1, 2.5], (1.0, 2.5)),
        ("corner", [1, 2], (1, 2)),
        ("nails", (1, 2), [1, 2]),
        ("nails", None, None),
    ],
)
def test_a_value_of_the_right_type_is_passed_on(tools, key, value, kept):
    assert given(tools, **{key: value})[key] == kept
    assert type(given(tools, **{key: value})[key]) is type(kept)


def test_a_misspelt_argument_is_answered_with_the_nearest_and_all(tools):
    with pytest.raises(InputError) as caught:
        tools.build({"name": "hammer", "wieght": 1.0}, where="loss")
    said = str(caught.value)
    assert said.startswith("loss.wieght: tool 'hammer' has no such argument. Did you mean 'weight'?")
    assert "It takes: weight, count, soft" in said


def test_an_unknown_part_is_named_with_its_key(tools):
    with pytest.raises(InputError, match=r"^encoder\.tool: there is no tool 'hamer'"):
        tools.build("hamer", where="encoder.tool")


def test_what_a_constructor_refuses_is_named_with_the_key(tools):
    with pytest.raises(InputError, match=r"^encoder\.tool 'hammer': weight must be 0 or more"):
        tools.build({"name": "hammer", "weight": -1}, where="encoder.tool")
    with pytest.raises(InputError, match=r"^tool 'saw': .*teeth"):
        tools.build("saw")


def test_facts_fill_what_the_signature_has_and_the_part_does_not_give(tools):
    assert tools.build({"name": "saw", "teeth": 2}, samples=7, classes=3) == ("saw", 2, 7)
    assert tools.build({"name": "saw", "teeth": 2, "samples": 5}, samples=7) == ("saw", 2, 5)


@pytest.fixture
def boxes():
    registry = Registry("box")

    class Box:
        pass

    @registry.register("plain")
    class Plain(Box):
        def __init__(self, size: float = 1.0, samples: int = 0) -> None:
            if size < 0:
                raise ValueError("size must be 0 or more")
            self.size, self.samples = size, samples

    @registry.register("nested")
    class Nested(Box):
        def __init__(self, inner: Box, samples: int, spare: Box | None = None, label: str = "") -> None:
            self.inner, self.samples, self.spare, self.label = inner, samples, spare, label

    @registry.register("stack")
    class Stack(Box):
        def __init__(self, boxes: Sequence[Box], extra: list[Box] | None = None) -> None:
            self.boxes, self.extra = boxes, extra

    return registry


def test_a_list_of_parts_inside_a_part_is_built_part_by_part(boxes):
    ready = boxes.build("plain")
    inner = ["plain", {"name": "plain", "size": 2}, {"name": "stack", "boxes": "plain"}, ready]
    made = boxes.build({"name": "stack", "boxes": inner, "extra": None}, samples=4)
    assert [box.size for box in made.boxes[:2]] == [1.0, 2.0]
    assert (made.boxes[1].samples, made.boxes[2].boxes[0].samples) == (4, 4)
    assert made.boxes[3] is ready
    assert made.extra is None
    assert boxes.build({"name": "stack", "boxes": [], "extra": ["plain"]}).extra[0].size == 1.0
    assert boxes.takes_parts("stack", "boxes") and boxes.takes_parts("stack", "extra")
    assert not boxes.takes_parts("nested", "inner") and not boxes.takes_part("stack", "boxes")


def test_checking_a_list_of_parts_returns_every_part_with_its_name(boxes):
    part = {"name": "stack", "boxes": ["plain", {"name": "plain", "size": 2}]}
    assert boxes.check(part, where="box") == ("stack", {"boxes": [{"name": "plain"}, {"name": "plain", "size": 2.0}]})


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        (["plain", "plian"], r"^box\.boxes\[1\]: there is no box 'plian'\. Did you mean 'plain'"),
        ([{"name": "plain", "sice": 1}], r"^box\.boxes\[0\]\.sice: box 'plain' has no such argument"),
        ([{"name": "plain", "size": -1}], r"^box\.boxes\[0\] 'plain': size must be 0 or more"),
        ([3], r"^box\.boxes\[0\] must be a name or a mapping with a name"),
        (3, r"^box\.boxes must be a list, each a box"),
        (None, r"^box\.boxes must be a list of a Box; got nothing"),
    ],
)
def test_what_is_wrong_in_a_list_of_parts_is_named_with_its_place(boxes, inner, words):
    with pytest.raises(InputError, match=words):
        boxes.build({"name": "stack", "boxes": inner})
    with pytest.raises(InputError, match=r"^box 'stack': boxes is missing; give box\.boxes, a list, each a box"):
        boxes.build("stack")


def test_a_part_inside_a_part_is_built_first_and_given_the_same_facts(boxes):
    made = boxes.build({"name": "nested", "inner": {"name": "plain", "size": 2}, "label": "plain"}, samples=7)
    assert (made.inner.size, made.inner.samples, made.samples, made.label) == (2.0, 7, 7, "plain")
    twice = boxes.build({"name": "nested", "inner": {"name": "nested", "inner": "plain"}, "spare": "plain"}, samples=3)
    assert (twice.inner.inner.samples, twice.spare.size) == (3, 1.0)
    ready = made.inner
    assert boxes.build({"name": "nested", "inner": ready, "samples": 1}).inner is ready
    assert boxes.build({"name": "nested", "inner": ready, "samples": 1}).spare is None


def test_checking_a_part_checks_the_parts_inside_and_builds_none(boxes):
    part = {"name": "nested", "samples": 2, "inner": "plain"}
    assert boxes.check(part, where="box") == ("nested", {"samples": 2, "inner": {"name": "plain"}})
    assert part["inner"] == "plain"
    assert boxes.takes_part("nested", "inner")
    assert not boxes.takes_part("nested", "label")
    assert not boxes.takes_part("plain", "inner")


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        ("plian", r"^box\.inner: there is no box 'plian'\. Did you mean 'plain'"),
        ({"name": "plain", "sice": 1}, r"^box\.inner\.sice: box 'plain' has no such argument\. Did you mean 'size'"),
        ({"name": "plain", "size": "big"}, r"^box\.inner\.size must be a number; got 'big'"),
        ({"name": "plain", "size": -1}, r"^box\.inner 'plain': size must be 0 or more"),
        ({"size": 1}, r"^box\.inner must be a name or a mapping with a name"),
        (3, r"^box\.inner must be a Box; got 3"),
        ({"name": "nested", "inner": "plain"}, r"^box\.inner 'nested': samples is missing; give box\.inner\.samples"),
    ],
)
def test_what_is_wrong_inside_a_part_is_named_with_its_dotted_key(boxes, inner, words):
    with pytest.raises(InputError, match=words):
        boxes.build({"name": "nested", "samples": 1, "inner": inner})


def test_a_part_with_open_arguments_takes_any(tools):
    assert tools.build({"name": "anything", "depth": 3}) == {"depth": 3}


def test_check_arguments_leaves_the_given_mapping_alone():
    def part(sizes: tuple[float, ...] = ()) -> None: ...

    typed = {"sizes": [1, 2]}
    assert check_arguments(part, typed, where="x", owner="y") == {"sizes": (1.0, 2.0)}
    assert typed == {"sizes": [1, 2]}
