"""ACEBench's comparison of calls with the answer, as the official checker (ACEBench e6db74b) makes it.

    calls = [("book_hotel", {"city": "Bonn", "nights": 2}), ...]                     from the reply
    gold  = {"book_hotel": {"city": "bonn"}, "book_hotel_1": {...}, ...}             _1, _2: further calls of a function

It is lenient in ways one would not guess, all kept: a parameter that is not required may be left out; numbers and
booleans are compared by type only; a gold string need only occur in the given one; two gold calls may be satisfied
by the same call. Every function returns the official name of the first fault, "" where there is none.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from tooln1.benchmarks.acebench_text import Call
from tooln1.benchmarks.bfcl_checker import normalized

Gold = dict[str, dict[str, Any]]  # {function name, perhaps with a number: {parameter: value}}

# Declared type -> the value's type, and the declared types whose elements have a type too.
TYPES: dict[str, type] = (
    dict.fromkeys(("string", "any"), str)
    | dict.fromkeys(("integer", "int", "number"), int)
    | dict.fromkeys(("array", "tuple", "list", "list(string)", "list(enum)"), list)
    | dict.fromkeys(("object", "dict"), dict)
    | {"float": float, "boolean": bool, "enum": enumerate}  # as the official table has it: no value is an enumerate
)
_ELEMENTS = {"array": dict, "tuple": dict, "object": dict, "list(string)": str, "list(enum)": enumerate}  # by default


# ------------------------------------------------------------------------------------------------------- calls


def calls_fault(calls: list[Call], gold: Gold, functions: list[dict]) -> str:
    """The first fault of a reply's calls: how many they are, of which functions, and each gold call in turn.

    functions: as the data describe them; those of the answer have "parameters" with "properties" and "required".
    """
    if len(calls) != len(gold):
        return "wrong functions number"
    if Counter(name for name, _ in calls) != Counter(map(base_name, gold)):
        return "function_mismatch"
    try:
        faults = (_best_fault(calls, base_name(key), gold[key], described(key, functions)) for key in gold)
        return next(filter(None, faults), "")
    except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError) as error:
        return f"raises:{type(error).__name__}"  # the official checker crashes there


def base_name(key: str) -> str:
    """The function's name without the number that tells several calls of it apart."""
    return re.sub(r"_\d+$", "", key)


def described(key: str, functions: list[dict]) -> dict | None:
    """The first function whose name occurs in a gold key."""
    return next((function for function in functions if function["name"] in key), None)


def _best_fault(calls: list[Call], name: str, gold: dict, function: dict) -> str:
    """The fault of the last call unless any of them is right; none is used up for the gold calls to come."""
    fault = ""
    for called, arguments in calls:
        fault = "simple_function_checker:unclear" if called != name else call_fault(name, arguments, gold, function)
        if not fault:
            break
    return fault


def call_fault(name: str, arguments: dict, gold: dict, function: dict) -> str:
    """The first fault of one call: no arguments, the name, required parameters, each argument in turn."""
    parameters = function["parameters"]
    if not arguments or not parameters:
        return "wrong_param" if arguments or parameters else ""
    properties = parameters["properties"]
    if gold == properties:
        return ""
    if not gold:
        return "wrong_param"
    if name != function["name"]:  # a function whose own name ends in a number
        return "wrong_function_name"
    if any(parameter not in arguments for parameter in parameters["required"]):
        return "lack_args"
    for parameter, value in arguments.items():
        if parameter not in properties or parameter not in gold:
            return "addition_args"
        if fault := argument_fault(value, gold[parameter], properties[parameter]):
            return fault
    return ""


# --------------------------------------------------------------------------------------------------- arguments


def argument_fault(value: Any, gold: Any, schema: dict) -> str:
    """The first fault of an argument: its type, then its value, where both it and gold are of the declared type."""
    kind, element = TYPES[schema["type"]], element_type(schema)
    if schema["type"] == "tuple" and type(value) is tuple:
        value = list(value)
    if kind is float and type(value) is int:
        value = float(value)
    if not type_fits(value, gold, kind, element):
        return "type_error"
    if type(_as_boolean(value)) is not kind or (gold != "" and type(gold) is not kind):
        return ""
    if element is dict and kind is list:
        return dicts_fault(value, gold)
    return _VALUE_FAULTS[kind](value, gold) if kind in _VALUE_FAULTS else ""


def element_type(schema: dict) -> type | None:
    """The type of a parameter's elements, None where it has none."""
    default = _ELEMENTS.get(schema["type"])
    items = schema.get("items")
    if default is None or not isinstance(items, dict) or "type" not in items:
        return default
    return TYPES[items["type"]]


def type_fits(value: Any, gold: Any, kind: type, element: type | None) -> bool:
    """A value has the declared type, elements included, or else that of gold, or it equals gold.

    Bool is no int. Elements are looked at where gold holds lists; one whose elements the value's fit is enough.
    """
    value = _as_boolean(value)
    if type(value) is kind:
        return element is None or any(
            type(item) is not list or all(type_fits(part, item, element, None) for part in value) for item in gold
        )
    return gold != "" and (type(value) is type(gold) or value == gold)


def _as_boolean(value: Any) -> Any:
    """The strings "true" and "false" count as booleans."""
    return value == "true" if value in ("true", "false") else value


# ------------------------------------------------------------------------------------------------------ values


def string_fault(value: str, gold: str) -> str:
    """The gold string occurs in the value."""
    return "" if normalized(gold) in normalized(value) else "value_error:string"


def list_fault(value: list, gold: list) -> str:
    """Equal lists, their own strings in normal form."""
    return "" if [*map(normalized, value)] == [*map(normalized, gold)] else "value_error:list/tuple"


def dict_fault(value: Any, gold: dict) -> str:
    """Equal keys, nested dicts likewise; of all other values the printed gold occurs in the printed value."""
    if not isinstance(value, dict) or value.keys() != gold.keys():
        return "value_error"
    for key, item in value.items():
        if isinstance(gold[key], dict):
            if fault := dict_fault(_as_boolean(item), gold[key]):
                return fault
        elif str(normalized(gold[key])) not in str(normalized(_as_boolean(item))):
            return "value_error"
    return ""


def dicts_fault(value: list, gold: list) -> str:
    """As many dicts, each as its place in gold."""
    if len(value) != len(gold):
        return "value_error:list_dict_count"
    return next(filter(None, map(dict_fault, value, gold)), "")


# Values of other types are not compared.
_VALUE_FAULTS: dict[type, Callable[[Any, Any], str]] = {str: string_fault, list: list_fault, dict: dict_fault}
