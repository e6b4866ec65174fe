"""``inlay methods``."""

from __future__ import annotations

from . import catalogue
from .options import Methods
from .tables import table


def run(options: Methods) -> None:
    """Print the methods, or the options of one.

    Raises:
        UserError: there is no such method.
    """
    if options.name is None:
        names = [*catalogue.method_configs(), *catalogue.BASELINES]
        print(table(["method", "learning rate", "what it is"], [[n, f"{catalogue.learning_rate(n):g}", catalogue.summary(n)] for n in names]))
        print("\n'inlay methods NAME' shows a method's options")
        return
    catalogue.check_method(options.name)
    print(f"{options.name}: {catalogue.summary(options.name)}\nlearning rate by default: {catalogue.learning_rate(options.name):g}")
    if options.name in catalogue.BASELINES:
        return
    told = catalogue.option_help(options.name)
    rows = [
        [f"--method.{f.name.replace('_', '-')}", catalogue.default_of(f), told.get(f.name, "")] for f in catalogue.own_options(options.name)
    ]
    print("\n" + table(["option", "default", "what it is"], [[name, str(default), what] for name, default, what in rows]))
