"""What the documentation's build does beyond what mkdocs.yml can say.

- A public name of reversax without an entry on a page makes the build fail.
- Cross-references to Diffrax lead to its own documentation. (An inventory of that would
  be fetched at each build, which is to work without a network.)
"""

import inspect

from mkdocs.exceptions import PluginError

import reversax
import reversax.compare

DIFFRAX = "https://docs.kidger.site/diffrax/api/"
# The names of Diffrax that docstrings refer to, and the pages where they are.
PAGES = {"RecursiveCheckpointAdjoint": "adjoints"}


def public_names() -> list[str]:
    """As they are imported from a module of reversax."""
    return sorted(
        f"{module.__name__}.{name}"
        for module in (reversax, reversax.compare)
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    )


def on_config(config):
    for name, page in PAGES.items():
        full = f"diffrax.{name}"
        config.plugins["autorefs"].register_url(full, f"{DIFFRAX}{page}/#{full}")
    return config


def on_env(env, config, files):
    """Once all pages are rendered."""
    documented = config.plugins["autorefs"]
    for name in public_names():
        try:
            documented.get_item_url(name)
        except KeyError:
            raise PluginError(
                f"`{name}` is public and has no entry in the documentation. "
                f"Add the line `::: {name}` to docs/api.md."
            ) from None
    return env
