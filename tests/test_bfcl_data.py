"""BFCL's files: where they are found, what the model sees of them, and mistakes in them."""

import pytest
from bfcl_fixtures import function, make_case, typed, write_category

from tooln1.benchmarks import bfcl
from tooln1.io.errors import UserError
from tooln1.prompt import build_messages

STRINGS = "type parameter in string representation."
NOTES = {  # category -> (language, declared parameter, what its description gains)
    "simple_java": (
        "Java 8 SDK",
        [
            (typed("any"), "This parameter can be of any type of Java object in string representation."),
            (typed("long"), f"This is Java long {STRINGS}"),
            (
                typed("ArrayList", "char"),
                f"This is Java ArrayList {STRINGS} The list elements are of type char; they are "
                "not in string representation.",
            ),
        ],
    ),
    "simple_javascript": (
        "JavaScript",
        [
            (typed("any"), "This parameter can be of any type of JavaScript object in string representation."),
            (
                typed("array", "float"),
                f"This is JavaScript array {STRINGS} The list elements are of type float; they are "
                "not in string representation.",
            ),
            (typed("dict"), f"This is JavaScript dict {STRINGS}"),
            (
                typed("dict") | {"properties": {"a": 1}},
                f"This is JavaScript dict {STRINGS} The dictionary entries have the "
                'following schema; they are not in string representation. {"a": 1}',
            ),
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


def test_python_functions_only_name_their_language(tmp_path):
    case = make_case(tmp_path, accepted={"p": [1]}, p=typed("integer"))
    description = "Does it. Note that the provided function is in Python 3 syntax."
    assert case.example.tools == [function(description=description, required=["p"], p=typed("integer"))]


def test_the_prompt_holds_the_tools_and_no_system_message_of_the_data(tmp_path):
    question = [[{"role": "system", "content": "SECRET"}, {"role": "user", "content": "Do."}]]
    write_category(tmp_path, "live_relevance", [function()], question=question)
    (case,) = bfcl.load(tmp_path)
    system, user = build_messages(case.example)
    assert user == {"role": "user", "content": "Do."}
    assert "Does it. Note that the provided function is in Python 3" in system["content"]
    assert "SECRET" not in system["content"]
    assert (case.category, case.gold, case.example.answer) == ("live_relevance", "any call", [])


@pytest.mark.parametrize(
    "below",
    [
        ".",
        "data",
        "bfcl_eval/data",
        "berkeley-function-call-leaderboard/bfcl_eval/data",
        "berkeley-function-call-leaderboard/data",
    ],
)
def test_data_are_found_where_installations_have_them(tmp_path, below):
    gold = [{"f": {}}]
    folder = write_category(tmp_path / below, "live_simple", [function()], gold, ids=["live_simple_0-0-0"])
    write_category(folder, "irrelevance", [])
    (folder / "BFCL_v4_multi_turn_base.json").write_text("not read")
    assert [(case.id, case.category) for case in bfcl.load(tmp_path)] == [
        ("irrelevance_0", "irrelevance"),
        ("live_simple_0-0-0", "live_simple"),
    ]


def test_version_3_gets_the_names_of_version_4(tmp_path):
    for old in ("simple", "java", "javascript", "parallel"):
        write_category(tmp_path, old, [function()], [{"f": {}}], version="v3")
    write_category(tmp_path, "live_multiple", [function()], [{"f": {}}], ["live_multiple_1052-279-0"], version="v3")
    mistyped = (tmp_path / "BFCL_v3_live_multiple.json").read_text().replace("-279-", "-79-")
    (tmp_path / "BFCL_v3_live_multiple.json").write_text(mistyped)
    assert [(case.category, case.id) for case in bfcl.load(tmp_path)] == [
        ("simple_python", "simple_python_0"),
        ("simple_java", "simple_java_0"),
        ("simple_javascript", "simple_javascript_0"),
        ("parallel", "parallel_0"),
        ("live_multiple", "live_multiple_1052-279-0"),
    ]


BAD_DATA = [  # what write_category writes, and the words of the sentence
    ({"gold": None}, "BFCL_v4_simple_python.json has questions, but possible_answer beside it lacks their answers"),
    ({"ids": ["a_0", "a_0"]}, 'line 2: the id "a_0" was given before'),
    ({"id": 7}, 'line 1: "id" must be a string, found a number'),
    ({"question": "Do."}, 'line 1: "question" must be a list'),
    ({"question": [[], []]}, 'line 1: "question" must hold one list of messages; multi-turn'),
    ({"question": [["Do."]]}, "messages[0]: expected an object, found a string"),
    ({"question": [[]]}, "messages must end with a user or tool turn"),
    ({"function": None}, 'line 1: "function" must be a list, found null'),
    ({"function": [None]}, "line 1, function: expected an object, found null"),
    ({"function": [{"name": "f"}]}, "function 'f': the key \"parameters\" is missing"),
    ({"functions": [function(name="g")]}, "the answer calls 'f', which is not among the functions ['g']"),
    ({"functions": [function(p={})]}, "parameter 'p' of 'f': the key \"type\" is missing"),
    ({"functions": [function(p=typed("int"))]}, "unknown type 'int'; known in Python 3 are string, integer"),
    ({"functions": [function(p=typed("array"))]}, 'the key "items" is missing'),
    ({"functions": [function(p=typed("array", "list"))]}, "parameter 'p' of 'f', items: unknown type 'list'"),
    ({"functions": [function(required=[1])]}, '"required" must be a list of names'),
    ({"functions": [function(description=None)]}, '"description" must be a string, found null'),
    ({"gold": []}, '"ground_truth" is empty'),
    ({"gold": {}}, '"ground_truth" must be a list, found an object'),
    ({"gold": [None]}, "ground_truth: expected an object, found null"),
    ({"gold": [{}]}, "each call of the ground truth must have one function, found []"),
    ({"gold": [{"f": []}]}, '"f" must be an object, found a list'),
    ({"gold": [{"f": {"p": 5}}]}, "'f': \"p\" must be a list, found a number"),
    ({"gold": [{"f": {"p": [{"a": 5}]}}]}, "'p' of 'f': 'a' must have a list of accepted values, found a number"),
    ({"gold": [{"f": {"p": [[{"a": 5}]]}}]}, "'p' of 'f': 'a' must have a list of accepted values, found a number"),
]


@pytest.mark.parametrize(("changes", "words"), BAD_DATA)
def test_mistakes_in_the_data_name_file_and_row(tmp_path, changes, words):
    write_category(tmp_path, "simple_python", **({"functions": [function()], "gold": [{"f": {}}]} | changes))
    with pytest.raises(UserError) as error:
        bfcl.load(tmp_path)
    assert words in str(error.value) and "BFCL_v4_simple_python.json" in str(error.value)


def test_files_that_do_not_go_together(tmp_path):
    with pytest.raises(UserError, match="holds no BFCL data: expected BFCL_v4_<category>.json files"):
        bfcl.load(tmp_path)
    folder = write_category(tmp_path, "parallel", [function()], [{"f": {}}], ids=["parallel_0", "parallel_1"])
    answers = folder / "possible_answer" / "BFCL_v4_parallel.json"
    first, second = answers.read_text().split("\n")
    answers.write_text(f"{second}\n{first}")
    with pytest.raises(UserError, match=r'line 1: the id is "parallel_1", but \S+ line 1 asks "parallel_0"'):
        bfcl.load(tmp_path)
    answers.write_text(first)
    with pytest.raises(UserError, match="has 1 answers to 2 questions"):
        bfcl.load(tmp_path)
    answers.write_text(f"{first}\n{second[:20]}")
    with pytest.raises(UserError, match="line 2: not valid JSON"):
        bfcl.load(tmp_path)
    answers.write_text(f"{first}\n{second}")
    (folder / "BFCL_v3_parallel.json").write_text("{}")
    with pytest.raises(UserError, match="are both parallel; keep one version"):
        bfcl.load(tmp_path)
    for file in folder.glob("BFCL*.json"):
        file.unlink()
    write_category(folder, "irrelevance", [])
    with pytest.raises(UserError, match="has answers, but .* lacks the questions"):
        bfcl.load(tmp_path)
