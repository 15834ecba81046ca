"""A machine that reads pickles without running them, for the formats whose pickles hold tensors.

A pickle is a program, so it isn't handed to Python's pickle. This machine knows the few instructions that make data, imports nothing, and
calls nothing but the builders that a format hands it. Nothing that it makes grows faster than the pickle that it reads, in memory or time.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from resbackbone.weights.reading import refusal

MAX_KEY_LENGTH = 4096  # of text; longer ones, compared again and again, take for ever
MAX_KEY_BITS = 64  # of a number: an address
MAX_ARGUMENTS = 16
MAX_COPIES = 2  # of each byte: text is made bytes, and bytes an array

Builder = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Global:
    """A class or function that a pickle names. It stays a name; a call of it is one of its builder, if it has one."""

    name: str
    build: Builder | None = None


@dataclass(frozen=True)
class Dialect:
    """What one format's pickles may hold.

    Args:
        find_global: from a dotted name to what stands for it; raises for one that the format doesn't need.
        set_state: changes an object as the format's BUILD does; raises for any other object or state. A state is a tuple, empty for those
            that a pickle writes in another way.
        protocol: of the pickles; later instructions are refused.
    """

    find_global: Callable[[str], Global]
    set_state: Callable[[Any, tuple[Any, ...]], None]
    protocol: int


class Source(Protocol):
    """Where a pickle is read from. It makes no room for more than it has, as BytesIO doesn't."""

    def read(self, count: int, /) -> bytes: ...

    def readline(self) -> bytes: ...

    def tell(self) -> int: ...


@dataclass
class PickleMachine:
    """What pickle's instructions work on: a stack, the stacks below each open mark, and a memo (a dict: no number makes it large)."""

    dialect: Dialect
    persistent: Mapping[str, Any]
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    paid: int = 0  # bytes and entries that went into calls and states
    position: int = 0  # bytes of the pickle that were read

    def step(self, name: str, argument: Any) -> None:
        if name in LITERALS:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in CONTAINERS:
            operands = self._operands(name)  # before the stack is looked up: it may be another afterwards
            self.stack.append(CONTAINERS[name](operands))
        elif name in ACTIONS:
            ACTIONS[name](self, *self._operands(name))
        elif name in PUTS:
            self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
        elif name in GETS:
            self.stack.append(self.memo[argument])
        elif name == "MARK":
            self.marks.append(self.stack)
            self.stack = []
        elif name == "GLOBAL":
            self.push_global(*argument.split(" ", 1))
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise refuse_instruction(name)

    def _operands(self, name: str) -> list[Any]:
        """A fixed number from the top of the stack, or all above the last mark."""
        if name not in OPERANDS:
            operands, self.stack = self.stack, self.marks.pop()
            return operands
        return [self.stack.pop() for _ in range(OPERANDS[name])][::-1]

    def set_items(self, *flat: Any) -> None:
        if not isinstance(self.stack[-1], dict):
            raise ValueError(f"items for a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(_pair_up(flat))

    def append(self, *values: Any) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError(f"elements for a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(values)

    def push_global(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("a name that is no text")
        self.stack.append(self.dialect.find_global(f"{module[:200]}.{name[:200]}"))

    def push_persistent(self, key: Any) -> None:
        self.stack.append(self.persistent[str(check_key(key))])

    def call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Global) or function.build is None:
            named = function.name if isinstance(function, Global) else f"a {type(function).__name__}"
            raise refusal(f"calls {named}, which no tensor needs")
        if not isinstance(arguments, tuple):
            raise ValueError(f"a call with a {type(arguments).__name__}")
        self._pay_for(arguments)
        self.stack.append(function.build(*arguments))

    def set_state(self, state: Any) -> None:
        state = state if isinstance(state, tuple) else ()  # what a list holds would not be paid for
        self._pay_for(state)
        self.dialect.set_state(self.stack[-1], state)

    def _pay_for(self, arguments: tuple[Any, ...]) -> None:
        """What a call may copy. Calls again and again on one value, which cost the pickle nothing, end here."""
        if len(arguments) > MAX_ARGUMENTS:
            raise ValueError(f"a call with {len(arguments)} arguments")
        self.paid += sum(len(argument) for argument in arguments if isinstance(argument, (str, bytes, bytearray, list, tuple, dict)))
        if self.paid > MAX_COPIES * self.position:
            raise ValueError("it claims to hold more than its own bytes")


def unpickle(source: Source, dialect: Dialect, persistent: Mapping[str, Any] | None = None) -> Any:
    """The object of the pickle at the source's position, which is behind it afterwards. It may refer to `persistent` by key.

    Raises InputError for a pickle that asks for more than data, and one of `reading`'s DAMAGE for a broken one.
    """
    machine, start = PickleMachine(dialect, persistent or {}), source.tell()
    for opcode, argument, position in pickletools.genops(source):  # type: ignore[arg-type]
        if opcode.proto > dialect.protocol:
            raise refuse_instruction(opcode.name)
        machine.position = (position or 0) - start
        machine.step(opcode.name, argument)
    return machine.stack.pop()


def refuse_instruction(name: str) -> Exception:
    return refusal(f"uses pickle's instruction {name}, which no tensor needs")


def check_key(key: Any) -> str | int:
    """Only text and numbers are keys, and no long ones: tuples in tuples in tuples, for one, can take for ever to hash."""
    if (isinstance(key, str) and len(key) <= MAX_KEY_LENGTH) or (isinstance(key, int) and key.bit_length() <= MAX_KEY_BITS):
        return key
    raise ValueError("a key that is neither text nor a number, or a long one")


def make_dict(pairs: Any = ()) -> dict[Any, Any]:
    """What builds an OrderedDict; Python 2's has its pairs among the arguments."""
    if not isinstance(pairs, (list, tuple)):
        raise ValueError(f"a dict of a {type(pairs).__name__}")
    return {check_key(key): value for key, value in pairs}


def _pair_up(flat: Any) -> dict[Any, Any]:
    return make_dict(list(zip(flat[::2], flat[1::2], strict=True)))


LITERALS = (
    *("INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
PUTS, GETS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), ("GET", "BINGET", "LONG_BINGET")
OPERANDS = {  # of the instructions that don't take all above the last mark
    **dict.fromkeys(("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT"), 0),
    **dict.fromkeys(("TUPLE1", "APPEND", "BUILD", "BINPERSID"), 1),
    **dict.fromkeys(("TUPLE2", "SETITEM", "REDUCE", "NEWOBJ", "STACK_GLOBAL"), 2),
    "TUPLE3": 3,
}
CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    **dict.fromkeys(("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"), tuple),
    **dict.fromkeys(("LIST", "EMPTY_LIST"), list),
    **dict.fromkeys(("DICT", "EMPTY_DICT"), _pair_up),
}
ACTIONS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("SETITEM", "SETITEMS"), PickleMachine.set_items),
    **dict.fromkeys(("APPEND", "APPENDS"), PickleMachine.append),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), PickleMachine.call),
    "STACK_GLOBAL": PickleMachine.push_global,
    "BINPERSID": PickleMachine.push_persistent,
    "BUILD": PickleMachine.set_state,
}
