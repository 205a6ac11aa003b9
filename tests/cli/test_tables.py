"""Plans and reports print as their tables: whole on the command line, in few lines elsewhere."""

import io

import pytest
import transformers
from helpers.tiny import make_config
from rich.console import Console

from mpoe_convert import Recipe, convert, plan
from mpoe_convert.tables import FEW, Table, listed, size

ROWS = tuple({"name": f"row {k}", "count": 1000 * k, "rank": None} for k in range(9))


def printed(value) -> str:
    out = Console(file=io.StringIO(), width=200, record=True)
    out.print(value)
    return out.export_text()


def test_a_table_in_text_and_in_markdown():
    table = Table("Rows", ROWS, left=("name",))
    assert table.headers == ["name", "count"]  # nobody has a rank
    text = printed(table.rich())
    assert all(f"row {k}" in text for k in range(9)) and "8,000" in text
    lines = table.markdown().splitlines()
    assert lines[:3] == ["| name | count |", "| --- | ---: |", "| `row 0` | 0 |"] and len(lines) == 11
    ranked = Table("Rows", ({"name": "a", "rank": 3}, {"name": "b", "rank": None}))
    assert ranked.markdown().splitlines()[-1] == "| `b` | – |"


def test_the_head_of_a_table_says_what_is_left_out():
    text = printed(Table("Rows", ROWS).head(4).rich())
    assert "row 2" in text and "row 3" not in text and "and 6 rows more" in text
    assert Table("Rows", ROWS).head(9).rows == ROWS == Table("Rows", ROWS).head(None).rows


def test_brackets_are_no_markup():
    assert "[red]x[/red]" in printed(Table("", ({"name": "[red]x[/red]"},)).rich())


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1234567, "1.2 MB"), (3 * 10**12, "3.00 TB")]
)
def test_sizes(num_bytes, text):
    assert size(num_bytes) == text


def test_lists():
    assert (listed((12, 64)), listed(())) == ("12,64", None)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A GPT-2 of a hundred layers."""
    config = make_config("gpt2")
    config.n_layer = 100
    folder = tmp_path_factory.mktemp("deep")
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [{}, {"keep": 0.9}, {"kind": "dense"}], ids=str)
def test_a_plan_is_whole_when_printed_and_short_when_shown(options, deep):
    found = plan(Recipe(deep, experts=2, bond_dim=2, layers="0-80", max_shard_size="20KB", **options))
    whole, short = printed(found), repr(found)
    for matrix in found.matrices:
        assert whole.count(matrix.name) == 1
    for file in found.shards:
        assert file in whole
    assert len(found.shards) > FEW and short == str(found)
    assert 1000 < len(short) < 4000 < len(whole)
    for said in (str(deep)[:40], "19 FFNs stay dense", "Totals", f"{found.totals.stored_params:,}"):
        assert said in short and said in whole
    assert "and 158 rows more" in short and "and 158 rows more" not in whole
    assert short.splitlines()[2] in found._repr_html_()


def test_a_report_is_short_when_shown(deep, tmp_path):
    report = convert(Recipe(deep, experts=2, bond_dim=4, layers="0-20"), tmp_path / "out")
    whole, short = printed(report), repr(report)
    assert f"{report.matrices[-1].name.rpartition('.')[0]} " in whole
    assert len(short) < 4000 and "and 17 rows more" in short and "Totals" in short
    assert "and 17 rows more" in report._repr_html_()
    assert all(f"`{matrix.name}`" in (tmp_path / "out/README.md").read_text() for matrix in report.matrices)
