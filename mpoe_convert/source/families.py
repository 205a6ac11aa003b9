"""The table of families: where the FFNs of every supported architecture are, one row per layer structure.

A row says where the FFN sits in the *module* tree of the current transformers release, and how a
*checkpoint* spells the names of its tensors (older checkpoints spell some differently). Rows are
matched by model type and confirmed by tensor names (`locate.py`); the part that the artifact needs at run
time goes into its config (see `modeling_mpoe.py`), so the shipped file knows no family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spelling:
    """How tensor names are written. Layers hold `{}` for the number; the rest is relative to a layer.

    `gate` is None for plain FFNs. `fused` means that `up` holds gate and up, one above the other.
    """

    layers: tuple[str, ...]
    up: str
    down: str
    gate: str | None = None
    fused: bool = False


@dataclass(frozen=True)
class Family:
    """One row. `layers` are module paths below the base model, parallel to every spelling's layers.

    `transposed` weights are stored (in, out) as by Conv1D, others (out, in) as by nn.Linear: names
    and shapes cannot tell (gpt2, gpt_neo and starcoder2 share theirs), only the model type can.
    `by_hand` is the text of --ffn that a row was made of, none of the table's.
    The other fields are explained in `modeling_mpoe.py`, which reads them.
    """

    model_types: tuple[str, ...]
    layers: tuple[str, ...]
    slot: str
    spellings: tuple[Spelling, ...]
    activation: str
    transposed: bool = False
    absorbed: tuple[str, ...] = ()
    inner_dropout: str | None = None
    outer_dropout: str | None = None
    adds_residual: bool = False
    by_hand: str | None = None

    def runtime(self) -> dict:
        """The part of the row that the artifact's config carries."""
        return {
            "slot": self.slot,
            "absorbed": list(self.absorbed),
            "activation": self.activation,
            "inner_dropout": self.inner_dropout,
            "outer_dropout": self.outer_dropout,
            "adds_residual": self.adds_residual,
        }


def row_of_module(
    slot: str,
    up: str,
    down: str,
    layers: str | tuple[str, ...],
    *,
    gate: str | None = None,
    fused: bool = False,
    **row: Any,
) -> Family:
    """The row of an FFN that is a module of its own: all names are below the slot.

    Args:
        slot, layers, row: as the fields of `Family`; one stack of layers may be given as a text.
        up, down, gate, fused: as the fields of `Spelling`.
    """
    layers = (layers,) if isinstance(layers, str) else layers
    below: dict[str, Any] = {
        key: f"{slot}.{row[key]}" for key in ("activation", "inner_dropout", "outer_dropout") if key in row
    }
    spelling = Spelling(layers, f"{slot}.{up}", f"{slot}.{down}", gate and f"{slot}.{gate}", fused)
    return Family(**(row | below), layers=layers, slot=slot, spellings=(spelling,))


def _inline(up: str, down: str, activation: str, layers: tuple[str, ...], **row: Any) -> Family:
    """Two linear layers and an activation that the layer itself calls one after the other."""
    spelling = Spelling(layers, up, down)
    return Family(
        **row,
        layers=layers,
        slot=up,
        spellings=(spelling,),
        activation=activation,
        absorbed=(activation, down),
    )


_T5_LAYERS = ("encoder.block.{}.layer.1", "decoder.block.{}.layer.2")
_BOTH_STACKS = ("encoder.layers.{}", "decoder.layers.{}")

FAMILIES: tuple[Family, ...] = (
    row_of_module(
        "mlp",
        "c_fc",
        "c_proj",
        "h.{}",
        model_types=("gpt2", "openai-gpt"),
        activation="act",
        outer_dropout="dropout",
        transposed=True,
    ),
    row_of_module(
        "mlp",
        "c_fc",
        "c_proj",
        "h.{}",
        model_types=("gpt_neo", "gpt_bigcode"),
        activation="act",
        outer_dropout="dropout",
    ),
    row_of_module(
        "mlp",
        "c_fc",
        "c_proj",
        "layers.{}",
        model_types=("starcoder2",),
        activation="act",
        outer_dropout="residual_dropout",
    ),
    row_of_module(
        "mlp",
        "fc_in",
        "fc_out",
        "h.{}",
        model_types=("gptj", "codegen"),
        activation="act",
        outer_dropout="dropout",
    ),
    row_of_module(
        "mlp",
        "dense_h_to_4h",
        "dense_4h_to_h",
        "layers.{}",
        model_types=("gpt_neox",),
        activation="act",
    ),
    row_of_module(
        "mlp",
        "dense_h_to_4h",
        "dense_4h_to_h",
        "h.{}",
        model_types=("falcon",),
        activation="act",
    ),
    row_of_module(
        "mlp",
        "dense_h_to_4h",
        "dense_4h_to_h",
        "h.{}",
        model_types=("bloom",),
        activation="gelu_impl",
        outer_dropout="hidden_dropout",
        adds_residual=True,
    ),
    row_of_module("mlp", "fc1", "fc2", "layers.{}", model_types=("phi",), activation="activation_fn"),
    row_of_module(
        "mlp",
        "gate_up_proj",
        "down_proj",
        "layers.{}",
        fused=True,
        model_types=("phi3", "glm"),
        activation="activation_fn",
    ),
    row_of_module(
        "mlp",
        "up_proj",
        "down_proj",
        "layers.{}",
        gate="gate_proj",
        model_types=(
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "smollm3",
            "olmo",
            "olmo2",
            "olmo3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "granite",
            "stablelm",
            "cohere",
            "cohere2",
            "helium",
            "exaone4",
            "ministral",
        ),
        activation="act_fn",
    ),
    # The text towers of vision-language models.
    row_of_module(
        "mlp",
        "up_proj",
        "down_proj",
        "language_model.layers.{}",
        gate="gate_proj",
        model_types=(
            "llava",
            "llava_next",
            "llava_next_video",
            "llava_onevision",
            "vipllava",
            "video_llava",
            "paligemma",
            "gemma3",
            "internvl",
            "mistral3",
            "qwen2_vl",
            "qwen2_5_vl",
            "qwen3_vl",
            "aya_vision",
            "cohere2_vision",
            "got_ocr2",
            "mllama",
            "lighton_ocr",
        ),
        activation="act_fn",
    ),
    row_of_module(
        "mlp",
        "up_proj",
        "down_proj",
        "text_model.layers.{}",
        gate="gate_proj",
        model_types=("idefics2", "idefics3", "smolvlm"),
        activation="act_fn",
    ),
    row_of_module(
        "mlp",
        "gate_up_proj",
        "down_proj",
        "language_model.layers.{}",
        fused=True,
        model_types=("glm4v",),
        activation="activation_fn",
    ),
    _inline(
        "fc1",
        "fc2",
        "activation_fn",
        ("decoder.layers.{}",),
        model_types=("opt",),
    ),
    _inline(
        "fc1",
        "fc2",
        "activation_fn",
        ("layers.{}",),
        inner_dropout="activation_dropout",
        model_types=("xglm",),
    ),
    _inline(
        "fc1",
        "fc2",
        "activation_fn",
        _BOTH_STACKS,
        inner_dropout="activation_dropout",
        model_types=(
            "bart",
            "mbart",
            "pegasus",
            "marian",
            "blenderbot",
            "blenderbot-small",
            "m2m_100",
            "plbart",
        ),
    ),
    Family(
        model_types=(
            "bert",
            "roberta",
            "xlm-roberta",
            "camembert",
            "electra",
            "deberta-v2",
            "mpnet",
        ),
        layers=("encoder.layer.{}",),
        slot="intermediate",
        spellings=(Spelling(("encoder.layer.{}",), "intermediate.dense", "output.dense"),),
        activation="intermediate.intermediate_act_fn",
        absorbed=("output.dense",),
    ),
    row_of_module(
        "mlp",
        "Wi",
        "Wo",
        "layers.{}",
        fused=True,
        model_types=("modernbert",),
        activation="act",
        inner_dropout="drop",
    ),
    row_of_module(
        "ffn",
        "lin1",
        "lin2",
        "transformer.layer.{}",
        model_types=("distilbert",),
        activation="activation",
        outer_dropout="dropout",
    ),
    _inline(
        "ffn",
        "ffn_output",
        "activation",
        ("encoder.albert_layer_groups.{}.albert_layers.0",),
        model_types=("albert",),
    ),
    Family(
        model_types=("t5", "mt5", "umt5"),
        layers=_T5_LAYERS,
        slot="DenseReluDense",
        spellings=(
            Spelling(_T5_LAYERS, "DenseReluDense.wi", "DenseReluDense.wo"),
            Spelling(_T5_LAYERS, "DenseReluDense.wi_1", "DenseReluDense.wo", gate="DenseReluDense.wi_0"),
        ),
        activation="DenseReluDense.act",
        inner_dropout="DenseReluDense.dropout",
    ),
    Family(
        model_types=("vit",),
        layers=("layers.{}",),
        slot="mlp",
        spellings=(
            Spelling(("encoder.layer.{}",), "intermediate.dense", "output.dense"),
            Spelling(("layers.{}",), "mlp.fc1", "mlp.fc2"),
        ),
        activation="mlp.activation_fn",
    ),
)

PAIR = "encoder-decoder"  # the model type of two models of one family, see `pairs`

FAMILY_OF: Mapping[str, Family] = {name: row for row in FAMILIES for name in row.model_types}


def families_json() -> list[dict]:
    """The table as plain values."""
    return [
        {
            "model_types": list(row.model_types),
            "layers": list(row.spellings[0].layers),
            "projections": [p for s in row.spellings for p in (s.gate, s.up, s.down) if p],
            "gated": any(s.gate or s.fused for s in row.spellings),
        }
        for row in FAMILIES
    ]


# Mixtures whose experts are called in another way than all others': model type -> why.
REFUSED: Mapping[str, str] = {
    "llama4_text": "the router scales what an expert gets, not what it gives",
    "llama4": "the router scales what an expert gets, not what it gives",
    "jetmoe": "its attention has experts too, and they are sorted by its own code",
    "dbrx": "its experts are one matrix, of which its own code cuts pieces",
    "switch_transformers": "an expert takes a limited number of tokens, and the others are dropped",
    "nllb-moe": "an expert takes a limited number of tokens, and the others are dropped",
    "doge": "its experts are vectors that product keys retrieve",
    "longcat_flash": "some of its experts are identities without weights",
    "zaya": "its router keeps a state across layers, and one expert skips",
}


def refusal(model_type: str, reason: str) -> str:
    """The message for a mixture that cannot be converted."""
    return f"a mixture of type {model_type} cannot be converted: {reason}"
