"""A hook of mkdocs: roles such as :class:`Name` in docstrings are shown as `Name`."""

import re

ROLE = re.compile(r":(?:class|func|meth|attr|data|mod):<code>~?(.*?)</code>")


def on_page_content(html: str, **_: object) -> str:
    return ROLE.sub(r"<code>\1</code>", html)
