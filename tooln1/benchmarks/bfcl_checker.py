"""BFCL's comparison of calls with accepted answers ("AST" scoring), as bfcl-eval 2026.3.23 makes it.

    calls  = [{"area": {"base": 10, "height": 5}}, ...]                      from the reply
    gold   = [{"area": {"base": [10], "height": [5], "unit": ["", "cm"]}}, ...]  accepted values; "": may be omitted

Every function here returns the official name of the first fault it finds, "" where there is none. Where the official
checker itself crashes, an exception is raised that `ast_fault` turns into "raises:...".
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tooln1.benchmarks.bfcl_literals import JAVA_TYPES, JAVASCRIPT_TYPES, java_value, javascript_value

Call = dict[Any, dict]  # {function name: arguments}; the name is any JSON scalar
Gold = dict[str, dict[str, list]]  # {function name: {parameter: accepted values}}


@dataclass(frozen=True)
class Language:
    """What a call is written in: its types, and how its literals are read where arguments are source text."""

    title: str  # as the function descriptions name it
    types: dict[str, type]  # declared type -> the JSON value's type
    lists: tuple[str, ...]  # the declared types whose elements have one too
    read: Callable[[str, str, str | None], Any] | None = None
    not_text: str = ""  # the fault of an argument that is no string


PYTHON = Language(
    "Python 3",
    {"string": str, "integer": int, "float": float, "boolean": bool, "any": str}
    | {"array": list, "tuple": list, "dict": dict},
    ("array", "tuple"),
)
JAVA = Language("Java 8 SDK", JAVA_TYPES, ("Array", "ArrayList"), java_value, "type_error:java")
JAVASCRIPT = Language("JavaScript", JAVASCRIPT_TYPES, ("array",), javascript_value, "type_error:js")


# ------------------------------------------------------------------------------------------------------- calls


def ast_fault(category: str, calls: list[Call], gold: list[Gold], functions: list[dict], language: Language) -> str:
    """The first fault of a reply's calls; the category's name decides which comparison is made."""
    parallel = "parallel" in category
    checker = "parallel" if parallel else "multiple" if "multiple" in category else "simple"
    if len(calls) != len(gold):
        return f"{checker}_function_checker{'_no_order' if parallel else ''}:wrong_count"
    described = {function["name"]: function for function in reversed(functions)}
    try:
        if parallel:
            return _parallel_fault(calls, gold, described, language)
        return call_fault(calls[0], gold[0], described[next(iter(gold[0]))], language)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        return f"raises:{type(error).__name__}"


def _parallel_fault(calls: list[Call], gold: list[Gold], described: dict[str, dict], language: Language) -> str:
    """Each gold call takes the first remaining call that is right for it, in order and without backtracking."""
    remaining = list(calls)
    for wanted in gold:
        function = described[next(iter(wanted))]
        right = (n for n, call in enumerate(remaining) if not call_fault(call, wanted, function, language))
        place = next(right, None)
        if place is None:
            return "parallel_function_checker_no_order:cannot_find_match"
        del remaining[place]
    return ""


def call_fault(call: Call, wanted: Gold, function: dict, language: Language) -> str:
    """The first fault of one call: name, required parameters, each argument in turn, parameters left out."""
    (accepted,) = wanted.values()
    if function["name"] not in call:
        return "simple_function_checker:wrong_func_name"
    arguments, properties = call[function["name"]], function["parameters"]["properties"]
    if any(name not in arguments for name in function["parameters"]["required"]):
        return "simple_function_checker:missing_required"
    for name, value in arguments.items():
        if name not in properties or name not in accepted:
            return "simple_function_checker:unexpected_param"
        if fault := argument_fault(value, accepted[name], properties[name], language):
            return fault
    if any(name not in arguments and "" not in values for name, values in accepted.items()):
        return "simple_function_checker:missing_optional"
    return ""


# --------------------------------------------------------------------------------------------------- arguments


def argument_fault(value: Any, accepted: list, schema: dict, language: Language) -> str:
    """The first fault of an argument: its type, then its value.

    Where the accepted values are of another type than the declared one, a variable's name is meant: then the value
    must equal one of them exactly, strings included.
    """
    declared = schema["type"]
    kind, element = language.types[declared], None
    if declared in language.lists:
        element = language.types[schema["items"]["type"]]
    if language.read:
        if type(value) is not str:
            return language.not_text
        value = language.read(value, declared, schema["items"]["type"] if element else None)
    elif kind is float and type(value) is int:
        value = float(value)
    if fault := type_fault(value, accepted, kind, element):
        return fault
    if _answer_type(accepted) not in (None, kind):
        return _member_fault(value, accepted)
    if element is dict:
        return dicts_fault(value, accepted)
    return _VALUE_FAULTS.get(kind, _member_fault)(value, accepted)


def type_fault(value: Any, accepted: list, kind: type, element: type | None) -> str:
    """A value has the declared type (bool is no int), or that of the accepted values."""
    answer_type = _answer_type(accepted)
    if type(value) is not kind:
        return "" if type(value) is answer_type else "type_error:simple"
    if element is None or any(_elements_fit(value, option, element) for option in accepted):
        return ""
    return "type_error:nested" if answer_type is kind else "type_error:simple"


def _elements_fit(value: list, option: Any, element: type) -> bool:
    """Whether all elements are of the declared type or of that of an accepted list's; "" lets any list pass."""
    if type(option) is not list:
        return True
    allowed = (element, _answer_type(option))
    return all(type(item) in allowed for item in value)


def _answer_type(accepted: list) -> type | None:
    """The type of the first accepted value other than ""; None if there is none."""
    return next((type(option) for option in accepted if option != ""), None)


# ------------------------------------------------------------------------------------------------------ values

_IGNORED = str.maketrans("", "", " ,./-_*^")


def normalized(value: Any) -> Any:
    """A string without case and some punctuation; anything else as it is."""
    return value.translate(_IGNORED).lower().replace("'", '"') if isinstance(value, str) else value


def _lists(accepted: list) -> list[list | str]:
    """The accepted lists, "" among them: it stands for the empty one."""
    return [option for option in accepted if isinstance(option, list | str)]


def _member_fault(value: Any, accepted: list) -> str:
    return "" if value in accepted else "value_error:others"


def string_fault(value: str, accepted: list) -> str:
    """Strings are compared in normal form."""
    options = [normalized(option) for option in accepted if isinstance(option, str)]
    return "" if normalized(value) in options else "value_error:string"


def list_fault(value: list, accepted: list) -> str:
    """A list equals an accepted one in order, its own strings in normal form."""
    ours = [normalized(item) for item in value]
    same = any(ours == [normalized(item) for item in option] for option in _lists(accepted))
    return "" if same else "value_error:list/tuple"


def dict_fault(value: Any, accepted: list) -> str:
    """A dict passes by one of the accepted ones; the fault is that against the last of them."""
    faults = [_entries_fault(value, option) for option in accepted if isinstance(option, dict)]
    return "" if "" in faults else ["dict_checker:unclear", *faults][-1]


def _entries_fault(value: Any, option: dict[str, list | str]) -> str:
    """`option` holds the accepted values of each key; a bare string there stands for its characters."""
    if type(value) is not dict:  # where "" let a list of anything pass the type check
        raise AttributeError("not a dict")
    if any(key not in value and "" not in choices for key, choices in option.items()):
        return "value_error:dict_key"
    for key, item in value.items():
        if key not in option:
            return "value_error:dict_key"
        if normalized(item) not in [normalized(choice) for choice in option[key]]:
            return "value_error:dict_value"
    return ""


def dicts_fault(value: list, accepted: list) -> str:
    """A list of dicts passes by one of the accepted lists, dict by dict in order."""
    faults = ["list_dict_checker:unclear"]
    for option in _lists(accepted):
        if len(value) != len(option):
            faults.append("value_error:list_dict_count")
        else:
            by_item = (dict_fault(item, [wanted]) for item, wanted in zip(value, option, strict=True))
            faults.append(next(filter(None, by_item), ""))
    return "" if "" in faults else faults[-1]


_VALUE_FAULTS: dict[type, Callable[[Any, list], str]] = {str: string_fault, list: list_fault, dict: dict_fault}
