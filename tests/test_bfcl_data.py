"""BFCL's files: where they are found, what the model sees of them, and mistakes in them."""

import pytest
from bfcl_fixtures import function, make_case, typed, write_category

from tooln1.benchmarks import bfcl, bfcl_data
from tooln1.io.errors import UserError
from tooln1.prompt import build_messages

STRINGS = "type parameter in string representation."
ELEMENTS = "The list elements are of type {}; they are not in string representation."
ENTRIES = "The dictionary entries have the following schema; they are not in string representation."
NOTES = {  # category -> (language, [(declared parameter, what its description gains)])
    "simple_python": ("Python 3", []),
    "simple_java": (
        "Java 8 SDK",
        [
            (typed("any"), "This parameter can be of any type of Java object in string representation."),
            (typed("long"), f"This is Java long {STRINGS}"),
            (typed("ArrayList", "char"), f"This is Java ArrayList {STRINGS} {ELEMENTS.format('char')}"),
        ],
    ),
    "simple_javascript": (
        "JavaScript",
        [
            (typed("array", "float"), f"This is JavaScript array {STRINGS} {ELEMENTS.format('float')}"),
            (typed("dict") | {"properties": {"a": 1}}, f'This is JavaScript dict {STRINGS} {ENTRIES} {{"a": 1}}'),
        ],
    ),
}


@pytest.mark.parametrize("category", NOTES)
def test_arguments_in_source_text_are_asked_for_as_strings(tmp_path, category):
    language, notes = NOTES[category]
    declared = {f"p{number}": schema for number, (schema, _) in enumerate(notes)}
    case = make_case(tmp_path, category, accepted={}, **declared)
    shown = {f"p{number}": {"type": "string", "description": f"It. {note}"} for number, (_, note) in enumerate(notes)}
    description = f"Does it. Note that the provided function is in {language} syntax."
    assert case.example.tools == [function(description=description, **shown)]
    assert case.functions == [function(**declared)]  # what the rules look at stays as it is


def test_the_prompt_holds_the_tools_and_no_system_message_of_the_data(tmp_path):
    question = [[{"role": "system", "content": "SECRET"}, {"role": "user", "content": "Do."}]]
    write_category(tmp_path, "live_relevance", [function()], question=question)
    (case,) = bfcl.load(tmp_path)
    system, user = build_messages(case.example)
    assert user == {"role": "user", "content": "Do."}
    assert "Does it. Note that the provided function is in Python 3" in system["content"]
    assert "SECRET" not in system["content"]
    assert (case.category, case.gold, case.example.answer) == ("live_relevance", "any call", [])


@pytest.mark.parametrize("below", bfcl_data.DATA_FOLDERS)
def test_data_are_found_where_installations_have_them(tmp_path, below):
    gold = [{"f": {}}]
    folder = write_category(tmp_path / below, "live_simple", [function()], gold, ids=["live_simple_0-0-0"])
    write_category(folder, "irrelevance", [])
    (folder / "BFCL_v4_multi_turn_base.json").write_text("not read")
    assert [case.id for case in bfcl.load(tmp_path)] == ["irrelevance_0", "live_simple_0-0-0"]


def test_version_3_gets_the_names_of_version_4(tmp_path):
    for old in ("simple", "java", "javascript", "parallel"):
        write_category(tmp_path, old, [function()], [{"f": {}}], version="v3")
    write_category(tmp_path, "live_multiple", [function()], [{"f": {}}], ["live_multiple_1052-279-0"], version="v3")
    mistyped = (tmp_path / "BFCL_v3_live_multiple.json").read_text().replace("-279-", "-79-")
    (tmp_path / "BFCL_v3_live_multiple.json").write_text(mistyped)
    ids = [f"{name}_0" for name in ("simple_python", "simple_java", "simple_javascript", "parallel")]
    assert [case.id for case in bfcl.load(tmp_path)] == [*ids, "live_multiple_1052-279-0"]


BAD_DATA = [  # what write_category writes, and what the sentence names
    ({"ids": ["a_0", "a_0"]}, 'line 2: the id "a_0" was given before'),
    ({"question": [[]]}, "line 1: messages must end with a user or tool turn"),
    ({"function": [{"name": "f"}]}, "line 1: not a row as the benchmark has them (KeyError: 'description')"),
]


@pytest.mark.parametrize(("changes", "words"), BAD_DATA)
def test_mistakes_in_the_data_name_file_and_row(tmp_path, changes, words):
    write_category(tmp_path, "simple_python", **({"functions": [function()], "gold": [{"f": {}}]} | changes))
    with pytest.raises(UserError) as error:
        bfcl.load(tmp_path)
    assert words in str(error.value) and "BFCL_v4_simple_python.json" in str(error.value)


def test_questions_and_answers_are_joined_by_id(tmp_path):
    with pytest.raises(UserError, match="holds no BFCL data: no BFCL_v"):
        bfcl.load(tmp_path)
    folder = write_category(tmp_path, "parallel", [function()], [{"f": {}}], ids=["parallel_0", "parallel_1"])
    answers = folder / "possible_answer" / "BFCL_v4_parallel.json"
    first, second = answers.read_text().split("\n")
    answers.write_text(f"{second}\n{first}")
    assert [case.id for case in bfcl.load(tmp_path)] == ["parallel_0", "parallel_1"]
    answers.write_text(first)
    with pytest.raises(UserError, match='line 2: .*BFCL_v4_parallel.json has no answer to "parallel_1"'):
        bfcl.load(tmp_path)
    answers.unlink()
    with pytest.raises(UserError, match="cannot read .*possible_answer/BFCL_v4_parallel.json"):
        bfcl.load(tmp_path)
