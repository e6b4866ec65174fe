"""``inlay methods``."""

from __future__ import annotations

import textwrap

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
        print(
            table(
                ["method", "learning rate", "what it is"],
                [[n, f"{catalogue.learning_rate(n):g}", catalogue.summary(n)] for n in names],
            )
        )
        print("\n'inlay methods NAME' shows a method's options")
        return
    catalogue.check_method(options.name)
    print(
        f"{options.name}: {catalogue.summary(options.name)}\nlearning rate by default: {catalogue.learning_rate(options.name):g}"
    )
    if options.name in catalogue.BASELINES:
        return
    if presets := catalogue.preset_names(options.name):
        print("\n--method.preset  (default: None)")
        known = f"a known configuration, whose values the other options change: {', '.join(presets)}"
        print(textwrap.fill(known, 100, initial_indent="    ", subsequent_indent="    "))
    told = catalogue.option_help(options.name)
    for f in catalogue.own_options(options.name):
        if f.name in told:
            print(f"\n--method.{f.name.replace('_', '-')}  (default: {catalogue.default_of(f)})")
            print(textwrap.fill(told[f.name], 100, initial_indent="    ", subsequent_indent="    "))
