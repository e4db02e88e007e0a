"""The jobs of a run, read from the workflow's own list of its files."""

from __future__ import annotations

import re
import sys
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest

from crfm_core import ConfigError
from crfm_core.planning.jobs import Job, list_outputs, read_jobs

RULES = {
    "tile_scenes": {"outputs": [r"results/(?P<dataset>a|b)/tiles/(?P<split>\w+)\.parquet"], "benchmark": "{dataset}-{split}.tsv"},
    "make_report": {"outputs": ["results/report.html", "results/figures"], "benchmark": ""},
}


def listing(*rows: tuple[str, str, str]) -> str:
    return "\n".join("\t".join(row) for row in (("output_file", "rule", "plan"), *rows))


def test_a_job_with_several_files_counts_once_and_is_open_while_one_of_them_is():
    text = listing(
        ("results/report.html", "make_report", "no update"),
        ("results/figures", "make_report", "update pending"),
        ("results/a/tiles/train.parquet", "tile_scenes", "no update"),
    )
    assert read_jobs(text, RULES) == [
        Job("tile_scenes", {"dataset": "a", "split": "train"}, False, Path("a-train.tsv")),
        Job("make_report", {}, True, None),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not listed in the form expected"),
        ("rule\tplan\nmake_report\tno update", "not listed in the form expected; it begins with 'rule"),
        (listing(("results/c/tiles/x.parquet", "tile_scenes", "no update")), "results/c/tiles/x.parquet as a file of rule tile_scenes"),
        (listing(("results/x", "unheard_of", "no update")), "results/x as a file of rule unheard_of, which makes no such file"),
    ],
)
def test_a_listing_that_does_not_fit_the_rules_is_refused(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_jobs(text, RULES)


def test_what_the_listing_program_complains_of_is_passed_on(tmp_path):
    with pytest.raises(ConfigError, match="cannot be listed: no such key"):
        list_outputs([sys.executable, "-c", "import sys; sys.exit('no such key')"], tmp_path)


def test_files_whose_jobs_were_stopped_are_asked_for_again(tmp_path):
    """Whatever the length of their names, and nothing else that has a mark."""
    short, long = "results/a.parquet", f"results/{'x' * 250}.parquet"
    mark = urlsafe_b64encode(long.encode()).decode()
    (tmp_path / f"@{mark[:200]}").mkdir()
    for path in (f"@{mark[:200]}/{mark[200:]}", urlsafe_b64encode(b"results/elsewhere").decode(), "no mark"):
        (tmp_path / path).touch()
    program = f"import sys; print('{short}\\tx\\n{long}\\tx', sys.argv[1:])"
    assert list_outputs([sys.executable, "-c", program], tmp_path).endswith(f"x ['--forcerun', '{long}']\n")
