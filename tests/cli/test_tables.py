"""Plans and reports print as their tables: whole on the command line, in few lines elsewhere."""

import io
import random
import re

import pytest
import transformers
from click.testing import CliRunner
from helpers.models import generative
from helpers.tiny import make_config, save_tiny
from rich.console import Console

from mpoe_convert import Recipe, convert, plan
from mpoe_convert.cli import main
from mpoe_convert.tables import FEW, Shown, Table, listed, merge_names, shared_prefix, short_paths, size

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


def expanded(name: str) -> list[str]:
    """ "h.0-1,3 mlp.up" -> h.0.mlp.up, h.1.mlp.up, h.3.mlp.up."""
    start, blank, rest = name.partition(" ")
    if not re.search(r"\d$", start):
        return [name]
    above, _, parts = start.rpartition(".")
    found = []
    for part in parts.split(","):
        first, _, last = part.partition("-")
        numbers = range(int(first), int(last or first) + 1)
        found += [f"{above}.{number}{blank and '.'}{rest}" for number in numbers]
    return found


def prefix_of(table: Table) -> str:
    found = re.search(r" of ([^ ,]+)", table.title)
    return f"{found[1]}." if found else ""


def lines_of(value, width: int) -> list[str]:
    out = Console(file=io.StringIO(), width=width, record=True)
    out.print(value.rich() if isinstance(value, Table) else value)
    return [line.rstrip() for line in out.export_text().splitlines()]


def check_drawn(value, width: int) -> None:
    """No line is too wide, and every word of every cell stands whole."""
    lines = lines_of(value, width)
    assert max(map(len, lines)) <= width
    words = {word for line in lines for word in line.split()}
    for table in value.shown() if isinstance(value, Shown) else [value]:
        if isinstance(table, Table):
            cells = [*table.headers, *(cell for row in table.cells() for cell in row)]
            missing = {word for cell in cells for word in cell.split()} - words
            assert all(f"{word}:" in words for word in missing), missing


@pytest.mark.parametrize(
    ("names", "merged"),
    [
        (["a.h.0.mlp.up", "a.h.1.mlp.up", "a.h.3.mlp.up"], ["a.h.0-1,3 mlp.up"]),
        (["h.0.up", "h.0.down", "h.1.up", "h.1.down"], ["h.0-1 up", "h.0-1 down"]),
        (["block.0.layer.1.wi", "block.1.layer.1.wi"], ["block.0-1 layer.1.wi"]),
        ([f"h.{n}.up" for n in (98, 99, 100, 101)], ["h.98-101 up"]),
        (["stages.0.layers.0.up", "stages.0.layers.1.up"], ["stages.0.layers.0-1 up"]),
        (["mlp.up", "mlp.down"], ["mlp.up", "mlp.down"]),
        (["layers.0", "layers.1"], ["layers.0-1"]),
        ([f"h.{n}.up" for n in (0, 2, 4, 6, 8, 9)], ["h.0,2,4,6 up", "h.8-9 up"]),
    ],
)
def test_names_that_differ_in_a_layer_are_merged(names, merged):
    found = [name for name, _ in merge_names([(name, "same") for name in names])]
    assert found == merged
    apart = [name for name, _ in merge_names([(name, k) for k, name in enumerate(names)])]
    assert sorted(sum(map(expanded, apart), [])) == sorted(names)


def test_what_all_names_start_with_is_left_to_the_title():
    assert shared_prefix(["transformer.h.0-3 mlp.up", "transformer.h.4 mlp.up"]) == "transformer."
    assert shared_prefix(["encoder.block.0 up", "decoder.block.0 up"]) == shared_prefix(["h.0 up"]) == ""
    assert shared_prefix(["model.language_model.layers.0-99 mlp.gate"]) == "model.language_model."


@pytest.mark.parametrize("width", range(24, 100, 4))
def test_a_table_of_any_words_keeps_to_the_width(width):
    draw = random.Random(width)
    headers = [draw.choice(["size", "bonds", "a long header"]) + f" {k}" for k in range(5)]
    cells = ["12 x 34", "layer.0-13 mlp.up_proj", "1,234,567", "x", ""]
    rows = tuple({header: draw.choice(cells) for header in headers} for _ in range(6))
    check_drawn(Table("Some rows", rows, left=tuple(headers[:2])), width)


def test_paths_lose_the_folders_that_all_share():
    assert short_paths(["/a/b/out", "/a/b/dense"]) == ["out", "dense"]
    assert short_paths(["/a/b/out", "/a/c/out"]) == ["b/out", "c/out"]
    assert short_paths(["me/one", "me/two"]) == ["me/one", "me/two"]


def test_a_word_wider_than_the_paper_is_broken_behind_a_separator():
    lines = lines_of(Table("", ({"name": "model.language_model.layers.0.mlp.gate_proj"},)), 24)
    assert max(map(len, lines)) <= 24
    assert "".join("".join(lines).split()) == "namemodel.language_model.layers.0.mlp.gate_proj"
    assert all(line.endswith((".", "_", "proj")) for line in lines)


@pytest.mark.parametrize("options", [{}, {"keep": 0.9}, {"kind": "dense"}], ids=str)
def test_a_plan_is_whole_when_printed_and_short_when_shown(options, deep):
    found = plan(Recipe(deep, experts=2, bond_dim=2, layers="0-80", max_shard_size="20KB", **options))
    whole, short = printed(found), repr(found)
    table = next(part for part in found.shown() if isinstance(part, Table))
    names = [f"{prefix_of(table)}{name}" for row in table.rows for name in expanded(row["matrix"])]
    assert sorted(names) == sorted(matrix.name for matrix in found.matrices)
    for row in table.rows:
        assert len(re.findall(rf"(?<![\d.]){re.escape(row['matrix'])}(?![\w.])", whole)) == 1
    for width in (60, 80, 200):
        check_drawn(found, width)
    for file in found.shards:
        assert file in whole
    assert len(found.shards) > FEW and short == str(found)
    assert 1000 < len(short) < 5000
    said = [str(deep)[:40], "19 FFNs stay dense: h.81-99", "Totals", found.savings[:60]]
    for text in (*said, f"{found.totals.stored_params:,}"):
        assert text in short and text in whole
    assert short.splitlines()[2] in found._repr_html_()


@pytest.mark.parametrize("model_type", ["t5", "bart", "llava", "albert"])
def test_plans_of_other_architectures_keep_to_the_width(model_type, tmp_path):
    dense = save_tiny(model_type, generative(model_type), tmp_path / "a-folder-with-a-very-long-name")
    found = plan(Recipe(dense, experts=2, bond_dim=2, layout="balanced"))
    table = next(part for part in found.shown() if isinstance(part, Table))
    names = [f"{prefix_of(table)}{name}" for row in table.rows for name in expanded(row["matrix"])]
    assert sorted(names) == sorted(matrix.name for matrix in found.matrices)
    for width in (60, 80, 200):
        check_drawn(found, width)


def test_a_report_is_short_when_shown(deep, tmp_path):
    report = convert(Recipe(deep, experts=2, bond_dim=4, layers="0-20"), tmp_path / "out")
    whole, short = printed(report), repr(report)
    layers = next(part for part in report.shown() if isinstance(part, Table))
    names = [f"{prefix_of(layers)}{name}" for row in layers.rows for name in expanded(row["FFN"])]
    # Layers whose numbers look the same share a row.
    assert sorted(names) == sorted({m.name.rpartition(".")[0] for m in report.matrices})
    assert "h.20 mlp" in whole and report.plan.savings in whole
    more = f"and {len(layers.rows) - 4} rows more"
    assert len(short) < 5000 and more in short and "Totals" in short
    assert more in report._repr_html_()
    card = (tmp_path / "out/README.md").read_text()
    assert all(f"`{matrix.name}`" in card for matrix in report.matrices) and report.plan.savings in card
    for width in (60, 80):
        check_drawn(report, width)


def test_commands_keep_to_the_terminal(deep, tmp_path):
    def page(*args: str) -> str:
        terminal = {"COLUMNS": "80", "FORCE_COLOR": "1", "TERM": "xterm"}
        done = CliRunner().invoke(main, [*args], env=terminal)
        assert done.exit_code == 0, done.output
        return re.sub(r"\x1b\[[\d;]*m", "", done.stdout)

    out = str(tmp_path / "out")
    convert(Recipe(deep, experts=2, bond_dim=4, layers="0-1"), out)
    for command in (["plan", str(deep), "--bond-dim", "2"], ["families"], ["inspect", out]):
        for line in page(*command).splitlines():
            assert len(line) <= 80, line
