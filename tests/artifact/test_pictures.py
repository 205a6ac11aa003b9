"""`report`: pictures of what the reports hold, and the card that shows them."""

import json
import shutil
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from helpers.data import QUICK, words
from huggingface_hub import ModelCard
from matplotlib.backends.backend_agg import FigureCanvasAgg
from safetensors.torch import load_file

from mpoe_convert import Finetuning, Recipe, convert, draw_pictures, finetune
from mpoe_convert.artifact.layout import CARD_FILE, REPORT_FILE, TRAINING_REPORT_FILE, file_names
from mpoe_convert.artifact.pictures import _figures
from mpoe_convert.cli import main
from mpoe_convert.errors import CheckpointError, OutputError


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def figures(folder) -> dict:
    training = folder / TRAINING_REPORT_FILE
    found = _figures(folder, read(folder / REPORT_FILE), read(training) if training.exists() else None)
    return {name: figure for name, _, figure in found}


@pytest.fixture
def tuned(artifact, tmp_path):
    _, out = artifact("gpt2", noise=0.1)
    data = tmp_path / "text.txt"
    data.write_text(words(600))
    run = Finetuning(str(out), str(data), str(data), **QUICK)
    finetune(run, tmp_path / "tuned")
    return tmp_path / "tuned"


@pytest.mark.parametrize("kind", ["mpo", "dense", "low-rank", "adapter"])
def test_after_conversion(kind, tiny_gpt2, tmp_path):
    out = tmp_path / "out"
    convert(Recipe(str(tiny_gpt2), kind=kind, experts=3, bond_dim=4), out)
    before = (out / CARD_FILE).read_text()
    written = draw_pictures(out)
    assert list(written) == ["error", "parameters"]
    for png, svg in written.values():
        assert (out / png).read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(out / svg).getroot().tag.endswith("svg")
    card = (out / CARD_FILE).read_text()
    assert all(f"]({png})" in card for png, _ in written.values())
    assert card.index("## Pictures") < card.index("## Limits") and ModelCard(card).data.tags
    assert card.replace(card[card.index("## Pictures") : card.index("## Limits")], "") == before
    assert sorted(read(out / REPORT_FILE)["files"]) == file_names(out)
    files = {path: (out / path).read_bytes() for path in file_names(out)}
    draw_pictures(out)
    assert {path: (out / path).read_bytes() for path in file_names(out)} == files
    convert(
        Recipe(str(tiny_gpt2), kind=kind, experts=2, bond_dim=4), out, overwrite=True
    )  # they are the artifact's own
    assert not (out / "pictures").exists()


def test_they_show_what_the_reports_say(tuned):
    report, log = read(tuned / REPORT_FILE), read(tuned / TRAINING_REPORT_FILE)["log"]
    drawn = figures(tuned)
    assert list(drawn) == ["error", "parameters", "losses", "load"]
    lines = {line.get_label(): line for line in drawn["error"].axes[0].lines}
    for role in ("up", "down"):
        own = [m for m in report["matrices"] if m["name"].endswith(role)]
        assert lines[f"{role}: error of expert 0"].get_ydata().tolist() == [m["relative_error"] for m in own]
        assert lines[f"{role}: drift of a clone"].get_ydata().tolist() == [m["clone_drift"] for m in own]
    totals = report["totals"]["ffn"]
    sizes = {}
    for bar in drawn["parameters"].axes[0].patches:
        place = round(bar.get_y() + bar.get_height() / 2)
        sizes[place] = sizes.get(place, 0) + bar.get_width()
    names = ("active_params", "stored_params", "plain_moe_active_params", "plain_moe_params", "dense_params")
    assert [sizes[place] for place in range(5)] == pytest.approx([totals[name] for name in names])
    training, evaluation, written = drawn["losses"].axes[0].lines
    assert set(written.get_xdata()) == {read(tuned / TRAINING_REPORT_FILE)["written_step"]}
    assert evaluation.get_xdata()[0] == 0  # before the first step
    assert training.get_xydata().tolist() == [[e["step"], e["loss"]] for e in log if "loss" in e]
    assert evaluation.get_xydata().tolist() == [[e["step"], e["eval_loss"]] for e in log if "eval_loss" in e]
    loads = [entry["expert_load"] for entry in log if "expert_load" in entry]
    assert len(loads) == 2 and all(
        sum(load) == pytest.approx(1, abs=1e-3) for e in loads for load in e.values()
    )
    for axes, path in zip(drawn["load"].axes, loads[0], strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        assert axes.get_title() == path
        for expert in range(3):
            assert lines[f"expert {expert}"].get_ydata().tolist() == [load[path][expert] for load in loads]
        assert set(lines["1/3: all alike"].get_ydata()) == {1 / 3}


def training_report(num_experts: int, num_layers: int, written: int = 2) -> dict:
    """A report of four steps, with losses that matplotlib would write with an offset."""
    log = []
    for step in range(1, 5):
        shares = [1.0 + (expert + step) % num_experts for expert in range(num_experts)]
        load = [share / sum(shares) for share in shares]
        entry = {"step": step, "loss": 1000 + 1e-4 * step}
        log.append(entry | {"expert_load": {f"h.{layer}.mlp": load for layer in range(num_layers)}})
    return {"log": log, "written_step": written}


@pytest.mark.parametrize(("num_experts", "num_layers"), [(2, 1), (14, 3), (16, 40), (40, 2)])
def test_every_picture_can_be_read(num_experts, num_layers, artifact):
    _, out = artifact("gpt2", noise=0.1)
    found = _figures(out, read(out / REPORT_FILE), training_report(num_experts, num_layers))
    for name, caption, figure in found:
        FigureCanvasAgg(figure).draw()
        assert figure.get_suptitle() and caption
        [legend] = figure.legends
        (left, _), (right, _) = legend.get_window_extent().get_points()
        assert 0 <= left < right <= figure.bbox.width, name
        for axes in figure.axes:
            assert not axes.xaxis.get_offset_text().get_text()
            assert not axes.yaxis.get_offset_text().get_text()
        if name != "load":
            assert figure.axes[0].get_xlabel() and (name == "parameters" or figure.axes[0].get_ylabel())
            continue
        assert figure.get_supylabel() == "share of the choices"
        shown = [axes for axes in figure.axes if axes.get_title()]
        assert sum(axes.get_xlabel() == "optimizer step" for axes in shown) == min(num_layers, 4)
        assert all(max(line.get_ydata()) < axes.get_ylim()[1] for axes in shown for line in axes.lines[:-1])
        assert len(shown) == min(num_layers, 14)
        assert ("one of every 3 layers" in figure.get_suptitle()) == (num_layers == 40)
        looks = [
            (line.get_color(), line.get_linestyle())
            for line in shown[0].lines
            if line.get_label().startswith("expert")
        ]
        assert len(looks) == len(set(looks)) == (num_experts if num_experts <= 16 else 0)
        labels = {text.get_text() for text in figure.legends[0].get_texts()}
        assert {f"1/{num_experts}: all alike", "later steps, not in the weights"} <= labels
        assert any("whose weights were written" in label for label in labels)


def test_no_point_of_the_errors_hides_another(artifact):
    _, out = artifact("llama", noise=0.1)
    axes = figures(out)["error"].axes[0]
    places = {line.get_label().partition(":")[0]: tuple(line.get_xdata()) for line in axes.lines}
    assert len(places) == 3 and len({place for found in places.values() for place in found}) == 6
    assert all(line.get_linestyle() == "None" for line in axes.lines)  # FFNs are no axis to go along


def test_biases_of_the_experts_are_theirs(tiny_gpt2, tmp_path):
    convert(Recipe(str(tiny_gpt2), bias="per-expert", experts=3, bond_dim=4), tmp_path / "out")
    bars = figures(tmp_path / "out")["parameters"].axes[0].patches
    shared, own, _ = (bar.get_width() for bar in bars[3:6])  # of what is stored
    found = load_file(tmp_path / "out" / "model.safetensors")
    mlp = {name: tensor for name, tensor in found.items() if ".mlp." in name and "router" not in name}
    assert own == sum(t.numel() for n, t in mlp.items() if ".aux_" in n or n.endswith("bias"))
    assert shared == sum(t.numel() for n, t in mlp.items() if ".central_" in n)


def test_what_cannot_be_drawn_or_written(tuned):
    report = read(tuned / TRAINING_REPORT_FILE)
    entry = next(entry for entry in report["log"] if "expert_load" in entry)
    report["log"] = [entry]
    (tuned / TRAINING_REPORT_FILE).write_text(json.dumps(report))
    assert list(figures(tuned)) == ["error", "parameters", "losses"]
    (tuned / "pictures").write_text("")
    with pytest.raises(OutputError, match="cannot write the pictures"):
        draw_pictures(tuned)


def test_pictures_do_not_outlive_what_they_show(artifact, tmp_path):
    _, out = artifact("gpt2", noise=0.2)
    shutil.copytree(out, tmp_path / "out")
    draw_pictures(tmp_path / "out")
    (tmp_path / "text.txt").write_text(words(600))
    finetune(Finetuning(str(tmp_path / "out"), str(tmp_path / "text.txt"), **QUICK), tmp_path / "tuned")
    assert "pictures/" not in (tmp_path / "tuned" / CARD_FILE).read_text()
    assert not (tmp_path / "tuned" / "pictures").exists()
    assert set(read(tmp_path / "tuned" / REPORT_FILE)["files"]) <= set(file_names(tmp_path / "tuned"))


def test_the_card_of_a_tuned_model(tuned):
    card = (tuned / CARD_FILE).read_text()
    assert "## Training" in card and "4 steps" in card and "perplexity" in card
    assert "The router is untrained" not in card


def test_command_line(tuned, tmp_path):
    done = CliRunner().invoke(main, ["report", str(tuned)])
    assert done.exit_code == 0 and "load.svg" in done.output.replace("\n", "")
    done = CliRunner().invoke(main, ["report", str(tuned), "--json"])
    assert list(json.loads(done.output)["pictures"]) == ["error", "parameters", "losses", "load"]
    done = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert done.exit_code == 1 and "is not an artifact" in done.output
    with pytest.raises(CheckpointError, match="train again"):
        (tuned / TRAINING_REPORT_FILE).write_text("{")
        draw_pictures(tuned)
