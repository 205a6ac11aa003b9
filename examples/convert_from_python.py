"""Plan, convert and verify from Python, and read the report.

python examples/convert_from_python.py [MODEL] [OUTPUT]
"""

import sys

from mpoe_convert import Recipe, convert, plan, verify


def main() -> None:
    source = sys.argv[1] if len(sys.argv) > 1 else "examples/tiny-gpt2"
    output = sys.argv[2] if len(sys.argv) > 2 else "out-python"
    recipe = Recipe(source, experts=8, top_k=2, bond_dim=64, layout="two-sided")

    planned = plan(recipe)  # reads headers only
    ffn = planned.ffn_totals
    print(f"FFN parameters: dense {ffn.dense_params:,}, plain MoE {ffn.plain_moe_params:,}, ", end="")
    print(f"this one {ffn.stored_params:,}")

    report = convert(recipe, output, overwrite=True)
    for matrix in report.matrices:
        print(f"{matrix.name}: bonds {matrix.bonds}, error {matrix.relative_error:.1e}")

    result = verify(output)
    print(f"relative difference of the outputs: {result.relative_difference:.1e}, ok: {result.ok}")


if __name__ == "__main__":
    main()
