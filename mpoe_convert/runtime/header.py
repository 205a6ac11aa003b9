# Copyright the mpoe_convert contributors. Licensed under the Apache License, Version 2.0.
"""Transformers whose feed-forward networks (FFNs) are mixtures of experts with shared parameters.

This file ships with every converted checkpoint and needs torch and transformers only (written for and
tested with torch 2.13 and transformers 5.18 and 5.24). What is notable:

* One form of weights. A projection is a sum of *terms*; a term is a chain of cores (a matrix product
  operator, MPO); a core is stored once for all experts (`central_k`) or once per expert (`aux_k`):

      y = x W_e        W_e =  aux_0[e] --D1-- central_1 --D2-- aux_2[e]
                                |                |                |
                            (i_0, j_0)       (i_1, j_1)       (i_2, j_2)

  Core k has shape (bond_left, in_dim, out_dim, bond_right), with a leading expert axis if there is one per
  expert. MPOE (arXiv 2203.01104) is one chain with a shared central core; dense experts (sparse upcycling,
  arXiv 2212.05055) are one chain of one per-expert core. An outer core may be untied: it then has a matrix
  for every value of the inputs (or outputs) between it and the chain's other end, as in a block tensor train
  (arXiv 2406.06248); matrices of 1 x 1 scale features.
* Schedules. If the cores left of the centre carry only inputs and those right of it only outputs (layouts
  "blocks" and "one-sided"), W_e = (L_e x I) C (I x R_e) acts on the activations, and no expert's matrix is
  ever built: all experts go through one matrix product with C. Otherwise, or where it is cheaper, the
  matrices of the experts that tokens go to are contracted first; in inference they can be kept.
* The model is the stock transformers class. `MPOE<Name>` is made on demand as a subclass of
  `transformers.<Name>`; its FFNs are swapped after the stock constructor has run. `config.mpoe` says which
  submodules are swapped and how they are wired, so this file knows no model family. Classes from a source's
  custom code are subclassed by `subclass` in `modeling_mpoe_source.py` beside this file.
* One form of decisions. A router returns `Choices`, a list of (token, expert, weight): losses, load, capacity
  and costs are made of it, and a selection rule is one function. Rule top-k gives every token k experts.
  Rule top-p (XMoE, arXiv 2403.18926) gives it as many as it takes to reach a probability, rule top-any
  (DynMoE, arXiv 2405.14297) all that it is like enough; by rule expert-choice (arXiv 2202.09368), of
  encoders, every expert takes its best tokens of a sequence. Compiled code, whose shapes must not depend on
  values, computes `top_k` experts per token, those that are not chosen with the weight zero.
* Combine weights are the softmax over the chosen logits (of rule top-any, equal) and sum to one: identical
  experts compute exactly what the dense FFN computed, whatever the router decides. Where every expert holds
  a part of the neurons (MoEfication, arXiv 2110.01786), they sum to one over the chosen ones of each part.

`config.mpoe` holds:

    format             version of this block, FORMAT_VERSION
    num_experts
    top_k              experts per token; with rule expert-choice in the mean, with others than top-k the most
                       that there may be
    rule               name of the selection rule, see `RULES`; "top-k" if it is absent
    threshold          of rule top-p, a probability
    parts              P: expert e holds part e mod P of an FFN's neurons, and the experts' outputs add up;
                       absent where experts are whole FFNs
    shared_experts     M: so many experts more, behind the others, which every token passes; 0 if it is absent
    ffns               {path of a layer below the base model: index into forms}; other layers stay dense
    forms              [{"up": projection, "down": projection, "gate": projection if gated}, ...]; a
                       projection is {"terms": [{"in_dims", "out_dims", "bonds", "shared"}, ...],
                       "bias": "shared", "per-expert", "once" (added to the sum) or null}; "untied",
                       one of a term's lists, is absent where no core is untied;
                       where experts differ in size, "by_expert" has what differs, {"bonds": [expert 0's,
                       expert 1's, ...], ...}, and the term's own lists are those of the largest expert;
                       "adapter": size, or one per expert, if the experts are adapters behind a shared FFN;
                       `PARTS` says which class reads which key
    family             how the FFN is wired into its layer; all paths are relative to the layer:
      slot             the submodule that the mixture replaces
      absorbed         submodules whose work moved into the mixture; they become Identity
      activation       where the stock activation module is found; it is used as it is
      inner_dropout    between activation and down-projection: a module, or a rate that is set to zero
      outer_dropout    after the down-projection, where the stock FFN applies it itself
      adds_residual    true if the stock FFN is called with the residual and adds it
                       where the source is a mixture, its blocks and routers stay:
      slot             the block that holds the experts; "" if the layer does
      experts          their name in it
      activation       where they have theirs, or its name in transformers' table; by default `act_fn`
      one_by_one       true if the block takes them from a list and calls each
      experts_at       the text by which they were named, for tools
    base_model_type, kind, base_auto_map   of the source, for people and tools; nothing here reads them

Letters of shapes: B sequences of a batch, T tokens (of all sequences, in one axis), H hidden size, E experts,
N choices, each of which is a row that passes one expert; k choices per token, so that N = T k for rule top-k.

Contents:
{contents}
"""

import transformers

try:
    from transformers import initialization as init
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.core_model_loading import ConversionOps, WeightConverter
    from transformers.integrations.moe import _grouped_mm_fallback  # noqa: F401  (registers the operator)
    from transformers.utils.generic import ModelOutput
except ImportError as error:
    found = transformers.__version__
    raise ImportError(f"modeling_mpoe.py needs transformers 5.18 or newer, found {found}") from error
