"""A mypy plugin that writes down every attribute that code refers to: its full name, a tab, and the file that reads it.

The file to append to is named by the environment variable ATTRIBUTE_READS.
"""

import os
from collections.abc import Callable

from mypy.nodes import MemberExpr
from mypy.plugin import AttributeContext, Plugin
from mypy.types import Type


class AttributeReads(Plugin):
    """Changes no type: it only looks on while mypy finds out what each expression is."""

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type]:
        """Note `fullname`, which names the class that declares the attribute."""

        def note(context: AttributeContext) -> Type:
            if isinstance(context.context, MemberExpr):  # not a declaration in a class body
                with open(os.environ["ATTRIBUTE_READS"], "a", encoding="utf-8") as file:
                    file.write(f"{fullname}\t{context.api.path}\n")
            return context.default_attr_type

        return note


def plugin(version: str) -> type[Plugin]:
    """What mypy asks for."""
    return AttributeReads
