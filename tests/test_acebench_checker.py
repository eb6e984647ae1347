"""ACEBench's comparison, rule by rule."""

import pytest

from tooln1.benchmarks.acebench_checker import calls_fault

A, B = {"city": "Aachen"}, {"city": "Bonn"}
BOOK = {
    "name": "hotel_book",
    "parameters": {"properties": {"city": {"type": "string"}, "nights": {"type": "integer"}}, "required": ["city"]},
}
TAXI = {"name": "taxi", "arguments": {}}


@pytest.mark.parametrize(
    ("schema", "gold", "value", "fault"),
    [
        ("string", "New York", "new-york, NY", ""),  # gold within the value
        ("string", "new york, NY", "New York", "value_error:string"),
        ("string", "", "anything", ""),
        ("string", "5", 5, "type_error"),
        ("string", "true", "true", "type_error"),  # the string counts as a boolean
        ("string", 5, 7, ""),  # of gold's type instead of the declared one: not compared
        ("integer", 5, -70, ""),  # numbers are compared by type only
        ("integer", 1, True, ""),  # but what equals gold passes
        ("integer", 5, 5.0, ""),
        ("float", 1.5, 2, ""),
        ("boolean", True, False, ""),
        ("enum", "red", "blue", ""),
        ("tuple", [1, 2], (2, 1), "value_error"),  # elements are dicts unless declared
        ("list", ["A b"], ["ab"], ""),
        ("strings", ["A b"], ["ab"], ""),
        ("strings", [], [], "type_error"),  # there is nothing in gold to fit
        ("strings", [["a"]], ["b"], "value_error:list/tuple"),
        ("array", [{"a": 1}], [{"a": 1}, {"a": 1}], "value_error:list_dict_count"),
        ("array", [{"a": 1}], [{"a": 21}], ""),  # 1 occurs in 21
        ("array", [{"a": 1}], ["a"], "value_error"),
        ("array", ["a"], [{}], "raises:AttributeError"),
        ("object", {}, {}, "type_error"),
        ("object", {"a": "x"}, {"a": "X.", "b": 1}, "value_error"),
        ("object", {"a": "x"}, {"a": "x" * 3}, ""),
        ("object", {"a": "true"}, {"a": "true"}, "value_error"),
        ("object", {"a": ["x y"]}, {"a": ["xy"]}, "value_error"),  # lists in dicts as printed
        ("object", {"a": {"b": "x"}}, {"a": {"b": "ax"}}, ""),
    ],
)
def test_types_and_values(schema, gold, value, fault):
    schema = {"type": "array", "items": {"type": "string"}} if schema == "strings" else {"type": schema}
    function = {"name": "f", "parameters": {"properties": {"p": schema}, "required": []}}
    assert calls_fault([("f", {"p": value})], {"f": {"p": gold}}, [function]) == fault


@pytest.mark.parametrize(
    ("calls", "gold", "fault"),
    [
        ([B], [B], ""),
        ([("taxi", B)], [B], "function_mismatch"),
        ([("hotel_book_1", B)], [B], "function_mismatch"),  # the number is the answer's, not the function's
        ([B, A], [A, B], ""),
        ([{"city": "Aachen-Bonn"}, A], [A, B], ""),  # one call satisfies both
        ([A, A], [A, B], "value_error:string"),
        ([{}], [B], "wrong_param"),
        ([{"nights": 2}], [B], "lack_args"),
        ([B | {"nights": 2}], [B], "addition_args"),  # not in the answer
        ([B | {"colour": 2}], [B | {"colour": 2}], "addition_args"),  # not among the parameters
        ([B], [B | {"nights": 2}], ""),  # what is not required may be left out
        ([{"city": 5, "nights": "x"}], [B | {"nights": 2}], "type_error"),  # the first fault, in the call's order
    ],
)
def test_calls(calls, gold, fault):
    calls = [call if isinstance(call, tuple) else ("hotel_book", call) for call in calls]
    keys = ["hotel_book", "hotel_book_1"]
    assert calls_fault(calls, dict(zip(keys, gold, strict=False)), [TAXI, BOOK]) == fault


def test_the_fault_is_that_of_the_last_call_looked_at():
    other = {"name": "other", "parameters": {"properties": {"x": {"type": "string"}}, "required": []}}
    gold, functions = {"hotel_book": B, "other": {"x": "y"}}, [BOOK, other]
    last_is_another = [("hotel_book", A), ("other", {"x": "y"})]
    assert calls_fault(last_is_another, gold, functions) == "simple_function_checker:unclear"
    assert calls_fault(last_is_another[::-1], gold, functions) == "value_error:string"


def test_functions_without_parameters_and_names_that_end_in_a_number():
    bare = {"name": "now", "parameters": {}}
    assert calls_fault([("now", {})], {"now": {}}, [bare]) == ""
    assert calls_fault([("now", {"x": 1})], {"now": {}}, [bare]) == "wrong_param"
    none = {"name": "now", "parameters": {"properties": {}, "required": []}}
    assert calls_fault([("now", {"x": 1})], {"now": {}}, [none]) == ""  # the answer equals the properties
    numbered = BOOK | {"name": "hotel_book_2"}
    assert calls_fault([("hotel_book", B)], {"hotel_book_2": B}, [numbered]) == "wrong_function_name"
    within = {"name": "book", "parameters": {"properties": {}, "required": ["x"]}}
    assert calls_fault([("hotel_book", B)], {"hotel_book": B}, [within, BOOK]) == "wrong_function_name"
