"""Sums, differences and products of whole numbers: a task family of any size, from trivial to hard for small models.

Every expression that the parameters allow has a number, in a mixed-radix system of operations and operands, so tasks
are made when they are asked for however many there are. A fixed shuffle of these numbers is cut in two: the first
`held_out` are for evaluation and never trained on, whatever the job's seed. (Expressions are told apart as written:
2 + 3 may be held out and 3 + 2 trained on.)
"""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import Annotated, Literal

import msgspec

from services.environment.api import Environment, EnvironmentParams, Message, Split, Task, UserError, permuted

Operation = Literal["+", "-", "*"]
SHUFFLE = "arithmetic"
LARGEST = 10**12
MOST_FILTERED = 200_000
"""Expressions that are looked at one by one; it takes a fraction of a second."""


class ArithmeticParams(EnvironmentParams):
    """What the expressions look like."""

    operations: Annotated[tuple[Operation, ...], msgspec.Meta(min_length=1)] = ("+",)
    """To choose from at each place. Products go before sums, as usual."""
    operands: Annotated[int, msgspec.Meta(ge=2, le=4)] = 2
    """How many numbers."""
    min: int | list[int] = 0
    """Smallest number, or one for each operand. Negative ones are written in parentheses."""
    max: int | list[int] = 99
    """Largest number, or one for each operand."""
    template: str = "What is {expression}? Reply with the number only."
    """The question; `{expression}` stands for the expression."""
    system: str | None = None
    """System message. None: none."""
    prefill: str = ""
    """Begins the reply for the policy, for instance `{expression} =`; it is not part of what a reward sees."""
    carry: bool = True
    """False: only sums in which no column of digits adds up to more than 9."""
    held_out: Annotated[int, msgspec.Meta(ge=0)] = 256
    """Expressions kept for evaluation."""


class Arithmetic(Environment[ArithmeticParams]):
    """One question, one reply; a reward (`exact_match`, `numeric`) compares it with the answer."""

    Params = ArithmeticParams

    def __init__(self, params: ArithmeticParams) -> None:
        """Raise `UserError` if the ranges make no sense or leave nothing to train on."""
        super().__init__(params)
        self._operations = list(dict.fromkeys(params.operations))
        self._ranges = list(zip(_each(params, "min"), _each(params, "max"), strict=True))
        _check(params, self._ranges)
        self._radixes = [len(self._operations)] * (params.operands - 1) + [high - low + 1 for low, high in self._ranges]
        self._allowed = None if params.carry else self._without_carry()
        self._count = math.prod(self._radixes) if self._allowed is None else len(self._allowed)
        if self._count <= params.held_out:
            raise UserError(
                f"environment 'arithmetic' has only {self._count} expressions with these parameters, and held_out = "
                f"{params.held_out} leaves none to train on: widen min and max, or lower held_out"
            )

    def size(self, split: Split) -> int:
        """See `Environment.size`."""
        return self.params.held_out if split == "held_out" else self._count - self.params.held_out

    def task(self, split: Split, index: int, seed: int) -> Task:
        """See `Environment.task`."""
        place = index if split == "held_out" else self.params.held_out + index
        number = permuted(place, self._count, SHUFFLE)
        operations, operands = self._decoded(number if self._allowed is None else self._allowed[number])
        expression = _written(operations, operands)
        return Task(
            question=self.params.template.replace("{expression}", expression),
            answer=str(_value(operations, operands)),
            metadata={"expression": expression},
        )

    def start(self, task: Task) -> list[Message]:
        """See `Environment.start`."""
        system = [Message(role="system", content=self.params.system)] if self.params.system else []
        begun = self.params.prefill.replace("{expression}", task.metadata["expression"])
        reply = [Message(role="assistant", content=begun)] if begun else []
        return [*system, Message(role="user", content=task.question), *reply]

    def _without_carry(self) -> list[int]:
        """Numbers of the expressions whose columns add up to at most 9."""
        count = math.prod(self._radixes)
        if self._operations != ["+"] or min(low for low, _ in self._ranges) < 0 or count > MOST_FILTERED:
            raise UserError(
                "environment 'arithmetic': carry = false is for sums of numbers that are not negative, with at most "
                f"{MOST_FILTERED:,} expressions: here operations = {self._operations} and {count:,} expressions"
            )
        return [number for number in range(count) if not _carries(self._decoded(number)[1])]

    def _decoded(self, number: int) -> tuple[list[Operation], list[int]]:
        digits = []
        for radix in self._radixes:
            number, digit = divmod(number, radix)
            digits.append(digit)
        places = self.params.operands - 1
        operands = [low + digit for (low, _), digit in zip(self._ranges, digits[places:], strict=True)]
        return [self._operations[digit] for digit in digits[:places]], operands


def _each(params: ArithmeticParams, name: Literal["min", "max"]) -> list[int]:
    given = params.min if name == "min" else params.max
    if isinstance(given, int):
        return [given] * params.operands
    if len(given) != params.operands:
        raise UserError(
            f"environment 'arithmetic': {name} has {len(given)} numbers for operands = {params.operands}: give one "
            "for each, or a single number for all"
        )
    return given


def _check(params: ArithmeticParams, ranges: list[tuple[int, int]]) -> None:
    if "{expression}" not in params.template:
        raise UserError(
            f"environment 'arithmetic': template {params.template!r} does not hold {{expression}}, so the policy would "
            "not see the question"
        )
    for low, high in ranges:
        if not -LARGEST <= low <= high <= LARGEST:
            raise UserError(
                f"environment 'arithmetic': an operand from {low} to {high} is impossible: min must not be above max, "
                f"and both within {LARGEST:.0e} of 0"
            )


def _carries(operands: list[int]) -> bool:
    columns = zip_longest(*(reversed(str(operand)) for operand in operands), fillvalue="0")
    return any(sum(map(int, column)) > 9 for column in columns)


def _written(operations: list[Operation], operands: list[int]) -> str:
    numbers = [str(operand) if operand >= 0 else f"({operand})" for operand in operands]
    return " ".join([numbers[0], *(f"{sign} {number}" for sign, number in zip(operations, numbers[1:], strict=True))])


def _value(operations: list[Operation], operands: list[int]) -> int:
    """The value of the expression: a sum of signed products."""
    terms = [operands[0]]
    for operation, operand in zip(operations, operands[1:], strict=True):
        if operation == "*":
            terms[-1] *= operand
        else:
            terms.append(operand if operation == "+" else -operand)
    return sum(terms)
