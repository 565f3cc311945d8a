"""The README does what it says."""

import re
from contextlib import redirect_stdout
from io import StringIO


def test_the_first_example_prints_what_the_readme_shows(repository):
    text = (repository / "README.md").read_text()
    code, shown = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", text, re.DOTALL).groups()
    printed = StringIO()
    with redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue() == shown


def test_every_file_that_the_readme_links_is_there(repository):
    text = (repository / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (repository / link).exists()] == []
