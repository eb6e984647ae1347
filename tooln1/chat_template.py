"""Chat templates: programs by a model's maker, run by jinja2 in a sandbox that bounds what they may cost.

They get the filters and the white-space rules that transformers gives them, so that the same messages become the
same text. A template is not to be trusted more than its file: it reaches neither Python nor files (jinja2's sandbox,
and of the methods of strings and the like only those that are listed here), and it neither hangs nor fills the
memory: all it does is charged to an allowance, and what would outgrow it is refused before it is done.

The unit of the allowance is a byte written or looked at; a step of the template (a node of its syntax tree that is
run) counts as STEP of them, about what it takes. Every loop, macro and block is charged for the size of its body.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.runtime import LoopContext, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from tooln1.template_syntax import STEP, Charges, GenerationTag


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ALLOWANCE = 2**27  # of a rendering: some hundred times what a real template takes for a long prompt
MAX_SOURCE = 2**16  # characters of a template; published ones have up to 20,000
MAX_DEPTH = 100  # of lists in lists; Python ends the process where it hashes a tuple that is nested much deeper
MAX_BITS = 2**14  # of an integer
DICT_ATTRIBUTES, LOOP_NUMBERS = frozenset(dir(dict)), _names("index index0 first last length")
CONTAINERS = (list, tuple, dict, type({}.keys()), type({}.values()), type({}.items()))
METHODS = {
    str: _names(
        "capitalize casefold center count endswith find format format_map index isalnum isalpha isascii isdecimal "
        "isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition "
        "removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith "
        "strip swapcase title upper zfill"
    ),
    dict: _names("copy get items keys values"),
    list: _names("copy count index"),
    tuple: _names("count index"),
    **dict.fromkeys((int, float, bool, bytes, set, frozenset, range), frozenset()),
}
# No template has a use for these, and what they cost cannot be told beforehand or what they give is random.
REMOVED_FILTERS = _names("filesizeformat forceescape pprint random striptags urlize wordwrap xmlattr")
# Their cost does not grow with what they are given, or (the second line) is charged for each item as it is taken.
CONSTANT_FILTERS = _names("attr count d default first items last length safe")
LAZY_FILTERS = _names("map reject rejectattr select selectattr")
PER_CHARACTER = _names("batch groupby list round slice sort sum unique")  # of a string, they see its characters
COMPARING_TESTS = _names("in == eq equalto != ne > gt greaterthan ge >= < lt lessthan <= le lower upper filter test")
NUMBER_TESTS = _names("odd even divisibleby")


def compile_template(source: str) -> Callable[..., str]:
    """The template as a function: render(**variables) -> text. Either may raise any Exception."""
    if len(source) > MAX_SOURCE:
        raise SecurityError(f"it is longer than {MAX_SOURCE:,} characters")
    sandbox = Sandbox()
    template = sandbox.from_string(source)

    def render(**variables: Any) -> str:
        sandbox.begin()
        try:
            return template.render(**variables)
        finally:
            sandbox.begin()  # what was measured need not stay in memory

    return render


class Sandbox(ImmutableSandboxedEnvironment):
    """What transformers gives a chat template to work with, every operation charged to the allowance."""

    intercepted_binops = frozenset(["*", "**", "%", "//"])  # those that can make much of little, or take long

    def __init__(self):
        # not optimized: jinja2 would work out what is constant ('a' * 10**10) while it reads the template
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=self.output,
            extensions=[GenerationTag, jinja2.ext.loopcontrols],
        )
        self.begin()
        filters = {name: f for name, f in self.filters.items() if name not in REMOVED_FILTERS} | {"tojson": to_json}
        self.filters = {name: self._charged_filter(name, function) for name, function in filters.items()}
        # What `Charges` puts into the syntax tree; no template can write these names.
        self.filters |= {
            "pay!": self.pay,
            "in!": self.pay_container,
            "slice!": self.pay_slice,
            "+!": self.add,
            "~!": self.join_texts,
            "loop!": self.loop,
            "body!": self.charge,
        }
        self.tests = {name: self._charged_test(name, function) for name, function in self.tests.items()}
        del self.globals["lipsum"]
        self.globals["raise_exception"] = self.raise_exception
        self.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern[:100])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        self.begin()
        return Charges().visit(super()._parse(source, name, filename)).set_environment(self)

    # ---- the allowance

    def begin(self) -> None:
        """A full allowance."""
        self.left = ALLOWANCE
        self.measured: dict[int, tuple[Any, int, int]] = {}  # id -> container (which keeps its id), size, depth

    def charge(self, cost: int) -> None:
        """Take `cost` from the allowance. Raises SecurityError where it does not suffice."""
        self.left -= cost
        if self.left < 0:
            raise SecurityError("it takes too many steps, or makes too much text")

    def pay(self, value: Any) -> Any:
        """`value` itself, charged for its size as text."""
        self.charge(self.measure(value)[0])
        return value

    def measure(self, value: Any) -> tuple[int, int]:
        """(size as text, depth) of a value; [x, x] has the size of x twice.

        Nothing in a template can change a list, so each is looked at only once, however often it occurs in others.
        """
        if isinstance(value, str):
            return sys.getsizeof(value), 0
        if isinstance(value, Namespace):
            raise SecurityError("a namespace is no value to print or compare")
        if not isinstance(value, CONTAINERS):
            return (STEP * (1 + len(value)) if isinstance(value, range) else STEP), 0
        known = self.measured.get(id(value))
        if known is None:
            size, deepest = 4 * STEP, 0
            for item in (*value, *value.values()) if isinstance(value, dict) else value:
                if type(item) is str:  # as `measure` would, only sooner
                    size += STEP + 4 * len(item)  # escapes make a string in a list longer
                elif item is not None:
                    inner, depth = self.measure(item)
                    size, deepest = size + STEP + inner, max(deepest, depth)
            if deepest >= MAX_DEPTH:
                raise SecurityError(f"it nests lists deeper than {MAX_DEPTH}")
            known = self.measured[id(value)] = (value, size, deepest + 1)
        return known[1], known[2]

    # ---- what the syntax tree of a template is made to call

    @jinja2.pass_context
    def output(self, context: Any, value: Any) -> Any:
        """What is about to be written. Taking the context keeps jinja2 from doing it as it reads the template."""
        if type(value) is not str:
            return self.pay(value)
        self.left -= sys.getsizeof(value)
        if self.left < 0:
            self.charge(0)
        return value

    def loop(self, items: Any, cost: int) -> Any:
        """What a loop runs over, charged with `cost` for each item."""
        if hasattr(items, "__len__"):
            self.charge(cost * len(items))
            return items
        return self._one_by_one(items, cost)

    def _one_by_one(self, items: Iterable, cost: int) -> Iterator:
        for item in items:
            self.charge(cost)
            yield item

    def pay_slice(self, value: Any) -> Any:
        """What is about to be sliced, charged for a copy."""
        self.charge(sys.getsizeof(value))
        return value

    def pay_container(self, value: Any) -> Any:
        """What something is looked for in; a dict is not searched."""
        return value if type(value) is dict else self.pay(value)

    def add(self, first: Any, *others: Any) -> Any:
        """The operator +, of a whole sum; a result is at most twice as large as what was there before."""
        for other in others:
            first = first + other
            self.left -= sys.getsizeof(first)
            if self.left < 0:
                self.charge(0)
        return first

    def join_texts(self, values: list) -> str:
        """The operator ~."""
        return str_join(map(self.pay, values))

    # ---- operators, attributes, calls

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The operators above, charged for the result before it is there."""
        if isinstance(left, int | float) and isinstance(right, int | float):
            self._check_integers(operator, left, right)
        elif operator == "%":
            self._pay_format(left, right, "%")
        elif operator == "*":
            self.charge(max(sys.getsizeof(left) * _times(right), sys.getsizeof(right) * _times(left)))
        return super().call_binop(context, operator, left, right)

    def _check_integers(self, operator: str, left: float, right: float) -> None:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise SecurityError(f"it computes with integers of more than {MAX_BITS} bits")

    def _pay_format(self, pattern: Any, values: Any, mark: str) -> None:
        """Text made from a pattern: its widths, and all values at every "%" or "{" of it."""
        if not isinstance(pattern, str):
            return
        if (mark == "%" and "*" in pattern) or re.search(r"\{[^{}]*\{(?!\{)[^{}]*\}", pattern):
            raise SecurityError("it takes the width of a formatted value from another value")
        self.charge(sys.getsizeof(pattern))
        widths = re.findall(r"\d+", pattern)
        if any(len(digits) > 8 for digits in widths):
            raise SecurityError("it formats a value with a huge width")
        self.charge(4 * sum(map(int, widths)) + 2 * pattern.count(mark) * self.measure(values)[0])

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Of strings, lists, dicts and numbers only METHODS; of jinja2's own objects what jinja2 calls safe."""
        for kind in type(obj).__mro__:
            if kind in METHODS:
                return attr in METHODS[kind]
        return super().is_safe_attribute(obj, attr, value)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """obj.attribute; the commonest in chat templates, keys of a message and numbers of a loop, come first."""
        if type(obj) is dict and attribute not in DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if type(obj) is LoopContext and attribute in LOOP_NUMBERS:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """obj[argument]; a tuple is charged, its hash looks at all of it."""
        if isinstance(argument, tuple):
            self.pay(argument)
        try:
            return obj[argument]
        except (TypeError, LookupError):
            return super().getitem(obj, argument)

    def call(__self, __context: Any, __function: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  as jinja2 has it
        """Call a macro (its body is charged as it runs), a function or a method."""
        __self.charge(STEP * (2 + len(args) + len(kwargs)))
        method = getattr(__function, "__wrapped__", __function)  # jinja2 wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(__function, LoopContext):
            args = (__self.loop(args[0], STEP * 100), *args[1:])  # a recursive loop goes down
        elif isinstance(owner, str):
            args = __self._pay_method(method.__name__, owner, args, kwargs)
        elif isinstance(owner, dict):
            __self.charge(sys.getsizeof(owner) if method.__name__ == "copy" else 0)
            __self.pay(args)
        elif isinstance(owner, list | tuple | LoopContext) or __function is dict:
            __self.pay((owner, args))
        return super().call(__context, __function, *args, **kwargs)

    def _pay_method(self, name: str, text: str, args: tuple, kwargs: dict) -> tuple:
        """Charge a method of `text` for its result; returns `args`, in which an iterator is made a list."""
        args = tuple(list(self._one_by_one(arg, STEP)) if isinstance(arg, Iterator) else arg for arg in args)
        size, given = sys.getsizeof(text), args[0] if args else None
        if name in ("center", "ljust", "rjust", "zfill"):
            size += 4 * abs(given)
        elif name == "join":
            size = self.measure(given)[0] + size * len(given)
        elif name == "replace":
            size += text.count(given) * sys.getsizeof(args[1])
        elif name in ("format", "format_map"):
            self._pay_format(text, (args, kwargs), "{")
        elif name in ("strip", "lstrip", "rstrip", "rfind", "rindex", "rpartition", "rsplit") and given is not None:
            size += len(text) * len(given)  # each searches in the time of the product
        if name in ("split", "rsplit", "splitlines"):
            size += 64 * len(text) // (1 + len(given) if isinstance(given, str) else 2)
        self.charge(size)
        return args

    def raise_exception(self, message: Any) -> None:
        """How a template refuses messages."""
        raise jinja2.TemplateError(str(self.pay(message)))

    # ---- filters and tests

    def _charged_filter(self, name: str, function: Callable) -> Callable:
        place = 1 if hasattr(function, "jinja_pass_arg") else 0  # of the value among the arguments
        plain = name not in PER_CHARACTER and name not in LAZY_FILTERS and name not in CONSTANT_FILTERS

        @functools.wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            if plain and not kwargs and type(args[-1]) is str and len(args) == place + 1:  # the common case
                self.left -= STEP + 8 * sys.getsizeof(args[-1])
                if self.left > 0:
                    return function(*args)
            value, others = args[place], [*args[place + 1 :], *kwargs.values()]
            self.charge(2 * STEP)
            if name in LAZY_FILTERS:
                value = self.loop(value, 4 * STEP + sum(len(other) for other in others if isinstance(other, str)))
            elif name not in CONSTANT_FILTERS:
                if isinstance(value, Iterator):
                    value = list(self._one_by_one(value, STEP))
                self._pay_filter(name, value, others)
            result = function(*args[:place], value, *args[place + 1 :], **kwargs)
            if isinstance(result, int) and result.bit_length() > MAX_BITS:
                raise SecurityError(f"it makes an integer of more than {MAX_BITS} bits")
            return result

        return charged

    def _pay_filter(self, name: str, value: Any, others: list) -> None:
        """Charge a filter before it works: for what it looks at, and for what its arguments make of that."""
        size, depth = self.measure(value)
        texts = sum(self.measure(other)[0] for other in others if not isinstance(other, int))
        widths = sum(abs(other) for other in others if isinstance(other, int))
        items = len(value) if hasattr(value, "__len__") else 1
        if name in ("round", "sum") and not all(isinstance(number, int | float | str) for number in others):
            raise SecurityError(f"the filter {name!r} is for numbers")
        if name == "round" and not isinstance(value, int | float):
            raise SecurityError("the filter 'round' is for numbers")
        if name in PER_CHARACTER and isinstance(value, str):
            size += 80 * items  # a string for every character
        if name in ("batch", "center", "slice", "truncate", "round"):
            size += 64 * widths
        elif name == "indent":
            size += (str(value).count("\n") + 1) * (4 * widths + texts)
        elif name == "replace":
            size += str(value).count(str(others[0])) * texts
        elif name == "format":
            self._pay_format(value, tuple(others), "%")
        elif name == "tojson":
            size += size * depth * (widths + texts) // STEP
        elif name in ("join", "trim", "sort", "groupby", "unique", "min", "max", "sum"):
            size += items * texts  # the separator or the path of an attribute, for every item
        self.charge(4 * size)

    def _charged_test(self, name: str, function: Callable) -> Callable:
        place = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def compared(*args: Any) -> bool:
            for value in args[place:]:
                self.pay(value)
            return function(*args)

        @functools.wraps(function)
        def computed(value: Any, *args: Any) -> bool:
            for number in (value, *args):
                if not isinstance(number, int | float):
                    raise TypeError(f"the test {name!r} is for numbers")
                self._check_integers("%", value, number)
            return function(value, *args)

        return compared if name in COMPARING_TESTS else computed if name in NUMBER_TESTS else function


def _times(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 1


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own `tojson` would escape <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
