"""BFCL's comparison of calls, rule by rule on cases made here; test_bfcl.py has the official verdicts."""

import pytest
from bfcl_fixtures import function, make_case, typed, why

SIMPLE, NESTED, OTHERS, STRING = "type_error:simple", "type_error:nested", "value_error:others", "value_error:string"
LIST, KEY, VALUE, COUNT = (
    f"value_error:{name}" for name in ("list/tuple", "dict_key", "dict_value", "list_dict_count")
)
DICT = {"a": ["x y", 1], "b": ["", 2]}

VALUES = [  # declared type, accepted values, the argument, the fault
    (typed("integer"), [5], 5, ""),
    (typed("integer"), [5], 6, OTHERS),
    (typed("integer"), [5], 5.0, SIMPLE),
    (typed("integer"), [1], True, SIMPLE),
    (typed("float"), [5.0], 5, ""),
    (typed("float"), [5], 5.5, OTHERS),
    (typed("float"), [5.0], 10**400, "raises:OverflowError"),
    (typed("boolean"), [True], 1, SIMPLE),
    (typed("string"), ["St. John's"], 'st JOHN"S', ""),
    (typed("string"), ["New York, NY"], "new-york/ny_*^", ""),
    (typed("string"), ["a"], "a\u00a0", STRING),
    (typed("string"), [7, "a b"], "ab", OTHERS),
    (typed("string"), [7, "a b"], "a b", ""),
    (typed("array", "integer"), [[1, 2]], [2, 1], LIST),
    (typed("array", "integer"), [[1, 2]], [1, "2"], NESTED),
    (typed("array", "string"), [["A b", "c"]], ["ab", "C."], ""),
    (typed("array", "string"), [["a"], ""], [], ""),
    (typed("array", "string"), [["a"], ""], [1], LIST),
    (typed("array", "string"), ["names"], "Names", OTHERS),
    (typed("array", "array"), [[["a b"]]], [["A b"]], LIST),
    (typed("dict"), [DICT], {"a": "XY"}, ""),
    (typed("dict"), [DICT], {"b": 2, "a": True}, ""),
    (typed("dict"), [DICT], {"a": 1, "c": 1}, KEY),
    (typed("dict"), [DICT, {"c": [1]}], {"c": 1}, ""),
    (typed("dict"), [""], {}, "dict_checker:unclear"),
    (typed("dict"), [{"a": [["x y"]]}], {"a": ["xy"]}, VALUE),
    (typed("dict"), [{"a": "xyz"}], {"a": "y"}, ""),
    (typed("array", "dict"), [[DICT, DICT]], [{"a": 1}, {"a": "xy", "b": 2}], ""),
    (typed("array", "dict"), [[DICT]], [{"a": 1}, {"a": 1}], COUNT),
    (typed("array", "dict"), [[DICT]], [{"a": 2}], VALUE),
    (typed("array", "dict"), [[DICT]], [1], NESTED),
    (typed("array", "dict"), [[DICT], ""], [1], "raises:AttributeError"),
    (typed("array", "dict"), [[DICT], ["", DICT]], [{}, {"a": 1}], "dict_checker:unclear"),
]


@pytest.mark.parametrize(("schema", "accepted", "value", "fault"), VALUES)
def test_types_and_values(tmp_path, schema, accepted, value, fault):
    assert why(make_case(tmp_path, accepted={"p": accepted}, p=schema), {"p": value}) == fault


def test_faults_of_a_call_come_in_order(tmp_path):
    accepted = {"a": [1], "b": ["", 2], "c": [3], "no parameter": ["", 4]}
    properties = {name: typed("integer") for name in "abcd"}
    functions = [function("geo.f", required=["a"], **properties)]
    case = make_case(tmp_path, gold=[{"geo.f": accepted}], functions=functions)
    checker = "simple_function_checker:"

    def fault(name="geo.f", **arguments) -> str:
        return why(case, arguments, name=name).removeprefix(checker)

    assert fault(a=1, c=3) == fault(c=3, b=2, a=1) == ""
    assert fault("geo_f", x=1) == fault("Geo.f", a=1, c=3) == "wrong_func_name"
    assert fault(x=1) == "missing_required"
    assert fault(a=1, x=1, c=4) == fault(a=1, d=1, c=3) == "unexpected_param"
    assert fault(a=1, c=3, **{"no parameter": 4}) == "unexpected_param"
    assert fault(a=1, c=4, x=1) == OTHERS
    assert fault(a=2) == OTHERS
    assert fault(a=1, b=2) == "missing_optional"
    assert why(case, {"a": 1, "c": 3}, {"a": 1, "c": 3}, name="geo.f") == why(case) == checker + "wrong_count"


def test_parallel_calls_are_matched_greedily_in_any_order(tmp_path):
    gold = [{"f": {"p": [1, 2]}}, {"f": {"p": [1]}}, {"f": {"p": [3]}}]
    case = make_case(tmp_path, "parallel_multiple", gold=gold, functions=[function(p=typed("integer"))])
    none_left = "parallel_function_checker_no_order:cannot_find_match"
    assert why(case, {"p": 3}, {"p": 2}, {"p": 1}) == ""
    assert why(case, {"p": 1}, {"p": 3}, {"p": 1}) == ""
    assert why(case, {"p": 1}, {"p": 2}, {"p": 3}) == none_left  # the first gold call took what the second needed
    assert why(case, {"p": 3}, {"p": 3}, {"p": 1}) == none_left
    assert why(case, {"p": 1}, {"p": 1}) == "parallel_function_checker_no_order:wrong_count"


@pytest.mark.parametrize(
    ("category", "fault"), [("simple_java", "type_error:java"), ("simple_javascript", "type_error:js")]
)
def test_arguments_in_source_text_must_be_strings(tmp_path, category, fault):
    accepted = {"n": [5], "s": ["my Text"], "v": ["myVar"], "w": ["", 2.5, "2.5"]}
    kinds = {"n": typed("integer"), "s": typed("String"), "v": typed("integer"), "w": typed("any")}
    case = make_case(tmp_path, category, accepted, **kinds)
    right = {"n": "5", "s": "MYTEXT", "v": "myVar", "w": "2.5"}
    assert why(case, right) == ""
    assert why(case, right | {"n": 5}) == why(case, right | {"w": [2.5]}) == fault
    assert why(case, right | {"n": "5.0"}) == SIMPLE
    assert why(case, right | {"v": "MyVar"}) == why(case, right | {"w": "2.50"}) == OTHERS
    assert why(case, right | {"n": "9" * 5000}) == "raises:ValueError"
