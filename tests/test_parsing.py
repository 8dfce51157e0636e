"""Reading answers: every way in which a Qwen-VL model writes boxes, and what is said of the rest."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.conversation import format_answer
from helpers.parsing import parse_answer

T = "nutrition-table"
TOKENS = "<|object_ref_start|>nutrition-table<|object_ref_end|><|box_start|>(14,57),(991,603)<|box_end|>"


@pytest.mark.parametrize(
    ("answer", "objects"),
    [
        (TOKENS + "<|im_end|>", [(T, [14, 57, 991, 603])]),
        (TOKENS, [(T, [14, 57, 991, 603])]),
        ("nutrition-table(14,57),(991,603)", [(T, [14, 57, 991, 603])]),  # special tokens skipped
        ("nutrition-table<box>(265,492),(735,842)>", [(T, [265, 492, 735, 842])]),
        ("nutrition-table<|box_start|>(265,492),(735,842)", [(T, [265, 492, 735, 842])]),  # cut after the box
        ("nutrition-table ( 14 , 57.5 ) , (991, 603)", [(T, [14, 57.5, 991, 603])]),
        ("table(991,603),(14,57)", [("table", [14, 57, 991, 603])]),  # corners swapped
        ("table(-20,57),(1400,603)", [("table", [-20, 57, 1400, 603])]),  # the converter clamps
        ("a(1,2),(3,4)b(5,6),(7,8)", [("a", [1, 2, 3, 4]), ("b", [5, 6, 7, 8])]),
        ("a(1,2),(3,4),(5,6),(7,8)", [("a", [1, 2, 3, 4]), ("a", [5, 6, 7, 8])]),  # one label, two boxes
        ("a at (1,2),(3,4) and (5,6),(7,8)", [("a at", [1, 2, 3, 4]), ("a at", [5, 6, 7, 8])]),
        ("I see a " + TOKENS + ", and that is all.", [(T, [14, 57, 991, 603])]),  # text around
        (
            "- nutrition-table: [14, 57, 991, 603]\n- logo: [1, 2, 3, 4]",
            [(T, [14, 57, 991, 603]), ("logo", [1, 2, 3, 4])],
        ),
        ("[[14, 57], [991, 603]]", [("", [14, 57, 991, 603])]),
        (
            '```json\n[\n\t{"bbox_2d": [14, 57, 991, 603], "label": "nutrition-table"}\n]\n```',
            [(T, [14, 57, 991, 603])],
        ),
        ('{"label": "a", "bbox_2d": [1, 2.5, 3, 4]}', [("a", [1, 2.5, 3, 4])]),
        (r'{"label": "4\" foil \\ \u00e9", "bbox_2d": [1, 2, 3, 4]}', [('4" foil \\ é', [1, 2, 3, 4])]),
        ("{'label': 'a', 'bbox_2d': [1, 2, 3, 4]}", [("a", [1, 2, 3, 4])]),
        ('[{"bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8]], "label": "a"}]', [("a", [1, 2, 3, 4]), ("a", [5, 6, 7, 8])]),
        ('{"tables": [{"bbox_2d": [1, 2, 3, 4], "label": "a"}]}', [("a", [1, 2, 3, 4])]),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "nutri', [("", [1, 2, 3, 4])]),  # the box was whole when it was cut off
    ],
)
def test_readable(answer, objects):
    parsed = parse_answer(answer)
    assert parsed.objects == objects
    assert parsed.unread == []


@pytest.mark.parametrize(
    ("answer", "objects", "unread"),
    [
        ("a(1,2),(3", [], ["(1,2),(3"]),
        ("a(1,2),(3,4", [], ["(1,2),(3,4"]),  # the last number may have had more digits
        ("(12,4),(", [], ["(12,4),("]),
        ("<|box_start|>(12,4", [], ["<|box_start|>(12,4"]),
        ("nutrition-table(12<|im_end|>", [], ["(12"]),
        ("nutrition-table(", [], ["("]),
        ("<|object_ref_start|>nutri", [], ["<|object_ref_start|>nutri"]),
        ("a<|box_start|>somewhere<|box_end|>", [], ["<|box_start|>somewhere"]),
        ("a<box>12,4,50,60</box>", [], ["<box>12,4,50,60"]),
        ("a(5,5),(5,9)", [], ["(5,5),(5,9)"]),  # no area
        ("a(" + "9" * 400 + ",1),(2,3)", [], ["(" + "9" * 400 + ",1),(2,3)"]),  # more than a float holds
        ("a(1,2),(3,4),(5,6)", [("a", [1, 2, 3, 4])], ["(5,6)"]),
        ("a(1,2),(3, b(5,6),(7,8)", [("b", [5, 6, 7, 8])], ["(1,2),(3,"]),
        ("a(1,2),(3,(5,6),(7,8)", [("a", [5, 6, 7, 8])], ["(1,2),(3,"]),
        ('[{"label": "a", "bbox_2d": [1, 2, 3]}]', [], ['{"label": "a", "bbox_2d": [1, 2, 3]}']),
        ('[{"label": "a"}]', [], ['{"label": "a"}']),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbo', [("a", [1, 2, 3, 4])], ['{"bbo']),
        ('[{"bbox_2d": [3, 2, 3, 4], "label": "a"}]', [], ['{"bbox_2d": [3, 2, 3, 4], "label": "a"}']),
    ],
)
def test_attempts_are_named(answer, objects, unread):
    parsed = parse_answer(answer)
    assert (parsed.objects, parsed.unread) == (objects, unread)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "There is no nutrition table.",
        "None (100 g, 2 pieces)",
        "[]",
        "```json\n[]\n```",
        '{"objects": []}',
        "<|im_end|>",
    ],
)
def test_nothing_to_find_is_not_malformed(answer):
    parsed = parse_answer(answer)
    assert (parsed.objects, parsed.unread) == ([], [])


sides = st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True).map(sorted)
grid_boxes = st.tuples(sides, sides).map(lambda pair: [pair[0][0], pair[1][0], pair[0][1], pair[1][1]])
letter, inner = st.sampled_from("abcäü栄"), st.text("abcäü栄 -_", max_size=10)
labels = st.builds(lambda first, middle, last: first + middle + last, letter, inner, letter)
scenes = st.lists(st.tuples(labels, grid_boxes), max_size=5)


def from_top_left(objects):
    return sorted(objects, key=lambda pair: (pair[1][1], pair[1][0]))


@given(scenes)
def test_what_was_written_is_read(objects):
    parsed = parse_answer(format_answer(*zip(*objects, strict=True)) if objects else format_answer([], []))
    assert parsed.objects == from_top_left(objects)
    assert parsed.unread == []


@given(scenes)
def test_what_was_written_is_read_without_special_tokens(objects):
    text = re.sub(r"<\|\w+\|>", "", format_answer(*zip(*objects, strict=True)) if objects else "")
    parsed = parse_answer(text)
    boxes = [box for _, box in from_top_left(objects)]
    assert [box for _, box in parsed.objects] == boxes
    assert parsed.unread == []


@given(scenes.filter(len), st.data())
def test_cut_answer_holds_no_wrong_box(objects, data):
    text = format_answer(*zip(*objects, strict=True))
    cut = text[: data.draw(st.integers(0, len(text)))]
    whole = from_top_left(objects)
    read = parse_answer(cut).objects
    assert read == whole[: len(read)]


@given(st.text() | st.text('<|>box_startend(),[]{}"label: 0123456789.-\n', max_size=60))
def test_arbitrary_text_never_raises(text):
    parsed = parse_answer(text)
    assert all(x1 < x2 and y1 < y2 for _, (x1, y1, x2, y2) in parsed.objects)
