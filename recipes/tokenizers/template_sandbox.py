"""What chat templates run in, when a recipe is checked and in training: Jinja's sandbox, and no more than they need."""

import sys
from types import FrameType
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_REPEATED = 10_000
"""Longest product of a text or list with a number."""
MAX_LINES = 200_000
"""Lines of Python that one trial may run: a short conversation takes some hundreds."""
TEMPLATE_ERRORS = (
    TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError, MemoryError,
)  # fmt: skip
"""What a wrong template raises, whether it is compiled or rendered."""


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """No code, no files, no changed arguments; no powers and no long repetitions, which fill memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute a product; raises SecurityError for one that could be of any size."""
        if operator == "**":
            raise SecurityError("a chat template may not use **")
        for repeated, times in ((left, right), (right, left)):
            is_long = isinstance(times, int) and isinstance(repeated, str | list | tuple)
            if is_long and len(repeated) * times > MAX_REPEATED:
                raise SecurityError(f"a chat template may repeat a text up to {MAX_REPEATED} characters")
        return super().call_binop(context, operator, left, right)


def try_template(template: Template, **variables: Any) -> str:
    """Render once as a trial; raises SecurityError for a template that does not end, else TEMPLATE_ERRORS."""
    left = MAX_LINES

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise SecurityError(
                f"it runs more than {MAX_LINES} lines for {len(variables.get('messages', ()))} messages"
            )
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        return str(template.render(**variables))
    finally:
        sys.settrace(before)
