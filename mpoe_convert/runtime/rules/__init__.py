"""Selection rules, one per file; each file is a part of `modeling_mpoe.py`.

A rule is a function with the decorator `rule`, found under its own name: `top_k` is "top-k" in `config.mpoe`.
It takes the router, the logits (T, E) in float32, the balancing bias (E,) or None, and the context, such as
how the tokens lie in sequences. It returns `Choices`, token by token, each token's from the first choice to
the last. In compiled code their number must not depend on values.
"""
