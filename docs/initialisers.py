"""A Griffe extension for the signatures and docstrings of `__init__`.

As in Diffrax these docstrings are set after the class, and Equinox makes most of the
methods. Griffe reads the source without running it and sees neither, so both are taken
from the class itself.
"""

import inspect
import sys

import griffe

import reversax.compare  # noqa: F401


class Initialisers(griffe.Extension):
    def on_class(self, *, cls: griffe.Class, **kwargs) -> None:
        module = sys.modules.get(cls.module.path)
        init = getattr(getattr(module, cls.name, None), "__init__", None)
        documented = getattr(init, "__doc__", None)
        if documented in (None, object.__init__.__doc__):
            return
        cls.set_member(
            "__init__",
            griffe.Function(
                "__init__",
                lineno=cls.lineno,
                endlineno=cls.endlineno,
                parameters=griffe.Parameters(*map(_parameter, _parameters(init))),
                docstring=griffe.Docstring(inspect.cleandoc(documented)),
            ),
        )


def _parameters(init):
    return inspect.signature(init).parameters.values()


def _parameter(parameter: inspect.Parameter) -> griffe.Parameter:
    has_default = parameter.default is not inspect.Parameter.empty
    kind = griffe.ParameterKind(parameter.kind.description)
    default = repr(parameter.default) if has_default else None
    return griffe.Parameter(parameter.name, kind=kind, default=default)
